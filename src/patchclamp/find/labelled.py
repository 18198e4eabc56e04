"""What every finder for a label shares: whose label is what, what a recording says of each, the table, the null.

Labels belong to the analysis. They are a label of the data, by its name, or one value for each example, and can be
dealt anew over the examples without recording again; for that a recording must keep something of every example
(`pc.Pooled`). A label of the data that was recorded with `pc.ByLabel` needs its counts alone, and cannot be
dealt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import polars as pl

from patchclamp.data.token_labels import UNLABELLED
from patchclamp.errors import DataError, unknown
from patchclamp.neurons import Neurons
from patchclamp.recording import Recording
from patchclamp.recording.summaries import ByLabel, Pooled, Summary
from patchclamp.statistics import permutation_test

Labels = str | Sequence[object] | np.ndarray


@dataclass(frozen=True, eq=False)
class Labelled:
    """The labels of a recording's examples.

    Attributes:
        recording: what they belong to.
        name: of the label in the data; None where values were given.
        categories: two or more, sorted.
        codes: `[examples]` int64, the place of each one's category; None for a label of tokens.
        scored: the places of the categories that neurons are scored for: all, or the one that was asked for.
    """

    recording: Recording
    name: str | None
    categories: tuple[str, ...]
    codes: np.ndarray | None
    scored: tuple[int, ...]
    _made: dict[tuple[str, str], Any] = field(default_factory=dict, repr=False)

    def dealt(self, codes: np.ndarray) -> Labelled:
        """The same with other labels."""
        return replace(self, name=None, codes=codes)

    # What a recording says of each category ---------------------------------------------------------

    def rates(self, site: str, threshold: float = 0.0) -> np.ndarray:
        """`[neurons, categories]` float64: share of the positions on which a neuron fires, above `threshold`.

        Raises:
            DataError: the recording has neither `ByLabel(of=[FiringRate(threshold)])` of this label nor
                `Pooled("fired", threshold)`.
        """
        summaries = self.recording[site].summaries
        pooled, by_label = summaries.get("pooled"), summaries.get("by_label")
        if self.codes is not None and isinstance(pooled, Pooled) and pooled.how == "fired" and _is(pooled, threshold):
            fired, there = self._once(("fired", site), lambda: _known(pooled.values))
            which = self._which(self.codes, self._positions(site) * there)
            count = which.sum(1)
            self._refuse_empty(count.tolist())
            return (which @ fired / count[:, None]).T.astype(np.float64)
        if self.name is not None and isinstance(by_label, ByLabel) and self.name in by_label.labels:
            rate = by_label.templates.get("firing_rate")
            places = [] if rate is None else [n for n, each in enumerate(_thresholds(rate)) if each == threshold]
            if places:
                self._refuse_empty(self._counts(by_label).tolist())
                return by_label.rate(self.name)[:, : len(self.categories), places[0]]
        if threshold == 0.0:
            wanted = "pc.ByLabel() and a label of the data, or pc.Pooled('fired')"
        else:
            wanted = f"pc.ByLabel(of=[pc.FiringRate({threshold})]), or pc.Pooled('fired', {threshold})"
        raise DataError(f"{site}: how often neurons fire in each category is not there: record with {wanted}")

    def moments(self, site: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Means and variances `[neurons, categories]`, and how many rows `[categories]`: float64.

        From `ByLabel(of=[Moments])`, whose rows are tokens, or from `Pooled`, whose rows are examples.

        Raises:
            DataError: the recording has neither.
        """
        summaries = self.recording[site].summaries
        pooled, by_label = summaries.get("pooled"), summaries.get("by_label")
        if self.codes is not None and isinstance(pooled, Pooled):
            centre, values, squares, there = self._once(("moments", site), lambda: _centred(pooled.values))
            which = self._which(self.codes, there.astype(np.float32))
            count = which.sum(1, dtype=np.float64)
            self._refuse_empty(count.tolist())
            mean = (which @ values / count[:, None]).T.astype(np.float64)
            variance = (which @ squares / count[:, None]).T - mean**2
            return mean + centre[:, None], variance.clip(min=0.0), count
        if self.name is not None and isinstance(by_label, ByLabel) and "moments" in by_label.templates:
            count = self._counts(by_label)
            self._refuse_empty(count.tolist())
            groups = [by_label.of(self.name, each).moments for each in self.categories]
            mean, variance = (np.stack([getattr(each, what) for each in groups], 1) for what in ("mean", "variance"))
            return mean, variance, count.astype(np.float64)
        raise DataError(
            f"{site}: what neurons do in each category is not there: record with pc.ByLabel() and a label of the data, "
            "or pc.Pooled('mean')"
        )

    def _counts(self, by_label: ByLabel) -> np.ndarray:
        """`[categories]`: rows of each; what stands behind the last of them is left out."""
        assert self.name is not None
        return by_label.count(self.name)[: len(self.categories)]

    def _refuse_empty(self, counts: Sequence[int]) -> None:
        for category, number in zip(self.categories, counts, strict=True):
            if not number:
                raise DataError(f"the category {category!r} has no position that counts")

    def pooled(self, site: str) -> np.ndarray:
        """`[examples, neurons]` float32, one number for each example; NaN for one without positions that count.

        Raises:
            DataError: the recording has no `Pooled`.
        """
        pooled = self.recording[site].summaries.get("pooled")
        if not isinstance(pooled, Pooled):
            raise DataError(f"{site}: a number for each example is wanted: record with pc.Pooled('max')")
        return np.asarray(pooled.values, np.float32)

    def _which(self, codes: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """`[categories, examples]` float32: the weight of each example, in the row of its category."""
        which = np.zeros((len(self.categories), len(codes)), np.float32)
        which[codes, np.arange(len(codes))] = weights
        return which

    def _once(self, key: tuple[str, str], make: Callable[[], Any]) -> Any:
        """What does not depend on the labels is made once for all deals of them."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _positions(self, site: str) -> np.ndarray:
        """How many rows of the site are each example's."""
        positions, recorded = self.recording.positions, self.recording[site]
        rows = recorded.count + recorded.nonfinite["rows"]
        if len(positions) == 0 or rows == len(positions):
            return np.ones(len(self.recording.folds))
        if rows != positions.sum():
            raise DataError(
                f"{site} has {rows:,} rows where the examples have {int(positions.sum()):,} positions (only some are "
                "routed to an expert; a decoder reads targets): how many are whose is not known. Record with "
                "pc.ByLabel() and a label of the data, without pc.Pooled"
            )
        return positions


def labelled(recording: Recording, labels: Labels, positive: str | None = None) -> Labelled:
    """Check labels against a recording.

    Args:
        recording: what was recorded.
        labels: name of a label of the data, or one value for each example.
        positive: the one category that neurons are scored for; None: each against the rest.

    Raises:
        UnknownName: no such label, or no such category.
        DataError: fewer than two categories, a category without an example, or another number of values than examples.
    """
    if isinstance(labels, str):
        name, codes = labels, recording.codes.get(labels)
        if labels not in recording.labels:
            raise unknown("label of the data", labels, recording.labels, "Or give one value for each example.")
        categories = recording.labels[labels]
        if codes is not None:
            codes = np.asarray(codes, np.int64)
        elif categories[-1] == UNLABELLED and not _any_unlabelled(recording, labels):
            categories = categories[:-1]  # every token has a label
    else:
        name = None
        values = [str(each) for each in labels]
        examples = len(recording.folds) or int(recording.facts["data"]["examples"])
        if len(values) != examples:
            raise DataError(f"{len(values)} labels were given for {examples} examples: one for each is wanted")
        categories, codes = np.unique(values, return_inverse=True)
        categories = tuple(str(each) for each in categories)
    if len(categories) < 2:
        raise DataError(f"at least two categories are wanted, and all examples have {', '.join(categories)!r}")
    if codes is not None and (empty := sorted(set(range(len(categories))) - set(codes.tolist()))):
        raise DataError(f"no example has the category {categories[empty[0]]!r}")
    if positive is not None and positive not in categories:
        raise unknown("category", positive, categories)
    scored = range(len(categories)) if positive is None else [categories.index(positive)]
    return Labelled(recording, name, tuple(categories), codes, tuple(scored))


def table(
    given: Labelled,
    scores: np.ndarray,
    columns: dict[str, np.ndarray | list] | None = None,
    *,
    null: str | None = None,
    permutations: int = 200,
    seed: int = 0,
    again: Callable[[Labelled], np.ndarray] | None = None,
) -> Neurons:
    """The table of a finder, best first.

    Args:
        given: the labels.
        scores: `[neurons of all sites, scored categories]`, larger is better.
        columns: more of them, `[neurons]` each.
        null: None, or "permute": labels are dealt anew over the examples, and `p` and `q` added.
        permutations: how often.
        seed: of the deals.
        again: scores of other labels, as `scores`.

    Returns:
        `Neurons` with `score`, that of its best category; `label`, which that is; `score_<category>` of each; with
        `null`, `p` (Westfall-Young, over all neurons) and `q` (pooled), of the best category's score.

    Raises:
        UnknownName: another `null`.
        DataError: labels of tokens cannot be dealt; too few permutations.
    """
    sites = [(name, int(each.site.size or 0)) for name, each in given.recording.by_site.items()]
    best = scores.argmax(1)
    frame: dict[str, object] = {
        "site": np.repeat([name for name, _ in sites], [size for _, size in sites]),
        "index": np.concatenate([np.arange(size) for _, size in sites]),
        "score": scores[np.arange(len(scores)), best],
        "label": [given.categories[given.scored[each]] for each in best],
        **(columns or {}),
    }
    for place, category in enumerate(given.scored):
        frame[f"score_{given.categories[category]}"] = scores[:, place]
    if null is not None:
        if null != "permute":
            raise unknown("null", null, ["permute"])
        if given.codes is None or again is None:
            raise DataError("labels of tokens cannot be dealt anew: tokens of one document are not independent")
        found = permutation_test(
            lambda codes: again(given.dealt(codes)).max(1), given.codes, permutations=permutations, seed=seed
        )
        frame |= {"p": found.p, "q": found.q}
    order = np.argsort(-np.asarray(frame["score"]), kind="stable")
    return Neurons.from_polars(pl.DataFrame(frame)[order])


def _any_unlabelled(recording: Recording, label: str) -> bool:
    """Whether some token has none of the categories of a label of tokens."""
    found = [each.summaries.get("by_label") for each in recording.by_site.values()]
    return any(each.count(label)[-1] > 0 for each in found if isinstance(each, ByLabel) and label in each.labels)


def _known(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`[examples, neurons]` float32 with 0 for what has no value, and which examples have values."""
    values = np.asarray(values, np.float32)
    return np.nan_to_num(values), ~np.isnan(values[:, 0])


def _centred(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Means `[neurons]`, what exceeds them and its squares `[examples, neurons]`, which examples have values."""
    there = ~np.isnan(values[:, 0])
    centre = np.asarray(np.nanmean(values, axis=0, dtype=np.float64))
    above = np.nan_to_num(np.asarray(values, np.float64) - centre).astype(np.float32)
    return centre, above, above**2, there


def _thresholds(rate: Summary) -> list[float]:
    return [each for each in rate.parameters()["thresholds"] if isinstance(each, (int, float))]


def _is(pooled: Pooled, threshold: float) -> bool:
    given = pooled.parameters()["threshold"]
    return isinstance(given, (int, float)) and float(given) == threshold
