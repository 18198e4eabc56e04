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
    order = np.argsort(-score, axis=0, kind="stable")
    hits = right[order].astype(np.float64)
    ranked = np.take_along_axis(score, order, 0)
    # The last of each run of equal scores is where a threshold lies.
    last = np.ones_like(hits, bool)
    last[:-1] = ranked[1:] != ranked[:-1]
    recalled = hits.cumsum(0)
    precision = recalled / np.arange(1, len(hits) + 1)[:, None]
    reached = np.where(last, recalled, 0.0)
    before = np.zeros_like(reached)
    before[1:] = np.maximum.accumulate(reached, axis=0)[:-1]
    return np.squeeze((np.where(last, recalled - before, 0.0) * precision).sum(0) / right.sum())


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
