"""By position, n-gram and fold, exemplars and pooled: however the rows are cut and merged, as by brute force."""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.properties.test_summaries import KINDS, TOKENS, Data, Plan, assert_same, datas, seeds

from patchclamp.recording.batch import Batch, Setting
from patchclamp.recording.folds import fold_of
from patchclamp.recording.summaries import (
    ByLabel,
    ByPosition,
    ByToken,
    Exemplars,
    ExemplarSet,
    Histogram,
    NGrams,
    Pooled,
    Summary,
    TopExamples,
    exemplars,
    pooled,
)
from patchclamp.recording.thresholds import FractionOfMaximum

EXAMPLES = 1000  # ids are below it
_64 = (1 << 64) - 1


class Maps(Data):
    """Examples that are images: every one has the pixels of a small grid, of which a few are left out."""

    def __init__(self, seed: int, grid: tuple[int, ...]) -> None:
        super().__init__(seed, "few")
        random = np.random.default_rng(seed)
        number, pixels = int(random.integers(1, 10)), int(np.prod(grid))
        self.grid = grid
        self.example = np.repeat(random.permutation(EXAMPLES)[:number], pixels)
        self.position = np.tile(np.arange(pixels), number)
        whole = np.sort(random.permutation(len(self.example))[: max(1, int(0.9 * len(self.example)))])
        self.example, self.position = self.example[whole], self.position[whole]
        self.rows = len(whole)
        self.token, self.code = np.zeros(self.rows, np.int64), np.zeros(self.rows, np.int64)
        self.values = random.choice([-1.0, 0.0, 0.5, 2.0, 3.0], size=(self.rows, self.size)).astype(np.float32)

    def batch(self, rows: np.ndarray | slice) -> Batch:
        return replace(super().batch(rows), grid=self.grid)


class PlanOfExamples(Plan):
    """A plan that splits no example."""

    def __init__(self, data: Data, seed: int) -> None:
        super().__init__(data, seed, whole_examples=True)

    def run(self, template: Summary, setting: Setting) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(exemplars, "_PIXELS_AT_ONCE", int(self._random.choice([1, 20, 1 << 20])))
            patch.setattr(pooled, "_BYTES_AT_ONCE", int(self._random.choice([1, 100, 1 << 24])))
            return super().run(template, setting)


maps = st.builds(Maps, seeds, st.sampled_from([(3, 4), (2, 65), (9,), (2, 3, 2)]))


def setting_of(data: Data) -> Setting:
    setting = data.setting()
    assert setting.calibration is not None
    # The band of the middle is [-0.5, 1.5] times these, by neuron.
    scale = np.linspace(0.5, 2, data.size, dtype=np.float32)
    calibration = replace(setting.calibration, quantile_of_examples=lambda q: scale * np.float32(4 * q - 1.5))
    return replace(setting, calibration=calibration, examples=EXAMPLES, grid=getattr(data, "grid", None))


def splitmix(seed: int, steps: int) -> int:
    """What SplitMix64 gives after so many steps, as written in C."""
    state = (seed + steps * 0x9E3779B97F4A7C15) & _64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _64
    return state ^ (state >> 31)


def signed_half(number: int) -> int:
    return (number - (1 << 64) if number >> 63 else number) >> 1


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=30))
def test_folds(ids: list[int]) -> None:
    expected = [splitmix(0x666F6C6473, each + 1) & 1 for each in ids]
    assert fold_of(ids).tolist() == fold_of(np.array(ids)).tolist() == fold_of(torch.tensor(ids)).tolist() == expected
    assert fold_of(ids[0]).shape == () and fold_of(torch.tensor([ids])).shape == (1, len(ids))


@given(datas, seeds, st.sampled_from([0.0, FractionOfMaximum(0.5)]))
def test_folds_of_by_token(data: Data, seed: int, threshold: float | FractionOfMaximum) -> None:
    found = Plan(data, seed).run(ByToken(threshold=threshold), data.setting())
    number = 0 if threshold == 0 else np.linspace(0.2, 3, data.size, dtype=np.float32) / 2
    fires = data.values > np.asarray(number, dtype=data.values.dtype)
    for fold in (0, 1):
        part, view = fold_of(data.example) == fold, found.fold(fold)
        assert view.count == part.sum()
        np.testing.assert_array_equal(view.tokens, TOKENS)
        np.testing.assert_array_equal(view.occurrences, [(data.token[part] == each).sum() for each in TOKENS])
        expected = [fires[part & (data.token == each)].sum(0) for each in TOKENS]
        np.testing.assert_array_equal(view.fired, np.stack(expected))
        np.testing.assert_array_equal(view.fired_total, fires[part].sum(0))
        np.testing.assert_array_equal(view.threshold, found.threshold)


