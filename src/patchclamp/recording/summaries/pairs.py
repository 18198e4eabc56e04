"""What `CoFiring`, `Correlation` and `correlate` share: a number for every pair of neurons, and each one's partners."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from patchclamp.errors import DataError
from patchclamp.model.largest import largest
from patchclamp.recording.summaries.summary import whole

# All pairs of 16,384 neurons: 1 GiB in int32, 2 GiB in float64.
MOST_PAIRS = 1 << 28
# Pairs that are added up or sorted at once, so that what is made in between stays small.
_PAIRS_AT_ONCE = 1 << 22


class Partners(NamedTuple):
    """Each neuron's best partners, best first.

    Attributes:
        indices: [neurons, k] int64; -1 where there are fewer than k.
        scores: [neurons, k] float64; NaN where there are fewer than k.
    """

    indices: np.ndarray
    scores: np.ndarray


def checked_block(where: str, block: Iterable[int] | None) -> tuple[int, int] | None:
    """Check the (start, stop) that a user gave.

    Raises:
        DataError: it is no such pair, or holds no neuron.
    """
    if block is None:
        return None
    given: list[Any] = list(block) if isinstance(block, tuple | list) else []
    if len(given) != 2:
        raise DataError(f"{where}: block is (start, stop), the neurons whose partners are kept, not {block!r}")
    start = whole(where, "the start of block", given[0], at_least=0)
    return start, whole(where, "the stop of block", given[1], at_least=start + 1)


def checked_partners(where: str, k: int | None) -> int | None:
    """Check a number of partners; None is for all.

    Raises:
        DataError: it is no whole number >= 1.
    """
    return None if k is None else whole(where, "the number of partners", k, at_least=1)


def rows_of(where: str, block: tuple[int, int] | None, site: str, size: int, columns: int) -> slice:
    """The neurons of a site that are paired with `columns` others.

    Raises:
        DataError: the site has no such neurons, or the pairs are too many.
    """
    start, stop = block or (0, size)
    if stop > size:
        raise DataError(f"{where}: block=({start}, {stop}), and {site} has {size} neurons")
    if (stop - start) * columns > MOST_PAIRS:
        some = max(1, MOST_PAIRS // columns)
        raise DataError(
            f"{where}: {stop - start:,} x {columns:,} pairs of neurons at {site} are more than {MOST_PAIRS:,}; "
            f"keep those of some neurons at a time: block=({start}, {min(stop, start + some)})"
        )
    return slice(start, stop)


def pieces(rows: int, columns: int) -> Iterator[slice]:
    """Slices of the rows of a matrix of pairs, each with few enough pairs to be worked on at once."""
    step = max(1, _PAIRS_AT_ONCE // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`left.T @ right` in the dtype that they have, also where the caller runs under autocast."""
    with torch.autocast(left.device.type, enabled=False):
        return torch.mm(left.t(), right, out=out)


def multiplied_in(*given: torch.dtype) -> torch.dtype:
    """float64 where the values are, and where the user lets torch multiply float32 less exactly."""
    try:
        exact = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set for each backend by itself
        exact = False
    return torch.float32 if exact and all(each == torch.float32 for each in given) else torch.float64


def spread(deviation: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The root of a neuron's sum of squared differences from its mean; NaN where it is the same on every row.

    A constant one is known by its extremes: its deviation may be a little above 0 by rounding.
    """
    return torch.where((low < high) & (deviation > 0), deviation.clamp(min=0).sqrt(), torch.nan)


def best_partners(
    rows: int, columns: int, score_of: Callable[[slice], np.ndarray], k: int | None, own: int | None
) -> Partners:
    """The k partners of each row with the largest absolute score; of equal ones the smaller index comes first.

    Args:
        rows: of the matrix of pairs.
        columns: of the matrix of pairs.
        score_of: gives [rows of the slice, columns] float64; NaN where a pair is none.
        k: how many; None for all.
        own: row i is column own + i, which is not its own partner; None where the columns are other neurons.
    """
    others = max(0, columns - (own is not None))
    k = others if k is None else min(k, others)
    indices, scores = np.full((rows, k), -1, dtype=np.int64), np.full((rows, k), np.nan)
    for part in pieces(rows, columns) if k else ():
        found = score_of(part)
        if own is not None:
            line = np.arange(len(found))
            found[line, own + part.start + line] = np.nan
        best = best_of(torch.from_numpy(found), k)
        indices[part], scores[part] = (each.numpy() for each in best)
    return Partners(indices, scores)


def best_of(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k columns of each row with the largest absolute score: indices and scores, as in `Partners`."""
    # A score that is none comes after all others.
    size = scores.abs().nan_to_num_(nan=-1.0, posinf=torch.inf)
    found, index = largest(size, k)
    return torch.where(found < 0, -1, index), torch.where(found < 0, torch.nan, scores.gather(1, index))
