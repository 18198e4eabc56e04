"""Weighted assignment: naming the label of an example from who fires, neurons of few labels counting for more.

Of a neuron e, n[e, l] is what it did on the examples of the label l, and q[e] what it does now. Relevant to l are
the neurons with a ratio n[e, l] / sum_l n[e, l] above a bound. With `labels[e]` the number of labels on which e
ever did anything, the score of l is a sum over its relevant neurons:

    score[l] = fired[l] * sum_e  q[e] / labels[e] * ratio[e, l]
    fired[l] = sum of n[e, l] where q[e] > 0  /  sum of n[e, l]

so that a neuron for everything says little, and a label whose neurons stay silent is doubted. Standard assignment, the
baseline, gives each neuron to the label on which it is largest, and takes the mean of q over a label's neurons.

The paper counts spikes of a network that learns by spike timing; any activations that are never negative will do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import ArrayLike

from patchclamp.errors import DataError, warn
from patchclamp.find.labelled import Labels, labelled
from patchclamp.neurons import Neurons
from patchclamp.published import published
from patchclamp.recording import Recording
from patchclamp.recording.summaries import Pooled


@dataclass(frozen=True, eq=False)
class WeightedAssignment:
    """Which neurons speak for which labels, and what they say of other examples.

    Attributes:
        labels: sorted.
        counts: `[neurons, labels]` float64, what each neuron did on each label; rows in the order of `sites`.
        sites: name -> number of neurons.
        relevance: a neuron is relevant to a label that has more than this share of its counts.
        ambiguous_share: one that responds to at least this share of the labels is divided by their number.
        weighted: False for standard assignment.
    """

    labels: tuple[str, ...]
    counts: np.ndarray
    sites: dict[str, int]
    relevance: float = 0.1
    ambiguous_share: float = 0.02
    weighted: bool = True

    @property
    def neurons(self) -> Neurons:
        """All neurons, those of one label first.

        `score` is the share of a neuron's counts on its best label (1 for a neuron of one label); `label` says which
        that is (null for one that never fires); `responds_to`, on how many labels it does anything.
        """
        ratio = self._ratio
        best = ratio.argmax(1)
        silent = self.counts.sum(1) == 0
        frame = pl.DataFrame(
            {
                "site": np.repeat(list(self.sites), list(self.sites.values())),
                "index": np.concatenate([np.arange(size) for size in self.sites.values()]),
                "score": ratio.max(1),
                "label": [None if none else self.labels[n] for n, none in zip(best, silent, strict=True)],
                "responds_to": (self.counts > 0).sum(1),
            },
            schema_overrides={"label": pl.String},
        )
        return Neurons.from_polars(frame.sort("score", descending=True, maintain_order=True))

    def scores(self, query: Recording | ArrayLike) -> np.ndarray:
        """`[examples, labels]` float64; 0 for a label none of whose neurons fires.

        Args:
            query: a recording of the same sites with `Pooled` of the same kind, or `[examples, neurons]`, no number
                negative. An example without positions that count has none that fires.

        Raises:
            DataError: other sites or sizes, no `Pooled`, negative activations.
        """
        fired = self._fired(query)
        if not self.weighted:
            return fired @ (self._assigned / self._assigned.sum(0).clip(min=1))
        relevant = self._relevant
        labels = (self.counts > 0).sum(1)
        divisor = np.where(labels >= self.ambiguous_share * len(self.labels), labels, 1).clip(min=1)
        expected = self.counts * relevant
        whole = expected.sum(0)
        heard = (fired > 0) @ expected / np.where(whole > 0, whole, 1.0)
        return fired @ (self._ratio * relevant / divisor[:, None]) * heard

    def predict(self, query: Recording | ArrayLike) -> list[str | None]:
        """The label of largest score for each example; None, an abstention, where no label scores (nothing fires).

        Args:
            query: as for `scores`.

        Raises:
            DataError: as there.
        """
        scores = self.scores(query)
        return [self.labels[each.argmax()] if each.any() else None for each in scores]

    def probabilities(self, query: Recording | ArrayLike) -> np.ndarray:
        """`[examples, labels]` float64: scores from their least (0) to their largest, divided by their sum.

        Alike for all labels where all scores are.

        Args:
            query: as for `scores`.

        Raises:
            DataError: as there.
        """
        scores = self.scores(query)
        above = scores - scores.min(1, keepdims=True)
        flat = above.max(1, keepdims=True) == 0
        above = np.where(flat, 1.0, above)
        return above / above.sum(1, keepdims=True)

    @property
    def _ratio(self) -> np.ndarray:
        whole = self.counts.sum(1, keepdims=True)
        return self.counts / np.where(whole > 0, whole, 1.0)

    @property
    def _relevant(self) -> np.ndarray:
        return self._ratio > self.relevance

    @property
    def _assigned(self) -> np.ndarray:
        """`[neurons, labels]` bool: each neuron that ever fires to one label."""
        assigned = np.zeros(self.counts.shape, bool)
        assigned[np.arange(len(assigned)), self.counts.argmax(1)] = True
        return assigned & (self.counts > 0)

    def _fired(self, query: Recording | ArrayLike) -> np.ndarray:
        if isinstance(query, Recording):
            for site, size in self.sites.items():
                found = int(query[site].site.size or 0)
                if found != size:
                    raise DataError(f"{site} has {found} neurons here, and {size} where the counts are from")
            return np.concatenate([_activity(query, site) for site in self.sites], 1)
        values = np.atleast_2d(np.asarray(query, np.float64))
        if values.ndim != 2 or values.shape[1] != len(self.counts):
            raise DataError(f"a query is [examples, {len(self.counts)} neurons]; not {list(values.shape)}")
        return _refuse_negative(values, "the query")


@published(
    row="S107",
    title="Spiking Neural Networks for Visual Place Recognition via Weighted Neuronal Assignments",
    authors="Hussaini et al.",
    year=2021,
    url="https://arxiv.org/abs/2109.06452",
    part="weighted assignment",
)
def weighted_assignment(
    recording: Recording,
    labels: Labels,
    *,
    relevance: float = 0.1,
    ambiguous_share: float = 0.02,
    weighted: bool = True,
) -> WeightedAssignment:
    """Assign neurons to labels, those of few labels with more weight (Hussaini et al., 2021).

    Where labels have unequal numbers of examples, counts are those that equal numbers would have given: else a label of
    many examples would have every neuron.

    Args:
        recording: with `Pooled`, of activations that are never negative; `Pooled("fired")` is not, whatever they are.
        labels: a label of the data, or one value for each example.
        relevance: a neuron is relevant to a label that has more than this share of its counts.
        ambiguous_share: a neuron that responds to at least this share of the labels is divided by their number.
        weighted: False for standard assignment.

    Raises:
        DataError: negative activations, no `Pooled`, a label of tokens, fewer than two labels, a share that is none.
        UnknownName: no such label.
    """
    for name, share in {"relevance": relevance, "ambiguous_share": ambiguous_share}.items():
        if not 0 <= share <= 1:
            raise DataError(f"{name} is a share from 0 to 1; not {share}")
    given = labelled(recording, labels)
    if given.codes is None:
        raise DataError("a label of tokens has no value for an example: weighted_assignment wants one for each example")
    fired = np.concatenate([_activity(recording, site) for site in recording], 1)
    examples = np.bincount(given.codes, minlength=len(given.categories))
    which = np.zeros((len(given.categories), len(fired)))
    which[given.codes, np.arange(len(fired))] = (examples.mean() / examples)[given.codes]
    sites = {name: int(each.site.size or 0) for name, each in recording.by_site.items()}
    made = WeightedAssignment(given.categories, (which @ fired).T, sites, relevance, ambiguous_share, weighted)
    speak = made._relevant if weighted else made._assigned
    for place in np.flatnonzero(~speak.any(0)):
        warn(f"weighted_assignment: no neuron speaks for {made.labels[place]!r}: it scores 0 and is never predicted")
    return made


# Helpers --------------------------------------------------------------------------------------------


def _activity(recording: Recording, site: str) -> np.ndarray:
    """`[examples, neurons]` float64, 0 where an example has no position that counts."""
    pooled = recording[site].summaries.get("pooled")
    if not isinstance(pooled, Pooled):
        raise DataError(f"{site}: a number for each example is wanted: record with pc.Pooled('mean', dtype='float32')")
    return _refuse_negative(np.nan_to_num(np.asarray(pooled.values, np.float64)), site)


def _refuse_negative(values: np.ndarray, what: str) -> np.ndarray:
    if (values < 0).any():
        raise DataError(
            f"{what} has negative activations, and counts are at least 0: record with pc.Pooled('fired'), or a site "
            "behind a nonlinearity that is never negative"
        )
    return values
