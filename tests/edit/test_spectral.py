"""Components of the unembedding that are damped: logits change by what the component said, and by nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.architectures import GEMMA2, GPT2, LLAMA, T5, TEXTS, VOCABULARY, Architecture, ids_of, tokenizer
from tests.decompose.test_output_svd import PLANTED, SAID, planted_matrix, planted_states
from tests.raw import assert_same, call
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import patchclamp as pc
from patchclamp.decompose.output_svd import head_states, output_svd
from patchclamp.edit.edited import EditedModel
from patchclamp.edit.spectral import damp_components
from patchclamp.errors import DataError, ModelError

WIDTH = 16


def tied_llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=WIDTH,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            tie_word_embeddings=True,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=3,
        )
    )


def bart() -> nn.Module:
    """Four names of one matrix: as in T5, and the flag means no more than that."""
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=len(VOCABULARY),
            d_model=WIDTH,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=32,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=3,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
        )
    )


BART = replace(T5, name="bart", new=bart)
TIED = replace(LLAMA, name="tied llama", new=tied_llama)


def planted_model() -> tuple[pc.Model, Any, np.ndarray, np.ndarray, np.ndarray]:
    """A float64 decoder whose head is the planted matrix."""
    matrix, left, values, right = planted_matrix()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50,
        n_embd=WIDTH,
        n_layer=1,
        n_head=2,
        n_positions=8,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    module: Any = GPT2LMHeadModel(config).double().eval()
    with torch.no_grad():
        module.lm_head.weight.copy_(torch.from_numpy(matrix))
    return pc.load(module), module, left, values, right


@torch.no_grad()
def output(module: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    return call(module, inputs)


# What a damped component does to logits --------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.5])
@torch.no_grad()
def test_logits_change_by_what_the_component_said(factor: float) -> None:
    model, module, left, values, right = planted_model()
    made: Any = damp_components(model, [PLANTED], factor).module
    states = torch.randn(30, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    change = (made.lm_head(states) - module.lm_head(states)).numpy()
    said = (states.numpy() @ right[PLANTED])[:, None] * values[PLANTED] * left[:, PLANTED]
    np.testing.assert_allclose(change, (factor - 1) * said, atol=1e-6)
    assert np.abs(change).max() > 0.1
    # States without that component keep their logits.
    orthogonal = states - (states @ torch.from_numpy(right[PLANTED]))[:, None] * torch.from_numpy(right[PLANTED])
    assert float((made.lm_head(orthogonal) - module.lm_head(orthogonal)).abs().max()) < 1e-13
    # The planted tokens come out less, the more it is damped.
    target, _ = planted_states(right)
    share = np.isin(made.lm_head(torch.from_numpy(target)).argmax(-1).numpy(), list(SAID)).mean()
    assert share < 0.5 if factor == 0 else share > 0.8 if factor > 1 else True


def test_the_singular_values_are_lowered_and_the_directions_stay() -> None:
    model, _, _, values, right = planted_model()
    made = damp_components(model, np.asarray([PLANTED, 0]), 0.47)
    expected = values.copy()
    expected[[PLANTED, 0]] *= 0.47
    found = output_svd(made)
    np.testing.assert_allclose(found.singular_values, np.sort(expected)[::-1], rtol=1e-10)
    order = np.argsort(-expected, kind="stable")
    np.testing.assert_allclose(np.abs((found.right * right[order]).sum(1)), 1, atol=1e-9)
    (step,) = made.provenance["interventions"]
    assert step["details"]["components"] == [PLANTED, 0] and step["details"]["factor"] == 0.47
    np.testing.assert_allclose(step["details"]["singular_values"], values[[PLANTED, 0]])


def test_a_factor_of_one_changes_nothing() -> None:
    model, _, _, _, _ = planted_model()
    assert damp_components(model, [2], 1).weights_sha256() == model.weights_sha256()


@torch.no_grad()
def test_found_by_states_and_damped_a_class_is_emitted_no_more() -> None:
    """After some words the decoder says tokens 40 to 49; the component that does it is found by states, and damped."""
    _, module, _, _, right = planted_model()
    for block in module.transformer.h:
        for projection in (block.attn.c_proj, block.mlp.c_proj):
            projection.weight.zero_()
    module.transformer.wpe.weight.zero_()
    words = module.transformer.wte.weight
    words.copy_(torch.from_numpy(np.random.default_rng(0).standard_normal(words.shape)))
    cues = [VOCABULARY[word] for word in ("cat", "dogs", "sat")]
    words[cues] += 6 * torch.from_numpy(right[PLANTED])
    model = pc.load(module, tokenizer=tokenizer())
    states = head_states(model, TEXTS)
    target, neutral = states.emitting(SAID), states.not_emitting(SAID)
    assert len(target) >= sum(ids_of(text).count(cue) for text in TEXTS for cue in cues) > 2
    found = output_svd(model)
    assert found.select(target, neutral, 1).tolist() == [PLANTED]
    after = head_states(damp_components(model, [PLANTED], 0.0, decomposition=found), TEXTS)
    np.testing.assert_array_equal(after.states, states.states)
    assert len(after.emitting(SAID)) < len(target) / 2
    control = head_states(damp_components(model, [PLANTED + 1], 0.0, decomposition=found), TEXTS)
    assert len(control.emitting(SAID)) > 0.8 * len(target)


# The model around it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [LLAMA, GPT2, TIED, GEMMA2, T5, BART], ids=str)
def test_saved_it_loads_with_its_own_head(family: Architecture, tmp_path: Path) -> None:
    """Tied ones are untied first: the embedding stays as it is.

    T5 scales by the flag, and in it and in BART three are tied by it, so there it is left on.
    """
    module: Any = family.build()
    model, inputs = pc.load(module), family.inputs()
    before, was = model.weights_sha256(), output(module, inputs)
    tied = module.get_output_embeddings().weight is module.get_input_embeddings().weight
    made = damp_components(model, [2, 5], 0.2)
    assert model.weights_sha256() == before and torch.equal(output(module, inputs), was)
    head = made.module.get_output_embeddings().weight  # type: ignore[operator]
    embedding = made.module.get_input_embeddings().weight  # type: ignore[operator]
    assert torch.equal(embedding, module.get_input_embeddings().weight) and head is not embedding
    matrix = module.get_output_embeddings().weight.detach().double().numpy()
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values[[2, 5]] *= 0.2
    np.testing.assert_allclose(head.detach().numpy(), (left * values) @ right, atol=1e-5)
    # The rest of the network computes what it did.
    hidden: list[torch.Tensor] = []
    handle = made.module.get_output_embeddings().register_forward_pre_hook(lambda _, args: hidden.append(args[0]))  # type: ignore[operator]
    after = output(made.module, inputs)
    handle.remove()
    scaled = hidden[0] @ torch.from_numpy(((left * values) @ right).T).float()
    cap = getattr(module.config, "final_logit_softcapping", None)
    bias = getattr(module, "final_logits_bias", None)  # of BART
    scaled = scaled if bias is None else scaled + bias
    assert_same(after, scaled if cap is None else cap * torch.tanh(scaled / cap))
    flags = made.provenance["config"]
    assert flags == ({"tie_word_embeddings": [True, False]} if tied and family not in (T5, BART) else {})
    assert ("is one of its own now" in made.provenance["interventions"][0]["words"]) == tied
    made.save(tmp_path / "saved")
    again, told = type(module).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(told[each] for each in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same(output(again.eval(), inputs), after)
    back = made.revert()
    assert back.weights_sha256() == before
    assert back.module.config.tie_word_embeddings == module.config.tie_word_embeddings  # type: ignore[union-attr,operator]
    assert len(back.tied_weights) == len(model.tied_weights)
    assert torch.equal(output(back.module, inputs), was)


def test_it_can_be_damped_again() -> None:
    model, inputs = pc.load(GPT2.build()), GPT2.inputs()
    found = output_svd(model)
    once = damp_components(model, [1], 0.5, decomposition=found)
    twice = damp_components(once, [3], 0.1, decomposition=found)
    both = damp_components(damp_components(model, [3], 0.1), [1], 0.5, decomposition=found)
    assert_same(output(twice.module, inputs), output(both.module, inputs))
    middle = twice.revert()
    assert isinstance(middle, EditedModel) and middle.weights_sha256() == once.weights_sha256()
    assert middle.revert().weights_sha256() == model.weights_sha256()


def test_a_type_that_is_coarse_is_kept() -> None:
    model = pc.load(LLAMA.build(torch.bfloat16))
    made: Any = damp_components(model, [0], 0.5).module
    assert made.lm_head.weight.dtype == torch.bfloat16
    assert not torch.equal(made.lm_head.weight, model.module.lm_head.weight)  # type: ignore[union-attr]


# What is refused ----------------------------------------------------------------------------------------------


class Linear8bit(nn.Linear):
    """By its name it packs its weights."""


def test_a_quantised_head_is_refused() -> None:
    module: Any = GPT2.build()
    module.lm_head = Linear8bit(WIDTH, len(VOCABULARY), bias=False)
    with pytest.raises(ModelError, match="unembedding lm_head is quantised: a Linear8bit packs its weights"):
        damp_components(pc.load(module), [0], 0.5)


def test_part_of_components_that_are_alike_is_said() -> None:
    values = np.linspace(8, 2, WIDTH)
    values[PLANTED + 1] = values[PLANTED]
    model, module, *_ = planted_model()
    with torch.no_grad():
        module.lm_head.weight.copy_(torch.from_numpy(planted_matrix(values)[0]))
    with pytest.warns(UserWarning, match="components 3, 4 have singular values"):
        damp_components(model, [PLANTED], 0.5)


def test_bad_input_is_said() -> None:
    model, *_ = planted_model()
    base = pc.load(LLAMA.build().model)  # type: ignore[arg-type]
    for act, error, match in [
        (lambda: damp_components(model, [16], 0.5), DataError, "from 0 to 15"),
        (lambda: damp_components(model, [], 0.5), DataError, "whole numbers"),
        (lambda: damp_components(model, [1], float("nan")), DataError, "finite number"),
        (
            lambda: damp_components(model, [1], 0.5, decomposition=output_svd(np.eye(4))),
            DataError,
            "of width 4, not 16",
        ),
        (lambda: damp_components(base, [1], 0.5), ModelError, "has no readout"),
    ]:
        with pytest.raises(error, match=match):
            act()
