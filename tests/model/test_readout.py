"""From the residual stream to logits: compared with the logits of the network and the arithmetic written out here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.architectures import (
    BERT,
    BLOOM,
    GEMMA2,
    GPT2,
    LLAMA,
    MAMBA,
    MISTRAL,
    NEOX,
    PHI,
    QWEN3,
    SEQUENTIAL,
    T5,
    T5_GATED,
    TEXTS,
    VOCABULARY,
    WIDTH,
    Architecture,
    deepseek,
    mixtral,
    padded,
)
from tests.raw import assert_same, hooks_of, watching
from torch import nn
from torch.nn.functional import linear
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    CohereConfig,
    CohereForCausalLM,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)

import patchclamp as pc
from patchclamp.errors import DataError
from patchclamp.model.example import Example
from patchclamp.model.norms import linear_part
from patchclamp.model.readout import Readout, readout_of

SMALL: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}


def opt(**options: Any) -> nn.Module:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=WIDTH,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            pad_token_id=1,
            **options,
        )
    )


def bart() -> nn.Module:
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=len(VOCABULARY),
            d_model=WIDTH,
            encoder_layers=1,
            decoder_layers=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            max_position_embeddings=32,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=3,
        )
    )


def _like(family: Architecture, name: str, new: Callable[[], nn.Module]) -> Architecture:
    return replace(family, name=name, new=new)


OPT_LM = replace(_like(BERT, "opt", lambda: opt(word_embed_proj_dim=WIDTH)), read=BLOOM.read)
OPT_NARROW = replace(OPT_LM, name="opt-narrow", new=lambda: opt(word_embed_proj_dim=8))
OPT_AFTER = replace(OPT_LM, name="opt-350m", new=lambda: opt(word_embed_proj_dim=8, do_layer_norm_before=False))
COHERE = _like(LLAMA, "cohere", lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.3)))
BART = _like(T5, "bart", bart)
LAST = {T5: "decoder.resid_post.1", T5_GATED: "decoder.resid_post.1", BART: "decoder.resid_post.1"}
FAMILIES = [GPT2, LLAMA, GEMMA2, T5, T5_GATED, NEOX, BLOOM, PHI, QWEN3, MISTRAL, MAMBA, OPT_LM, OPT_NARROW, OPT_AFTER]
FAMILIES += [COHERE, BART, _like(LLAMA, "mixtral", mixtral), _like(LLAMA, "deepseek", deepseek)]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=str)


def found(module: nn.Module, example: Example | None = None) -> Readout:
    readout = readout_of(module, pc.load(module).sites, example)
    assert isinstance(readout, Readout), readout
    return readout


def bias_of(module: nn.Module) -> torch.Tensor:
    bias = found(module).bias
    assert bias is not None
    return bias


def refused(module: nn.Module, example: Example | None = None) -> str:
    readout = readout_of(module, pc.load(module).sites, example)
    assert isinstance(readout, str)
    return readout


@torch.no_grad()
def stream_and_logits(module: nn.Module, family: Architecture, readout: Readout) -> tuple[torch.Tensor, torch.Tensor]:
    """What the last block returns, by a plain hook, and the network's logits."""
    site = pc.load(module).site(readout.residual)
    with watching(module, [site.module]) as seen:
        logits = module(**family.inputs()).logits
    return seen[site.module][1], logits


@every_family
@torch.no_grad()
def test_it_gives_the_networks_own_logits(family: Architecture) -> None:
    module = family.build()
    readout = found(module)
    x, logits = stream_and_logits(module, family, readout)
    assert_same(readout(x), logits)
    assert readout.residual == LAST.get(family, "resid_post.1")
    # A stream that no example has seen, and so large that a cap would show.
    norm = module.get_submodule(readout.norm) if readout.norm else nn.Identity()
    y = 5 * torch.randn(3, WIDTH)
    made = norm(y)
    if family in (OPT_NARROW, OPT_AFTER):
        made = module.get_submodule("model.decoder.project_out")(made)
    made = module.get_submodule("lm_head")(made / WIDTH**0.5 if family in (T5, T5_GATED) else made)
    made = 0.3 * made if family is COHERE else made
    made = 30 * torch.tanh(made / 30) if family is GEMMA2 else made
    assert_same(readout(y), made)


