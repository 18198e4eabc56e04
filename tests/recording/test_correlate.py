"""`correlate`: planted pairs are matched and independent ones not; brute force; many passes; recordings; refusals."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from tests.recording import tiny
from tests.recording.tiny import CASES, alone, recorded, seeded, state_of
from torch import nn

import patchclamp as pc
from patchclamp.errors import DataError, UnknownName
from patchclamp.recording.correlate import passes_for

TEXTS = tiny.texts(60)
SITES = CASES["bert"].sites
NEURONS = tiny.HIDDEN * tiny.LAYERS


def bert(seed: int = 0, dtype: torch.dtype = torch.float32) -> pc.Model:
    return pc.load(seeded(tiny.bert(), seed).to(dtype), tokenizer=tiny.tokenizer())


def correlated(first: Any, second: Any, data: Any = None, *given: Any, **options: Any) -> pc.ModelCorrelation:
    """Quietly, in several batches."""
    return pc.correlate(first, second, data, *given, **({"batch_tokens": 40, "progress": False} | options))


def values_of(model: pc.Model, texts: list[str] = TEXTS) -> np.ndarray:
    """[rows, neurons] of all sites, each text run alone."""
    rows = alone(model.module, SITES, model.tokenizer, texts)
    return np.concatenate([rows[site].values for site in SITES], axis=1).astype(np.float64)


def brute(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.corrcoef(first, second, rowvar=False)[: first.shape[1], first.shape[1] :]


def memory_for(passes: int, first: int, second: int, rows: int, k: int = 10, matrix: bool = False) -> int:
    """As little as is enough for so many passes."""
    for memory in range(10_000, 10_000_000, 500):
        with contextlib.suppress(DataError):
            if passes_for(first, second, rows, k, matrix, memory, 4).number <= passes:
                return memory
    raise AssertionError


class Echo(nn.Module):
    """Reads numbers, and has them as its neurons: as they are, or permuted, scaled, turned and blurred."""

    def __init__(self, change: Any = lambda x: x) -> None:
        super().__init__()
        self.neurons, self.change = nn.Identity(), change

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return self.neurons(self.change(given)).sum(-1)


def echoes(change: Any = lambda x: x) -> pc.Model:
    return pc.load(Echo(change).eval())


HERE = "module:neurons"


def test_it_is_what_brute_force_says() -> None:
    # In single precision, texts alone and in batches differ by more than the correlation is off.
    first, second = bert(0, torch.float64), bert(1, torch.float64)
    found = correlated(first, second, TEXTS, matrix=True, k=5)
    expected = brute(values_of(first), values_of(second))
    assert found.r is not None and found.r.dtype == np.float32
    np.testing.assert_allclose(found.r, expected, rtol=0, atol=1e-7)
    assert found.count == len(values_of(first)) and (found.passes, found.left_out) == (1, 0)
    assert found.sites == {side: dict.fromkeys(SITES, tiny.HIDDEN) for side in ("first", "second")}
    for partners, r in ((found.of_first, expected), (found.of_second, expected.T)):
        order = np.argsort(-np.abs(r), axis=1)[:, :5]
        np.testing.assert_array_equal(partners.indices, order)
        np.testing.assert_allclose(partners.scores, np.take_along_axis(r, order, 1), rtol=0, atol=1e-10)
    single = correlated(bert(0), bert(1), TEXTS, matrix=True)
    np.testing.assert_allclose(single.r, expected, rtol=0, atol=5e-5)  # type: ignore[arg-type]


def test_planted_neurons_are_matched_and_others_are_not() -> None:
    """The second model has the first's neurons in another order, scaled, every third turned, and blurred."""
    random = torch.Generator().manual_seed(0)
    data = torch.randn(3000, 40, generator=random) * 3 + 100
    order = torch.randperm(40, generator=random)
    signs = torch.where(torch.arange(40) % 3 == 0, -1, 1)
    blurred = (data + torch.randn(3000, 40, generator=random))[:, order] * torch.logspace(-6, 6, 40) * signs
    both = torch.cat([data, blurred], dim=1)
    found = correlated(echoes(lambda x: x[:, :40]), echoes(lambda x: x[:, 40:]), both, HERE, k=1)
    np.testing.assert_array_equal(found.of_second.indices[:, 0], order)
    np.testing.assert_array_equal(found.of_first.indices[:, 0], order.argsort())
    np.testing.assert_allclose(found.of_second.scores[:, 0], signs * 3 / 10**0.5, atol=0.02)
    table = found.matches("second").to_polars()
    assert table["mutual"].all() and table["partner_site"].unique().to_list() == [HERE]
    # Each other pair is independent.
    rest = correlated(echoes(lambda x: x[:, :40]), echoes(lambda x: x[:, 40:]), both, HERE, k=2)
    assert np.abs(rest.of_second.scores[:, 1]).max() < 5 / 3000**0.5


