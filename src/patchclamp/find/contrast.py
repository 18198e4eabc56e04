"""Contrast: how far a neuron's mean on the examples of a label exceeds its mean on the rest.

    score = mean of the label - mean of the rest

A neuron belongs to the label where that is positive: the published rule is no more than the sign, so half of all
neurons belong to any label, by chance too. Whether they are more than chance is what `contrast_overlap` asks: do
disjoint halves of the examples find the same neurons? The difference of means is also the usual baseline that other
finders are compared with.

The paper's second half prunes weights, chosen by their size times the norm of their input; that is not here.
"""

from __future__ import annotations

import numpy as np
import polars as pl
from scipy.stats import hypergeom

from patchclamp.errors import DataError
from patchclamp.find.labelled import Labelled, Labels, labelled, table
from patchclamp.neurons import Neurons
from patchclamp.published import published
from patchclamp.recording import Recording
from patchclamp.statistics import cohens_d, welch

# Means of the same numbers, summed in another order in float32, differ by less than this many standard deviations.
_ROUNDING = 1e-5


@published(
    row="S150",
    title="Memorized Images in Diffusion Models share a Subspace that can be Located and Deleted",
    authors="Chavhan et al.",
    year=2024,
    url="https://arxiv.org/abs/2406.18566",
    part="neurons",
)
def contrast(
    recording: Recording,
    labels: Labels,
    positive: str | None = None,
    *,
    null: str | None = None,
    permutations: int = 200,
    seed: int = 0,
) -> Neurons:
    """Neurons that are larger on a label than on the rest, by the difference of means (Chavhan et al., 2024).

    Args:
        recording: with `ByLabel` of this label (means over tokens) or `Pooled` (means over examples).
        labels: a label of the data ("memorised" or not, in the paper), or one value for each example.
        positive: score neurons for this category only; None: each against the rest.
        null: "permute" adds `p` and `q`.
        permutations: how often labels are dealt anew.
        seed: of that.

    Returns:
        All neurons: `score`, mean on its best label less the mean on the rest, in units of the activation; `label`;
        `score_<label>`; `selected`, whether that mean exceeds the rest's, which is the paper's choice; `owners`, all
        labels for which it does, with commas between; `difference`, the score under its own name; `cohens_d`, the same
        in standard deviations; `p_welch`, two-sided, of that neuron and label alone: it is not corrected, and far too
        small where the rows are tokens (`ByLabel`), which are not independent.

    Raises:
        DataError: fewer than two labels, fewer than two rows of one, what is wanted was not recorded.
        UnknownName: no such label or category.
    """
    given = labelled(recording, labels, positive)
    found = _Contrasts(given)
    best = np.arange(len(found.difference)), found.difference.argmax(1)
    columns = {
        "selected": found.exceeds[best],
        "owners": [
            ", ".join(given.categories[given.scored[n]] for n in np.flatnonzero(each)) for each in found.exceeds
        ],
        "difference": found.difference[best],
        "cohens_d": found.cohens_d[best],
        "p_welch": found.p_welch[best],
    }
    return table(
        given,
        found.difference,
        columns,
        null=null,
        permutations=permutations,
        seed=seed,
        again=_differences,
    )


def contrast_overlap(
    recording: Recording,
    labels: Labels,
    positive: str,
    *,
    top: float | None = 0.01,
    splits: int = 20,
    seed: int = 0,
) -> pl.DataFrame:
    """Do disjoint halves of the examples find the same neurons for a label? Intersection over union, site by site.

    The examples of the label and the rest are each cut in two at random; each half of the label is contrasted with a
    half of the rest, so that nothing is in both. A neuron that varies much comes out of both halves more often
    than others, whatever the label: `shuffled` is what remains when labels are dealt anew, and is the fairer chance.

    Args:
        recording: with `Pooled`.
        labels: a label of the data, or one value for each example.
        positive: the category that is contrasted with the rest.
        top: share of a site's neurons that make a set: those of largest difference, if it is above 0. None: all whose
            difference is above 0, the paper's sets.
        splits: how often examples are cut in two.
        seed: of that.

    Returns:
        One row a site: `site`; `top`, neurons in a set at most; `overlap` (0 to 1), mean over splits, and `smallest` of
        them; `chance`, what two sets of that size drawn at random would share (hypergeometric); `shuffled`, the overlap
        of labels that are dealt anew for each split.

    Raises:
        DataError: no `Pooled`, a label of tokens, fewer than two examples on one side, a share that is none.
        UnknownName: no such label or category.
    """
    if top is not None and not 0 < top <= 1:
        raise DataError(f"top is a share, above 0 and at most 1, or None; not {top}")
    if splits < 1:
        raise DataError(f"splits is a whole number, at least 1; not {splits}")
    given = labelled(recording, labels, positive)
    if given.codes is None:
        raise DataError("a label of tokens cannot be cut in halves of examples: give one value for each example")
    rows = []
    for site in recording:
        values = given.pooled(site)
        there = ~np.isnan(values[:, 0])
        inside = (given.codes == given.scored[0])[there]
        if min(inside.sum(), (~inside).sum()) < 2:
            raise DataError(f"{site}: halves of {positive!r} and of the rest want at least two examples of each")
        rows.append({"site": site} | _overlap(values[there].astype(np.float64), inside, top, splits, seed))
    return pl.DataFrame(rows)


