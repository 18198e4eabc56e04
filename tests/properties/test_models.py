"""Random small configurations of each family, random trees of modules: what is listed is right, nothing breaks."""

from __future__ import annotations

import itertools
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.raw import assert_same, hooks_of, plain_weights, watching
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

import patchclamp as pc

VOCABULARY = 13
OF_GENERATION: dict[str, Any] = {"decoder_start_token_id": 0}
sizes = st.integers(1, 4)


@st.composite
def common(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes that every transformer has, in the words of most of them."""
    heads = draw(st.sampled_from([1, 2, 4]))
    return {
        "hidden_size": heads * draw(st.sampled_from([2, 4, 8])) * 2,
        "intermediate_size": 4 * draw(st.integers(1, 6)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def grouped(given: dict[str, Any]) -> dict[str, Any]:
    heads = given["num_attention_heads"]
    return given | {"num_key_value_heads": max(1, heads // 2), "head_dim": given["hidden_size"] // heads}


def gpt2(given: dict[str, Any]) -> nn.Module:
    names = {"n_embd": "hidden_size", "n_inner": "intermediate_size", "n_layer": "num_hidden_layers"}
    names |= {"n_head": "num_attention_heads", "n_positions": "max_position_embeddings"}
    config: dict[str, Any] = {new: given[old] for new, old in names.items()}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **config))


def t5(given: dict[str, Any]) -> nn.Module:
    heads, width = given["num_attention_heads"], given["hidden_size"]
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=width,
            d_kv=3,
            d_ff=given["intermediate_size"],
            num_layers=given["num_hidden_layers"],
            num_heads=heads,
            feed_forward_proj="gated-gelu" if heads == 2 else "relu",
            pad_token_id=0,
            eos_token_id=2,
            **OF_GENERATION,
        )
    )


def mixtral(given: dict[str, Any]) -> nn.Module:
    config: dict[str, Any] = grouped(given) | {"num_local_experts": 3, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**config))


def opt(given: dict[str, Any]) -> nn.Module:
    config: dict[str, Any] = given | {"word_embed_proj_dim": given["hidden_size"]}
    config["ffn_dim"] = config.pop("intermediate_size")
    return OPTForCausalLM(OPTConfig(**config, do_layer_norm_before=given["num_hidden_layers"] != 2))


def mamba(given: dict[str, Any]) -> nn.Module:
    names = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
    return MambaForCausalLM(MambaConfig(**{name: given[name] for name in names}, state_size=3, pad_token_id=0))


def vit(given: dict[str, Any]) -> nn.Module:
    names = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
    return ViTModel(ViTConfig(**{name: given[name] for name in names}, image_size=8, patch_size=4))


FAMILIES = {
    "bert": lambda given: BertModel(BertConfig(**given)),
    "gpt2": gpt2,
    "gpt-neox": lambda given: GPTNeoXForCausalLM(
        GPTNeoXConfig(**given, use_parallel_residual=given["num_hidden_layers"] != 2)
    ),
    "llama": lambda given: LlamaForCausalLM(LlamaConfig(**grouped(given))),
    "qwen3": lambda given: Qwen3ForCausalLM(Qwen3Config(**grouped(given))),
    "gemma2": lambda given: Gemma2ForCausalLM(Gemma2Config(**grouped(given))),
    "phi": lambda given: PhiForCausalLM(PhiConfig(**given)),
    "opt": opt,
    "t5": t5,
    "mixtral": mixtral,
    "mamba": mamba,
    "vit": vit,
}


def drawn(module: nn.Module, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in module.named_parameters():
            centre = 1.0 if "norm" in path.lower() or "ln_" in path else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + centre)
    return module.eval()


def inputs_of(name: str, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (2, 5), generator=generator)
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :3]} if name == "t5" else {})


@pytest.mark.parametrize("name", FAMILIES)
@given(given=common(), seed=st.integers(0, 99))
def test_every_configuration_of_a_family_has_its_sites_and_they_are_what_they_say(
    name: str, given: dict[str, Any], seed: int
) -> None:
    with torch.random.fork_rng():
        module = drawn(FAMILIES[name](given), seed)
    before = hooks_of(module)
    model, inputs = pc.load(module), inputs_of(name, seed)
    layers, stacks = given["num_hidden_layers"], 2 if name == "t5" else 1
    kinds: dict[str, int] = {}
    for site in model.sites.values():
        kinds[site.kind] = kinds.get(site.kind, 0) + 1
    neurons = {"mamba": "mixer", "mixtral": "expert"}.get(name, "mlp")
    assert kinds[neurons] == layers * (3 if name == "mixtral" else stacks), model.explain_sites()
    assert kinds["resid_pre"] == kinds["resid_post"] == layers * stacks
    assert kinds.get("attn", 0) == kinds.get("pattern", 0) == (0 if name == "mamba" else layers * (2 * stacks - 1))
    sites = [site for site in model.sites.values() if site.writes is not None]
    with watching(module, {site.writes for site in sites if site.writes}) as seen:
        read = model.activations(inputs, "*")
    for site in sites:
        assert site.writes is not None
        bias = plain_weights(module, site.writes)[1]
        assert site.size == read[site.name].shape[-1]
        assert_same(read[site.name] @ model.output_weights(site) + bias, seen[site.writes][1])
    blocks = [f"{stack}resid" for stack in (("encoder.", "decoder.") if name == "t5" else ("",))]
    for block in blocks:
        for layer in range(layers - 1):
            assert torch.equal(read[f"{block}_post.{layer}"], read[f"{block}_pre.{layer + 1}"])
    assert hooks_of(module) == before


@st.composite
def trees(draw: st.DrawFn, depth: int = 3) -> nn.Module:
    """Any nesting of containers and layers; most of them cannot be run at all."""
    width = draw(sizes)
    leaves = st.sampled_from(
        [
            lambda: nn.Linear(width, draw(sizes), bias=draw(st.booleans())),
            lambda: nn.Linear(width, width),
            lambda: nn.Conv2d(width, draw(sizes), draw(st.sampled_from([1, 3])), padding=1),
            lambda: nn.BatchNorm2d(width),
            lambda: nn.LayerNorm(width),
            lambda: nn.ReLU(inplace=draw(st.booleans())),
            lambda: nn.GELU(),
            lambda: nn.Identity(),
            lambda: nn.Dropout(),
            lambda: nn.Embedding(5, width),
            lambda: nn.LSTM(width, draw(sizes), batch_first=True),
            lambda: nn.GRUCell(width, width),
            lambda: nn.MultiheadAttention(width, 1, batch_first=True),
            lambda: nn.TransformerEncoderLayer(2 * width, 1, width + 1, batch_first=True),
            lambda: nn.LazyLinear(width),
        ]
    )
    if depth == 0 or draw(st.integers(0, 2)) == 0:
        return draw(leaves)()
    children = draw(st.lists(trees(depth=depth - 1), min_size=1, max_size=4))
    container = draw(st.sampled_from(["sequential", "list", "twice"]))
    if container == "list":
        return nn.ModuleList(children)
    if container == "twice":  # one module in two places
        return nn.Sequential(children[0], *children)
    return nn.Sequential(*children)


@settings(max_examples=60 if settings.default and settings.default.max_examples <= 20 else 1000)
@given(module=trees(), seed=st.integers(0, 9))
def test_any_tree_of_modules_can_be_looked_at(module: nn.Module, seed: int) -> None:
    before = hooks_of(module)
    state = {name: type(value) for name, value in module.named_parameters()}
    training = [each.training for each in module.modules()]
    # A call gives a lazy layer its weights, and makes it another class.
    lazy = any(isinstance(each, nn.LazyLinear) for each in module.modules())
    model = pc.load(module)
    paths = dict(module.named_modules())
    for name, site in model.sites.items():
        assert site.name == name and site.module in paths
        assert model.site(name) == site and site in model.select(name)
    assert model.explain_sites() and len(model.kinds()) >= 1
    assert {name: type(value) for name, value in module.named_parameters()} == state
    assert hooks_of(module) == before
    for shape in ((2, 3), (2, 3, 4), (2, 3, 5, 5)) if model.sites else ():
        try:
            read = model.activations(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), "*")
        except Exception as error:
            # A tree that does not take this raises whatever it likes; what we raise, we raise on purpose.
            raised_by = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
            # Python blames a call with wrong arguments on the caller, which is us where we stand before the module.
            misfit = isinstance(error, TypeError) and ".forward() " in str(error)
            ours = raised_by.is_relative_to(Path(pc.__file__).parent)
            assert not ours or misfit or isinstance(error, pc.errors.PatchclampError), error
            continue
        for name, tensor in read.items():
            site = model.site(name)
            assert site.size in (None, tensor.shape[1 if site.kind == "pattern" else -1])
    if not lazy:
        assert hooks_of(module) == before
    assert [each.training for each in module.modules()] == training


@settings(max_examples=30 if settings.default and settings.default.max_examples <= 20 else 300)
@given(
    widths=st.lists(st.integers(1, 6), min_size=3, max_size=5),
    normed=st.lists(st.booleans(), min_size=5, max_size=5),
    seed=st.integers(0, 99),
)
def test_a_chain_of_convolutions_is_read_and_silenced_at_every_channel(
    widths: list[int], normed: list[bool], seed: int
) -> None:
    parts: list[nn.Module] = []
    ends: dict[str, int] = {}
    for number, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        name = f"conv.{len(parts)}"
        parts += [nn.Conv2d(inputs, outputs, 3, padding=1)]
        parts += [nn.BatchNorm2d(outputs)] if normed[number] else []
        parts += [nn.ReLU()]
        ends[name] = len(parts)
    network = drawn(nn.Sequential(*parts), seed)
    model = pc.load(network)
    assert list(model.sites) == list(ends)
    x = torch.randn(2, widths[0], 6, 6, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, end in ends.items():
            expected = network[:end](x)
            assert_same(model.activations(x, name).movedim(-1, 1), expected)
            channel = seed % model.site(name).size  # type: ignore[operator]
            silenced = expected.clone()
            silenced[:, channel] = 0
            with model.intervene(pc.ablate(pc.Neurons({name: [channel]}))):
                assert_same(network(x), network[end:](silenced) if end < len(network) else silenced)