def test_independent_models_are_not_matched() -> None:
    """No r is larger than chance allows: 1,600 pairs of 4,000 rows, 5 standard deviations."""
    both = torch.randn(4000, 80, generator=torch.Generator().manual_seed(1))
    found = correlated(
        echoes(lambda x: x[:, :40]), echoes(lambda x: x[:, 40:]), both, HERE, matrix=True, batch_tokens=1500
    )
    assert found.r is not None
    assert np.abs(found.r).max() < 5 / 4000**0.5
    np.testing.assert_allclose(found.r.std(), 4000**-0.5, rtol=0.1)


def test_constant_neurons_are_nobodys_partner() -> None:
    random = torch.Generator().manual_seed(0)
    data = torch.randn(500, 5, generator=random)
    data[:, 2] = 0.7

    def change(given: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.full((len(given), 1), 1e4), given[:, :1]], dim=1)

    found = correlated(echoes(), echoes(change), data, HERE, matrix=True, k=3)
    assert found.r is not None
    assert np.isnan(found.r[2]).all() and np.isnan(found.r[:, 0]).all() and np.isfinite(found.r[[0, 1, 3, 4], 1]).all()
    assert found.of_first.indices[:, 0].tolist() == [1, 1, -1, 1, 1] and (found.of_first.indices[:, 1:] == -1).all()
    assert (found.of_second.indices[0] == -1).all() and np.isnan(found.of_second.scores[0]).all()
    assert 2 not in found.of_second.indices[1] and found.of_second.indices.shape == (2, 3)
    last = found.matches().to_polars().row(-1, named=True)
    unmatched = {"score": None, "r": None, "partner_site": None, "partner_index": None, "mutual": False}
    assert last == {"site": HERE, "index": 2} | unmatched


@pytest.mark.parametrize("passes", [2, 3, 7, 48])
def test_many_passes_give_the_same(passes: int) -> None:
    first, second = bert(0), bert(1)
    whole = correlated(first, second, TEXTS, matrix=True)
    memory = memory_for(passes, NEURONS, NEURONS, whole.count, matrix=True)
    found = correlated(first, second, TEXTS, matrix=True, memory=memory)
    assert 1 < found.passes <= passes and (passes == 48) <= (found.passes > 20)
    for name in ("of_first", "of_second"):
        here, there = getattr(found, name), getattr(whole, name)
        np.testing.assert_array_equal(here.indices, there.indices)
        np.testing.assert_allclose(here.scores, there.scores, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.r, whole.r, rtol=0, atol=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("passes", [1, 4])
@pytest.mark.parametrize("per", ["token", "example"])
def test_stored_activations_give_the_same(passes: int, per: Any, tmp_path: Path) -> None:
    first, second = bert(0), bert(1)
    wanted = correlated(first, second, TEXTS, per=per)
    stored = [recorded(each, TEXTS, "mlp.*", [pc.Moments()], activations=True) for each in (first, second)]
    stored[0].save(tmp_path / "first")
    memory = memory_for(passes, NEURONS, NEURONS, wanted.count)
    found = correlated(pc.Recording.open(tmp_path / "first"), stored[1], memory=memory, per=per)
    assert (found.count, found.sites, found.passes) == (wanted.count, wanted.sites, passes)
    np.testing.assert_array_equal(found.of_first.indices, wanted.of_first.indices)
    np.testing.assert_array_equal(found.of_second.indices, wanted.of_second.indices)
    np.testing.assert_allclose(found.of_second.scores, wanted.of_second.scores, rtol=0, atol=2e-6)
    one = correlated(*stored, None, "mlp.1", "mlp.0")
    two = correlated(first, second, TEXTS, "mlp.1", "mlp.0")
    np.testing.assert_array_equal(one.of_first.indices, two.of_first.indices)


def test_means_over_examples() -> None:
    first, second = bert(0, torch.float64), bert(1, torch.float64)
    found = correlated(first, second, TEXTS, per="example", matrix=True)
    means = []
    for model in (first, second):
        rows = alone(model.module, SITES, model.tokenizer, TEXTS)
        each = [[rows[site].values[rows[site].example == n].mean(0) for site in SITES] for n in range(len(TEXTS))]
        means.append(np.stack([np.concatenate(row) for row in each]))
    assert found.count == len(TEXTS)
    np.testing.assert_allclose(found.r, brute(*means), rtol=0, atol=1e-7)  # type: ignore[arg-type]


def test_tokenizers_that_differ() -> None:
    """Special tokens do not count, so that they may differ; words that are cut differently may not."""
    first = bert(0)
    bare = pc.load(tiny.gpt2(), tokenizer=tiny.tokenizer("$A"))
    found = correlated(first, bare, TEXTS)
    assert found.count == len(values_of(first))
    from tokenizers.pre_tokenizers import Split

    letters = tiny.tokenizer("$A")
    letters.backend_tokenizer.pre_tokenizer = Split("", "isolated")  # type: ignore[assignment]
    other = pc.load(tiny.gpt2(), tokenizer=letters)
    with pytest.raises(DataError, match=r"do not read the same tokens: of text 0, .*per='example'"):
        correlated(first, other, TEXTS)
    assert correlated(first, other, TEXTS, per="example").count == len(TEXTS)


def test_a_model_finds_itself_at_other_sites() -> None:
    model = bert(0)
    found = correlated(model, model, TEXTS, "mlp.0", "mlp.*", k=2)
    assert found.of_first.indices[:, 0].tolist() == list(range(tiny.HIDDEN))
    np.testing.assert_allclose(found.of_first.scores[:, 0], 1, atol=1e-6)
    assert found.neuron("second", tiny.HIDDEN + 3) == ("mlp.1", 3)
    table = found.matches().where(pl.col("partner_site") == "mlp.0").to_polars()
    assert (table["index"] == table["partner_index"]).all() and len(table) == tiny.HIDDEN


def test_it_agrees_with_the_summary_within_one_recording() -> None:
    model = bert(0)
    summary = recorded(model, TEXTS, "mlp.*", [pc.Correlation("mlp.1", partners=4)])["mlp.0"].correlation
    found = correlated(model, model, TEXTS, "mlp.0", "mlp.1", k=4, matrix=True)
    np.testing.assert_allclose(found.r, summary.r, rtol=0, atol=2e-6)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found.of_first.indices, summary.partners().indices)