@given(datas, seeds, st.integers(1, 5), st.sampled_from([0.0, FractionOfMaximum(0.5)]))
def test_by_position(data: Data, seed: int, positions: int, threshold: float | FractionOfMaximum) -> None:
    found = Plan(data, seed).run(ByPosition(positions, threshold), data.setting())
    number = np.float32(0) if threshold == 0 else np.linspace(0.2, 3, data.size, dtype=np.float32) / 2
    edges = found.edges
    assert edges[: positions + 2].tolist() == [*range(positions + 1), 2 * positions] and edges[-1] == 2**31
    assert found.mean.shape == (data.size, len(edges) - 1)
    wide = data.values.astype(np.float64)
    for place, (low, high) in enumerate(itertools.pairwise(edges)):
        here = (data.position >= low) & (data.position < high)
        assert found.count[place] == here.sum()
        if not here.any():
            assert np.isnan(found.mean[:, place]).all() and np.isnan(found.rate[:, place]).all()
            continue
        atol = 1e-12 * np.abs(wide).max()
        np.testing.assert_allclose(found.mean[:, place], wide[here].mean(0), rtol=1e-9, atol=atol)
        atol = 1e-18 * np.square(wide).max()
        np.testing.assert_allclose(found.variance[:, place], wide[here].var(0), rtol=1e-6, atol=atol)
        np.testing.assert_array_equal(found.rate[:, place], (data.values[here] > number).mean(0))


def ngrams_of(data: Data, n: int, fires: np.ndarray) -> list[Counter[tuple[int, ...]]]:
    """For each neuron, how often it fires on each n-gram."""
    places = list(zip(data.example.tolist(), data.position.tolist(), strict=True))
    row_of = {place: row for row, place in enumerate(places)}
    found: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(data.size)]
    for row, (example, position) in enumerate(places):
        rows = [row_of.get((example, position - back)) for back in range(n - 1, -1, -1)]
        if None not in rows:
            gram = tuple(int(data.token[each]) for each in rows)
            for neuron in np.flatnonzero(fires[row]):
                found[neuron][gram] += 1
    return found


@given(datas, seeds, st.integers(1, 4), st.integers(1, 4) | st.just(1000))
def test_ngrams(data: Data, seed: int, n: int, slots: int) -> None:
    found = PlanOfExamples(data, seed).run(NGrams(n, slots, threshold=0.0), data.setting())
    brute = ngrams_of(data, n, data.values > 0)
    np.testing.assert_array_equal(found.fired_total, [each.total() for each in brute])
    assert found.count == ngrams_of(data, n, np.ones_like(data.values))[0].total()
    for neuron, true in enumerate(brute):
        counts, error = found.counts[neuron], found.error[neuron]
        taken = counts > 0
        kept = dict(zip(map(tuple, found.tokens[neuron][taken].tolist()), counts[taken].tolist(), strict=True))
        assert len(kept) == taken.sum() and (found.tokens[neuron][~taken] == -1).all()
        assert (slots + 1) * error <= found.fired_total[neuron] - counts.sum()
        for gram in {*true, *kept}:
            assert kept.get(gram, 0) <= true[gram] <= kept.get(gram, 0) + error
            assert gram in kept or true[gram] * (slots + 1) <= found.fired_total[neuron]
        if slots == 1000:
            assert error == 0 and list(kept.items()) == sorted(true.items(), key=lambda each: (-each[1], each[0]))


def strongest(data: Data, neuron: int, fold: int) -> dict[int, int]:
    """Example -> the first row with its largest value, for the examples of one fold."""
    found = {}
    for example in np.unique(data.example):
        rows = np.flatnonzero(data.example == example)
        if fold_of(int(example)) == fold:
            found[int(example)] = int(rows[data.values[rows, neuron].argmax()])
    return found


