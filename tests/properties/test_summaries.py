"""However the rows are cut into batches, ordered and merged, a summary says what the full matrix says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from patchclamp.recording import batch as batch_module
from patchclamp.recording.batch import Batch, Calibration, Setting
from patchclamp.recording.summaries import (
    ByLabel,
    ByToken,
    FiringRate,
    Histogram,
    MinMax,
    Moments,
    Summary,
    TopExamples,
    by_token,
    histogram,
    top_examples,
)
from patchclamp.recording.thresholds import FractionOfMaximum, OwnQuantile

# Few distinct values make many ties. -0.0 equals 0.0; 0.125 and -2.0 are edges of bins.
FEW = [-2.0, -1.0, -0.0, 0.0, 0.125, 0.5, 1.0, 3.0]
# How much is worked on at once; small here, so that small data is cut as large data is.
PIECES = [
    (batch_module, "_BLOCK_ELEMENTS", [1, 9, 1 << 20]),
    (top_examples, "_SPARSE_SHARE", [0.0, 0.25, 1e9]),
    (top_examples, "_COLUMNS_AT_ONCE", [1, 2, 128]),
    (histogram, "_COUNTED_AT_ONCE", [1, 13, 1 << 22]),
    (by_token, "_ROWS_AT_ONCE", [1, 7, 1 << 20]),
]
KINDS = ("code", "prose", "verse")
TOKENS = np.array([7, 3, 900])


class Data:
    """A full matrix of activations with what belongs to its rows."""

    def __init__(self, seed: int, kind: str) -> None:
        random = np.random.default_rng(seed)
        lengths = random.integers(1, 7, size=random.integers(1, 15))
        self.rows, self.size = int(lengths.sum()), int(random.integers(1, 6))
        ids = random.permutation(1000)[: len(lengths)]
        self.example = np.repeat(ids, lengths)
        # Not every position counts, so there are gaps.
        self.position = np.concatenate([np.sort(random.permutation(2 * n)[:n]) for n in lengths])
        self.token = random.choice([3, 7, 8, 900, 901], size=self.rows)
        self.code = np.repeat(random.integers(0, len(KINDS), size=len(lengths)), lengths)
        dtype = np.float64 if kind == "double" else np.float32
        if kind == "few":
            values = random.choice(FEW, size=(self.rows, self.size))
        elif kind == "negative":
            values = -np.abs(random.normal(size=(self.rows, self.size))) - 0.1
        elif kind == "constant":
            values = np.full((self.rows, self.size), 0.1)
        elif kind == "large mean":
            values = random.normal(1e4, 0.1, size=(self.rows, self.size))
        else:
            values = random.normal(size=(self.rows, self.size)) * 2.0 ** random.integers(-9, 9)
        self.values = values.astype(dtype)

    def batch(self, rows: np.ndarray | slice) -> Batch:
        return Batch(
            torch.from_numpy(self.values[rows]),
            torch.from_numpy(self.example[rows]),
            torch.from_numpy(self.position[rows]),
            torch.from_numpy(self.token[rows]),
            {"kind": torch.from_numpy(self.code[rows])},
        )

    def setting(self) -> Setting:
        maximum = np.linspace(0.2, 3, self.size, dtype=np.float32)
        calibration = Calibration(maximum, lambda q: maximum * np.float32(q))
        dtype = torch.from_numpy(self.values).dtype
        return Setting("mlp.0", self.size, TOKENS, {"kind": KINDS}, calibration, dtype)


class Plan:
    """Where to cut, in which order to show the batches, and how to merge."""

    def __init__(self, data: Data, seed: int, whole_examples: bool = False) -> None:
        random = np.random.default_rng(seed)
        places = np.arange(1, data.rows)
        if whole_examples:
            places = places[data.example[1:] != data.example[:-1]]
        cuts = np.sort(random.choice(places, size=random.integers(0, len(places) + 1), replace=False))
        pieces = [each for each in np.split(np.arange(data.rows), cuts)]
        if not whole_examples:
            pieces.append(np.arange(0))  # a batch without rows
        self.batches = [data.batch(pieces[each]) for each in random.permutation(len(pieces))]
        self._random = random

    def run(self, template: Summary, setting: Setting) -> Any:
        """Show the batches to several accumulators, some stored and read again, and merge them as a tree."""
        with pytest.MonkeyPatch.context() as patch:
            for module, name, choices in PIECES:
                patch.setattr(module, name, self._random.choice(choices).item())
            group_rows = int(self._random.choice([2, 5, 32]))
            patch.setattr(batch_module, "GROUP_ROWS", group_rows)
            patch.setattr(top_examples, "GROUP_ROWS", group_rows)
            return self._run(template, setting)

    def _run(self, template: Summary, setting: Setting) -> Summary:
        random = self._random
        accumulators = [template.start(setting) for _ in range(random.integers(1, 5))]
        for batch in self.batches:
            accumulators[random.integers(len(accumulators))].update(batch)
        accumulators = [self._maybe_stored(each, template, setting) for each in accumulators]
        while len(accumulators) > 1:
            one, other = random.choice(len(accumulators), size=2, replace=False)
            accumulators[one].merge(accumulators[other])
            del accumulators[other]
        return self._maybe_stored(accumulators[0], template, setting)

    def _maybe_stored(self, accumulator: Summary, template: Summary, setting: Setting) -> Summary:
        if self._random.random() < 0.5:
            return accumulator
        again = Summary.from_parameters(template.name, template.parameters())
        blank = Setting(setting.site, setting.size, None, setting.labels, None, setting.dtype)
        return again.reopen(blank, accumulator.state())


datas = st.builds(
    Data,
    st.integers(0, 2**32 - 1),
    st.sampled_from(["few", "few", "normal", "negative", "constant", "large mean", "double"]),
)
seeds = st.integers(0, 2**32 - 1)


@given(datas, seeds)
def test_moments(data: Data, seed: int) -> None:
    found = Plan(data, seed).run(Moments(), data.setting())
    wide = data.values.astype(np.float64)
    assert found.count == data.rows
    np.testing.assert_allclose(found.mean, wide.mean(0), rtol=1e-9, atol=1e-12 * np.abs(wide).max())
    np.testing.assert_allclose(found.variance, wide.var(0), rtol=1e-6, atol=1e-18 * np.square(wide).max())


@given(datas, seeds)
def test_min_max(data: Data, seed: int) -> None:
    found = Plan(data, seed).run(MinMax(), data.setting())
    np.testing.assert_array_equal(found.min, data.values.min(0), strict=True)
    np.testing.assert_array_equal(found.max, data.values.max(0), strict=True)


@given(datas, seeds)
def test_firing_rate(data: Data, seed: int) -> None:
    thresholds = (0.0, 0.125, -1.0, FractionOfMaximum(0.5), OwnQuantile(0.25))
    found = Plan(data, seed).run(FiringRate(*thresholds), data.setting())
    maximum = np.linspace(0.2, 3, data.size, dtype=np.float32)
    numbers = [np.float32(0), np.float32(0.125), np.float32(-1), maximum / 2, maximum / 4]
    expected = np.stack([(data.values > each).sum(0) for each in numbers], axis=1)
    assert found.count == data.rows
    np.testing.assert_array_equal(found.fired, expected, strict=True)
    np.testing.assert_array_equal(found.rate, expected / data.rows)


def brute_top(data: Data, neuron: int, k: int) -> list[int]:
    """The rows of a neuron's k best, by the fixed rule."""
    keys = zip(-data.values[:, neuron], data.example.tolist(), data.position.tolist(), range(data.rows), strict=True)
    return [row for *_, row in sorted(keys)[:k]]


