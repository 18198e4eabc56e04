"""Neuron activation coverage: an example is strange where it brings neurons into states that they were rarely seen in.

The state of a neuron joins what it does to what that does to the answer: its activation z times the slope of the
divergence of the class probabilities p from uniform ones.

    state      sigmoid(alpha z dL/dz),   L = KL(uniform || p) = -mean_c log p_c - log(classes)
    Phi[i, m]  min(t[i, m] / O, 1)       t: how many known examples brought neuron i into bin m of M; O: enough
    score(x)   mean over neurons of Phi[i, bin of x's state], then over sites: low where x is strange
    coverage   mean over bins and neurons of Phi, then over sites: how much of what neurons can do is known

Activations and slopes of pixels and tokens are averaged before they are multiplied. (The authors' code adds them up,
and its bins are narrow in the middle; the steepness that they publish, 0.001 for early layers, belongs to that.)
Counts add, so that parts of the data can be read apart. The room of checks, where this would belong, is not built.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
import torch

from patchclamp.errors import DataError, unknown, warn
from patchclamp.find.out_of_distribution import Pass, passes_over
from patchclamp.model import Model, Site, load
from patchclamp.neurons import Neurons
from patchclamp.published import published

Setting = float | Mapping[str, float]

_STATES = ("product", "activation", "gradient")
_SPACINGS = ("middle", "uniform")
_BASE = 1e3  # of the logarithm whose equal steps make bins that are narrow in the middle


@dataclass(frozen=True, eq=False)
class ActivationCoverage:
    """The states that a classifier's neurons were in on known examples. `a + b` has seen what both have.

    Attributes:
        model: the classifier.
        sites: whose neurons.
        counts: site -> `[neurons, bins]` int64, examples that brought a neuron into a bin.
        edges: site -> `[bins + 1]` float64, from 0 to 1.
        full_count: site -> how many examples fill a bin.
        alpha: site -> steepness of the sigmoid.
        state: "product", "activation" or "gradient".
        pool: "mean", "sum" or "first", as in `activation_coverage`.
        examples: how many were seen.
    """

    model: Model
    sites: tuple[Site, ...]
    counts: dict[str, np.ndarray] = field(repr=False)
    edges: dict[str, np.ndarray] = field(repr=False)
    full_count: dict[str, float]
    alpha: dict[str, float]
    state: str
    pool: str
    examples: int

    def phi(self, site: str) -> np.ndarray:
        """`[neurons, bins]` float64, how far each bin is covered, from 0 to 1.

        Raises:
            UnknownName: no such site.
        """
        if site not in self.counts:
            raise unknown("site", site, self.counts)
        return np.minimum(self.counts[site] / self.full_count[site], 1.0)

    def coverage(self) -> float:
        """How much of what the neurons can do is known, from 0 to 1 (NAC-ME): the mean over sites."""
        return float(np.mean(list(self.coverage_by_site().values())))

    def coverage_by_site(self) -> dict[str, float]:
        """Site -> the mean over its bins and neurons."""
        return {name: float(self.phi(name).mean()) for name in self.counts}

    def neurons(self) -> Neurons:
        """Every neuron, the one whose states are covered best first: `score`, its mean over bins."""
        frames = [
            pl.DataFrame(
                {"site": [name] * len(counts), "index": np.arange(len(counts)), "score": self.phi(name).mean(1)}
            )
            for name, counts in self.counts.items()
        ]
        return Neurons.from_polars(pl.concat(frames).sort("score", descending=True, maintain_order=True))

    def score(self, data: Any) -> np.ndarray:
        """How much each example is like the known ones (NAC-UE); low where it is strange. `[examples]` float64.

        Raises:
            DataError: a state is not a number. ModelError: as when it was made.
        """
        return np.mean(list(self.score_by_site(data).values()), axis=0)

    def score_by_site(self, data: Any) -> dict[str, np.ndarray]:
        """Site -> `[examples]` float64, as `score`."""
        found: dict[str, list[np.ndarray]] = {name: [] for name in self.counts}
        order = []
        phi = {name: self.phi(name) for name in self.counts}
        for each in passes_over(self.model, data, self.sites, pool=self.pool, slopes=self._sloped):
            order.append(each.examples)
            for name, state in _states(each, self.state, self.alpha).items():
                place = _bins(state, self.edges[name])
                found[name].append(phi[name][np.arange(state.shape[1]), place].mean(1))
        back = np.argsort(np.concatenate(order), kind="stable")
        return {name: np.concatenate(parts)[back] for name, parts in found.items()}

    def states(self, data: Any) -> dict[str, np.ndarray]:
        """Site -> `[examples, neurons]` float64, the states themselves, from 0 to 1."""
        read = list(passes_over(self.model, data, self.sites, pool=self.pool, slopes=self._sloped))
        back = np.argsort(np.concatenate([each.examples for each in read]), kind="stable")
        states = [_states(each, self.state, self.alpha) for each in read]
        return {name: np.concatenate([each[name] for each in states])[back] for name in self.counts}

    def __add__(self, other: ActivationCoverage) -> ActivationCoverage:
        """What has seen the examples of both.

        Raises:
            DataError: they are of different models, sites or settings.
        """
        alike = ("state", "pool", "alpha", "full_count")
        unlike = [name for name in alike if getattr(self, name) != getattr(other, name)]
        unlike += ["model"] * (self.model.module is not other.model.module)
        unlike += ["bins"] * any(not np.array_equal(self.edges[name], other.edges.get(name, ())) for name in self.edges)
        if unlike or self.counts.keys() != other.counts.keys():
            raise DataError(f"counts of coverages that differ in their {(unlike or ['sites'])[0]} do not add up")
        counts = {name: self.counts[name] + other.counts[name] for name in self.counts}
        both = self.examples + other.examples
        return ActivationCoverage(
            self.model, self.sites, counts, self.edges, self.full_count, self.alpha, self.state, self.pool, both
        )

    @property
    def _sloped(self) -> bool:
        return self.state != "activation"


@published(
    row="S060",
    title="Neuron Activation Coverage: Rethinking Out-of-distribution Detection and Generalization",
    authors="Liu et al.",
    year=2024,
    url="https://arxiv.org/abs/2306.02879",
)
def activation_coverage(
    model: Model | torch.nn.Module,
    data: Any,
    sites: str | Site | Iterable[str | Site],
    *,
    bins: int | Mapping[str, int] = 50,
    full_count: Setting = 50,
    alpha: Setting = 100.0,
    state: str = "product",
    spacing: str = "middle",
    pool: str = "mean",
    examples: int | None = None,
    seed: int = 0,
) -> ActivationCoverage:
    """Which states a classifier's neurons are in on examples that it knows (Liu et al., 2024).

    `found.score(other)` is low where other examples are strange. Never judge it by the examples that it was made from.

    Args:
        model: a classifier; its weights stay as they are, and no gradient is left in them.
        data: known examples, as `pc.record` takes them; about 1,000, as many of each class, in the paper.
        sites: names or globs; in a network for images the layer before the logits and the ends of its stages.
        bins: M, for every site or site -> bins.
        full_count: O, how many examples fill a bin; also by site.
        alpha: steepness of the sigmoid; also by site. It should spread the states: look at `found.states(data)`.
        state: "product" of activation and slope, or one of them: "activation" (needs no backward pass), "gradient".
        spacing: "middle": bins that are 30 times as narrow around 1/2, the state of a neuron that is silent or does not
            matter, as near 0 and 1; or "uniform": all equally wide.
        pool: of an example's pixels or tokens: their "mean"; their "sum", to which the steepness that the authors
            publish belongs; or the "first" (a class token).
        examples: read so many, drawn at random; None: all.
        seed: of that draw.

    Raises:
        DataError: bins, counts or steepness that are none; a state that is not a number.
        UnknownName: no such site, state, spacing or pool; a setting for a site that is not read.
        ModelError: one logit alone, no logits of examples, or a site that the logits do not depend on.

    Warns:
        If fewer examples than `full_count` were seen: no bin can be full.
    """
    model = model if isinstance(model, Model) else load(model)
    for what, given, known in (("state", state, _STATES), ("spacing", spacing, _SPACINGS)):
        if given not in known:
            raise unknown(what, given, known)
    chosen = model.select(sites)
    names = [site.name for site in chosen]
    edges = {name: _edges(int(each), spacing) for name, each in _by_site("bins", bins, names, 2).items()}
    enough = _by_site("full_count", full_count, names, 1)
    steep = _by_site("alpha", alpha, names, 0)
    passes = passes_over(model, data, chosen, pool=pool, slopes=state != "activation", examples=examples, seed=seed)
    counts, seen = _counted(passes, state, steep, edges)
    for name, each in enough.items():
        if seen < each:
            warn(f"{name}: {seen} examples were seen, and {each:g} fill a bin: no bin is full, so all scores are low")
    return ActivationCoverage(model, tuple(chosen), counts, edges, enough, steep, state, pool, seen)


# Helpers --------------------------------------------------------------------------------------------


def _counted(
    passes: Iterable[Pass], state: str, alpha: Mapping[str, float], edges: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], int]:
    """Site -> `[neurons, bins]` int64, how many examples brought a neuron into a bin; and how many there were."""
    counts: dict[str, np.ndarray] = {}
    seen = 0
    for each in passes:
        seen += len(each.examples)
        for name, found in _states(each, state, alpha).items():
            neurons, bins = found.shape[1], len(edges[name]) - 1
            place = _bins(found, edges[name]) + np.arange(neurons) * bins
            held = counts.setdefault(name, np.zeros((neurons, bins), np.int64))
            held += np.bincount(place.ravel(), minlength=held.size).reshape(held.shape)
    return counts, seen


def _states(of: Pass, state: str, alpha: Mapping[str, float]) -> dict[str, np.ndarray]:
    from scipy.special import expit

    found = {}
    for name, value in of.values.items():
        raw = value if state == "activation" else of.slopes[name]
        raw = raw * value if state == "product" else raw
        if not np.isfinite(raw).all():
            strange = of.examples[~np.isfinite(raw).all(1)][0]
            raise DataError(f"{name}: on example {strange} a state is not a finite number")
        found[name] = expit(alpha[name] * raw)
    return found


def _bins(state: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The bin of each state; a bin has its lower edge, and the last one 1 too."""
    return np.searchsorted(edges[1:-1], state, side="right")