def test_rows_that_are_not_finite_are_left_out() -> None:
    data = torch.randn(60, 3, generator=torch.Generator().manual_seed(0)).abs() + 0.5
    data[:3, 0] = 0.0

    def change(given: torch.Tensor) -> torch.Tensor:
        return 1 / given

    with pytest.warns(UserWarning, match="3 of 60 rows hold a NaN or an infinity and were left out"):
        found = correlated(echoes(), echoes(change), data, HERE, matrix=True, batch_tokens=7)
    kept = data[3:].double().numpy()
    assert (found.count, found.left_out) == (57, 3)
    np.testing.assert_allclose(found.r, brute(kept, 1 / kept), rtol=0, atol=2e-6)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no row is finite"):
        correlated(echoes(), echoes(lambda x: x * torch.nan), data, HERE)


def test_stored_rows_that_are_not_finite_are_left_out_in_every_pass() -> None:
    data = torch.randn(60, 3, generator=torch.Generator().manual_seed(0)).abs() + 0.5
    data[:3, 0] = 0.0
    with pytest.warns(UserWarning):
        stored = [
            recorded(each, data, HERE, [pc.Moments()], activations=True) for each in (echoes(), echoes(lambda x: 1 / x))
        ]
    with pytest.warns(UserWarning, match="3 of 60 rows"):
        found = correlated(stored[0], stored[1], None, HERE, matrix=True, memory=memory_for(3, 3, 3, 60))
    kept = data[3:].double().numpy()
    np.testing.assert_allclose(found.r, brute(kept, 1 / kept), rtol=0, atol=2e-6)  # type: ignore[arg-type]


def test_one_row_and_one_neuron() -> None:
    lonely = correlated(echoes(), echoes(), torch.ones(1, 1), HERE, matrix=True)
    assert lonely.count == 1 and np.isnan(lonely.r).all()  # type: ignore[arg-type]
    assert lonely.of_first.indices.tolist() == [[-1]] and len(lonely.matches()) == 1
    pair = correlated(echoes(), echoes(lambda x: -x), torch.tensor([[1.0], [2.0]]), HERE)
    np.testing.assert_allclose(pair.of_first.scores, [[-1.0]])


def test_of_equal_partners_the_smaller_comes_first_across_passes() -> None:
    data = (torch.arange(100) % 2 * 2.0 - 1)[:, None]  # of which nothing is rounded
    copies = echoes(lambda x: x.expand(-1, 90))
    for passes in (1, 2, 60):
        found = correlated(copies, copies, data, HERE, k=4, memory=memory_for(passes, 90, 90, 100, k=4))
        assert passes // 2 < found.passes <= passes
        for partners in (found.of_first, found.of_second):
            np.testing.assert_array_equal(partners.indices, np.tile(np.arange(4), (90, 1)))


def test_what_it_takes_is_said_before_it_starts(capsys: pytest.CaptureFixture[str]) -> None:
    correlated(bert(0), bert(1), TEXTS, memory=memory_for(3, NEURONS, NEURONS, 481), progress=True)
    said = capsys.readouterr().err
    assert f"{NEURONS} x {NEURONS} pairs of neurons in 3 passes with 0 MB" in said
    assert f"{len(TEXTS)} examples" in said


