"""How sure is a number? Examples are drawn again with replacement, and it is computed anew.

The interval is the bias-corrected and accelerated one (Efron, 1987) or that of the plain percentiles. As with
permutations, what is drawn is the independent example, never the token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from patchclamp.errors import DataError, unknown

Statistic = Callable[[np.ndarray], np.ndarray]
_WAYS = ("bca", "percentile")


@dataclass(frozen=True, eq=False)
class Interval:
    """A statistic and where it lies.

    Attributes:
        value, low, high: `[neurons]` float64.
        level: how often such an interval holds the true one, in the long run.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    level: float


def bootstrap(
    statistic: Statistic,
    examples: int,
    *,
    level: float = 0.95,
    draws: int = 1000,
    way: str = "bca",
    strata: np.ndarray | None = None,
    seed: int = 0,
) -> Interval:
    """An interval for a statistic of examples.

    Args:
        statistic: from indices of examples `[number]` int64, some of them several times, to `[neurons]`.
        examples: how many there are.
        level: of confidence.
        draws: how often examples are drawn.
        way: "bca", which also calls the statistic once without each example (or without each of 100 groups of
            them, where there are more), or "percentile".
        strata: `[examples]`: as many are drawn of each stratum as it has; the labels of a comparison of groups.
        seed: of the draws.

    Raises:
        DataError: fewer than two examples, a level that is none, too few draws for it, or strata of another length.
        UnknownName: no such way.
    """
    if way not in _WAYS:
        raise unknown("way of making an interval", way, _WAYS)
    if examples < 2 or not 0 < level < 1:
        raise DataError(f"{examples} examples and level {level}: at least two are needed, and a level between 0 and 1")
    if draws * (1 - level) / 2 < 5:
        raise DataError(f"{draws} draws are too few for level {level}: at least {round(10 / (1 - level))} are needed")
    if strata is not None and np.shape(strata) != (examples,):
        raise DataError(f"strata are {list(np.shape(strata))} where there are {examples} examples")
    everyone = np.arange(examples)
    groups = [everyone] if strata is None else [np.flatnonzero(strata == each) for each in np.unique(strata)]
    generator = np.random.default_rng(seed)
    value = np.asarray(statistic(everyone), np.float64)
    found = np.stack(
        [
            np.asarray(statistic(np.concatenate([generator.choice(each, len(each)) for each in groups])), np.float64)
            for _ in range(draws)
        ]
    )
    tails = np.asarray([(1 - level) / 2, (1 + level) / 2])
    shares = np.broadcast_to(tails[:, None], (2, len(value)))
    if way == "bca":
        shares = _corrected(tails, value, found, _left_out(statistic, groups))
    ordered = np.sort(found, axis=0)
    places = (shares * (draws - 1)).clip(0, draws - 1)
    floor = np.floor(places).astype(np.int64)
    above = np.minimum(floor + 1, draws - 1)
    low, high = (
        np.take_along_axis(ordered, floor[[side]], 0)[0] * (1 - (places - floor)[side])
        + np.take_along_axis(ordered, above[[side]], 0)[0] * (places - floor)[side]
        for side in (0, 1)
    )
    return Interval(value, low, high, level)


_GROUPS = 100


def _left_out(statistic: Statistic, groups: list[np.ndarray]) -> np.ndarray:
    """`[groups, neurons]`: the statistic without some examples at a time."""
    everyone = np.concatenate(groups)
    number = min(_GROUPS, len(everyone))
    # Dealt out in turns, so that each part leaves out as much of each stratum as it can.
    part = np.arange(len(everyone)) % number
    return np.stack([np.asarray(statistic(np.sort(everyone[part != each])), np.float64) for each in range(number)])


def _corrected(tails: np.ndarray, value: np.ndarray, found: np.ndarray, without: np.ndarray) -> np.ndarray:
    """`[2, neurons]`: the shares of the draws that lie below the ends of the interval."""
    below = ((found < value).mean(0) + (found == value).mean(0) / 2).clip(0.5 / len(found), 1 - 0.5 / len(found))
    bias = norm.ppf(below)
    away = without.mean(0) - without
    cubes, squares = (away**3).sum(0), (away**2).sum(0)
    acceleration = cubes / (6 * np.where(squares > 0, squares, 1.0) ** 1.5)
    point = bias + norm.ppf(tails)[:, None]
    return norm.cdf(bias + point / (1 - acceleration * point))
