"""The compiled loops of `fused.py`: one walk over activations for everything that is learned of each column.

Compiled by numba when first called, and kept in its cache; importing this module compiles nothing. Each function
looks at the columns [first, last) only, so that several threads share a tensor without sharing a sum: the result
does not depend on their number. Rows are copied into a tile that fits the processor's nearest memory, and every
statistic is taken from there, four rows at a time, which is what lets the compiler use wide registers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

_TILE = 32
_compiled: Any = njit(nogil=True, cache=True, error_model="numpy")


@_compiled
def sweep(
    values: np.ndarray,
    rows: np.ndarray,
    rank: np.ndarray,
    first: int,
    last: int,
    shift: np.ndarray,
    sums: np.ndarray,
    squares: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    thresholds: np.ndarray,
    fired: np.ndarray,
    top: np.ndarray,
    top_rank: np.ndarray,
) -> bool:
    """Take in the rows of a tensor; False, at once, where one of them is not finite.

    Args:
        values: [positions, size] float32 or float64.
        rows: [rows] int64, which of these count.
        rank: [rows] int64, as `Batch.rank`.
        first: of the columns that are looked at.
        last: one past them.
        shift: [size] float64, near the mean of each column, so that squares do not cancel.
        sums: [size] float64, is added to: of what exceeds the shift.
        squares: [size] float64, is added to: of the same.
        low: [size], is lowered to the smallest value.
        high: [size], is raised to the largest value.
        thresholds: [thresholds, size].
        fired: [thresholds, size] int64, is added to.
        top: [size, k], the largest values of each column, largest first; k may be 0.
        top_rank: [size, k] int64, their ranks; of equal values the smaller rank comes first.
    """
    width, number = last - first, thresholds.shape[0]
    tile = np.empty((_TILE, width), values.dtype)
    tile_low, tile_high = np.empty(width, values.dtype), np.empty(width, values.dtype)
    some_fired = np.zeros((number, width), np.int32)
    # What must be reached to enter the largest values, side by side: one look at each column for every tile.
    bar = top[first:last, -1].copy() if top.shape[1] else tile_high
    for start in range(0, len(rows), _TILE):
        height = min(_TILE, len(rows) - start)
        _gather(values, rows, start, height, first, tile)
        _add_moments(tile, height, shift[first:last], sums[first:last], squares[first:last])
        _extremes(tile, height, tile_low, tile_high)
        if not _all_finite(sums[first:last]):
            return False
        _widen(low[first:last], high[first:last], tile_low, tile_high)
        for each in range(number):
            _count_above(tile, height, thresholds[each, first:last], some_fired[each])
        if top.shape[1]:
            _insert(tile, height, rank, start, tile_high, bar, top[first:last], top_rank[first:last])
    for each in range(number):
        for column in range(width):
            fired[each, first + column] += some_fired[each, column]
    return True


@_compiled
def join_moments(
    number: int,
    shift: np.ndarray,
    sums: np.ndarray,
    squares: np.ndarray,
    count: np.ndarray,
    mean: np.ndarray,
    deviation: np.ndarray,
) -> None:
    """As `Moments.join`, of what `sweep` has added up over some rows.

    Args:
        number: of the rows.
        shift: [size] float64, as `sweep` was given it; may be `mean` itself.
        sums: [size] float64.
        squares: [size] float64.
        count: [1] int64, is added to: rows before these.
        mean: [size] float64, of the rows before, becomes that of all.
        deviation: [size] float64, the sum of squared deviations of the rows before, becomes that of all.
    """
    share = number / (count[0] + number)
    for column in range(len(sums)):
        above = sums[column] / number
        difference = shift[column] + above - mean[column]
        own = max(squares[column] - sums[column] * above, 0.0)
        deviation[column] += own + difference * difference * (count[0] * share)
        mean[column] += difference * share
    count[0] += number


@_compiled
def sweep_groups(
    values: np.ndarray,
    rows: np.ndarray,
    starts: np.ndarray,
    first: int,
    last: int,
    shift: np.ndarray,
    sums: np.ndarray,
    squares: np.ndarray,
    thresholds: np.ndarray,
    fired: np.ndarray,
) -> None:
    """Sums and firings of each group of rows: group g has `rows[starts[g] : starts[g + 1]]`.

    As `sweep`, but `sums` and `squares` are [groups, size] and `fired` is [groups, thresholds, size] int64.
    """
    width, number = last - first, thresholds.shape[0]
    tile = np.empty((_TILE, width), values.dtype)
    some_fired = np.zeros((number, width), np.int32)
    for group in range(len(starts) - 1):
        some_fired[:] = 0
        for start in range(starts[group], starts[group + 1], _TILE):
            height = min(_TILE, starts[group + 1] - start)
            _gather(values, rows, start, height, first, tile)
            _add_moments(tile, height, shift[first:last], sums[group, first:last], squares[group, first:last])
            for each in range(number):
                _count_above(tile, height, thresholds[each, first:last], some_fired[each])
        for each in range(number):
            for column in range(width):
                fired[group, each, first + column] += some_fired[each, column]


@_compiled
def count_groups(
    values: np.ndarray,
    rows: np.ndarray,
    starts: np.ndarray,
    place: np.ndarray,
    first: int,
    last: int,
    threshold: np.ndarray,
    fired: np.ndarray,
    total: np.ndarray,
) -> None:
    """Firings of each group of rows, added to its own place and to a total.

    Args:
        values: [positions, size].
        rows: [rows] int64, sorted by group.
        starts: [groups + 1] int64, where each group begins in `rows`.
        place: [groups] int64, the row of `fired` that each group is added to; -1: to the total only.
        first: of the columns that are looked at.
        last: one past them.
        threshold: [size].
        fired: [places, size] whole numbers.
        total: [size] int64.
    """
    width = last - first
    tile = np.empty((_TILE, width), values.dtype)
    some_fired, all_fired = np.empty(width, np.int32), np.zeros(width, np.int32)
    for group in range(len(starts) - 1):
        some_fired[:] = 0
        for start in range(starts[group], starts[group + 1], _TILE):
            height = min(_TILE, starts[group + 1] - start)
            _gather(values, rows, start, height, first, tile)
            _count_above(tile, height, threshold[first:last], some_fired)
        where = place[group]
        if where >= 0:
            for column in range(width):
                fired[where, first + column] += some_fired[column]
        for column in range(width):
            all_fired[column] += some_fired[column]
    for column in range(width):
        total[first + column] += all_fired[column]


# One tile -------------------------------------------------------------------------------------------


@_compiled
def _gather(values: np.ndarray, rows: np.ndarray, start: int, height: int, first: int, tile: np.ndarray) -> None:
    for row in range(height):
        # A view, because the compiler does not use wide registers where an index might be negative.
        line = values[rows[start + row], first : first + tile.shape[1]]
        for column in range(tile.shape[1]):
            tile[row, column] = line[column]


@_compiled
def _add_moments(tile: np.ndarray, height: int, shift: np.ndarray, sums: np.ndarray, squares: np.ndarray) -> None:
    whole = height - height % 4
    for row in range(0, whole, 4):
        for column in range(tile.shape[1]):
            centre = shift[column]
            a = np.float64(tile[row, column]) - centre
            b = np.float64(tile[row + 1, column]) - centre
            c = np.float64(tile[row + 2, column]) - centre
            d = np.float64(tile[row + 3, column]) - centre
            sums[column] += (a + b) + (c + d)
            squares[column] += (a * a + b * b) + (c * c + d * d)
    for row in range(whole, height):
        for column in range(tile.shape[1]):
            a = np.float64(tile[row, column]) - shift[column]
            sums[column] += a
            squares[column] += a * a


@_compiled
def _extremes(tile: np.ndarray, height: int, low: np.ndarray, high: np.ndarray) -> None:
    for column in range(tile.shape[1]):
        low[column] = tile[0, column]
        high[column] = tile[0, column]
    for row in range(1, height):
        for column in range(tile.shape[1]):
            value = tile[row, column]
            high[column] = value if value > high[column] else high[column]
        for column in range(tile.shape[1]):
            value = tile[row, column]
            low[column] = value if value < low[column] else low[column]


@_compiled
def _widen(low: np.ndarray, high: np.ndarray, tile_low: np.ndarray, tile_high: np.ndarray) -> None:
    for column in range(len(low)):
        low[column] = tile_low[column] if tile_low[column] < low[column] else low[column]
        high[column] = tile_high[column] if tile_high[column] > high[column] else high[column]


@_compiled
def _count_above(tile: np.ndarray, height: int, threshold: np.ndarray, fired: np.ndarray) -> None:
    whole = height - height % 4
    for row in range(0, whole, 4):
        for column in range(tile.shape[1]):
            limit = threshold[column]
            fired[column] += (np.int32(tile[row, column] > limit) + np.int32(tile[row + 1, column] > limit)) + (
                np.int32(tile[row + 2, column] > limit) + np.int32(tile[row + 3, column] > limit)
            )
    for row in range(whole, height):
        for column in range(tile.shape[1]):
            fired[column] += np.int32(tile[row, column] > threshold[column])


@_compiled
def _all_finite(sums: np.ndarray) -> bool:
    wrong = 0.0
    for column in range(len(sums)):
        wrong += sums[column] - sums[column]  # NaN for an infinity or a NaN, 0 for a number
    return wrong == 0.0


@_compiled
def _insert(
    tile: np.ndarray,
    height: int,
    rank: np.ndarray,
    start: int,
    high: np.ndarray,
    bar: np.ndarray,
    top: np.ndarray,
    top_rank: np.ndarray,
) -> None:
    end = top.shape[1] - 1
    for column in range(tile.shape[1]):
        if high[column] < bar[column]:  # almost always
            continue
        for row in range(height):
            # Adding zero turns -0.0 into 0.0: which of the two was seen must not depend on the order.
            value, place = tile[row, column] + 0, rank[start + row]
            if not _comes_before(value, place, top[column, end], top_rank[column, end]):
                continue
            slot = end
            while slot > 0 and _comes_before(value, place, top[column, slot - 1], top_rank[column, slot - 1]):
                top[column, slot] = top[column, slot - 1]
                top_rank[column, slot] = top_rank[column, slot - 1]
                slot -= 1
            top[column, slot] = value
            top_rank[column, slot] = place
        bar[column] = top[column, end]


@_compiled
def _comes_before(value: float, rank: int, other: float, other_rank: int) -> bool:
    return value > other or (value == other and rank < other_rank)
