"""The tokens that neurons promote: against all directions, sorted; planted; bounded in memory; and refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.architectures import BERT, BLOOM, GEMMA2, GPT2, LLAMA, MISTRAL, QWEN3, T5, T5_GATED, WIDTH, Architecture
from transformers import GPT2Config, GPT2LMHeadModel

import patchclamp as pc
from patchclamp.errors import DataError, ModelError, UnknownName
from patchclamp.model import top_tokens as module_of_top_tokens
from patchclamp.model.readout import readout_of
from patchclamp.model.top_tokens import TopTokens, Written, top_tokens

FAMILIES = [GPT2, LLAMA, GEMMA2, T5, T5_GATED, BLOOM, QWEN3, MISTRAL]


def brute(directions: torch.Tensor, k: int, smallest: bool = False) -> tuple[np.ndarray, np.ndarray]:
    values = directions.float().numpy()
    order = np.argsort(values if smallest else -values, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(values, order, 1)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@torch.no_grad()
def test_they_are_the_best_of_all_directions(family: Architecture) -> None:
    model = pc.load(family.build())
    readout = model.readout
    sites = "decoder.mlp.*" if family in (T5, T5_GATED) else "mlp.*"
    found = readout.top_tokens(sites, 4, bottom=True)
    assert list(found.sizes) == [site.name for site in model.select(sites)] and len(found) == sum(found.sizes.values())
    for site in model.select(sites):
        weights = model.output_weights(site)
        if site.norm is not None and family is GEMMA2:
            gain: Any = model.module.get_submodule(site.norm)
            weights = weights * (1 + gain.weight)
        directions = readout.directions(weights)
        ids, values = brute(directions, 4)
        of_site = found[site.name]
        assert of_site.bottom_ids is not None and of_site.bottom_values is not None
        np.testing.assert_allclose(of_site.values, values, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(of_site.ids, ids)
        ids, values = brute(directions, 4, smallest=True)
        np.testing.assert_allclose(of_site.bottom_values, values, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(of_site.bottom_ids, ids)


@torch.no_grad()
def test_planted_neurons_are_read() -> None:
    """Neuron 3 writes the unembedding of token 7, and neuron 5 writes against that of token 11."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=301, n_embd=32, n_layer=2, n_head=2, n_positions=16, tie_word_embeddings=False)
    module: Any = GPT2LMHeadModel(config).eval()
    model = pc.load(module)
    weights = model.output_weights("mlp.1")
    weights[3] = 10 * module.lm_head.weight[7]
    weights[5] = -10 * module.lm_head.weight[11]
    found = model.readout.top_tokens("mlp.1", 1, bottom=True)
    assert found.bottom_ids is not None
    assert found.ids[3, 0] == 7 and found.bottom_ids[5, 0] == 11
    other = model.readout.top_tokens("mlp.0", 1)
    assert other.values.max() < 0.5 * found.values[3, 0]


rows = st.integers(1, 9)


