"""Attention probabilities: what is read is what the model computes, what is written is what meets the values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from tests.architectures import (
    BERT,
    GPT2,
    HEADS,
    LAYERS,
    LLAMA,
    NEURONS,
    OPT,
    T5,
    TEXTS,
    VIT,
    VOCABULARY,
    WIDTH,
    Architecture,
    gpt_neox,
    padded,
)
from tests.raw import assert_same, call
from torch import nn
from torch.nn import functional
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssModel,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from patchclamp.errors import ModelError
from patchclamp.model.attention import pattern_refusal
from patchclamp.model.hooks import hooked, reading
from patchclamp.model.site import Site


@dataclass(frozen=True, eq=False)
class Attending:
    """One family: field of its output -> (path of the attention, path of its output projection), `{}` for the layer."""

    architecture: Architecture
    paths: Mapping[str, tuple[str, str]]

    def sites(self) -> dict[str, list[Site]]:
        """Field of the output -> the sites of its layers."""
        return {
            name: [pattern(path.format(layer), layer, f"{name}.{layer}") for layer in range(LAYERS)]
            for name, (path, _) in self.paths.items()
        }

    def projection(self, name: str, layer: int) -> str:
        """Path of the output projection."""
        return self.paths[name][1].format(layer)

    def __str__(self) -> str:
        return str(self.architecture)


def pattern(path: str, layer: int = 0, name: str = "pattern.0", heads: int | None = HEADS) -> Site:
    """The site of the attention probabilities of one module."""
    return Site(name, "pattern", layer, heads, module=path, tensor="output", axis=1, through="attention")


def causal(new: Callable[[], nn.Module], name: str, *, positions: bool = True) -> Architecture:
    """A decoder that reads texts; `positions`: it takes `position_ids`."""
    names = ["input_ids", "attention_mask"] + (["position_ids"] if positions else [])
    return Architecture(name, new, lambda side: {each: padded(side=side)[each] for each in names}, {})


def images(new: Callable[[], nn.Module], name: str) -> Architecture:
    """A network that reads images."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(3, 3, 8, 8, generator=generator)
    return Architecture(name, new, lambda side: {"pixel_values": pixels}, {})


SMALL: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": WIDTH,
    "intermediate_size": NEURONS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
GROUPED: dict[str, Any] = dict(SMALL, num_key_value_heads=2, head_dim=6)
IMAGE: dict[str, Any] = {
    **{name: SMALL[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")},
    "image_size": 8,
    "patch_size": 4,
}


def bloom() -> nn.Module:
    """BLOOM: its own attention code, no configuration in it."""
    names = ("vocab_size", "hidden_size", "pad_token_id", "bos_token_id", "eos_token_id")
    return BloomForCausalLM(BloomConfig(n_layer=LAYERS, n_head=HEADS, **{name: SMALL[name] for name in names}))


def clip() -> nn.Module:
    """Both towers of CLIP in one model."""
    return CLIPModel(CLIPConfig(text_config=dict(SMALL), vision_config=dict(IMAGE), projection_dim=8))


LLAMA_LIKE = {"attentions": ("model.layers.{}.self_attn", "model.layers.{}.self_attn.o_proj")}
MISTRAL = causal(lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=4)), "mistral")
QWEN3 = causal(lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED)), "qwen3")
GEMMA2 = causal(
    lambda: Gemma2ForCausalLM(Gemma2Config(**GROUPED, sliding_window=4, attn_logit_softcapping=2.0)), "gemma2"
)
PHI = causal(lambda: PhiForCausalLM(PhiConfig(**SMALL)), "phi")
BLOOM = causal(bloom, "bloom", positions=False)
FALCON = causal(
    lambda: FalconForCausalLM(FalconConfig(**dict(SMALL, ffn_hidden_size=NEURONS, new_decoder_architecture=False))),
    "falcon",
)
NEOX = causal(lambda: gpt_neox(parallel=True), "gpt-neox")
CLIP_TEXT = causal(lambda: CLIPTextModel(CLIPTextConfig(**SMALL)), "clip-text")
CLIP_VISION = images(lambda: CLIPVisionModel(CLIPVisionConfig(**IMAGE)), "clip-vision")