@every_family
@torch.no_grad()
def test_the_folded_weights_are_linear_in_the_normalised_stream(family: Architecture) -> None:
    module = family.build()
    readout = found(module)
    x, logits = stream_and_logits(module, family, readout)
    if readout.norm:
        norm: Any = module.get_submodule(readout.norm)
        epsilon = next(
            getattr(norm, name) for name in ("eps", "variance_epsilon", "layer_norm_epsilon") if hasattr(norm, name)
        )
        # A layer norm is one whose output has no mean before gain and shift; here that is known by its class.
        centres = isinstance(norm, nn.LayerNorm) or family is COHERE
        centred = x - x.mean(-1, keepdim=True) if centres else x
        x = x / (centred.pow(2).mean(-1, keepdim=True) + epsilon).sqrt()
    plain = x @ readout.weight.T + (0 if readout.bias is None else readout.bias)
    assert_same(plain if family is not GEMMA2 else 30 * torch.tanh(plain / 30), logits)
    assert readout.weight.shape == (len(VOCABULARY), WIDTH)

    weights = pc.load(module).output_weights("mlp.1") if family is GPT2 else torch.randn(5, WIDTH)
    assert_same(readout.directions(weights), weights @ readout.weight.T)


@torch.no_grad()
def test_directions_are_those_of_the_arithmetic_written_out() -> None:
    weights = torch.randn(6, WIDTH)

    gpt2: Any = GPT2.build()
    norm, head = gpt2.transformer.ln_f, gpt2.lm_head
    expected = linear((weights - weights.mean(1, keepdim=True)) * norm.weight, head.weight)
    assert_same(found(gpt2).directions(weights), expected)
    assert_same(bias_of(gpt2), linear(norm.bias, head.weight))

    gemma: Any = GEMMA2.build()
    readout = found(gemma)
    assert_same(readout.directions(weights), linear(weights * (1 + gemma.model.norm.weight), gemma.lm_head.weight))
    assert (readout.softcap, readout.scale, readout.bias) == (30.0, 1.0, None)

    t5: Any = T5.build()
    scaled = linear(weights * t5.decoder.final_layer_norm.weight, t5.lm_head.weight) * WIDTH**-0.5
    assert_same(found(t5).directions(weights), scaled)

    phi: Any = PHI.build()
    shift = linear(phi.model.final_layernorm.bias, phi.lm_head.weight) + phi.lm_head.bias
    assert_same(bias_of(phi), shift)

    cohere: Any = COHERE.build()
    assert found(cohere).scale == pytest.approx(0.3, rel=1e-5)