def _edges(bins: int, spacing: str) -> np.ndarray:
    even = np.linspace(0, 1, bins + 1)
    if spacing == "uniform":
        return even
    away = np.minimum(even, 1 - even) * 2  # from the nearer end, 1 in the middle
    low = np.log1p((np.sqrt(_BASE) - 1) * away) / np.log(_BASE)
    return np.where(even <= 0.5, low, 1 - low)


def _by_site(what: str, given: Setting | Mapping[str, int], sites: list[str], least: int) -> dict[str, float]:
    if isinstance(given, Mapping):
        for name in given:
            if name not in sites:
                raise unknown("site", name, sites, f"{what} is for sites that are read.")
        if missing := [name for name in sites if name not in given]:
            raise DataError(f"{what} says nothing of {missing[0]}: give it for every site, or one number for all")
    found = {name: given[name] if isinstance(given, Mapping) else given for name in sites}
    for name, each in found.items():
        whole = what != "bins" or (isinstance(each, int) and not isinstance(each, bool))
        if not whole or not np.isfinite(each) or each < least or each == 0:
            wanted = {"bins": "a whole number, at least 2", "full_count": "a number, at least 1", "alpha": "above 0"}
            raise DataError(f"{what} of {name} is {wanted[what]}; not {each!r}")
    return {name: float(each) for name, each in found.items()}