FAMILIES = [
    Attending(GPT2, {"attentions": ("transformer.h.{}.attn", "transformer.h.{}.attn.c_proj")}),
    Attending(LLAMA, LLAMA_LIKE),
    Attending(MISTRAL, LLAMA_LIKE),
    Attending(QWEN3, LLAMA_LIKE),
    Attending(GEMMA2, LLAMA_LIKE),
    Attending(NEOX, {"attentions": ("layers.{}.attention", "layers.{}.attention.dense")}),
    Attending(PHI, {"attentions": ("model.layers.{}.self_attn", "model.layers.{}.self_attn.dense")}),
    Attending(BLOOM, {"attentions": ("transformer.h.{}.self_attention", "transformer.h.{}.self_attention.dense")}),
    Attending(FALCON, {"attentions": ("transformer.h.{}.self_attention", "transformer.h.{}.self_attention.dense")}),
    Attending(OPT, {"attentions": ("decoder.layers.{}.self_attn", "decoder.layers.{}.self_attn.out_proj")}),
    Attending(BERT, {"attentions": ("encoder.layer.{}.attention", "encoder.layer.{}.attention.output.dense")}),
    Attending(
        T5,
        {
            "encoder_attentions": (
                "encoder.block.{}.layer.0.SelfAttention",
                "encoder.block.{}.layer.0.SelfAttention.o",
            ),
            "decoder_attentions": (
                "decoder.block.{}.layer.0.SelfAttention",
                "decoder.block.{}.layer.0.SelfAttention.o",
            ),
            "cross_attentions": (
                "decoder.block.{}.layer.1.EncDecAttention",
                "decoder.block.{}.layer.1.EncDecAttention.o",
            ),
        },
    ),
    Attending(VIT, {"attentions": ("layers.{}.attention", "layers.{}.attention.o_proj")}),
    Attending(CLIP_TEXT, {"attentions": ("encoder.layers.{}.self_attn", "encoder.layers.{}.self_attn.out_proj")}),
    Attending(CLIP_VISION, {"attentions": ("encoder.layers.{}.self_attn", "encoder.layers.{}.self_attn.out_proj")}),
]
every = pytest.mark.parametrize("family", FAMILIES, ids=str)
sides = pytest.mark.parametrize("side", ["left", "right"])


@cache
def built(architecture: Architecture, implementation: str = "") -> Any:
    """One network for all tests, with its own attention implementation or another."""
    module: Any = architecture.build()
    for each in module.modules() if implementation else ():
        if hasattr(each, "config"):
            each.config._attn_implementation = implementation
    return module


def every_site(family: Attending) -> list[Site]:
    """All of a family's sites."""
    return [site for sites in family.sites().values() for site in sites]


def real_queries(inputs: Mapping[str, torch.Tensor], name: str, shape: torch.Size) -> torch.Tensor:
    """`[batch, heads, queries]`: where the query is a token and not padding."""
    mask = inputs.get("attention_mask" if name in ("attentions", "encoder_attentions") else "decoder_attention_mask")
    whole = torch.ones(shape[:3], dtype=torch.bool)
    return whole if mask is None else whole & mask[:, None].bool()


def implementations(module: nn.Module) -> list[Any]:
    """What every configuration in the network says."""
    return [getattr(getattr(each, "config", None), "_attn_implementation", None) for each in module.modules()]


def owned(module: nn.Module) -> list[str]:
    """Modules that hold a `forward` of their own."""
    return [path for path, each in module.named_modules() if "forward" in vars(each)]