@given(st.integers(0, 2**32 - 1), rows, st.integers(1, 300), st.integers(1, 320), rows, st.booleans())
def test_exactly_whatever_the_blocks(seed: int, n: int, vocabulary: int, k: int, block: int, ties: bool) -> None:
    """Whole numbers multiply without rounding, so that brute force is met to the last digit, ties included."""
    random = np.random.default_rng(seed)
    high = 2 if ties else 100
    vectors, matrix = (
        torch.from_numpy(random.integers(-high, high + 1, (size, 6)).astype(np.float32)) for size in (n, vocabulary)
    )
    memory = block * 4 * (-(-vocabulary // 64) * 64)
    found = top_tokens(
        [Written("", vectors)], lambda x: x, matrix, k, bottom=True, dtype=torch.float32, memory=memory, show=False
    )
    for smallest, ids, values in ((False, found.ids, found.values), (True, found.bottom_ids, found.bottom_values)):
        expected = brute(vectors @ matrix.T, k, smallest)
        np.testing.assert_array_equal(ids, expected[0])
        np.testing.assert_array_equal(values, expected[1])
        assert ids is not None and ids.shape == (n, min(k, vocabulary))


def test_no_more_is_held_than_was_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Watched(module_of_top_tokens._Product):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            made.append(self)

        def __call__(self, given: torch.Tensor) -> torch.Tensor:
            out = super().__call__(given)
            assert out.data_ptr() == self.buffer.data_ptr() and out.stride(0) % 64 == 0
            return out

    monkeypatch.setattr(module_of_top_tokens, "_Product", Watched)
    model = pc.load(GPT2.build())
    readout = model.readout
    whole = readout.top_tokens("mlp.*", 3)
    few = readout.top_tokens("mlp.*", 3, memory=4 * 64 * 5)
    one = readout.top_tokens("mlp.*", 3, memory=1)
    assert [len(each.buffer) for each in made][1:] == [5, 1]
    assert made[1].buffer.numel() * 4 <= 4 * 64 * 5
    # Weights that are as they should be are not copied.
    assert all(each.matrix.data_ptr() == model.module.get_parameter("lm_head.weight").data_ptr() for each in made)
    for each in (few, one):
        np.testing.assert_array_equal(each.ids, whole.ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_weights_of_another_precision_are_multiplied_in_float32(dtype: torch.dtype) -> None:
    model = pc.load(LLAMA.build(dtype))
    exact = pc.load(LLAMA.build(dtype).float())
    found, wanted = (each.readout.top_tokens("mlp.*", 3) for each in (model, exact))
    assert found.values.dtype == np.float32
    # The norm that is folded in is computed by the network in its own precision.
    tolerance = 1e-5 if dtype == torch.float64 else 1e-3
    np.testing.assert_allclose(found.values, wanted.values, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_a_tied_unembedding_and_one_that_lies_the_other_way() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=101, n_embd=32, n_layer=1, n_head=2, n_positions=16)
    tied: Any = GPT2LMHeadModel(config).eval()
    assert tied.lm_head.weight is tied.transformer.wte.weight
    readout = pc.load(tied).readout
    expected = brute(readout.directions(torch.eye(32)), 5)
    np.testing.assert_array_equal(readout.top_tokens(torch.eye(32), 5).ids, expected[0])
    turned = tied.lm_head.weight.detach().T.contiguous().T
    assert turned.stride(1) != 1
    found = top_tokens(
        [Written("", torch.eye(32))],
        lambda x: readout.linear_part(x),
        turned,
        5,
        bottom=False,
        dtype=torch.float32,
        memory=1 << 20,
        show=False,
    )
    np.testing.assert_array_equal(found.ids, expected[0])


def test_low_precision_where_it_is_asked_for() -> None:
    """As on a GPU; here it is only slow."""
    vectors, matrix = torch.eye(6), torch.randn(70, 6, generator=torch.Generator().manual_seed(0))
    found = top_tokens(
        [Written("", vectors)], lambda x: x, matrix, 3, bottom=False, dtype=torch.bfloat16, memory=1 << 20, show=False
    )
    values = matrix.bfloat16().float().T
    np.testing.assert_array_equal(found.values, values.sort(dim=1, descending=True).values[:, :3].numpy())


def test_bad_input() -> None:
    model = pc.load(GPT2.build())
    readout = model.readout
    for k in (0, -1, 2.5, True):
        with pytest.raises(DataError, match="top_tokens: k is a whole number >= 1"):
            readout.top_tokens("mlp.*", k)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="memory is a whole number"):
        readout.top_tokens(memory=0)
    with pytest.raises(DataError, match=f"width {WIDTH}, not 3"):
        readout.top_tokens(torch.randn(2, 3))
    with pytest.raises(DataError, match="bfloat16 is for a GPU"):
        readout.top_tokens(dtype=torch.bfloat16)
    with pytest.raises(UnknownName, match=r"mlp\.9"):
        readout.top_tokens("mlp.9")
    with pytest.raises(ModelError, match=r"resid_post\.0 is of kind 'resid_post'"):
        readout.top_tokens("resid_post.0")
    with pytest.raises(DataError, match="no sites are asked for"):
        readout.top_tokens([])
    with pytest.raises(UnknownName, match=r"mlp\.1"):
        readout.top_tokens("mlp.0")["mlp.1"]
    bare = readout_of(model.module, model.sites)
    with pytest.raises(DataError, match=r"use model\.readout"):
        bare.top_tokens("mlp.0")  # type: ignore[union-attr]
    with pytest.raises(DataError, match=r"encoder\.mlp\.0 does not write .*decoder\.mlp\.\*"):
        pc.load(T5.build()).readout.top_tokens("mlp.*")
    with pytest.raises(ModelError, match="has no readout"):
        _ = pc.load(BERT.build()).readout


@torch.no_grad()
def test_weights_that_are_not_finite_are_named() -> None:
    model = pc.load(GPT2.build())
    readout = model.readout
    model.output_weights("mlp.1")[2, 3] = torch.nan
    with pytest.raises(DataError, match=r"what mlp\.1:2 does to the logits is NaN"):
        readout.top_tokens("mlp.*")
    with pytest.raises(DataError, match="vector 1 does"):
        readout.top_tokens(torch.tensor([[1.0], [torch.nan]]).expand(2, WIDTH))


def test_none_and_one() -> None:
    readout = pc.load(GPT2.build()).readout
    assert readout.top_tokens(torch.zeros(0, WIDTH), 3).ids.shape == (0, 3)
    silent = readout.top_tokens(torch.zeros(WIDTH), 3, bottom=True)
    assert silent.ids.tolist() == [[0, 1, 2]] and silent.bottom_ids is not None
    assert silent.bottom_ids.tolist() == [[0, 1, 2]] and not silent.values.any()
    assert isinstance(silent, TopTokens) and "1 neurons, 3 tokens" in repr(silent)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: torch.cuda.is_available() is False")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    here, there = pc.load(LLAMA.build()), pc.load(LLAMA.build().cuda())
    wanted, found = here.readout.top_tokens("mlp.*", 3), there.readout.top_tokens("mlp.*", 3, dtype=dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    np.testing.assert_allclose(found.values, wanted.values, rtol=tolerance, atol=tolerance)