@given(datas, seeds, st.integers(1, 5) | st.integers(1, 30))
def test_top_examples(data: Data, seed: int, k: int) -> None:
    found = Plan(data, seed).run(TopExamples(k), data.setting())
    assert found.values.dtype == data.values.dtype
    for neuron in range(data.size):
        rows = brute_top(data, neuron, k)
        n = len(rows)
        np.testing.assert_array_equal(found.values[neuron, :n], data.values[rows, neuron])
        np.testing.assert_array_equal(found.example[neuron, :n], data.example[rows])
        np.testing.assert_array_equal(found.position[neuron, :n], data.position[rows])
        assert np.isnan(found.values[neuron, n:]).all()
        assert (found.example[neuron, n:] == -1).all() and (found.position[neuron, n:] == -1).all()


@given(datas, seeds, st.integers(1, 8), st.integers(1, 3))
def test_windows_of_top_examples(data: Data, seed: int, k: int, context: int) -> None:
    found = Plan(data, seed, whole_examples=True).run(TopExamples(k, context), data.setting())
    row_of = {pair: row for row, pair in enumerate(zip(data.example, data.position, strict=True))}
    expected = np.full((data.size, k, 2 * context + 1), np.nan, dtype=np.float16)
    for neuron in range(data.size):
        for place, row in enumerate(brute_top(data, neuron, k)):
            for offset in range(-context, context + 1):
                near = row_of.get((data.example[row], data.position[row] + offset))
                if near is not None:
                    expected[neuron, place, offset + context] = data.values[near, neuron]
    np.testing.assert_array_equal(found.window, expected, strict=True)


