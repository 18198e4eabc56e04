"""The residual stream: what is read is what plain PyTorch computes, what is written is what comes next.

For each family the test computes the stream itself, from the embeddings on, with the weights of the
network. Only what each attention module gives is taken from the run, by a plain hook.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from tests.architectures import (
    BERT,
    BLOOM,
    CLIP,
    GEMMA2,
    GPT2,
    LAYERS,
    LLAMA,
    MAMBA,
    MISTRAL,
    NEOX,
    OPT,
    OPT_POST,
    PHI,
    QWEN3,
    T5,
    T5_GATED,
    TRANSFORMERS,
    VIT,
    WIDTH,
    Architecture,
)
from tests.raw import assert_same, watching
from torch import nn
from torch.nn.functional import gelu, layer_norm, linear, silu

import patchclamp as pc

Inputs = Mapping[str, torch.Tensor]


class Family(NamedTuple):
    """How a family computes. `block` is the network's own; norms and MLPs are computed here."""

    start: Callable[[Any, Inputs, str], torch.Tensor]  # (network, inputs, stack) -> what enters the first block
    attention_norm: Callable[[Any], Any]
    mlp_norm: Callable[[Any], Any]
    mlp: Callable[[Any, torch.Tensor], torch.Tensor]  # (block, what it reads) -> what it writes
    query: str  # path within the block of a projection that reads what attention reads
    into: str  # the same for the MLP
    norms_first: bool
    last: str  # path of the norm that reads the last block's output; "" where the network returns it
    attended: Callable[[Any, torch.Tensor], torch.Tensor] = lambda block, x: x  # (block, projection) -> what is added


def layer(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """A norm by hand: with a bias it takes the mean off, without one it is T5's and Llama's, or Gemma's."""
    if getattr(norm, "bias", None) is not None:
        return layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    if type(norm).__name__.startswith("Gemma"):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps) * (1 + norm.weight)
    epsilon = norm.variance_epsilon
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * norm.weight


def dense(module: Any, x: torch.Tensor) -> torch.Tensor:
    return (
        x @ module.weight + module.bias
        if isinstance(module.weight, nn.Parameter) and hasattr(module, "nf")
        else linear(x, module.weight, module.bias)
    )


def tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return gelu(x, approximate="tanh")


def bert_start(network: Any, inputs: Inputs, stack: str) -> torch.Tensor:
    words, places, kinds = (
        network.embeddings.word_embeddings,
        network.embeddings.position_embeddings,
        network.embeddings.token_type_embeddings,
    )
    x = words.weight[inputs["input_ids"]] + places.weight[inputs["position_ids"]] + kinds.weight[0]
    return layer(network.embeddings.LayerNorm, x)


def opt_start(network: Any, inputs: Inputs, stack: str) -> torch.Tensor:
    decoder, mask = network.decoder, inputs["attention_mask"]
    places = (mask.cumsum(1) * mask - 1).long() + 2
    return decoder.embed_tokens.weight[inputs["input_ids"]] + decoder.embed_positions.weight[places]


def vit_start(network: Any, inputs: Inputs, stack: str) -> torch.Tensor:
    parts = network.embeddings
    patches = nn.functional.conv2d(
        inputs["pixel_values"],
        parts.patch_embeddings.projection.weight,
        parts.patch_embeddings.projection.bias,
        stride=4,
    )
    patches = patches.flatten(2).transpose(1, 2)
    return torch.cat([parts.cls_token.expand(len(patches), -1, -1), patches], 1) + parts.position_embeddings


def t5_start(network: Any, inputs: Inputs, stack: str) -> torch.Tensor:
    return network.shared.weight[inputs["decoder_input_ids" if stack == "decoder." else "input_ids"]]


def t5_mlp(block: Any, x: torch.Tensor) -> torch.Tensor:
    parts = block.layer[-1].DenseReluDense
    if hasattr(parts, "wi"):
        return dense(parts.wo, torch.relu(dense(parts.wi, x)))
    return dense(parts.wo, tanh_gelu(dense(parts.wi_0, x)) * dense(parts.wi_1, x))


