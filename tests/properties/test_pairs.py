"""However the rows are cut into batches, ordered and merged, what is kept of pairs is what the full matrix says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from patchclamp.recording.batch import Batch, Calibration, Setting
from patchclamp.recording.summaries import CoFiring, Correlation, Summary, co_firing, correlation, pairs
from patchclamp.recording.thresholds import FractionOfMaximum

# How much is worked on at once; small here, so that small data is cut as large data is.
PIECES = [
    (co_firing, "_ROWS_AT_ONCE", [1, 3, 1 << 12]),
    (correlation, "_ROWS_AT_ONCE", [1, 3, 1 << 10]),
    (pairs, "_PAIRS_AT_ONCE", [1, 7, 1 << 22]),
]
FEW = [-1.0, -0.0, 0.0, 0.5, 1.0]
OTHER = "mlp.1"


class Data:
    """Activations of two sites on the same rows; some rows of the other one are not finite."""

    def __init__(self, seed: int, kind: str) -> None:
        random = np.random.default_rng(seed)
        self.rows, self.size, self.columns = (int(random.integers(1, high)) for high in (40, 7, 6))
        shape = (self.rows, self.size + self.columns)
        values = random.normal(size=shape)
        values += values[:, random.permutation(shape[1])] * random.choice([-2, 0, 1], size=shape[1])
        if kind == "few":
            values = random.choice(FEW, size=shape)
        elif kind == "large mean":
            values = 1e4 + 0.1 * values
        elif kind == "tiny":
            values *= 1e-30
        elif kind == "huge":
            values *= 1e30
        values = values.astype(np.float64 if kind == "double" else np.float32)
        values[:, random.random(shape[1]) < 0.2] = 0.1  # constant neurons
        self.values, self.others = values[:, : self.size].copy(), values[:, self.size :].copy()
        self.finite = np.ones(self.rows, bool)
        if kind == "not finite":
            self.finite = random.random(self.rows) < 0.8
            self.others[~self.finite, random.integers(self.columns)] = random.choice([np.nan, np.inf, -np.inf])

    def batch(self, rows: np.ndarray | slice) -> Batch:
        values = torch.from_numpy(self.values[rows])
        index = torch.arange(len(values))
        return Batch(values, index, index, others={OTHER: torch.from_numpy(self.others[rows])})

    def setting(self) -> Setting:
        maximum = np.linspace(0.2, 3, self.size, dtype=np.float32)
        dtype = torch.from_numpy(self.values).dtype
        calibration = Calibration(maximum, lambda q: maximum * np.float32(q))
        return Setting("mlp.0", self.size, calibration=calibration, dtype=dtype, sizes={OTHER: self.columns})

    def run(self, template: Summary, seed: int) -> Any:
        """Show batches in any order to several accumulators, some stored and read again, and merge them as a tree."""
        random = np.random.default_rng(seed)
        cuts = np.sort(random.integers(0, self.rows + 1, size=random.integers(0, 6)))
        batches = [self.batch(each) for each in np.split(random.permutation(self.rows), cuts)]
        with pytest.MonkeyPatch.context() as patch:
            for module, name, choices in PIECES:
                patch.setattr(module, name, random.choice(choices).item())
            accumulators = [template.start(self.setting()) for _ in range(random.integers(1, 5))]
            for batch in batches:
                accumulators[random.integers(len(accumulators))].update(batch)
            accumulators = [self._maybe_stored(each, template, random) for each in accumulators]
            while len(accumulators) > 1:
                one, other = random.choice(len(accumulators), size=2, replace=False)
                accumulators[one].merge(accumulators[other])
                del accumulators[other]
            return accumulators[0]

    def _maybe_stored(self, accumulator: Summary, template: Summary, random: np.random.Generator) -> Summary:
        if random.random() < 0.5:
            return accumulator
        again = Summary.from_parameters(template.name, template.parameters())
        blank = Setting("mlp.0", self.size, dtype=self.setting().dtype, sizes={OTHER: self.columns})
        return again.reopen(blank, accumulator.state())


KINDS = ["normal", "few", "large mean", "tiny", "huge", "double", "not finite"]
datas = st.builds(Data, st.integers(0, 2**32 - 1), st.sampled_from(KINDS))
seeds = st.integers(0, 2**32 - 1)


def some_block(data: Data, seed: int) -> tuple[int, int] | None:
    start, stop = np.sort(np.random.default_rng(seed).integers(0, data.size + 1, size=2)).tolist()
    return (start, stop) if start < stop else None


def brute_partners(key: np.ndarray, own: int | None, k: int) -> np.ndarray:
    """The k columns of each row with the largest key, the smaller index first; -1 where there are fewer."""
    found = np.full(
        (len(key), min(k, key.shape[1] - (own is not None))),
        -1,
    )
    for row, keys in enumerate(key):
        ranked = sorted((-each, column) for column, each in enumerate(keys) if each > 0)
        ranked = [column for _, column in ranked if own is None or column != own + row]
        found[row, : len(ranked)] = ranked[: found.shape[1]]
    return found


@given(datas, seeds, st.integers(1, 8), st.sampled_from([0.0, 0.4, FractionOfMaximum(0.5)]))
def test_co_firing(data: Data, seed: int, k: int, threshold: float | FractionOfMaximum) -> None:
    block = some_block(data, seed)
    found = data.run(CoFiring(threshold, partners=k, block=block), seed)
    number = threshold
    if isinstance(threshold, FractionOfMaximum):
        number = np.linspace(0.2, 3, data.size, dtype=np.float32) / 2
    fires = data.values > np.asarray(number, dtype=data.values.dtype)
    rows = slice(*(block or (0, data.size)))
    both = (fires[:, rows, None] & fires[:, None]).sum(0)
    either = (fires[:, rows, None] | fires[:, None]).sum(0)
    assert found.count == data.rows
    np.testing.assert_array_equal(found.fired, fires.sum(0), strict=True)
    np.testing.assert_array_equal(found.both, both, strict=True)
    jaccard = both / np.where(either, either, np.nan)
    np.testing.assert_array_equal(found.jaccard(), jaccard)
    partners = found.partners()
    index = brute_partners(jaccard, rows.start, k)
    np.testing.assert_array_equal(partners.indices, index)
    expected = np.where(index < 0, np.nan, np.take_along_axis(jaccard, index, 1))
    np.testing.assert_array_equal(partners.scores, expected)


def brute_correlation(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """numpy's, in float64, one pair at a time; NaN where one of the two is constant."""
    left, right = left.astype(np.float64), right.astype(np.float64)
    found = np.full((left.shape[1], right.shape[1]), np.nan)
    for i, one in enumerate(left.T):
        for j, other in enumerate(right.T):
            if len(one) and np.ptp(one) > 0 and np.ptp(other) > 0:
                found[i, j] = np.corrcoef(one, other)[0, 1]
    return found