@torch.no_grad()
def test_a_soft_cap_that_small_logits_do_not_show_is_found() -> None:
    gemma = GEMMA2.build()
    gemma.get_submodule("lm_head").weight.mul_(1e-3)  # type: ignore[operator]
    inputs = padded()
    assert gemma(input_ids=inputs["input_ids"]).logits.abs().max() < 0.1
    assert found(gemma).softcap == pytest.approx(30.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", [GPT2, LLAMA, GEMMA2, T5], ids=str)
@torch.no_grad()
def test_low_precision(family: Architecture, dtype: torch.dtype) -> None:
    module, exact = family.build(dtype), family.build()
    readout = found(module)
    x, logits = stream_and_logits(module, family, readout)
    assert readout(x).dtype == dtype
    torch.testing.assert_close(readout(x).float(), logits.float(), rtol=0.02, atol=0.02 * float(logits.abs().max()))
    # Folded in float32: only the weights are rounded, not what is computed with them.
    weights = torch.randn(5, WIDTH)
    same = found(exact).directions(weights)
    assert readout.directions(weights).dtype == torch.float32
    difference = (readout.directions(weights) - same).abs().max() / same.abs().max()
    assert difference < 0.02


class Decoder(nn.Module):
    """A plain decoder: blocks of a gated MLP, a norm written here, the embedding as unembedding."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.norm = Scale()
        self.head = None if tied else nn.Linear(6, 11)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return (x @ self.embedding.weight.T if self.head is None else self.head(x)) / 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.into, self.act, self.out = nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.out(self.act(self.into(self.norm(x))))


class Scale(nn.Module):
    """Root mean square, with a gain of three minus the weight; nothing in its name says so."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-6) * (3 - self.weight)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_a_plain_decoder(tied: bool) -> None:
    torch.manual_seed(0)
    module = Decoder(tied).eval()
    ids = torch.arange(8)[None]
    assert "pc.load(..., example=...)" in refused(module)
    readout = found(module, Example((ids,)))
    with watching(module, ["blocks.1"]) as seen:
        logits = module(ids)
    assert_same(readout(seen["blocks.1"][1]), logits)
    assert (readout.norm, readout.unembedding) == ("norm", "embedding" if tied else "head")
    assert readout.scale == pytest.approx(0.5, rel=1e-5)
    y = seen["blocks.1"][1]
    plain = y / y.pow(2).mean(-1, keepdim=True).sqrt() @ readout.weight.T
    assert_same(plain if readout.bias is None else plain + readout.bias, logits)
    assert (readout.bias is None) == tied
    assert_same(readout.linear_part.gain, 3 - module.norm.weight.detach())


def test_what_has_no_readout_says_why() -> None:
    small = BertConfig(**SMALL)
    why = refused(BertForMaskedLM(small).eval())
    assert "transform_act_fn (GELUActivation) comes between the last block and the unembedding" in why
    assert "cls.predictions.decoder" in why
    assert "no unembedding" in refused(BertForSequenceClassification(small).eval())
    assert "BertModel returns no logits" in refused(BERT.build())
    assert "could not be tried" in refused(SEQUENTIAL.build())


@torch.no_grad()
def test_other_arithmetic_is_refused() -> None:
    biased: Any = bart().eval()
    biased.final_logits_bias.copy_(torch.arange(float(len(VOCABULARY)))[None])
    assert "neither a multiple" in refused(biased)

    class Cubed(GPT2LMHeadModel):
        def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
            output: Any = super().forward(input_ids, **kwargs)
            output.logits = output.logits + output.logits.pow(3)
            return output

    cubed: Any = Cubed(GPT2.build().config)  # type: ignore[arg-type]
    assert "neither a multiple" in refused(cubed.eval())

    class LastOnly(GPT2LMHeadModel):
        def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
            return super().forward(input_ids, logits_to_keep=1, **kwargs)

    last: Any = LastOnly(GPT2.build().config)  # type: ignore[arg-type]
    assert "what enters the unembedding lm_head is not made by norms" in refused(last.eval())

    lost: Any = LLAMA.build()
    lost.model.norm = nn.Sequential(lost.model.norm, nn.Tanh())
    assert "model.norm.1 (Tanh) comes between" in refused(lost)


def test_the_network_is_left_as_it_was() -> None:
    module = GPT2.build().train()
    before = {name: each.clone() for name, each in module.state_dict().items()}
    hooks, state = hooks_of(module), torch.random.get_rng_state()
    sites = pc.load(module).sites
    readout_of(module, sites)
    assert all(each.training for each in module.modules())
    assert hooks_of(module) == hooks
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(each, before[name]) for name, each in module.state_dict().items())


def test_weights_of_another_width_are_refused() -> None:
    readout = found(GPT2.build())
    with pytest.raises(DataError, match=f"width {WIDTH}, not 3"):
        readout.directions(torch.randn(2, 3))
    with pytest.raises(DataError, match=f"width {WIDTH}, not 4"):
        readout(torch.randn(2, 4))


@pytest.mark.parametrize("width", [2, 5, 16])
@torch.no_grad()
def test_the_linear_part_of_norms(width: int) -> None:
    torch.manual_seed(width)
    layer, root = nn.LayerNorm(width), nn.RMSNorm(width, eps=1e-3)
    for parameter in (*layer.parameters(), *root.parameters()):
        parameter.normal_()
    part = linear_part(layer, width)
    assert part is not None
    assert part.centres
    assert_same(part.gain, layer.weight.detach())
    assert_same(part.shift, layer.bias.detach())
    part = linear_part(root, width)
    assert part is not None
    assert not part.centres
    assert_same(part.gain, root.weight.detach())
    others: Mapping[str, nn.Module] = {
        "linear": nn.Linear(width, width),
        "tanh": nn.Tanh(),
        "groups": nn.GroupNorm(2, 16),
        "embedding": nn.Embedding(3, width),
        "batch": nn.BatchNorm1d(width).eval(),
    }
    for name, module in others.items():
        if name != "groups" or width == 16:
            assert linear_part(module, width) is None, name


@torch.no_grad()
def test_a_trained_decoder(data_folder: Path) -> None:
    folder = data_folder / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist")
    model = pc.load(folder)
    readout = found(model.module)
    inputs = model.inputs(list(TEXTS[:1]))
    with watching(model.module, [model.site(readout.residual).module]) as seen:
        logits = model.module(**inputs).logits
    (x, _), *_ = [(each[1], path) for path, each in seen.items()]
    assert_same(readout(x), logits)
    module: Any = model.module
    weights = model.output_weights("mlp.4")
    assert_same(readout.directions(weights), linear(weights * module.model.norm.weight, module.lm_head.weight))