def clip_start(network: Any, inputs: Inputs, stack: str) -> torch.Tensor:
    parts = network.get_submodule(f"{stack}model.embeddings".replace(".model", "_model"))
    if stack == "text.":
        ids = inputs["input_ids"]
        return parts.token_embedding.weight[ids] + parts.position_embedding.weight[: ids.shape[1]]
    patches = nn.functional.conv2d(inputs["pixel_values"], parts.patch_embedding.weight, stride=4)
    patches = patches.flatten(2).transpose(1, 2)
    x = torch.cat([parts.class_embedding.expand(len(patches), 1, -1), patches], 1) + parts.position_embedding.weight
    return layer(network.vision_model.pre_layrnorm, x)


def bloom_start(network: Any, inputs: Inputs, stack: str) -> torch.Tensor:
    parts = network.transformer
    return layer(parts.word_embeddings_layernorm, parts.word_embeddings.weight[inputs["input_ids"]])


def gated(nonlinearity: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    def mlp(block: Any, x: torch.Tensor) -> torch.Tensor:
        parts = block.mlp
        return dense(parts.down_proj, nonlinearity(dense(parts.gate_proj, x)) * dense(parts.up_proj, x))

    return mlp


_OPT = Family(
    opt_start,
    lambda block: block.self_attn_layer_norm,
    lambda block: block.final_layer_norm,
    lambda block, x: dense(block.fc2, torch.relu(dense(block.fc1, x))),
    "self_attn.q_proj",
    "fc1",
    True,
    "decoder.final_layer_norm",
)
_T5 = Family(
    t5_start,
    lambda block: block.layer[0].layer_norm,
    lambda block: block.layer[-1].layer_norm,
    t5_mlp,
    "layer.0.SelfAttention.q",
    "layer.{last}.DenseReluDense.wi",
    True,
    "{stack}final_layer_norm",
)
FAMILIES = {
    BERT: Family(
        bert_start,
        lambda block: block.attention.output.LayerNorm,
        lambda block: block.output.LayerNorm,
        lambda block, x: dense(block.output.dense, gelu(dense(block.intermediate.dense, x))),
        "attention.self.query",
        "intermediate.dense",
        False,
        "",
    ),
    GPT2: Family(
        lambda network, inputs, stack: (
            network.transformer.wte.weight[inputs["input_ids"]] + network.transformer.wpe.weight[inputs["position_ids"]]
        ),
        lambda block: block.ln_1,
        lambda block: block.ln_2,
        lambda block, x: dense(block.mlp.c_proj, tanh_gelu(dense(block.mlp.c_fc, x))),
        "attn.c_attn",
        "mlp.c_fc",
        True,
        "transformer.ln_f",
    ),
    LLAMA: Family(
        lambda network, inputs, stack: network.model.embed_tokens.weight[inputs["input_ids"]],
        lambda block: block.input_layernorm,
        lambda block: block.post_attention_layernorm,
        gated(silu),
        "self_attn.q_proj",
        "mlp.up_proj",
        True,
        "model.norm",
    ),
    OPT: _OPT,
    OPT_POST: _OPT._replace(norms_first=False, last=""),
    T5: _T5,
    T5_GATED: _T5._replace(into="layer.{last}.DenseReluDense.wi_1"),
    VIT: Family(
        vit_start,
        lambda block: block.layernorm_before,
        lambda block: block.layernorm_after,
        lambda block, x: dense(block.mlp.fc2, gelu(dense(block.mlp.fc1, x))),
        "attention.q_proj",
        "mlp.fc1",
        True,
        "layernorm",
    ),
}
FAMILIES |= {
    QWEN3: FAMILIES[LLAMA],
    MISTRAL: FAMILIES[LLAMA],
    GEMMA2: FAMILIES[LLAMA]._replace(
        start=lambda network, inputs, stack: network.model.embed_tokens.weight[inputs["input_ids"]] * WIDTH**0.5,
        mlp_norm=lambda block: block.pre_feedforward_layernorm,
        mlp=lambda block, x: layer(block.post_feedforward_layernorm, gated(tanh_gelu)(block, x)),
        attended=lambda block, x: layer(block.post_attention_layernorm, x),
    ),
    BLOOM: Family(
        bloom_start,
        lambda block: block.input_layernorm,
        lambda block: block.post_attention_layernorm,
        lambda block, x: dense(block.mlp.dense_4h_to_h, tanh_gelu(dense(block.mlp.dense_h_to_4h, x))),
        "self_attention.query_key_value",
        "mlp.dense_h_to_4h",
        True,
        "transformer.ln_f",
    ),
    CLIP: Family(
        clip_start,
        lambda block: block.layer_norm1,
        lambda block: block.layer_norm2,
        lambda block, x: dense(block.mlp.fc2, (h := dense(block.mlp.fc1, x)) * torch.sigmoid(1.702 * h)),
        "self_attn.q_proj",
        "mlp.fc1",
        True,
        "{tower}",
    ),
    NEOX: Family(
        lambda network, inputs, stack: network.gpt_neox.embed_in.weight[inputs["input_ids"]],
        lambda block: block.input_layernorm,
        lambda block: block.post_attention_layernorm,
        lambda block, x: dense(block.mlp.dense_4h_to_h, gelu(dense(block.mlp.dense_h_to_4h, x))),
        "attention.query_key_value",
        "mlp.dense_h_to_4h",
        True,
        "gpt_neox.final_layer_norm",
    ),
    PHI: Family(
        lambda network, inputs, stack: network.model.embed_tokens.weight[inputs["input_ids"]],
        lambda block: block.input_layernorm,
        lambda block: block.input_layernorm,
        lambda block, x: dense(block.mlp.fc2, tanh_gelu(dense(block.mlp.fc1, x))),
        "self_attn.q_proj",
        "mlp.fc1",
        True,
        "model.final_layernorm",
    ),
    MAMBA: Family(
        lambda network, inputs, stack: network.backbone.embeddings.weight[inputs["input_ids"]],
        lambda block: block.norm,
        lambda block: block.norm,
        lambda block, x: torch.zeros_like(x),
        "mixer.in_proj",
        "",
        True,
        "backbone.norm_f",
    ),
}
KINDS = ("resid_pre", "resid_mid", "resid_post")
Change = Callable[[torch.Tensor], torch.Tensor]
each_family = pytest.mark.parametrize("architecture", TRANSFORMERS, ids=str)
both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


@cache
def loaded(architecture: Architecture, dtype: torch.dtype) -> pc.Model:
    return pc.load(architecture.build(dtype))


class Stream:
    """The residual stream of one stack as plain PyTorch has it, and what attention, MLP and last norm read of it."""

    def __init__(self, architecture: Architecture, stack: str, changes: Mapping[str, Change]) -> None:
        self.family, self.block = FAMILIES[architecture], architecture.blocks[stack]
        self.stack, self.changes = stack, changes
        self.attention = [
            place.module
            for name, place in architecture.places.items()
            if name.startswith(stack) and ("attn" in name or "mixer" in name)
        ]
        last = "2" if stack == "decoder." else "1"
        self.into = self.family.into.format(last=last)
        # What reads the last block's output: in CLIP's vision tower, the norm of the first position only.
        tower = "text_model.final_layer_norm" if stack == "text." else f"{self.block.format(LAYERS - 1)}.mlp.fc2"
        self.last = self.family.last.format(stack=stack, tower=tower)
        self.middle = architecture.middle

    @property
    def watched(self) -> list[str]:
        """The modules whose inputs and outputs the computation needs, or is compared with."""
        paths = [f"{self.block}.{self.family.query}", *self.attention, self.block]
        paths += [f"{self.block}.{self.into}"] if self.into else []
        return [path.format(number) for path in paths for number in range(LAYERS)] + [self.last]

    def compute(self, network: Any, inputs: Inputs, seen: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Name of a residual site, or path of a module that reads the stream -> tensor."""
        family, found = self.family, {}

        def settled(name: str, x: torch.Tensor) -> torch.Tensor:
            found[name] = self.changes[name](x) if name in self.changes else x
            return found[name]

        x = family.start(network, inputs, self.stack)
        for number in range(LAYERS):
            base = self.block.format(number)
            block = network.get_submodule(base)
            norms = family.attention_norm(block), family.mlp_norm(block)
            x = settled(f"{self.stack}resid_pre.{number}", x)
            found[f"{base}.{family.query}"] = layer(norms[0], x) if family.norms_first else x
            if not self.into:  # a mixer is shown zeros for padding
                found[f"{base}.{family.query}"] = layer(norms[0], x) * inputs["attention_mask"][..., None]
            before = x
            for path in self.attention:
                x = x + family.attended(block, seen[path.format(number)][1])
            if self.middle:
                x = before = settled(f"{self.stack}resid_mid.{number}", x if family.norms_first else layer(norms[0], x))
            # Side by side, the MLP reads what attention read.
            reads = layer(norms[1], before) if family.norms_first else before
            if self.into:
                found[f"{base}.{self.into}"] = reads
            x = x + family.mlp(block, reads)
            x = settled(f"{self.stack}resid_post.{number}", x if family.norms_first else layer(norms[1], x))
        if not self.last.endswith("fc2"):
            found[self.last or "output"] = x
        return found


def run(
    architecture: Architecture, dtype: torch.dtype, side: str, stack: str, *interventions: Any, **changes: Change
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """(what patchclamp reads, what plain PyTorch computes, what plain hooks saw) in one forward pass."""
    model, inputs = loaded(architecture, dtype), architecture.inputs(side, dtype)
    stream = Stream(architecture, stack, changes)
    kinds = KINDS if architecture.middle else ("resid_pre", "resid_post")
    sites = [f"{stack}{kind}.{number}" for kind in kinds for number in range(LAYERS)]
    with watching(model.module, stream.watched) as seen, torch.no_grad():
        with model.intervene(*interventions):
            read = model.activations(inputs, sites)
        computed = stream.compute(model.module, inputs, seen)
    if not stream.last:  # the path "" is the network itself: what it returns is the stream
        seen["output"] = seen[""][1], seen[""][1]
    return read, computed, seen


def compare(architecture: Architecture, read: Any, computed: dict[str, torch.Tensor], seen: dict[str, Any]) -> None:
    for name, expected in computed.items():
        got = (read[name] if name in read else seen[name][0]).reshape(expected.shape)
        if architecture in (LLAMA, QWEN3, MISTRAL, GEMMA2, T5, T5_GATED, MAMBA, BLOOM):
            # Their norms compute in float32 whatever they are given, or their constants are as exact as that.
            got, expected = got.float(), expected.float()
        assert_same(got, expected)


@each_family
@both_types
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_is_read_is_what_plain_pytorch_computes(architecture: Architecture, dtype: torch.dtype, side: str) -> None:
    for stack in architecture.blocks:
        read, computed, seen = run(architecture, dtype, side, stack)
        parts = 3 + architecture.middle + (architecture is not MAMBA)
        assert len(computed) == LAYERS * parts + (stack != "vision.")
        compare(architecture, read, computed, seen)


@each_family
@both_types
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_what_comes_next(architecture: Architecture, dtype: torch.dtype, kind: str) -> None:
    # Attention and MLP read the changed stream, and the stream itself goes on changed.
    held = {3: 2.0, WIDTH - 1: -1.5}

    def hold(x: torch.Tensor) -> torch.Tensor:
        changed = x.clone()
        for index, value in held.items():
            changed[..., index] = value
        return changed

    if kind == "resid_mid" and not architecture.middle:
        assert kind not in {site.kind for site in loaded(architecture, dtype).sites.values()}
        return
    for stack in architecture.blocks:
        for number in range(LAYERS):
            name = f"{stack}{kind}.{number}"
            clamp = pc.clamp(pc.Neurons({name: list(held)}), list(held.values()))
            read, computed, seen = run(architecture, dtype, "left", stack, clamp, **{name: hold})
            assert (read[name][..., list(held)] == torch.tensor(list(held.values()), dtype=dtype)).all()
            compare(architecture, read, computed, seen)
            if kind != "resid_post":  # the plain hook on the block was there before patchclamp's
                given = {f"{stack}resid_post.{number}": seen[architecture.blocks[stack].format(number)][1]}
                expected = {name: computed[name] for name in given}
                compare(architecture, given, expected, seen)


@pytest.mark.parametrize("architecture", [each for each in TRANSFORMERS if each.middle], ids=str)
def test_a_write_to_the_middle_reaches_both_the_residual_and_the_mlp(architecture: Architecture) -> None:
    # Pre-norm blocks hold two references to the residual; here the two effects are told apart.
    for stack in architecture.blocks:
        name = f"{stack}resid_mid.1"
        nothing, _, before = run(architecture, torch.float64, "right", stack)
        double = pc.scale(pc.Neurons({name: [2]}), 2.0)
        twice, _, after = run(architecture, torch.float64, "right", stack, double)
        base, last = architecture.blocks[stack].format(1), "2" if stack == "decoder." else "1"
        into = f"{base}.{FAMILIES[architecture].into.format(last=last)}"
        assert not torch.allclose(before[into][0], after[into][0])
        assert torch.equal(nothing[f"{stack}resid_pre.1"], twice[f"{stack}resid_pre.1"])
        assert torch.equal(nothing[name][..., 2] * 2, twice[name][..., 2])
        assert not torch.allclose(before[base][1][..., 2], after[base][1][..., 2])
