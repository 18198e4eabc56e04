"""Visual DNA: what neurons do on a data set is its fingerprint, and fingerprints have distances.

A fingerprint is the distribution of every neuron's activations, as a histogram and as mean and variance. Fingerprints
add up, so that of two data sets together is known without another pass. Between two of them each neuron has a distance:

    "emd"      sum over bins j of |F_a(j) - F_b(j)| (x(j + 1) - x(j))     F the shares of activations up to bin j
    "frechet"  (mean_a - mean_b)^2 + (std_a - std_b)^2                    of normal distributions; squared units

"emd" is the earth mover's distance, in units of the activation, if all of a bin lies at its middle x. The paper has
1,000 equal bins over the range of a reference set, cuts off what lies beyond it, and counts in bins. The bins of
`pc.Histogram` are the same for all neurons: at most an eighth as wide as the values in them are large, from -16,384 to
16,384. So small activations are resolved finer than there and large ones coarser, no reference is needed, and no cut
hides drift. Without a scale of each neuron's own, loud neurons rule the mean: `reference` gives them one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import polars as pl
from numpy.typing import ArrayLike

from patchclamp.errors import DataError, unknown, warn
from patchclamp.neurons import Neurons
from patchclamp.published import published
from patchclamp.recording import Recording
from patchclamp.recording.summaries import ByLabel, Histogram, Moments

_WAYS = ("emd", "frechet")
_ENLARGED = 1.2  # the paper's range is so much wider than what the reference shows
_MUCH = 0.01  # share of activations beyond the last edge that is worth a warning


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """How the activations of every neuron are distributed on a data set. `a + b` is that of both together.

    Attributes:
        model: name, class and hash of the weights, as in the facts of the recording.
        data: name of the data.
        count: site -> activations of each neuron.
        edges: `[bins + 1]` float64, of all histograms.
        histograms: site -> `[neurons, bins]` int64; empty where the recording has no `Histogram`.
        mean: site -> `[neurons]` float64; empty where it has no `Moments`.
        variance: the same.
    """

    model: Mapping[str, object]
    data: str
    count: dict[str, int]
    edges: np.ndarray = field(repr=False)
    histograms: dict[str, np.ndarray] = field(repr=False)
    mean: dict[str, np.ndarray] = field(repr=False)
    variance: dict[str, np.ndarray] = field(repr=False)

    @property
    def outside(self) -> dict[str, float]:
        """Site -> share of its activations beyond the last edges, which count as if they lay on them."""
        return {name: float(each[:, [0, -1]].sum() / each.sum()) for name, each in self.histograms.items()}

    def __add__(self, other: Fingerprint) -> Fingerprint:
        """The fingerprint of both data sets together.

        Raises:
            DataError: they are of different models or sites.
        """
        _refuse_unlike(self, other)
        mean, variance = {}, {}
        for name in self.mean.keys() & other.mean.keys():
            share = other.count[name] / (self.count[name] + other.count[name])
            difference = other.mean[name] - self.mean[name]
            mean[name] = self.mean[name] + share * difference
            within = (1 - share) * self.variance[name] + share * other.variance[name]
            variance[name] = within + share * (1 - share) * difference**2
        shared = self.histograms.keys() & other.histograms.keys()
        return Fingerprint(
            self.model,
            f"{self.data} + {other.data}",
            {name: self.count[name] + other.count[name] for name in self.count},
            self.edges,
            {name: self.histograms[name] + other.histograms[name] for name in self.histograms if name in shared},
            mean,
            variance,
        )


@dataclass(frozen=True, eq=False)
class FingerprintDistance:
    """How far apart two data sets are in what neurons do on them.

    Attributes:
        overall: the (weighted) mean over neurons.
        by_site: site -> the same over its neurons; without sites none of whose neurons counts.
        neurons: the largest distance first: `score`, the distance; `weight`; `mean_difference`, of the second to
            the first; `beyond`, the share of the second's activations outside of all bins that the first reaches.
        how: "emd" or "frechet".
        outside: site -> share of its activations beyond +-16,384 in the first and in the second.
    """

    overall: float
    by_site: dict[str, float]
    neurons: Neurons
    how: str
    outside: dict[str, tuple[float, float]] = field(repr=False)


@published(
    row="S101",
    title="Visual DNA: Representing and Comparing Images using Distributions of Neuron Activations",
    authors="Ramtoula et al.",
    year=2023,
    url="https://arxiv.org/abs/2304.10036",
    part="fingerprint",
)
def fingerprint(recording: Recording, label: str | None = None, category: str | None = None) -> Fingerprint:
    """The distributions of what neurons do on a data set, to be compared with another's (Ramtoula et al., 2023).

    Args:
        recording: with `pc.Histogram()` (for "emd"), `pc.Moments()` (for "frechet"), or both, which `pc.record` keeps
            unless told otherwise. Every token, or every pixel of a channel's map, counts.
        label: a label of the data: of the rows of `category` alone, recorded with
            `pc.ByLabel(of=[pc.Histogram, pc.Moments])`.
        category: of the label.

    Raises:
        DataError: neither summary was recorded, a site saw nothing, or only one of `label` and `category` is given.
        UnknownName: no such label or category.
    """
    if (label is None) != (category is None):
        raise DataError("label and category belong together: fingerprint(recording, 'kind', 'code')")
    facts = recording.facts
    model = {name: facts["model"].get(name) for name in ("name", "class", "weights_sha256")}
    data = str(facts["data"].get("name")) + ("" if category is None else f", {label} {category}")
    found = Fingerprint(model, data, {}, np.empty(0), {}, {}, {})
    for name in recording:
        histogram, moments = _summaries_of(recording, name, label, category)
        if histogram is None and moments is None:
            asked = "pc.Histogram() and pc.Moments()"
            asked = asked if label is None else "pc.ByLabel(of=[pc.Histogram, pc.Moments])"
            raise DataError(f"{name}: how activations are distributed is not there: record with {asked}")
        if histogram is not None:
            found.histograms[name] = histogram.counts
            found = replace(found, edges=histogram.edges)
        if moments is not None:
            found.mean[name], found.variance[name] = moments.mean, moments.variance
        seen = int(found.histograms[name][0].sum()) if moments is None else moments.count
        if not seen:
            raise DataError(f"{name} saw no activation on {data}: an empty set has no fingerprint")
        found.count[name] = seen
    return found


@published(
    row="S101",
    title="Visual DNA: Representing and Comparing Images using Distributions of Neuron Activations",
    authors="Ramtoula et al.",
    year=2023,
    url="https://arxiv.org/abs/2304.10036",
    part="distance",
)
def fingerprint_distance(
    a: Fingerprint,
    b: Fingerprint,
    *,
    how: str = "emd",
    neurons: Neurons | None = None,
    weights: Mapping[str, ArrayLike] | None = None,
    reference: Fingerprint | None = None,
) -> FingerprintDistance:
    """How far apart two data sets are in what neurons do on them (Ramtoula et al., 2023).

    For one attribute, find the neurons that it moves: `fingerprint_distance(with_it, without_it).neurons.top(50)`;
    given as `neurons`, these compare by the attribute, and all others compare in spite of it.

    Args:
        a: of one data set.
        b: of the other; of the same model and sites.
        how: "emd", in units of the activation, or "frechet", in squared ones.
        neurons: only these; None: all.
        weights: site -> `[neurons]`, at least 0, of the mean over neurons; a site that is not named has weight 0.
        reference: measure each neuron's distance in widths of its range on this data set (1.2 times what it shows
            there, as in the paper, whose unit is a thousandth of that); for "frechet" in their squares.

    Raises:
        DataError: different models, sites or edges; a summary that `how` needs was not recorded; a weight is negative
            or not finite, or none is above 0.
        UnknownName: no such way, site or neuron.

    Warns:
        UserWarning: If more than 1% of a site's activations are beyond +-16,384, where all count as one value.
    """
    if how not in _WAYS:
        raise unknown("distance between fingerprints", how, _WAYS)
    _refuse_unlike(a, b)
    weight = _weights(a, neurons, weights)
    distance = _emd(a, b) if how == "emd" else _frechet(a, b)
    if reference is not None:
        _refuse_unlike(a, reference)
        power = 1 if how == "emd" else 2
        distance = {name: each / _range(reference, name) ** power for name, each in distance.items()}
    outside = {name: (a.outside[name], b.outside[name]) for name in a.histograms if name in b.histograms}
    for name, shares in outside.items():
        if max(shares) > _MUCH:
            warn(f"{name}: {max(shares):.1%} of activations are beyond +-{a.edges[-2]:,.0f}, where all count as one")
    totals = {name: float(each.sum()) for name, each in weight.items()}
    weighed = {name: float(distance[name] @ weight[name]) for name in distance}
    return FingerprintDistance(
        sum(weighed.values()) / sum(totals.values()),
        {name: weighed[name] / total for name, total in totals.items() if total > 0},
        _table(a, b, distance, weight),
        how,
        outside,
    )


# Helpers --------------------------------------------------------------------------------------------


def _summaries_of(
    recording: Recording, site: str, label: str | None, category: str | None
) -> tuple[Histogram | None, Moments | None]:
    held: Mapping[str, object] = recording[site].summaries
    if label is not None and category is not None:
        by_label = held.get("by_label")
        if not isinstance(by_label, ByLabel):
            raise DataError(f"{site}: nothing is known by label: record with pc.ByLabel(of=[pc.Histogram, pc.Moments])")
        group = by_label.of(label, category)
        held = {name: getattr(group, name) for name in by_label.templates}
    histogram, moments = held.get("histogram"), held.get("moments")
    return histogram if isinstance(histogram, Histogram) else None, moments if isinstance(moments, Moments) else None


def _refuse_unlike(a: Fingerprint, b: Fingerprint) -> None:
    if any(a.model[key] != b.model[key] for key in ("class", "weights_sha256")):
        raise DataError(
            f"fingerprints of different models ({a.model['name']!r} and {b.model['name']!r}, or other weights) have no "
            "distance: their neurons are not the same"
        )
    if a.count.keys() != b.count.keys():
        odd = sorted(a.count.keys() ^ b.count.keys())
        raise DataError(f"the fingerprints are of different sites: {odd[0]} is in one of them only")
    if a.histograms and b.histograms and not np.array_equal(a.edges, b.edges):
        raise DataError(f"the histograms have different edges ({len(a.edges)} and {len(b.edges)} of them): record anew")


def _emd(a: Fingerprint, b: Fingerprint) -> dict[str, np.ndarray]:
    for name in a.count:
        if name not in a.histograms or name not in b.histograms:
            raise DataError(f"{name}: the earth mover's distance wants histograms: record with pc.Histogram()")
    ends = a.edges.copy()
    ends[0], ends[-1] = ends[1], ends[-2]  # what lies beyond the last edge counts as if it lay on it
    gaps = np.diff((ends[:-1] + ends[1:]) / 2)
    found = {}
    for name, counts in a.histograms.items():
        one, other = (each.cumsum(1)[:, :-1] / each.sum(1, keepdims=True) for each in (counts, b.histograms[name]))
        found[name] = np.abs(one - other) @ gaps
    return found


def _frechet(a: Fingerprint, b: Fingerprint) -> dict[str, np.ndarray]:
    for name in a.count:
        if name not in a.mean or name not in b.mean:
            raise DataError(f"{name}: Frechet's distance wants means and variances: record with pc.Moments()")
    return {
        name: (a.mean[name] - b.mean[name]) ** 2 + (np.sqrt(a.variance[name]) - np.sqrt(b.variance[name])) ** 2
        for name in a.count
    }


def _range(reference: Fingerprint, site: str) -> np.ndarray:
    """`[neurons]` float64, how wide the range of each neuron is."""
    if site not in reference.histograms:
        raise DataError(f"{site}: the range on the reference wants its histogram: record with pc.Histogram()")
    low, high = _reached(reference.histograms[site])
    edges = reference.edges.clip(reference.edges[1], reference.edges[-2])
    width = edges[high + 1] - edges[low]
    # Everything lies beyond one end: no edge tells how wide that is, and the bin next to it stands in.
    return _ENLARGED * np.where(width > 0, width, edges[2] - edges[1])


def _reached(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last bin that is not empty, `[neurons]` each."""
    there = counts > 0
    return there.argmax(1), counts.shape[1] - 1 - there[:, ::-1].argmax(1)