def brute_exemplars(
    data: Data, template: Exemplars, low: np.ndarray, high: np.ndarray, neuron: int, fold: int
) -> dict[str, list[int]]:
    """The rows of each sort, in order."""
    rows = strongest(data, neuron, fold)
    value = {example: data.values[row, neuron] for example, row in rows.items()}

    def drawn(salt: int) -> Callable[[int], int]:
        return lambda example: -signed_half(splitmix(2 * template.seed + salt, example + 1))

    dtype = data.values.dtype
    inside = [each for each in rows if low[neuron].astype(dtype) <= value[each] <= high[neuron].astype(dtype)]
    order = {
        "top": sorted(rows, key=lambda each: (-value[each], each)),
        "middle": sorted(inside, key=drawn(1)),
        "random": sorted(rows, key=drawn(2)),
    }
    return {kind: [rows[each] for each in examples[: template.k]] for kind, examples in order.items()}


def check_exemplars(
    data: Data, template: Exemplars, found: Any, shown: Callable[[ExemplarSet, int, int, int], None]
) -> None:
    low, high = found.band.T
    for fold in (0, 1):
        for kind, group in {"top": found.top(fold), "middle": found.middle(fold), "random": found.random(fold)}.items():
            assert group.values.dtype == data.values.dtype
            for neuron in range(data.size):
                rows = brute_exemplars(data, template, low, high, neuron, fold)[kind]
                n = len(rows)
                np.testing.assert_array_equal(group.example[neuron, :n], data.example[rows])
                np.testing.assert_array_equal(group.position[neuron, :n], data.position[rows])
                np.testing.assert_array_equal(group.values[neuron, :n], data.values[rows, neuron])
                assert np.isnan(group.values[neuron, n:]).all()
                assert (group.example[neuron, n:] == -1).all() and (group.position[neuron, n:] == -1).all()
                for place, row in enumerate(rows):
                    shown(group, neuron, place, row)


@given(datas, seeds, st.integers(1, 4), st.integers(0, 2))
def test_exemplars_of_texts(data: Data, seed: int, k: int, context: int) -> None:
    template = Exemplars(k, context=context, seed=seed % 3)
    setting = setting_of(data)
    found = PlanOfExamples(data, seed).run(template, setting)
    scale = np.linspace(0.5, 2, data.size, dtype=np.float32)
    np.testing.assert_allclose(found.band, np.stack([-0.5 * scale, 1.5 * scale], axis=1))
    row_of = {pair: row for row, pair in enumerate(zip(data.example, data.position, strict=True))}

    def window(group: ExemplarSet, neuron: int, place: int, row: int) -> None:
        for offset in range(-context, context + 1) if context else ():
            near = row_of.get((data.example[row], data.position[row] + offset))
            expected = np.nan if near is None else data.values[near, neuron].astype(np.float16)
            np.testing.assert_array_equal(group.window[neuron, place, offset + context], expected)

    check_exemplars(data, template, found, window)
    example, position = found.places()
    there = {pair for pair in zip(example.ravel().tolist(), position.ravel().tolist(), strict=True) if pair[0] >= 0}
    groups = [each(fold) for each in (found.top, found.middle, found.random) for fold in (0, 1)]
    pairs = [zip(each.example.ravel().tolist(), each.position.ravel().tolist(), strict=True) for each in groups]
    assert there == {pair for each in pairs for pair in each if pair[0] >= 0}


