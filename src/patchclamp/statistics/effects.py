"""How large is a difference? Sizes that can be compared between neurons, from means and variances or from examples."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from patchclamp.errors import DataError


def cohens_d(
    mean: ArrayLike,
    variance: ArrayLike,
    count: ArrayLike,
    other_mean: ArrayLike,
    other_variance: ArrayLike,
    other_count: ArrayLike,
    unbiased: bool = True,
) -> np.ndarray:
    """Difference of two means in pooled standard deviations (Cohen, 1988); with Hedges' correction (1981) if unbiased.

    Args:
        mean: of one group, `[neurons]`.
        variance: the same, of a population (divided by the count).
        count: of its examples, a number or `[neurons]`.
        other_mean: of the other group.
        other_variance: the same.
        other_count: the same.
        unbiased: multiply by 1 - 3 / (4 n - 9), n being both counts together.

    Returns:
        `[neurons]` float64; 0 where nothing varies and nothing differs, infinite where only the means do.

    Raises:
        DataError: a group of fewer than two.
    """
    first, second = _counts(count, other_count)
    both = first + second
    squares = np.asarray(variance, np.float64) * first + np.asarray(other_variance, np.float64) * second
    spread = np.sqrt(squares / (both - 2))
    difference = np.asarray(mean, np.float64) - np.asarray(other_mean, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(difference == 0, 0.0, difference / spread)
    return found * (1 - 3 / (4 * both - 9)) if unbiased else found


def welch(
    mean: ArrayLike,
    variance: ArrayLike,
    count: ArrayLike,
    other_mean: ArrayLike,
    other_variance: ArrayLike,
    other_count: ArrayLike,
) -> tuple[np.ndarray, np.ndarray]:
    """Student's t and its two-sided p, of two groups whose variances may differ (Welch, 1947).

    The examples must be independent: of tokens of one document the p is far too small.

    Args:
        mean: of one group, `[neurons]`.
        variance: the same, of a population (divided by the count).
        count: of its examples, a number or `[neurons]`.
        other_mean: of the other group.
        other_variance: the same.
        other_count: the same.

    Returns:
        t and p, `[neurons]` float64 each; t is 0 and p is 1 where nothing varies and nothing differs.

    Raises:
        DataError: a group of fewer than two.
    """
    from scipy.stats import t as student

    first, second = _counts(count, other_count)
    one = np.asarray(variance, np.float64) / (first - 1)
    two = np.asarray(other_variance, np.float64) / (second - 1)
    difference = np.asarray(mean, np.float64) - np.asarray(other_mean, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(difference == 0, 0.0, difference / np.sqrt(one + two))
        freedom = (one + two) ** 2 / (one**2 / (first - 1) + two**2 / (second - 1))
    freedom = np.where(np.isfinite(freedom), freedom, 1.0)
    return t, np.where(difference == 0, 1.0, 2 * student.sf(np.abs(t), freedom))


def _counts(count: ArrayLike, other_count: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(count, np.float64), np.asarray(other_count, np.float64)
    if (first < 2).any() or (second < 2).any():
        raise DataError("how groups differ is known from at least two examples in each")
    return first, second
