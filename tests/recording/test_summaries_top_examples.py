"""TopExamples against a full sort: large data, many ties, few rows, windows."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch

from patchclamp.errors import DataError
from patchclamp.recording.batch import Batch, Setting
from patchclamp.recording.summaries import TopExamples, top_examples


def batch_of(values: np.ndarray, example: np.ndarray, position: np.ndarray) -> Batch:
    return Batch(torch.from_numpy(values), torch.from_numpy(example), torch.from_numpy(position))


def brute(values: np.ndarray, example: np.ndarray, position: np.ndarray, k: int) -> tuple[np.ndarray, ...]:
    orders = [np.lexsort((position, example, -values[:, neuron]))[:k] for neuron in range(values.shape[1])]
    rows = np.stack(orders)
    return np.take_along_axis(values, rows.T, axis=0).T, example[rows], position[rows]


def normal(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return random.normal(size=shape).astype(np.float32)


def relu(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Zeros nearly everywhere, a third of the neurons dead, some with few firings."""
    values = np.maximum(random.normal(size=shape) - np.linspace(0, 4, shape[1]), 0).astype(np.float32)
    values[:, ::3] = 0
    return np.where((values == 0) & (random.random(shape) < 0.5), np.float32(-0.0), values)


def few(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return random.choice([0.0, 0.5, 1.0], p=[0.5, 0.49, 0.01], size=shape).astype(np.float32)


def rising(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return normal(random, shape) + np.linspace(0, 50, shape[0], dtype=np.float32)[:, None]


def double(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Differences that float32 does not see."""
    return 1 + random.integers(0, 500, size=shape) * 2.0**-40


@pytest.mark.parametrize("make", [normal, relu, few, rising, double])
def test_equals_a_full_sort(
    make: Callable[[np.random.Generator, tuple[int, int]], np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(5)
    rows, size, per_example = 6000, 150, 12
    values = make(random, (rows, size))
    example = np.repeat(random.permutation(rows // per_example), per_example)
    position = np.tile(np.arange(per_example) * 2 + 1, rows // per_example)
    whole = 0

    def counted(*given: object) -> object:
        nonlocal whole
        whole += 1
        return best_of(*given)  # pyright: ignore[reportArgumentType]

    best_of = top_examples._best_of
    monkeypatch.setattr(top_examples, "_best_of", counted)
    found = TopExamples(20).start(Setting("mlp.0", size, dtype=torch.from_numpy(values).dtype))
    cuts = [0, 333, 1000, 1001, 2500, 4000, 5200, rows]
    for start, stop in pairwise(cuts):
        part = slice(start, stop)
        found.update(batch_of(values[part], example[part], position[part]))
    for mine, truth in zip(
        (found.values, found.example, found.position), brute(values, example, position, 20), strict=True
    ):
        np.testing.assert_array_equal(mine, truth)
    assert not np.signbit(found.values[found.values == 0]).any()
    assert found.values.dtype == values.dtype
    # Both ways of finding candidates were taken (rising data leaves no other than the thorough one).
    assert 1 <= whole <= (7 if make is rising else 5)


def test_ties_go_to_the_smaller_example_then_the_smaller_position() -> None:
    found = TopExamples(3).start(Setting("mlp.0", 1))
    for example, position in [(9, 0), (4, 8), (4, 2), (1 << 31, 0), (7, 1)]:
        found.update(
            batch_of(
                np.array([[-0.0 if example == 4 else 0.0]], np.float32),
                np.array([example]),
                np.array([position]),
            )
        )
    assert found.example.tolist() == [[4, 4, 7]] and found.position.tolist() == [[2, 8, 1]]
    assert not np.signbit(found.values).any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_zeros_of_either_sign_are_ties_within_a_batch(dtype: type) -> None:
    random = np.random.default_rng(6)
    found = TopExamples(5).start(Setting("mlp.0", 9))
    values = random.choice([0.0, -0.0, -1.0], size=(300, 9)).astype(dtype)
    example = random.permutation(300)
    found.update(batch_of(values, example, np.zeros(300, np.int64)))
    np.testing.assert_array_equal(found.example, brute(values, example, example, 5)[1])


def test_fewer_rows_than_places() -> None:
    found = TopExamples(4).start(Setting("mlp.0", 2))
    found.update(batch_of(np.array([[-1.0, 2.0], [-3.0, 1.0]], np.float32), np.array([5, 5]), np.array([1, 2])))
    np.testing.assert_array_equal(found.values, [[-1, -3, np.nan, np.nan], [2, 1, np.nan, np.nan]])
    assert found.example.tolist() == [[5, 5, -1, -1]] * 2
    assert found.position.tolist() == [[1, 2, -1, -1]] * 2
    found.merge(TopExamples(4).start(Setting("mlp.0", 2)))
    assert found.position.tolist() == [[1, 2, -1, -1]] * 2


def test_values_may_become_wider() -> None:
    narrow, wide = (TopExamples(2).start(Setting("mlp.0", 1)) for _ in range(2))
    third = np.array([[1 / 3]])
    narrow.update(batch_of(third.astype(np.float32), np.array([0]), np.array([0])))
    wide.update(batch_of(third, np.array([1]), np.array([0])))
    for one, other in ((narrow, wide), (wide, narrow)):
        again = TopExamples(2).start(Setting("mlp.0", 1))
        again.merge(one)
        again.merge(other)
        assert again.values.tolist() == [[float(np.float32(1 / 3)), 1 / 3]]


def test_windows_stay_in_the_example_and_skip_what_does_not_count() -> None:
    example = np.array([3, 3, 3, 4, 4, 5])
    position = np.array([1, 2, 4, 1, 2, 0])
    values = np.array([[0.5], [9.0], [0.25], [8.0], [1e9], [-1.0]], np.float32)
    found = TopExamples(4, context=2).start(Setting("mlp.0", 1))
    found.update(batch_of(values, example, position))
    nan, largest = np.nan, 65504
    expected = [
        [nan, 8, largest, nan, nan],
        [nan, 0.5, 9, nan, 0.25],
        [nan, nan, 8, largest, nan],
        [nan, nan, 0.5, 9, nan],
    ]
    np.testing.assert_array_equal(found.window[0], np.array(expected, np.float16), strict=True)
    few = TopExamples(3, context=1).start(Setting("mlp.0", 2))
    few.update(batch_of(np.array([[1.0, 2.0]], np.float32), np.array([0]), np.array([0])))
    np.testing.assert_array_equal(few.window[1], [[nan, 2, nan], [nan] * 3, [nan] * 3])
    with pytest.raises(DataError, match="context="):
        _ = TopExamples(4).start(Setting("mlp.0", 1)).window


def test_a_window_never_reaches_into_the_example_before() -> None:
    last = (1 << 31) - 1
    found = TopExamples(1, context=1).start(Setting("mlp.0", 1))
    found.update(batch_of(np.array([[1.0], [2.0]], np.float32), np.array([4, 5]), np.array([last, 0])))
    np.testing.assert_array_equal(found.window[0, 0], [np.nan, 2, np.nan])


@pytest.mark.parametrize(("k", "context"), [(0, 0), (2.5, 0), (True, 0), (3, -1), ("3", 0)])
def test_bad_parameters(k: int, context: int) -> None:
    with pytest.raises(DataError, match="whole number"):
        TopExamples(k, context)


@pytest.mark.parametrize(("example", "position"), [(-1, 0), (0, -1), (1 << 32, 0), (0, 1 << 31)])
def test_ids_out_of_range_are_refused(example: int, position: int) -> None:
    found = TopExamples(1).start(Setting("mlp.0", 1))
    with pytest.raises(DataError, match="must be in 0"):
        found.update(batch_of(np.zeros((1, 1), np.float32), np.array([example]), np.array([position])))