@given(datas, seeds)
def test_histogram(data: Data, seed: int) -> None:
    found = Plan(data, seed).run(Histogram(), data.setting())
    for neuron in range(data.size):
        places = np.searchsorted(found.edges, data.values[:, neuron].astype(np.float64), side="right") - 1
        np.testing.assert_array_equal(found.counts[neuron], np.bincount(places, minlength=len(found.edges) - 1))


@given(datas, seeds)
def test_by_label(data: Data, seed: int) -> None:
    found = Plan(data, seed).run(ByLabel(of=(Moments(), FiringRate(0.0, 0.5), TopExamples(2))), data.setting())
    assert found.labels == ("kind",) and found.categories("kind") == KINDS
    for code, category in enumerate(KINDS):
        part = data.values[data.code == code].astype(np.float64)
        group = found.of("kind", category)
        assert group.count == group.moments.count == found.count("kind")[code] == len(part)
        if not len(part):
            assert np.isnan(found.mean("kind")[:, code]).all()
            continue
        atol = 1e-12 * np.abs(part).max()
        np.testing.assert_allclose(found.mean("kind")[:, code], part.mean(0), rtol=1e-9, atol=atol)
        np.testing.assert_array_equal(found.rate("kind")[:, code, 1], (part > 0.5).mean(0))
        np.testing.assert_array_equal(group.top_examples.values[:, 0], part.max(0))


@given(datas, seeds, st.sampled_from([0.0, 0.5, FractionOfMaximum(0.5)]))
def test_by_token(data: Data, seed: int, threshold: float | FractionOfMaximum) -> None:
    found = Plan(data, seed).run(ByToken(threshold=threshold), data.setting())
    number = np.linspace(0.2, 3, data.size, dtype=np.float32) / 2 if threshold not in (0.0, 0.5) else threshold
    fires = data.values > np.asarray(number, dtype=data.values.dtype)
    assert found.count == data.rows
    np.testing.assert_array_equal(found.tokens, TOKENS)
    np.testing.assert_array_equal(found.occurrences, [(data.token == each).sum() for each in TOKENS])
    np.testing.assert_array_equal(found.fired, np.stack([fires[data.token == each].sum(0) for each in TOKENS]))
    np.testing.assert_array_equal(found.fired_total, fires.sum(0))


def assert_same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], strict=True)


ALL = [
    Moments(),
    MinMax(),
    FiringRate(0.0, FractionOfMaximum(0.5)),
    TopExamples(5),
    TopExamples(5, context=2),
    Histogram(),
    ByLabel(of=(Moments, FiringRate, Histogram, MinMax)),
    ByToken(),
]


@pytest.mark.parametrize("template", ALL, ids=repr)
@given(data=datas, seed=seeds)
def test_state_is_plain_numbers_and_comes_back(template: Summary, data: Data, seed: int) -> None:
    accumulator = Plan(data, seed).run(template, data.setting())
    state = accumulator.state()
    assert all(isinstance(each, np.ndarray) and each.dtype.kind in "iuf" for each in state.values())
    kept = {name: each.copy() for name, each in state.items()}
    again = template.start(data.setting())
    again.restore(state)
    for changed, other in ((again, accumulator), (accumulator, again)):
        before = other.state()
        for batch in Plan(data, seed + 1).batches:  # no two of the three share memory
            changed.update(batch)
        assert_same(other.state(), before)
        assert_same(state, kept)
    assert_same(accumulator.state(), again.state())


@pytest.mark.parametrize("template", ALL, ids=repr)
@given(data=datas)
def test_nbytes(template: Summary, data: Data) -> None:
    setting = data.setting()
    accumulators = [template.start(setting), template.start(setting)]
    for each in accumulators:
        each.update(data.batch(slice(None)))
    held = sum(array.nbytes for each in accumulators for array in each.state().values())
    assert abs(template.nbytes([setting, setting]) - held) <= 0.05 * held