def _beyond(seen: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """`[neurons]`: the share of `counts` in bins below or above all that `seen` reaches."""
    low, high = (each[:, None] for each in _reached(seen))
    place = np.arange(counts.shape[1])
    return np.where((place < low) | (place > high), counts, 0).sum(1) / counts.sum(1)


def _weights(
    of: Fingerprint, neurons: Neurons | None, weights: Mapping[str, ArrayLike] | None
) -> dict[str, np.ndarray]:
    sizes = {name: len(of.mean[name] if name in of.mean else of.histograms[name]) for name in of.count}
    found = {name: np.full(size, 1.0 if weights is None else 0.0) for name, size in sizes.items()}
    for name, given in (weights or {}).items():
        if name not in sizes:
            raise unknown("site", name, sizes)
        values = np.asarray(given, np.float64)
        if values.shape != (sizes[name],) or not (np.isfinite(values) & (values >= 0)).all():
            raise DataError(f"weights of {name} are {sizes[name]} numbers, finite and at least 0")
        found[name] = values
    if neurons is not None:
        for name in neurons.sites:
            if name not in sizes:
                raise unknown("site", name, sizes)
            if (largest := int(neurons.indices(name).max())) >= sizes[name]:
                raise unknown("neuron", f"{name}:{largest}", (), f"{name} has neurons 0 to {sizes[name] - 1}.")
        chosen = {name: np.isin(np.arange(size), neurons.indices(name)) for name, size in sizes.items()}
        found = {name: np.where(chosen[name], each, 0.0) for name, each in found.items()}
    if not any(each.any() for each in found.values()):
        raise DataError("no neuron has a weight above 0: there is nothing to compare by")
    return found


def _table(a: Fingerprint, b: Fingerprint, distance: dict[str, np.ndarray], weight: dict[str, np.ndarray]) -> Neurons:
    frames = []
    for name, score in distance.items():
        columns: dict[str, object] = {"site": [name] * len(score), "index": np.arange(len(score)), "score": score}
        if name in a.mean and name in b.mean:
            columns["mean_difference"] = b.mean[name] - a.mean[name]
        if name in a.histograms and name in b.histograms:
            columns["beyond"] = _beyond(a.histograms[name], b.histograms[name])
        columns["weight"] = weight[name]
        frames.append(pl.DataFrame(columns))
    frame = pl.concat(frames, how="diagonal_relaxed").filter(pl.col("weight") > 0)
    return Neurons.from_polars(frame.sort("score", descending=True, maintain_order=True))