@given(maps, seeds, st.integers(1, 4))
def test_exemplars_of_maps(data: Maps, seed: int, k: int) -> None:
    template = Exemplars(k, quantile=0.5)
    found = PlanOfExamples(data, seed).run(template, setting_of(data))
    threshold = np.linspace(0.2, 3, data.size, dtype=np.float32) / 2
    # A side of at most 64 cells, or as many as make 4096 in all.
    longest = {1: 4096, 2: 64, 3: 16}[len(data.grid)]
    steps = [-(-length // longest) for length in data.grid]

    def mask(group: ExemplarSet, neuron: int, place: int, row: int) -> None:
        rows = np.flatnonzero(data.example == data.example[row])
        expected = np.zeros([-(-length // step) for length, step in zip(data.grid, steps, strict=True)], dtype=bool)
        for each in rows[data.values[rows, neuron] > threshold[neuron]]:
            pixel = np.unravel_index(data.position[each], data.grid)
            expected[tuple(index // step for index, step in zip(pixel, steps, strict=True))] = True
        np.testing.assert_array_equal(group.mask[neuron, place], expected)

    check_exemplars(data, template, found, mask)
    assert found.grid == data.grid


@given(datas, seeds, st.sampled_from(["max", "mean", "last", "fired"]), st.sampled_from(["float16", "float32"]))
def test_pooled(data: Data, seed: int, how: str, dtype: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        setting = replace(setting_of(data), scratch=folder if seed % 2 else None)
        found = PlanOfExamples(data, seed).run(Pooled(how, FractionOfMaximum(0.5), dtype), setting)
        threshold = (np.linspace(0.2, 3, data.size, dtype=np.float32) / 2).astype(data.values.dtype)
        pool = {
            "max": lambda rows: rows.max(0),
            "mean": lambda rows: rows.astype(np.float64).mean(0),
            "last": lambda rows: rows[-1],
            "fired": lambda rows: (rows > threshold).mean(0),
        }[how]
        expected = np.full((EXAMPLES, data.size), np.nan, dtype=dtype)
        for example in np.unique(data.example):
            expected[example] = pool(data.values[data.example == example])
        assert found.values.dtype == dtype and found.example.tolist() == list(range(EXAMPLES))
        # A mean may be rounded the other way where it lies half way between two numbers.
        np.testing.assert_allclose(found.values, expected, rtol=float(2 * np.finfo(dtype).eps) * (how == "mean"))
        found = None  # gives the file back before its folder goes


@given(datas, seeds)
def test_by_label_of_any(data: Data, seed: int) -> None:
    of = (Histogram, ByPosition(2), NGrams(2, 1000, 0.0), Exemplars(2, context=1), ByToken(threshold=0.0))
    found = PlanOfExamples(data, seed).run(ByLabel(of=of), setting_of(data))
    shown = set()
    for code, category in enumerate(KINDS):
        part, group = data.code == code, found.of("kind", category)
        assert (group.histogram.counts.sum(1) == part.sum()).all()
        assert group.by_position.count[0] == (part & (data.position == 0)).sum()
        fires = (data.values > 0) & part[:, None]
        np.testing.assert_array_equal(group.ngrams.counts.sum(1), [each.total() for each in ngrams_of(data, 2, fires)])
        assert group.by_token.fold(1).count == (fold_of(data.example[part]) == 1).sum()
        for fold in (0, 1):
            mine = data.example[part & (fold_of(data.example) == fold)]
            kept = group.exemplars.top(fold).example
            assert set(kept.ravel()) <= {-1, *mine} and (kept >= 0).sum() == min(2, len(set(mine))) * data.size
        shown |= set(group.exemplars.places()[0].ravel().tolist())
    assert set(found.places()[0].tolist()) == shown


ALL = [
    ByPosition(3, FractionOfMaximum(0.5)),
    NGrams(2, 3),
    Exemplars(2, context=1),
    Exemplars(2, context=0),
    Pooled("mean"),
    Pooled("fired", FractionOfMaximum(0.5), "float32"),
    ByLabel(of=(ByPosition(2), NGrams(1, 2), Exemplars(1), TopExamples(1))),
]


@pytest.mark.parametrize("template", ALL, ids=repr)
@given(data=datas | maps, seed=seeds)
def test_state_is_plain_numbers_and_comes_back(template: Summary, data: Data, seed: int) -> None:
    setting = setting_of(data)
    accumulator = PlanOfExamples(data, seed).run(template, setting)
    state = accumulator.state()
    assert all(isinstance(each, np.ndarray) and each.dtype.kind in "iuf" for each in state.values())
    kept = {name: each.copy() for name, each in state.items()}
    again = template.start(setting)
    again.restore(state)
    ids = np.setdiff1d(np.arange(EXAMPLES), data.example)[:3]
    more = Batch(
        torch.zeros(3, data.size),
        torch.from_numpy(ids),
        torch.zeros(3, dtype=torch.int64),
        torch.full((3,), 7),
        {"kind": torch.zeros(3, dtype=torch.int64)},
        getattr(data, "grid", None),
    )
    for changed, unchanged in ((again, accumulator), (accumulator, again)):
        before = unchanged.state()
        changed.update(more)  # no two of the three share memory
        assert_same(unchanged.state(), before)
        assert_same(state, kept)
    assert_same(accumulator.state(), again.state())


@pytest.mark.parametrize("template", ALL, ids=repr)
@given(data=datas | maps)
def test_nbytes(template: Summary, data: Data) -> None:
    setting = setting_of(data)
    accumulators = [template.start(setting), template.start(setting)]
    for each in accumulators:
        each.update(data.batch(slice(None)))
    held = sum(array.nbytes for each in accumulators for array in each.state().values())
    assert template.nbytes([setting, setting]) == held == sum(each.held_bytes() for each in accumulators)