@given(datas, seeds, st.integers(1, 8), st.sampled_from([None, "mlp.0", OTHER]))
def test_correlation(data: Data, seed: int, k: int, with_: str | None) -> None:
    block = some_block(data, seed)
    found = data.run(Correlation(with_, partners=k, block=block), seed)
    rows = slice(*(block or (0, data.size)))
    kept = data.finite if with_ == OTHER else np.ones(data.rows, bool)
    other = data.others if with_ == OTHER else data.values
    expected = brute_correlation(data.values[kept, rows], other[kept])
    assert found.count == kept.sum()
    # float32 is given a mean of 10,000 with an accuracy of 0.0005, which both sides see alike.
    atol = 1e-10 if data.values.dtype == np.float64 else 2e-6
    np.testing.assert_allclose(found.r, expected, rtol=0, atol=atol)
    own = None if with_ == OTHER else rows.start
    partners, r = found.partners(), found.r
    index = brute_partners(np.abs(r), own, k)
    np.testing.assert_array_equal(partners.indices, index)
    np.testing.assert_array_equal(partners.scores, np.where(index < 0, np.nan, np.take_along_axis(r, index, 1)))
    if own is not None:
        itself = r[np.arange(len(r)), own + np.arange(len(r))]
        assert np.isin(itself[~np.isnan(itself)], 1.0).all()


@given(seeds)
def test_a_large_mean_does_not_cancel(seed: int) -> None:
    """Where the sum of squares has no digit of the variance left, the correlation has six."""
    random = np.random.default_rng(seed)
    common = random.normal(size=(5000, 1))
    values = 1e4 + 0.1 * (common * random.normal(size=4) + random.normal(size=(5000, 4)))
    values = values.astype(np.float32)
    started = Correlation().start(Setting("mlp.0", 4))
    for part in np.split(values, np.sort(random.integers(0, 5000, size=5))):
        index = torch.arange(len(part))
        started.update(Batch(torch.from_numpy(part), index, index))
    expected = np.corrcoef(values.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(started.r, expected, rtol=0, atol=2e-6)


TEMPLATES = [CoFiring(0.0), CoFiring(block=(0, 1)), Correlation(), Correlation(OTHER), Correlation(OTHER, block=(0, 1))]


@pytest.mark.parametrize("template", TEMPLATES, ids=repr)
@given(data=datas, seed=seeds)
def test_nbytes_is_what_is_held(template: Summary, data: Data, seed: int) -> None:
    accumulator = data.run(template, seed)
    held = sum(array.nbytes for array in accumulator.state().values())
    assert accumulator.held_bytes() == held
    assert template.nbytes([data.setting(), data.setting()]) == 2 * held


@pytest.mark.parametrize("template", TEMPLATES, ids=repr)
@given(data=datas, seed=seeds)
def test_a_state_comes_back_and_shares_no_memory(template: Summary, data: Data, seed: int) -> None:
    accumulator = data.run(template, seed)
    state = accumulator.state()
    kept = {name: each.copy() for name, each in state.items()}
    again = template.reopen(data.setting(), state)
    again.update(data.batch(slice(None)))
    accumulator.update(data.batch(slice(None)))
    for name, array in state.items():
        np.testing.assert_array_equal(array, kept[name], strict=True)
        np.testing.assert_array_equal(again.state()[name], accumulator.state()[name], strict=True)