# Helpers --------------------------------------------------------------------------------------------


def _differences(given: Labelled) -> np.ndarray:
    groups = [_groups(given, site) for site in given.recording]
    return np.concatenate([mean - other for mean, _, _, other, _, _ in groups])


class _Contrasts:
    """Of all sites, `[neurons, scored categories]` each."""

    def __init__(self, given: Labelled) -> None:
        groups = [_groups(given, site) for site in given.recording]
        mean, variance, _, other, other_variance, _ = (np.concatenate(each) for each in zip(*groups, strict=True))
        self.difference = mean - other
        self.cohens_d = np.concatenate([cohens_d(*each) for each in groups])
        self.p_welch = np.concatenate([welch(*each)[1] for each in groups])
        self.exceeds = self.difference > _ROUNDING * np.sqrt((variance + other_variance) / 2)


_Group = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _groups(given: Labelled, site: str) -> _Group:
    """Mean, variance and count of each scored category, then of the rest: `[neurons, categories]` each."""
    mean, variance, count = given.moments(site)
    # Around the mean of all: squares of what is far from 0 would lose their last digits.
    centre = mean @ (count / count.sum())
    near = mean - centre[:, None]
    rest = np.tile(count, (len(count), 1))
    np.fill_diagonal(rest, 0.0)
    weights = (rest / rest.sum(1, keepdims=True)).T
    other = near @ weights
    other_variance = ((variance + near**2) @ weights - other**2).clip(min=0.0)
    counts = np.broadcast_to(count, mean.shape), np.broadcast_to(rest.sum(1), mean.shape)
    found = mean, variance, counts[0], other + centre[:, None], other_variance, counts[1]
    return tuple(each[:, given.scored] for each in found)  # type: ignore[return-value]


def _overlap(
    values: np.ndarray, inside: np.ndarray, top: float | None, splits: int, seed: int
) -> dict[str, float | int]:
    generator = np.random.default_rng(seed)
    size = values.shape[1]
    wanted = size if top is None else max(1, round(top * size))
    values = values - values.mean(0)
    floor = _ROUNDING * values.std(0)
    found, chance, shuffled = [], [], []
    for _ in range(splits):
        first, second = _halves(values, inside, wanted, floor, generator)
        found.append(_shared(first, second))
        chance.append(_by_chance(size, int(first.sum()), int(second.sum())))
        shuffled.append(_shared(*_halves(values, generator.permutation(inside), wanted, floor, generator)))
    return {
        "top": wanted,
        "overlap": float(np.mean(found)),
        "smallest": float(np.min(found)),
        "chance": float(np.mean(chance)),
        "shuffled": float(np.mean(shuffled)),
    }


def _halves(
    values: np.ndarray, inside: np.ndarray, wanted: int, floor: np.ndarray, generator: np.random.Generator
) -> list[np.ndarray]:
    """The sets of two halves, `[neurons]` bool each."""
    half = np.zeros(len(inside), np.int64)
    for side in (inside, ~inside):
        places = generator.permutation(np.flatnonzero(side))
        half[places[: len(places) // 2]] = 1
    sets = []
    for which in (0, 1):
        difference = values[inside & (half == which)].mean(0) - values[~inside & (half == which)].mean(0)
        chosen = np.zeros(len(difference), bool)
        chosen[np.argsort(-difference, kind="stable")[:wanted]] = True
        sets.append(chosen & (difference > floor))
    return sets


def _shared(first: np.ndarray, second: np.ndarray) -> float:
    return float((first & second).sum() / max((first | second).sum(), 1))


def _by_chance(size: int, first: int, second: int) -> float:
    """Intersection over union that is expected of two sets of these sizes, drawn at random."""
    if not first or not second:
        return 0.0
    both = np.arange(max(0, first + second - size), min(first, second) + 1)
    return float((hypergeom.pmf(both, size, first, second) * both / (first + second - both)).sum())