@contextmanager
def projected(module: nn.Module, path: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """By plain PyTorch: change what a projection is given."""
    handle = module.get_submodule(path).register_forward_pre_hook(lambda _module, args: (change(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


# Reading ----------------------------------------------------------------------------------------------


@every
@sides
@torch.no_grad()
def test_what_is_read_is_what_the_eager_model_returns(family: Attending, side: str) -> None:
    inputs = family.architecture.inputs(side)
    eager = built(family.architecture, "eager")
    expected = eager(**inputs, output_attentions=True)
    for module in (eager, built(family.architecture)):
        plain = call(module, inputs)
        with reading(module, every_site(family)) as captured:
            assert torch.equal(call(module, inputs), plain)
        for name, sites in family.sites().items():
            for layer, site in enumerate(sites):
                (seen,) = captured[site.name]
                got, wanted = seen.tensor.movedim(-1, 1), expected[name][layer]
                assert got.shape == wanted.shape
                # A query that is padding may look at nothing: eager spreads it evenly, the fused kernel returns zeros.
                real = real_queries(inputs, name, got.shape)
                real = real if module is not eager else torch.ones_like(real)
                assert_same(got[real], wanted[real])
                assert_same(got[real].sum(-1), torch.ones_like(got[real].sum(-1)))


@torch.no_grad()
def test_both_towers_at_once() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module: Any = clip().eval()
    inputs = dict(padded(side="right"), **CLIP_VISION.inputs())
    inputs.pop("position_ids")
    sites = [
        pattern(f"{tower}_model.encoder.layers.1.self_attn", name=f"{tower}.pattern.1") for tower in ("text", "vision")
    ]
    with reading(module, sites) as captured:
        module(**inputs)
    with hooked(module, [(site, lambda t: t * 0) for site in sites]):
        changed = module(**inputs)
    assert [tuple(captured[site.name][0].tensor.shape) for site in sites] == [(4, 11, 11, HEADS), (3, 5, 5, HEADS)]
    alone = module.vision_model
    alone.set_attn_implementation("eager")
    expected = alone(inputs["pixel_values"], output_attentions=True).attentions[1]
    assert_same(captured["vision.pattern.1"][0].tensor.movedim(-1, 1), expected)
    assert not torch.allclose(changed.logits_per_image, module(**inputs).logits_per_image)


@pytest.mark.parametrize("family", [FAMILIES[1], FAMILIES[4], FAMILIES[7]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_the_type_is_the_models_own(family: Attending, dtype: torch.dtype) -> None:
    module, inputs = family.architecture.build(dtype), family.architecture.inputs()
    sites = every_site(family)
    with reading(module, sites) as captured:
        call(module, inputs)
    assert {seen.tensor.dtype for site in sites for seen in captured[site.name]} == {dtype}
    with hooked(module, [(site, lambda tensor: tensor.roll(1, -1)) for site in sites]):
        assert call(module, inputs).dtype == dtype


# Writing ----------------------------------------------------------------------------------------------


@every
@sides
@torch.no_grad()
def test_writing_what_is_there_changes_nothing(family: Attending, side: str) -> None:
    module, inputs = built(family.architecture), family.architecture.inputs(side)
    seen = []
    with hooked(module, [(site, lambda tensor: seen.append(tensor) or tensor) for site in every_site(family)]):
        got = call(module, inputs)
    assert_same(got, call(module, inputs))
    assert len(seen) == len(every_site(family)) and seen[0].shape[-1] == HEADS


@every
@torch.no_grad()
def test_a_head_that_looks_at_nothing_writes_nothing(family: Attending) -> None:
    module, inputs = built(family.architecture), family.architecture.inputs("left")

    def without_head(tensor: torch.Tensor) -> torch.Tensor:
        return tensor * torch.tensor([1.0, 1.0, 0.0, 1.0])

    def without_slice(tensor: torch.Tensor) -> torch.Tensor:
        width = tensor.shape[-1] // HEADS
        return tensor * (torch.arange(tensor.shape[-1]) // width != 2)

    plain = call(module, inputs)
    for name, sites in family.sites().items():
        with hooked(module, [(sites[0], without_head)]):
            got = call(module, inputs)
        with projected(module, family.projection(name, 0), without_slice):
            expected = call(module, inputs)
        assert_same(got, expected)
        assert not torch.allclose(got, plain, rtol=1e-3)


@torch.no_grad()
def test_looking_evenly_is_the_mean_of_the_values() -> None:
    module, inputs = built(GPT2), GPT2.inputs("right")
    mask = inputs["attention_mask"].bool()
    length = mask.shape[1]
    allowed = torch.ones(length, length).tril() * mask[:, None]
    even = allowed / allowed.sum(-1, keepdim=True)
    block: Any = module.get_submodule("transformer.h.0")
    hidden = module.transformer.wte(inputs["input_ids"]) + module.transformer.wpe(inputs["position_ids"])
    values = block.attn.c_attn(block.ln_1(hidden))[..., 2 * WIDTH :]
    middle = hidden + block.attn.c_proj(even @ values)
    expected = middle + block.mlp(block.ln_2(middle))

    site = pattern("transformer.h.0.attn")
    with hooked(module, [(site, lambda tensor: even[..., None].expand_as(tensor))]):
        got = module(**inputs, output_hidden_states=True).hidden_states[1]
    assert_same(got, expected)


def test_gradients_flow_as_through_the_eager_model() -> None:
    inputs = LLAMA.inputs("left")
    gradients = []
    for implementation in ("sdpa", "eager"):
        module: Any = built(LLAMA, implementation) if implementation == "eager" else built(LLAMA)
        site = pattern("model.layers.0.self_attn")
        with hooked(module, [(site, lambda tensor: tensor * 0.5)]):
            logits = module(**inputs).logits[inputs["attention_mask"].bool()]
        weight = module.get_submodule("model.layers.0.self_attn.q_proj").weight
        gradients.append(torch.autograd.grad(logits.square().sum(), weight)[0])
    assert gradients[0].isfinite().all() and gradients[0].any()
    assert_same(gradients[0], gradients[1])


def test_dropout_is_left_to_the_model() -> None:
    module: Any = built(BERT)
    module.config.attention_probs_dropout_prob, before = 0.5, module.config.attention_probs_dropout_prob
    attention = module.get_submodule("encoder.layer.0.attention.self")
    attention.dropout.p, kept = 0.5, attention.dropout.p
    attention.train()
    try:
        inputs, seen, met = BERT.inputs(), [], []
        site = pattern("encoder.layer.0.attention")
        with (
            hooked(module, [(site, lambda tensor: seen.append(tensor) or torch.ones_like(tensor))]),
            projected(module, "encoder.layer.0.attention.output.dense", lambda t: met.append(t) or t),
        ):
            call(module, inputs)
            call(module, inputs)
    finally:
        attention.eval()
        attention.dropout.p, module.config.attention_probs_dropout_prob = kept, before
    assert torch.equal(seen[0], seen[1]) and not torch.allclose(met[0], met[1])


@pytest.mark.parametrize("family", [FAMILIES[0], FAMILIES[1], FAMILIES[2], FAMILIES[7]], ids=str)
@sides
@torch.no_grad()
def test_generating_with_a_cache(family: Attending, side: str) -> None:
    module = built(family.architecture)
    read = padded(TEXTS[:2], side)
    options: dict[str, Any] = {
        "input_ids": read["input_ids"],
        "attention_mask": read["attention_mask"],
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "do_sample": False,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    sites = every_site(family)
    width = options["input_ids"].shape[1]

    def scores(**more: Any) -> torch.Tensor:
        return torch.stack(module.generate(**options, **more).scores).nan_to_num(neginf=0.0)

    def without_head(tensor: torch.Tensor) -> torch.Tensor:
        return tensor * torch.tensor([1.0, 0.0, 1.0, 1.0])

    plain = scores()
    with reading(module, sites) as captured:
        assert torch.equal(scores(), plain)
    shapes = [tuple(seen.tensor.shape) for seen in captured[sites[0].name]]
    assert shapes[0] == (2, width, width, HEADS)
    assert [shape[1] for shape in shapes[1:]] == [1, 1, 1]
    with hooked(module, [(site, without_head) for site in sites]):
        cached, again = scores(), scores(use_cache=False)
    assert_same(cached, again)
    assert not torch.allclose(cached, plain, rtol=1e-3)
    # A step with a cache sees what the last row of a full pass sees.
    with reading(module, sites) as stepped, torch.no_grad():
        module.generate(**options)
    with reading(module, sites) as full, torch.no_grad():
        module.generate(**options, use_cache=False)
    keys = stepped[sites[-1].name][2].tensor.shape[2]
    assert_same(stepped[sites[-1].name][2].tensor[:, 0], full[sites[-1].name][2].tensor[:, -1, -keys:])


# Any other network ------------------------------------------------------------------------------------


class Own(nn.Module):
    """Attention as anybody writes it: by the fused function, or by hand with batch and heads in one axis."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.mix, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, WIDTH] -> the same."""
        batch, tokens, _ = x.shape
        width = WIDTH // HEADS
        query, key, value = self.mix(x).view(batch, tokens, 3, HEADS, width).permute(2, 0, 3, 1, 4)
        if self.fused:
            joined = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            query, key, value = (each.reshape(batch * HEADS, tokens, width) for each in (query, key, value))
            scores = query @ key.transpose(1, 2) / math.sqrt(width)
            scores = scores + torch.full((tokens, tokens), -math.inf).triu(1)
            joined = (scores.softmax(2) @ value).view(batch, HEADS, tokens, width)
        return self.out(joined.transpose(1, 2).reshape(batch, tokens, WIDTH))


@torch.no_grad()
def test_attention_of_ones_own() -> None:
    torch.manual_seed(0)
    fused, by_hand = Own(fused=True), Own(fused=False)
    by_hand.load_state_dict(fused.state_dict())
    x = torch.randn(3, 5, WIDTH)
    read, written = [], []
    for module in (fused, by_hand):
        root = nn.Sequential(module)
        with reading(root, [pattern("0")]) as captured:
            root(x)
        read.append(captured["pattern.0"][0].tensor)
        with hooked(root, [(pattern("0"), lambda tensor: tensor.flip(-1))]):
            written.append(root(x))
    assert_same(read[0], read[1])
    assert_same(written[0], written[1])
    assert read[0].shape == (3, 5, 5, HEADS) and not torch.allclose(written[0], fused(x))
    assert (read[0].sum(2) - 1).abs().max() < 1e-6 and not read[0][:, 1, 2:].any()


class Kernel(nn.Module):
    """The fused function alone."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Query, key and value, and its options."""
        return functional.scaled_dot_product_attention(*args, **kwargs)


EMPTY = torch.tensor([[True, False, True, True, False], [False] * 5, [True] * 5])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"enable_gqa": True},
        {"enable_gqa": True, "is_causal": True},
        {"attn_mask": EMPTY},
        {"attn_mask": torch.zeros(3, 5).masked_fill(~EMPTY, -math.inf), "scale": 2.0},
        {"attn_mask": torch.arange(60.0).view(1, 4, 3, 5).cos()},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_the_fused_function_step_by_step(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    shared = 2 if "enable_gqa" in options else HEADS
    shapes = [(2, HEADS, 3, 8), (2, shared, 5, 8), (2, shared, 5, 6)]
    given = [torch.randn(shape, requires_grad=True) for shape in shapes]
    expected = functional.scaled_dot_product_attention(given[0], given[1], given[2], **options)
    root = nn.Sequential(Kernel())
    with hooked(root, [(pattern("0"), lambda tensor: tensor)]):
        got = root[0](*given, **options)
    assert_same(got.detach(), expected.detach())
    gradients = [torch.autograd.grad(output.square().sum(), given) for output in (got, expected)]
    for mine, theirs in zip(*gradients, strict=True):
        assert_same(mine, theirs)


@pytest.mark.parametrize("needs_weights", [False, True])
@torch.no_grad()
def test_multihead_attention_of_torch(needs_weights: bool) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()
    x, ignored = torch.randn(3, 6, WIDTH), torch.arange(6)[None] >= torch.tensor([6, 4, 2])[:, None]
    options: dict[str, Any] = {
        "key_padding_mask": ignored,
        "need_weights": needs_weights,
        "average_attn_weights": False,
    }
    output, _ = attention(x, x, x, **options)
    _, expected = attention(x, x, x, **dict(options, need_weights=True))
    with reading(attention, [pattern("")]) as captured:
        again, _ = attention(x, x, x, **options)
    assert_same(captured["pattern.0"][0].tensor, expected.movedim(1, -1))
    assert_same(again, output)
    even = torch.full((3, 6, 6, HEADS), 1 / 6)
    with hooked(attention, [(pattern(""), lambda _: even)]):
        got, _ = attention(x, x, x, **options)
    weight, bias = attention.in_proj_weight[2 * WIDTH :], attention.in_proj_bias[2 * WIDTH :]
    mean = functional.linear(x, weight, bias).mean(1, keepdim=True).expand(3, 6, WIDTH)
    assert_same(got, functional.linear(mean, attention.out_proj.weight, attention.out_proj.bias))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@torch.no_grad()
def test_transformer_encoder_with_padding() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, NEURONS, batch_first=True)
    encoder = nn.TransformerEncoder(layer, LAYERS).eval()
    x, ignored = torch.randn(2, 5, WIDTH), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    plain = encoder(x, src_key_padding_mask=ignored)
    sites = [pattern(f"layers.{layer}.self_attn", layer, f"pattern.{layer}") for layer in range(LAYERS)]
    with reading(encoder, sites) as captured:
        again = encoder(x, src_key_padding_mask=ignored)
    assert_same(again[~ignored], plain[~ignored])
    first: Any = encoder.layers[0]
    _, expected = first.self_attn(x, x, x, key_padding_mask=ignored, average_attn_weights=False)
    assert_same(captured["pattern.0"][0].tensor, expected.movedim(1, -1))
    assert captured["pattern.1"][0].tensor.shape == (2, 5, 5, HEADS)


# As it was --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_contexts_nest_and_act_in_order() -> None:
    module, inputs = built(GPT2), GPT2.inputs()
    site = pattern("transformer.h.0.attn")
    with hooked(module, [(site, lambda tensor: torch.ones_like(tensor))]):
        with hooked(module, [(site, lambda tensor: tensor * 3)]), reading(module, [site]) as captured:
            call(module, inputs)
            assert (captured[site.name][0].tensor == 3).all()
        with reading(module, [site]) as captured:
            call(module, inputs)
        assert (captured[site.name][0].tensor == 1).all()
    assert not owned(module)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_all_is_as_before_after_an_exception(error: type[BaseException]) -> None:
    module, inputs = GPT2.build(), GPT2.inputs()
    before, plain = implementations(module), call(module, inputs)

    def stop(_: torch.Tensor) -> torch.Tensor:
        raise error("stop")

    with pytest.raises(error, match="stop"), hooked(module, [(pattern("transformer.h.1.attn"), stop)]):
        call(module, inputs)
    assert not owned(module) and implementations(module) == before
    assert torch.equal(call(module, inputs), plain)
    assert torch.overrides._get_current_function_mode() is None


@torch.no_grad()
def test_a_forward_of_its_own_comes_back() -> None:
    module, inputs = GPT2.build(), GPT2.inputs()
    attention = module.get_submodule("transformer.h.0.attn")
    calls, forward = [], attention.forward

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(*args, **kwargs)

    attention.forward = own
    with reading(module, [pattern("transformer.h.0.attn")]) as captured:
        call(module, inputs)
    assert attention.forward is own and len(calls) == 1 and len(captured["pattern.0"]) == 1


@torch.no_grad()
def test_a_fused_implementation_is_eager_for_the_while() -> None:
    module: Any = LLAMA.build()
    inputs = LLAMA.inputs("left")
    expected = built(LLAMA, "eager")(**inputs, output_attentions=True)
    module.config._attn_implementation = "flex_attention"
    sites = [pattern(f"model.layers.{layer}.self_attn", layer, f"pattern.{layer}") for layer in range(LAYERS)]
    outer, inner = reading(module, [sites[0]]), reading(module, [sites[1]])
    with outer as first:
        second = inner.__enter__()
        output = module(**inputs)
        assert set(implementations(module)) == {"eager", None}
    # The outer one has ended first.
    assert set(implementations(module)) == {"eager", None}
    module(**inputs)
    inner.__exit__(None, None, None)
    assert set(implementations(module)) == {"flex_attention", None}
    assert_same(output.logits, expected.logits)
    assert len(first["pattern.0"]) == 1 and len(second["pattern.1"]) == 2
    for layer, captured in enumerate((first["pattern.0"], second["pattern.1"])):
        assert_same(captured[0].tensor.movedim(-1, 1), expected.attentions[layer])


@torch.no_grad()
def test_configurations_further_in_keep_their_own() -> None:
    module: Any = clip().eval()
    module.config._attn_implementation = {"": "flex_attention", "text_config": "sdpa", "vision_config": "eager"}
    before = implementations(module)
    with reading(module, [pattern("text_model.encoder.layers.0.self_attn")]):
        during = implementations(module)
    assert during != before and during[0] == "eager" and implementations(module) == before


# Refusing ---------------------------------------------------------------------------------------------


class Averaging(nn.Module):
    """An "attention" without a softmax; or, if `twice`, with two of them."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.twice = twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] -> the same."""
        if not self.twice:
            return x.mean(1, keepdim=True).expand_as(x)
        scores = (x @ x.transpose(1, 2))[:, None].expand(-1, HEADS, -1, -1)
        return (scores.softmax(-1) + functional.softmax(-scores, dim=-1)).mean(1) @ x


def test_no_softmax_or_several_are_named() -> None:
    x = torch.randn(2, 3, WIDTH)
    for twice, message in (
        (False, r"pattern\.0: 0 was called but computed no softmax over 4 heads"),
        (True, "several"),
    ):
        module = nn.Sequential(Averaging(twice))
        with pytest.raises(ModelError, match=message), reading(module, [pattern("0")]):
            module(x)
        assert not owned(module)
        assert module(x).shape == x.shape


def test_the_wrong_number_of_heads_is_found_out() -> None:
    module = built(GPT2)
    wrong = pattern("transformer.h.0.attn", heads=HEADS - 1)
    message = (
        r"transformer\.h\.0\.attn \(attention implementation sdpa\) was called but computed no softmax over 3 heads"
    )
    with pytest.raises(ModelError, match=message), reading(module, [wrong]):
        call(module, GPT2.inputs())


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
def test_what_is_refused_before_any_call() -> None:
    for family in FAMILIES:
        module = built(family.architecture)
        assert {pattern_refusal(module.get_submodule(site.module)) for site in every_site(family)} == {None}
    assert pattern_refusal(nn.MultiheadAttention(WIDTH, HEADS)) is None
    small = dict(GROUPED, num_local_experts=2, layer_types=["full_attention"] * LAYERS)
    sinks = GptOssModel(GptOssConfig(**small))
    message = r"pattern\.0 cannot be reached: .* an attention sink"
    with pytest.raises(ModelError, match=message), reading(sinks, [pattern("layers.0.self_attn")]):
        pass
    traced = nn.Sequential(torch.jit.trace(Own(fused=True), torch.randn(1, 3, WIDTH)))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="TorchScript"), reading(traced, [pattern("0")]):
        pass