def test_passes_are_as_few_as_memory_allows() -> None:
    fits = passes_for(9216, 9216, 10**8, 10, False, 2 * 10**9, 4)
    assert (fits.number, fits.neurons, fits.block_rows) == (1, 9216, 4096) and fits.nbytes < 1.3e9
    llama = passes_for(458_752, 458_752, 10**8, 10, False, 64 * 10**9, 4)
    assert llama.nbytes <= 64 * 10**9 and (llama.number - 1) * llama.neurons < 458_752 <= llama.number * llama.neurons
    for first, second, memory in ((1000, 3000, 30_000_000), (7, 5, 10_000), (9216, 50_000, 10**9)):
        found = passes_for(first, second, 10**6, 3, False, memory, 4)
        assert found.nbytes <= memory and found.number * found.neurons >= first
    with pytest.raises(DataError, match=r"1,000 x 1,000 pairs of neurons need at least .*leave out matrix=True"):
        passes_for(1000, 1000, 100, 3, True, 10**6, 4)


def test_bad_input() -> None:
    first, second = bert(0), bert(1)
    before = state_of(first.module)
    for k in (0, -1, 2.5, None):
        with pytest.raises(DataError, match="correlate: k is a whole number >= 1"):
            pc.correlate(first, second, TEXTS, k=k)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="per is 'token' or 'example', not 'word'"):
        correlated(first, second, TEXTS, per="word")
    with pytest.raises(DataError, match="memory is a whole number"):
        correlated(first, second, TEXTS, memory=0)
    with pytest.raises(DataError, match="need at least"):
        correlated(first, second, TEXTS, memory=100)
    with pytest.raises(DataError, match="two models need data="):
        correlated(first, second)
    with pytest.raises(UnknownName, match=r"mlp\.9"):
        correlated(first, second, TEXTS, "mlp.9")
    with pytest.raises(UnknownName, match=r"mlp\.7"):
        correlated(first, second, TEXTS, "mlp.*", "mlp.7")
    with pytest.raises(DataError, match="no sites are asked for"):
        correlated(first, second, TEXTS, [])
    with pytest.raises(DataError, match="at least 1; not 0"):
        correlated(first, second, TEXTS, batch_tokens=0)
    found = correlated(first, second, TEXTS)
    with pytest.raises(DataError, match="'first' or 'second', not 'third'"):
        found.matches("third")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=f"has {NEURONS} neurons; there is no number {NEURONS}"):
        found.neuron("first", NEURONS)
    assert state_of(first.module) == before


def test_bad_recordings() -> None:
    first, second = bert(0), bert(1)
    kept = recorded(first, TEXTS, "mlp.*", [pc.Moments()], activations=True)
    bare = recorded(second, TEXTS, "mlp.*", [pc.Moments()])
    other = recorded(second, TEXTS[:5], "mlp.*", [pc.Moments()], activations=True)
    special = recorded(second, TEXTS, "mlp.*", [pc.Moments()], activations=True, special_tokens=True)
    with pytest.raises(DataError, match=r"activations of mlp\.0 were not kept"):
        correlated(kept, bare)
    with pytest.raises(DataError, match="different data"):
        correlated(kept, other)
    with pytest.raises(DataError, match=r"has \d+ rows where mlp\.0 has \d+, or others"):
        correlated(kept, special)
    with pytest.raises(DataError, match="two models and data, or two recordings"):
        correlated(kept, second, TEXTS)
    with pytest.raises(DataError, match="leave out data="):
        correlated(kept, kept, TEXTS)
    with pytest.raises(UnknownName, match="Only recorded sites"):
        correlated(kept, kept, None, "attn.0")


def test_sites_without_the_same_rows_are_refused() -> None:
    """The second model has a row for each example where the first has four."""
    data = torch.randn(10, 4, 3)
    with pytest.raises(DataError, match=r"has 40 rows where module:neurons of Echo has 10, .*per='example'"):
        correlated(echoes(), echoes(lambda x: x.mean(1)), data, HERE, batch_tokens=4096)
    found = correlated(echoes(), echoes(lambda x: x.mean(1)), data, HERE, per="example")
    np.testing.assert_allclose(found.of_first.scores[:, 0], 1, atol=1e-5)


def test_the_models_are_left_as_they_were_when_it_stops() -> None:
    first, second = bert(0), bert(1)
    for each in (first, second):
        each.select("mlp.*")  # may run the model to see how it works
    before = state_of(first.module), state_of(second.module)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = second.module.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        correlated(first, second, TEXTS)
    handle.remove()
    assert (state_of(first.module), state_of(second.module)) == before
