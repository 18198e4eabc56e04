"""How well a score puts the right ones first: average precision, area under the ROC curve, recall at a count.

Scores may have a second dimension, one column for each neuron; nothing here loops over columns. Ties are neither luck
nor harm: those of equal score are taken together, as if any order of them were equally likely for the area, and at one
threshold for average precision (as scikit-learn has it).
"""

from __future__ import annotations

import numpy as np

from patchclamp.errors import DataError


def average_precision(right: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Mean of the precision at each right one, thresholds from high to low.

    Args:
        right: `[items]` bool.
        score: `[items]` or `[items, columns]`, finite.

    Returns:
        `[]` or `[columns]` float64.

    Raises:
        DataError: none is right, a score is not finite, or the lengths differ.
    """
    right, score = _checked(right, score)
    return np.squeeze(Ranked(score).average_precision(right))


class Ranked:
    """Scores that are sorted once, for average precisions with one label after the other.

    Args:
        score: `[items, columns]`, finite.
    """

    def __init__(self, score: np.ndarray) -> None:
        order = np.argsort(-score, axis=0, kind="stable")
        ranked = np.take_along_axis(score, order, 0)
        # The last of each run of equal scores is where a threshold lies.
        self._last = np.ones(score.shape, bool)
        self._last[:-1] = ranked[1:] != ranked[:-1]
        self._order = order.astype(np.int32)
        self._places = np.arange(1, len(score) + 1, dtype=np.float64)[:, None]

    def average_precision(self, right: np.ndarray) -> np.ndarray:
        """`[columns]` float64, of `right` `[items]` bool, some of which are."""
        recalled = right[self._order].cumsum(0, dtype=np.int32)
        reached = np.where(self._last, recalled, 0)
        before = np.zeros_like(reached)
        np.maximum.accumulate(reached[:-1], axis=0, out=before[1:])
        return (np.where(self._last, recalled - before, 0) * (recalled / self._places)).sum(0) / right.sum()


def roc_auc(right: np.ndarray, score: np.ndarray) -> np.ndarray:
    """The chance that a right one has a higher score than a wrong one; of equal scores, half. As `average_precision`.

    Raises:
        DataError: as there, or all are right.
    """
    right, score = _checked(right, score)
    if right.all():
        raise DataError("all are right: there is nothing to tell them from")
    from scipy.stats import rankdata

    positive = int(right.sum())
    ranks = rankdata(score, axis=0)[right].sum(0)
    return np.squeeze((ranks - positive * (positive + 1) / 2) / (positive * (len(right) - positive)))


def recall_at(right: np.ndarray, score: np.ndarray, count: int | None = None) -> float:
    """Share of the right ones among the `count` of highest score; None: as many as are right.

    Where scores tie at the edge, the share that is expected if they come in any order.

    Raises:
        DataError: as `average_precision`, or a count below 1.
    """
    right, score = _checked(right, np.asarray(score))
    if score.shape[1] != 1:
        raise DataError("recall_at takes one score for each item")
    wanted = int(right.sum()) if count is None else count
    if wanted < 1:
        raise DataError(f"count is a whole number, at least 1; not {count}")
    column = score[:, 0]
    edge = np.sort(column)[::-1][min(wanted, len(column)) - 1]
    above, tied = column > edge, column == edge
    room = min(wanted, len(column)) - int(above.sum())
    return float((right[above].sum() + right[tied].sum() * room / int(tied.sum())) / right.sum())


def _checked(right: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    right, score = np.asarray(right, bool), np.asarray(score, np.float64)
    score = score[:, None] if score.ndim == 1 else score
    if right.ndim != 1 or score.ndim != 2 or len(right) != len(score):
        raise DataError(f"{list(right.shape)} items are right or wrong, and {list(score.shape)} have scores")
    if not right.any():
        raise DataError("none is right: there is nothing to find")
    if not np.isfinite(score).all():
        raise DataError("a score is not a finite number")
    return right, score
