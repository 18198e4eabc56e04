"""TransformerLens's names: what they stand for here, and that it is the same tensor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.architectures import BERT, GEMMA2, GPT2, LLAMA, T5, Architecture, mixtral, qwen2_moe
from tests.raw import assert_same, watching
from torch import nn
from torch.nn.functional import linear, silu

import patchclamp as pc
from patchclamp.errors import UnknownName
from patchclamp.model.aliases import unalias


def named(family: Architecture, name: str) -> str:
    return unalias(name, pc.load(family.build()).sites)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("blocks.1.mlp.hook_post", "mlp.1"),
        ("blocks.0.hook_resid_pre", "resid_pre.0"),
        ("blocks.0.hook_resid_mid", "resid_mid.0"),
        ("blocks.1.hook_resid_post", "resid_post.1"),
        ("blocks.1.attn.hook_z", "attn.1"),
        ("blocks.1.attn.hook_pattern", "pattern.1"),
        ("blocks.1.mlp.hook_pre", "module:transformer.h.1.mlp.c_fc"),
        ("blocks.1.hook_mlp_out", "module:transformer.h.1.mlp.c_proj"),
        ("blocks.0.hook_attn_out", "module:transformer.h.0.attn.c_proj"),
        ("blocks.*.mlp.hook_post", "mlp.*"),
        ("blocks.[0-1].attn.hook_z", "attn.[0-1]"),
        ("blocks.3.mlp.experts.2.hook_post", "expert.3.2"),
        # Not TransformerLens's.
        ("mlp.1", "mlp.1"),
        ("encoder.mlp.*", "encoder.mlp.*"),
        ("*", "*"),
        ("module:transformer.hook_me", "module:transformer.hook_me"),
    ],
)
def test_names_of_gpt2(name: str, ours: str) -> None:
    assert named(GPT2, name) == ours


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("encoder.1.mlp.hook_post", "encoder.mlp.1"),
        ("decoder.0.hook_resid_post", "decoder.resid_post.0"),
        ("decoder.0.hook_resid_mid_cross", "decoder.resid_mid.0"),
        ("encoder.0.hook_resid_mid", "encoder.resid_mid.0"),
        ("decoder.1.cross_attn.hook_z", "decoder.cross_attn.1"),
        ("decoder.1.cross_attn.hook_pattern", "decoder.cross_pattern.1"),
        ("decoder.1.hook_cross_attn_out", "module:decoder.block.1.layer.1.EncDecAttention.o"),
        ("encoder.*.attn.hook_z", "encoder.attn.*"),
    ],
)
def test_names_of_encoder_decoders(name: str, ours: str) -> None:
    assert named(T5, name) == ours
    sites = pc.load(T5.build()).sites
    assert ours.startswith("module:") or "*" in ours or ours in sites


def test_there_is_no_site_between_self_attention_and_cross_attention() -> None:
    with pytest.raises(UnknownName, match=r"decoder\.0\.hook_resid_mid_cross"):
        named(T5, "decoder.0.hook_resid_mid")


@pytest.mark.parametrize("family", [BERT, GPT2, LLAMA, GEMMA2], ids=str)
@torch.no_grad()
def test_what_blocks_add_up_is_the_residual(family: Architecture) -> None:
    """`hook_attn_out` and `hook_mlp_out` are what is added to the stream, whatever norms there are and wherever."""
    module = family.build()
    model = pc.load(module)
    attention, mlp = (
        unalias(f"blocks.1.hook_{name}_out", model.sites).removeprefix("module:") for name in ("attn", "mlp")
    )
    pre, post = (unalias(f"blocks.1.hook_resid_{place}", model.sites) for place in ("pre", "post"))
    assert (pre, post) == ("resid_pre.1", "resid_post.1")
    block = model.site(pre).module
    inputs = family.inputs()
    with watching(module, [attention, mlp, block]) as seen:
        module(**inputs)
    stream = seen[block][0] + seen[attention][1]
    if family is BERT:
        layer: Any = module.get_submodule(block)
        stream = layer.attention.output.LayerNorm(stream)
        assert_same(layer.output.LayerNorm(stream + seen[mlp][1]), seen[block][1])
    else:
        assert_same(stream + seen[mlp][1], seen[block][1])


@torch.no_grad()
def test_the_two_inputs_of_a_gated_mlp() -> None:
    """TransformerLens: `post = act(pre) * pre_linear`."""
    module = LLAMA.build()
    model = pc.load(module)
    pre, beside = (
        unalias(f"blocks.0.mlp.hook_{name}", model.sites).removeprefix("module:") for name in ("pre", "pre_linear")
    )
    down = model.site(unalias("blocks.0.mlp.hook_post", model.sites)).module
    with watching(module, [pre, beside, down]) as seen:
        module(**LLAMA.inputs())
    assert_same(seen[down][0], silu(seen[pre][1]) * seen[beside][1])
    weights: Any = module.get_submodule(pre)
    assert_same(seen[pre][1], linear(seen[pre][0], weights.weight))


def test_unknown_names_say_which_are_known() -> None:
    with pytest.raises(UnknownName, match=r"blocks\.3\.attn\.hook_q'.*nearest.*blocks\.3\.attn\.hook_z") as caught:
        named(GPT2, "blocks.3.attn.hook_q")
    assert "mlp.hook_post, hook_resid_pre" in str(caught.value)
    for name in ("hook_embed", "ln_final.hook_normalized", "blocks.0.ln1.hook_scale", "blocks.hook_resid_pre"):
        with pytest.raises(UnknownName, match="known by a TransformerLens name"):
            named(GPT2, name)


def test_modules_are_named_one_by_one() -> None:
    with pytest.raises(UnknownName, match="give the number"):
        named(GPT2, "blocks.*.hook_mlp_out")
    with pytest.raises(UnknownName, match=r"no site is called 'mlp\.7'.*mlp\.0"):
        named(GPT2, "blocks.7.hook_mlp_out")
    with pytest.raises(UnknownName, match=r"fed by transformer\.h\.0\.mlp\.c_fc"):
        named(GPT2, "blocks.0.mlp.hook_pre_linear")


def test_what_experts_add_is_not_one_projections() -> None:
    moe = replace(LLAMA, name="qwen2-moe", new=qwen2_moe)
    with pytest.raises(UnknownName, match="experts write together"):
        named(moe, "blocks.0.hook_mlp_out")
    assert named(moe, "blocks.0.mlp.hook_post") == "mlp.0"
    only_experts = replace(LLAMA, name="mixtral", new=mixtral)
    with pytest.raises(UnknownName, match=r"no site is called 'mlp\.0'"):
        named(only_experts, "blocks.0.hook_mlp_out")
    assert named(only_experts, "blocks.1.mlp.experts.3.hook_post") in pc.load(only_experts.build()).sites


def test_a_fused_gate_names_its_projection() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(6)
            self.both, self.act, self.down = nn.Linear(6, 20), nn.SiLU(), nn.Linear(10, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate, up = self.both(self.norm(x)).chunk(2, -1)
            return x + self.down(self.act(gate) * up)

    sites = pc.load(nn.Sequential(Fused(), Fused())).sites
    with pytest.raises(UnknownName, match=r"one fused projection; module:1\.both"):
        unalias("blocks.1.mlp.hook_pre", sites)


def test_the_one_stack_that_has_it_is_meant() -> None:
    sites = {name: site for name, site in pc.load(T5.build()).sites.items() if name.startswith("encoder.")}
    assert unalias("blocks.0.hook_mlp_out", sites) == "module:encoder.block.0.layer.1.DenseReluDense.wo"
    with pytest.raises(UnknownName, match=r"encoder\.mlp\.0"):
        unalias("blocks.0.hook_mlp_out", pc.load(T5.build()).sites)
