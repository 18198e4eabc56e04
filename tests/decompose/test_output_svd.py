"""The singular components of an unembedding: one that is planted is found, and what is said of them is so."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from tests.architectures import GEMMA2, GPT2, LLAMA, T5, TEXTS, Architecture, ids_of, tokenizer
from tests.raw import hooks_of
from torch import nn

import patchclamp as pc
from patchclamp.decompose.output_svd import OutputDecomposition, head_states, output_svd

WIDTH, VOCABULARY, PLANTED = 16, 50, 3
SAID = range(40, 50)


def orthonormal(rows: int, columns: int, seed: int, first: np.ndarray | None = None) -> np.ndarray:
    drawn = np.random.default_rng(seed).standard_normal((rows, columns))
    if first is not None:
        drawn[:, 0] = first
    made, sizes = np.linalg.qr(drawn)
    return made * np.sign(np.diag(sizes))


def planted_matrix(values: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """W = U S V^T whose component 3 promotes tokens 40 to 49 and hardly any other."""
    tokens = np.isin(np.arange(VOCABULARY), list(SAID)) + 0.01 * np.random.default_rng(9).random(VOCABULARY)
    left = orthonormal(VOCABULARY, WIDTH, 0, tokens)
    left[:, [0, PLANTED]] = left[:, [PLANTED, 0]]
    right = orthonormal(WIDTH, WIDTH, 1).T
    values = np.linspace(8, 2, WIDTH) if values is None else values
    return (left * values) @ right, left, values, right


def planted_states(right: np.ndarray, steps: int = 200, strength: float = 6.0) -> tuple[np.ndarray, np.ndarray]:
    """States at steps that emit 40 to 49, and others: all coordinates vary, the planted one is moved."""
    generator = np.random.default_rng(2)
    target, neutral = generator.standard_normal((2, steps, WIDTH))
    return target + strength * right[PLANTED], neutral


def aligned(found: OutputDecomposition, right: np.ndarray) -> np.ndarray:
    return np.abs((found.right * right).sum(1))


# The decomposition -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tall", [False, True], ids=["svd", "eigh"])
def test_the_parts_are_those_of_numpy(tall: bool) -> None:
    matrix = np.random.default_rng(0).standard_normal((400 if tall else 50, WIDTH))
    found = output_svd(matrix)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    np.testing.assert_allclose(found.singular_values, values, rtol=1e-12)
    np.testing.assert_allclose(aligned(found, right), 1, rtol=1e-10)
    everything = np.arange(WIDTH)
    np.testing.assert_allclose(
        (found.left(everything) * found.singular_values) @ found.right, matrix, rtol=1e-9, atol=1e-9
    )
    np.testing.assert_allclose(np.abs((found.left(everything) * left).sum(0)), 1, rtol=1e-10)
    largest = np.abs(found.right).argmax(1)
    assert (found.right[everything, largest] > 0).all()
    assert found.close == [] and found.lost == ()


def test_more_dimensions_than_tokens() -> None:
    matrix = np.random.default_rng(0).standard_normal((5, 9))
    found = output_svd(torch.from_numpy(matrix).float())
    assert len(found) == 5 and found.right.shape == (5, 9)
    np.testing.assert_allclose((found.left(range(5)) * found.singular_values) @ found.right, matrix, atol=1e-6)


def test_the_component_that_says_the_tokens_is_the_one_selected() -> None:
    matrix, _, _, right = planted_matrix()
    found = output_svd(matrix)
    target, neutral = planted_states(right)
    said = (target @ matrix.T).argmax(1)
    # The planted direction is what makes these tokens come out.
    assert np.isin(said, list(SAID)).mean() > 0.95 > 0.5 > np.isin((neutral @ matrix.T).argmax(1), list(SAID)).mean()
    assert found.select(target, neutral, 1).tolist() == [PLANTED]
    assert found.select(target, neutral).tolist() == [PLANTED]  # one in a thousand of 16 is one
    score = found.differences(target, neutral)
    assert score[PLANTED] > 4 > 1 > np.delete(score, PLANTED).max()


def test_coordinates_are_what_logits_are_made_of() -> None:
    """And V where V^T belongs gives other numbers, which select another component."""
    matrix, left, values, right = planted_matrix()
    found = output_svd(matrix)
    target, neutral = planted_states(right)
    signs = np.sign((found.right * right).sum(1))
    np.testing.assert_allclose(found.coordinates(target) * signs, target @ right.T, atol=1e-9)
    np.testing.assert_allclose(
        (found.coordinates(target) * found.singular_values) @ found.left(range(WIDTH)).T, target @ matrix.T, atol=1e-9
    )
    np.testing.assert_allclose(found.left(range(WIDTH)) * signs, left, atol=1e-9)
    np.testing.assert_allclose(found.singular_values, values)
    transposed = np.abs((target @ found.right).mean(0) - (neutral @ found.right).mean(0))
    assert transposed.argmax() != PLANTED
    assert found.coordinates(torch.from_numpy(target[0])).shape == (WIDTH,)


def test_the_signed_difference_has_the_sign_of_the_direction() -> None:
    matrix, _, _, right = planted_matrix()
    found = output_svd(matrix)
    up, neutral = planted_states(right, strength=6.0)
    down, _ = planted_states(right, strength=-6.0)
    signed = [found.differences(each, neutral, standardised=False)[PLANTED] for each in (up, down)]
    assert abs(signed[0]) == pytest.approx(6, abs=0.5) and abs(signed[1]) == pytest.approx(6, abs=0.5)
    assert signed[0] * signed[1] < 0
    higher, lower = (up, down) if signed[0] > 0 else (down, up)
    assert found.select(higher, neutral, 1, standardised=False).tolist() == [PLANTED]
    assert found.select(lower, neutral, 1, standardised=False).tolist() != [PLANTED]
    assert found.select(lower, neutral, 1).tolist() == [PLANTED]


def test_a_loud_component_that_does_not_care_is_not_selected() -> None:
    """Ten times the size and no difference in its own spread: the plain difference of means would take it."""
    matrix, _, _, right = planted_matrix()
    found = output_svd(matrix)
    target, neutral = planted_states(right, steps=12, strength=3.0)
    loud = 60 * np.random.default_rng(5).standard_normal((2, 12)) + np.asarray([[25.0], [0.0]])
    target, neutral = target + loud[0][:, None] * right[7], neutral + loud[1][:, None] * right[7]
    plain = np.abs(found.differences(target, neutral, standardised=False))
    assert plain.argmax() == 7
    assert found.select(target, neutral, 1).tolist() == [PLANTED]


def test_states_that_do_not_differ_have_small_differences() -> None:
    matrix, _, _, _ = planted_matrix()
    generator = np.random.default_rng(3)
    found = output_svd(matrix).differences(*generator.standard_normal((2, 400, WIDTH)))
    # The largest of 16 standard normal z, over the root of 400 / 2.
    assert found.max() < 4 / np.sqrt(200)
    same = generator.standard_normal((1, WIDTH)).repeat(5, 0)
    assert not output_svd(matrix).differences(same, same).any()


# What cannot be told ---------------------------------------------------------------------------------------


def test_equal_singular_values_are_said() -> None:
    values = np.linspace(8, 2, WIDTH)
    values[PLANTED + 1] = values[PLANTED]
    matrix, _, _, right = planted_matrix(values)
    found = output_svd(matrix)
    assert found.close == [(PLANTED, PLANTED + 1)]
    target, neutral = planted_states(right)
    with pytest.warns(UserWarning, match="components 3, 4 have singular values that differ by less than 0.0001"):
        found.select(target, neutral, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found.warn_of_parts([3, 4])
        found.warn_of_parts([0, 9])


@pytest.mark.parametrize(("rows", "small"), [(50, 1e-13), (400, 1e-8)], ids=["svd", "eigh"])
def test_small_singular_values_are_said_and_never_selected(rows: int, small: float) -> None:
    right = orthonormal(WIDTH, WIDTH, 1).T
    values = np.append(np.linspace(8, 2, WIDTH - 1), 8 * small)
    matrix = (orthonormal(rows, WIDTH, 0) * values) @ right
    with pytest.warns(UserWarning, match="1 of 16 singular values are below"):
        found = output_svd(matrix)
    assert found.lost == (15,)
    states = np.random.default_rng(0).standard_normal((2, 30, WIDTH))
    states[0] += 50 * found.right[15]
    assert 15 not in found.select(*states, count=15)
    with pytest.raises(pc.errors.DataError, match="from 1 to 15, not 16"):
        found.select(*states, count=16)
    with pytest.raises(pc.errors.DataError, match="component 15 is rounding"):
        found.left([15])


def test_bad_input_is_said() -> None:
    matrix, _, _, right = planted_matrix()
    found, (target, neutral) = output_svd(matrix), planted_states(right)
    empty = target[:0]
    for call, match in [
        (lambda: output_svd(np.ones(4)), r"\[vocabulary, d\], not \[4\]"),
        (lambda: output_svd(matrix * np.nan), "finite"),
        (lambda: found.coordinates(target[:, :3]), "have width 16"),
        (lambda: found.coordinates(target * np.inf), "not finite"),
        (lambda: found.select(empty, neutral), r"the target states are \[0\] steps.*give more texts"),
        (lambda: found.select(target, neutral[0]), "the neutral states"),
        (lambda: found.select(target, neutral, 0), "from 1 to 16, not 0"),
        (lambda: found.left([16]), "from 0 to 15"),
        (lambda: found.left([1, 1]), "different numbers"),
        (lambda: found.left([]), "whole numbers"),
        (lambda: found.left([0.5]), "whole numbers"),  # type: ignore[list-item]
    ]:
        with pytest.raises(pc.errors.DataError, match=match):
            call()


# States of a model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [GPT2, LLAMA, GEMMA2], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_head_states_are_what_the_unembedding_is_given(family: Architecture, side: str) -> None:
    module = family.build()
    model = pc.load(module, tokenizer=tokenizer(side=side))
    module.train()
    hooks = hooks_of(module)
    found = head_states(model, TEXTS, batch_size=3)
    assert module.training and hooks_of(module) == hooks
    assert found.texts.tolist() == [number for number, text in enumerate(TEXTS) for _ in ids_of(text)]
    head = module.get_submodule("lm_head").weight.detach().numpy()  # type: ignore[union-attr]
    for number, text in enumerate(TEXTS):
        there = found.texts == number
        logits = model.logits(text).numpy()
        assert found.emitted[there].tolist() == logits.argmax(-1).tolist()
        assert ((found.states[there] @ head.T).argmax(-1) == logits.argmax(-1)).all()
    last = head_states(model, TEXTS, "last")
    ends = np.flatnonzero(np.append(np.diff(found.texts) > 0, True))
    np.testing.assert_allclose(last.states, found.states[ends], rtol=1e-4, atol=1e-5)
    some = set(found.emitted[:3].tolist())
    assert len(found.emitting(some)) + len(found.not_emitting(some)) == len(found.emitted)
    assert len(found.emitting(some)) == sum(each in some for each in found.emitted.tolist()) > 0


def test_states_of_a_data_set_and_of_an_encoder_with_a_decoder() -> None:
    model = pc.load(T5.build(), tokenizer=tokenizer())
    found = head_states(model, pc.Texts(TEXTS))
    # The decoder reads the start token and all tokens but the last.
    assert len(found.emitted) == sum(len(ids_of(text)) for text in TEXTS)
    assert found.states.shape[1] == WIDTH


def test_a_model_whose_decomposition_is_that_of_its_head() -> None:
    model = pc.load(GPT2.build())
    weight = model.module.lm_head.weight  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, two = output_svd(model), output_svd(weight.detach().double().numpy())  # type: ignore[union-attr]
    np.testing.assert_allclose(one.singular_values, two.singular_values, rtol=1e-12)
    np.testing.assert_allclose(one.right, two.right, atol=1e-9)


def test_models_without_a_head_are_refused() -> None:
    base = pc.load(copy.deepcopy(GPT2.build().transformer), tokenizer=tokenizer())  # type: ignore[arg-type]
    with pytest.raises(pc.errors.ModelError, match="has no readout"):
        output_svd(base)
    with pytest.raises(pc.errors.ModelError, match="has no readout"):
        head_states(base, TEXTS)
    model = pc.load(GPT2.build(), tokenizer=tokenizer())
    with pytest.raises(pc.errors.DataError, match="given no texts"):
        head_states(model, [])
    with pytest.raises(pc.errors.UnknownName, match="no choice of steps is called 'first'"):
        head_states(model, TEXTS, "first")  # type: ignore[arg-type]


class Direct(nn.Module):
    """Its logits are made of the embedding's weights: no module is called for them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True, norm_first=True)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(2))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x @ self.embedding.weight.T


def test_an_unembedding_that_is_never_called_has_no_states_to_read() -> None:
    assert max(ids_of("it sat")) < 20
    ids = torch.arange(5)[None]
    model = pc.load(Direct().eval(), tokenizer=tokenizer(), example=ids)
    assert len(output_svd(model)) == WIDTH
    with pytest.raises(pc.errors.ModelError, match="is not called as a module, once"):
        head_states(model, ["it sat"])
