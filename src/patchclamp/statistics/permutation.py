"""Is a score more than chance? Labels are dealt anew over the examples, and every neuron is scored again.

The examples are documents, images, sentences: what was drawn independently. Tokens of one document resemble each
other, and a test that deals labels over tokens finds what is not there.

With thousands of neurons a p of each neuron's own permutations is too coarse to survive a correction: for q = 0.05
among 9,216 neurons 184,320 permutations would be needed. Two ways share the permutations among the neurons. Both first
put every neuron on one scale, by the mean and the standard deviation of its scores, the observed one among them (so
that under the null hypothesis all have the same standing):

    z = (score - mean) / standard deviation

- *Westfall-Young* (max statistic, step-down): `p` is the share of deals whose largest z, among the neurons that are
  not larger than this one, reaches it. The chance that any neuron is called in error at p < a is at most a, whatever
  the neurons have to do with each other. (Westfall and Young, 1993, algorithm 4.1; Ge, Dudoit and Speed, 2003.)
- *Pooled*: a neuron's own p is the share of all z of all neurons and deals that reach its own, and `q` what Benjamini
  and Hochberg (1995) make of these: of the neurons with q < a, about a share a is called in error. It holds as far as
  the neurons' null distributions have the same shape once they are on one scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from patchclamp.errors import DataError

Score = Callable[[np.ndarray], np.ndarray]
_LEAST = 19  # permutations, for a p of 0.05


@dataclass(frozen=True, eq=False)
class PermutationTest:
    """What a permutation test found. All arrays `[neurons]` float64.

    Attributes:
        score: of the labels as they are.
        z: the score on the common scale; 0 for a neuron whose score no deal changes.
        p: Westfall-Young, corrected for all neurons.
        q: of the null distribution pooled over neurons.
        permutations: how many times labels were dealt.
    """

    score: np.ndarray
    z: np.ndarray
    p: np.ndarray
    q: np.ndarray
    permutations: int

    @property
    def least_p(self) -> float:
        """The smallest p that so many permutations can give."""
        return 1 / (self.permutations + 1)

    def least_q(self, found: int = 1) -> float:
        """The smallest q that so many permutations can give if `found` neurons are called."""
        number = len(self.score)
        return number / (self.permutations * number + 1) / max(found, 1)

    def below(self, level: float) -> np.ndarray:
        """`[neurons]` bool: which have q < level.

        Raises:
            DataError: no neuron could have it, whatever the data, with so few permutations.
        """
        if not 0 < level < 1:
            raise DataError(f"a false discovery rate lies between 0 and 1; not {level}")
        if self.least_q(len(self.score)) >= level:
            raise DataError(
                f"q < {level:g} cannot be reached with {self.permutations} permutations: at least "
                f"{math.ceil(1 / (level * len(self.score))) + 1} are needed"
            )
        return self.q < level

    def __repr__(self) -> str:
        return (
            f"PermutationTest: {len(self.score):,} neurons, {self.permutations:,} permutations over examples; "
            f"p (Westfall-Young) from {self.least_p:.2g}, q (pooled) from {self.least_q():.2g} for a single neuron; "
            f"{int((self.q < 0.05).sum())} with q < 0.05"
        )


def permutation_test(
    score: Score,
    labels: np.ndarray,
    *,
    permutations: int = 200,
    seed: int = 0,
    strata: np.ndarray | None = None,
) -> PermutationTest:
    """Score neurons with labels that are dealt anew over the examples.

    Args:
        score: from labels `[examples]` to `[neurons]`, larger where a neuron has more to do with them.
        labels: `[examples]`, of any dtype: one for each independent example.
        permutations: how often; each calls `score` once.
        seed: of the deals.
        strata: `[examples]`; labels are dealt within a stratum only (examples of one length, of one source).

    Raises:
        DataError: fewer than 19 permutations, labels that are all the same or of another shape, a score that is NaN
            or changes its shape.
    """
    labels = np.asarray(labels)
    _check(labels, permutations, strata)
    observed = _finite(score(labels), None)
    found = np.empty((permutations + 1, len(observed)))
    found[0] = observed
    generator = np.random.default_rng(seed)
    for number in range(1, permutations + 1):
        found[number] = _finite(score(labels[_deal(generator, len(labels), strata)]), observed)
    z = _on_one_scale(found)
    return PermutationTest(observed, z[0], _step_down(z), benjamini_hochberg(_pooled(z)), permutations)


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """False discovery rates of p-values, both `[tests]` float64 (Benjamini and Hochberg, 1995).

    Raises:
        DataError: a p outside of 0 to 1.
    """
    p = np.asarray(p, np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise DataError("p-values are numbers from 0 to 1 in one dimension")
    order = np.argsort(p, kind="stable")[::-1]
    ranks = np.arange(len(p), 0, -1)
    q = np.empty_like(p)
    q[order] = np.minimum.accumulate(p[order] * len(p) / ranks).clip(max=1.0)
    return q


# Helpers --------------------------------------------------------------------------------------------


def _check(labels: np.ndarray, permutations: int, strata: np.ndarray | None) -> None:
    if permutations < _LEAST:
        raise DataError(f"with {permutations} permutations no p is below 0.05: at least {_LEAST} are needed")
    if labels.ndim != 1 or len(np.unique(labels)) < 2:
        raise DataError("labels are [examples], and at least two of them differ: else there is nothing to deal")
    if strata is not None and np.shape(strata) != labels.shape:
        raise DataError(f"strata are {list(np.shape(strata))} where the labels are {list(labels.shape)}")


def _finite(found: np.ndarray, like: np.ndarray | None) -> np.ndarray:
    found = np.asarray(found, np.float64)
    if found.ndim != 1 or (like is not None and found.shape != like.shape):
        raise DataError(f"a score is one number for each neuron, always the same ones; not {list(found.shape)}")
    if not np.isfinite(found).all():
        raise DataError(f"the score of {int((~np.isfinite(found)).sum())} neurons is not a finite number")
    return found


def _deal(generator: np.random.Generator, number: int, strata: np.ndarray | None) -> np.ndarray:
    """`[examples]` int64: whose label each example gets."""
    if strata is None:
        return generator.permutation(number)
    dealt = np.arange(number)
    for each in np.unique(strata):
        places = np.flatnonzero(strata == each)
        dealt[places] = generator.permutation(places)
    return dealt


def _on_one_scale(found: np.ndarray) -> np.ndarray:
    """`[deals, neurons]`, in units of each neuron's own spread; 0 where nothing but rounding changes."""
    centred = found - found.mean(0)
    spread = found.std(0)
    still = spread <= 1e-12 * np.abs(found).max(0)
    return np.where(still, 0.0, centred / np.where(still, 1.0, spread))


def _step_down(z: np.ndarray) -> np.ndarray:
    """Corrected p of each neuron; row 0 is the observed one, and counts as a deal itself."""
    order = np.argsort(-z[0], kind="stable")
    # Largest of each deal among this neuron and those below it.
    largest = np.maximum.accumulate(z[:, order[::-1]], axis=1)[:, ::-1]
    p = np.empty(z.shape[1])
    p[order] = np.maximum.accumulate((largest >= z[0, order] - _ROUNDING).mean(0))
    return p


def _pooled(z: np.ndarray) -> np.ndarray:
    """Share of all z of all deals that reach each neuron's own; the observed one among them."""
    null = np.sort(z[1:], axis=None)
    reached = len(null) - np.searchsorted(null, z[0] - _ROUNDING, side="left")
    return (1 + reached) / (1 + len(null))


_ROUNDING = 1e-9
