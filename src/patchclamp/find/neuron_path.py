"""A path of neurons, one in each layer, that together carry a class from the input to the output.

The activation w of chosen units at one position (the class token's, of a vision transformer) is scaled by one factor a
from 0 to what it is; F is the probability of the class. What the units of a path contribute jointly is

    "own":    JAS = sum_j  w_j  integral_0^1  dF/dw_j  da               = F(as it is) - F(without them)
    "joint":  JAS = sum_j  w_j  integral_0^1  sum_l dF/dw_l  da         as published, with the products of all pairs

where the other units of these layers, at this position, are held at what they are.

A path grows layer by layer: the units chosen so far and all units of the next layer are scaled together, and the unit
with which the sum is largest comes next. In the published sum a large activation is multiplied by the gradients of the
others, so that a unit without any effect can win by its size alone; "own", the default, leaves these products out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl
import torch

from patchclamp.attribution import frozen
from patchclamp.attribution.engine import capturing
from patchclamp.errors import DataError, unknown
from patchclamp.find.scaled_units import Classes, ScaledUnits, at_position
from patchclamp.model import Model, Site
from patchclamp.neurons import Neurons
from patchclamp.published import published

Score = Literal["own", "joint"]
Rule = Literal["midpoint", "left"]
BASELINES = ("activation", "single", "influence", "random")


@dataclass(frozen=True, eq=False)
class NeuronPath:
    """One path for each example.

    Attributes:
        sites: in which each stage of the path lies, in order.
        units: `[examples, stages]` int64, which unit of its site.
        jas: `[examples, stages]` float64, the joint attribution score of the path up to each stage, in units of
            probability.
        probability: `[examples]` float64, of the example's class.
        classes: `[examples]` int64, which class the path of an example is for.
        position: at which token; sites without tokens have none.
    """

    sites: tuple[str, ...]
    units: np.ndarray
    jas: np.ndarray
    probability: np.ndarray
    classes: np.ndarray
    position: int

    def example(self, number: int) -> Neurons:
        """The path of one example, from the first stage to the last, with the column `jas`."""
        if not 0 <= number < len(self.units):
            raise DataError(f"there are examples 0 to {len(self.units) - 1}, not {number}")
        columns = {"site": list(self.sites), "index": self.units[number], "jas": self.jas[number]}
        return Neurons.from_polars(pl.DataFrame(columns))

    def of_class(self, number: int | None = None) -> Neurons:
        """Of each stage the unit that is on most paths of a class, in the order of stages.

        Args:
            number: which class; None: over all examples.

        Returns:
            One neuron for each stage: `share` of the class's examples whose path holds it.

        Raises:
            UnknownName: no example is of that class.
        """
        frame = self.neurons(number).to_polars().sort("score", descending=True, maintain_order=True)
        first = frame.unique("site", keep="first", maintain_order=True).rename({"score": "share"})
        order = pl.Enum(list(self.sites))
        return Neurons.from_polars(first.sort(pl.col("site").cast(order)))

    def neurons(self, number: int | None = None) -> Neurons:
        """All units that are on a path of a class, those on most paths first.

        Args:
            number: which class; None: over all examples.

        Returns:
            `score`, the share of the class's examples whose path holds the unit.

        Raises:
            UnknownName: no example is of that class.
        """
        units = self.units if number is None else self.units[self._of(number)]
        frames = []
        for stage, site in enumerate(self.sites):
            index, counts = np.unique(units[:, stage], return_counts=True)
            frames.append(pl.DataFrame({"site": site, "index": index, "score": counts / len(units)}))
        return Neurons.from_polars(pl.concat(frames).sort("score", descending=True, maintain_order=True))

    def class_similarity(self) -> pl.DataFrame:
        """How alike the paths of classes are: cosines between how often each unit is on a path.

        Returns:
            One row for each pair of classes, each with itself too: `class`, `other`, `cosine`.
        """
        width = int(self.units.max()) + 1
        names = np.unique(self.classes)
        flat = self.units + width * np.arange(len(self.sites))
        counts = np.stack(
            [np.bincount(flat[self.classes == each].ravel(), minlength=width * len(self.sites)) for each in names]
        ).astype(np.float64)
        counts /= np.linalg.norm(counts, axis=1, keepdims=True)
        pairs = [(int(names[one]), int(names[other])) for one in range(len(names)) for other in range(len(names))]
        cosine = (counts @ counts.T).ravel()
        return pl.DataFrame({"class": [a for a, _ in pairs], "other": [b for _, b in pairs], "cosine": cosine})

    def _of(self, number: int) -> np.ndarray:
        chosen = self.classes == number
        if not chosen.any():
            raise unknown("class of the paths", number, np.unique(self.classes).tolist())
        return chosen


@dataclass(frozen=True, eq=False)
class PathEffect:
    """What scaling the units of each example's path does.

    Attributes:
        before: `[examples]` float64, probability of the example's class as the network is.
        after: the same with the units scaled.
        right_before: `[examples]` bool, whether that class is the network's answer.
        right_after: the same with the units scaled.
    """

    before: np.ndarray
    after: np.ndarray
    right_before: np.ndarray
    right_after: np.ndarray

    @property
    def change(self) -> np.ndarray:
        """`[examples]`: `after` less `before`."""
        return self.after - self.before


@published(
    row="S081",
    title="Discovering Influential Neuron Path in Vision Transformers",
    authors="Wang et al.",
    year=2025,
    url="https://arxiv.org/abs/2503.09046",
)
def neuron_path(
    model: Model,
    inputs: Any,
    target_class: Classes,
    sites: str | Site | Iterable[str | Site] = "mlp.*",
    *,
    steps: int = 20,
    position: int = 0,
    score: Score = "own",
    rule: Rule = "midpoint",
    per_class: bool = False,
    batch: int = 128,
) -> NeuronPath:
    """The most influential path of neurons for a class, of each example (Wang et al., 2025).

    The published code gives all images of a batch the class of the first, integrates by left sums and adds up products
    of all pairs; here each example has its own class, and the other two are `rule="left"` and `score="joint"`.

    Args:
        model: a classifier, which gives `[examples, classes]` logits.
        inputs: a tensor `[examples, ...]`, texts, or the keyword arguments of the module.
        target_class: the number of a class for all examples, or one for each.
        sites: one stage of the path each, in the order of the network: `[examples, size]` or `[examples, tokens,
            size]`.
        steps: points of the integral, 2 or more.
        position: number of the token at which units are scaled, padding left out: 0 is the class token of ViT and BERT;
            negative ones count from the end.
        score: "own" or "joint", as above.
        rule: where the points of the integral lie: in the middle of each step, or at its left end.
        per_class: one path for all examples of a class, which is best in the mean, instead of one for each.
        batch: how many points times examples are run at once.

    Returns:
        `NeuronPath`. It takes `2 * steps` forward and backward passes for each stage.

    Raises:
        DataError: too few steps, a class that there is not, sites of another shape, or fewer tokens than `position`.
        UnknownName: the model has no such sites.
    """
    _check(steps, score, rule)
    problem = ScaledUnits.of(model, inputs, target_class, sites, position, batch)
    points = _points(steps, rule)
    units: list[np.ndarray] = []
    for site in problem.sites:
        scaled = problem.scaled(units) | {site: torch.ones_like(problem.recorded[site], dtype=torch.bool)}
        slopes = problem.slopes(scaled, points)
        path_weight, path_slope, path_own = problem.on_path(units, slopes)
        weight, slope = problem.recorded[site].double(), slopes[site]
        if score == "own":
            found = weight * slope + path_own[:, None]
        else:
            found = (slope + path_slope[:, None]) * (weight + path_weight[:, None])
        found = found.cpu().numpy()
        if per_class:
            found = _mean_by(found, problem.classes)
        units.append(found.argmax(1))
    return _path(problem, units, points, score)


def path_baseline(
    model: Model,
    inputs: Any,
    target_class: Classes,
    sites: str | Site | Iterable[str | Site] = "mlp.*",
    *,
    method: str = "activation",
    steps: int = 20,
    position: int = 0,
    score: Score = "own",
    rule: Rule = "midpoint",
    batch: int = 128,
    seed: int = 0,
) -> NeuronPath:
    """Paths that are found in simpler ways, to compare with those of `neuron_path`, whose arguments these are.

    Args:
        model: the model.
        inputs: as there.
        target_class: as there.
        sites: as there.
        method: "activation": the largest activation of each site. "single": the largest integrated gradient of each
            site, whatever the others are (knowledge neurons). "influence": from the output backward, the unit with the
            largest derivative times activation: of the class's probability, then of the unit that was chosen before
            (a greedy influence pattern). "random".
        steps: of the integrals.
        position: as there.
        score: as there; of what `jas` is.
        rule: as there.
        batch: as there.
        seed: of the random paths.

    Raises:
        UnknownName: no such method.
        DataError: as there.
    """
    if method not in BASELINES:
        raise unknown("baseline of paths", method, BASELINES)
    _check(steps, score, rule)
    problem = ScaledUnits.of(model, inputs, target_class, sites, position, batch)
    points = _points(steps, rule)
    if method == "influence":
        units = _influence(problem)
    elif method == "random":
        generator = np.random.default_rng(seed)
        units = [generator.integers(0, each.shape[1], len(each)) for each in problem.recorded.values()]
    else:
        units = []
        for site, weight in problem.recorded.items():
            found = weight
            if method == "single":
                found = (
                    weight.double() * problem.slopes({site: torch.ones_like(weight, dtype=torch.bool)}, points)[site]
                )
            units.append(found.argmax(1).cpu().numpy())
    return _path(problem, units, points, score)


def path_effect(model: Model, inputs: Any, path: NeuronPath, factor: float = 0.0, *, batch: int = 128) -> PathEffect:
    """What removing or enhancing the units of each example's path does to the probability of its class.

    Args:
        model: the model.
        inputs: those that the paths are of.
        path: from `neuron_path` or `path_baseline`; only the token at its position is changed.
        factor: what the activations are multiplied with: 0 removes the units, 2 enhances them.
        batch: examples that are run at once.

    Raises:
        DataError: the paths are of another number of examples.
    """
    problem = ScaledUnits.of(model, inputs, path.classes, path.sites, path.position, batch)
    units = list(path.units.T)
    before, right_before = problem.answers({}, 1.0)
    after, right_after = problem.answers(problem.scaled(units), factor)
    return PathEffect(before, after, right_before, right_after)


# Helpers --------------------------------------------------------------------------------------------


def _path(problem: ScaledUnits, units: Sequence[np.ndarray], points: np.ndarray, score: Score) -> NeuronPath:
    stages = []
    for stage in range(1, len(units) + 1):
        weight, slope, own = problem.on_path(units[:stage], problem.slopes(problem.scaled(units[:stage]), points))
        stages.append((own if score == "own" else weight * slope).cpu().numpy())
    probability = problem.answers({}, 1.0)[0]
    shown = np.stack(units, 1).astype(np.int64)
    return NeuronPath(tuple(problem.sites), shown, np.stack(stages, 1), probability, problem.classes, problem.position)


def _influence(problem: ScaledUnits) -> list[np.ndarray]:
    """From the output backward: the unit that the one behind depends on most."""
    units = {site: np.zeros(len(problem.classes), np.int64) for site in problem.sites}
    chosen = [problem.model.site(site) for site in problem.sites]
    for rows in problem.batches():
        with problem.model.evaluating(), frozen(problem.model.module), torch.enable_grad():
            with capturing(problem.model.module, chosen) as captured:
                output = problem.run(rows)
            value = problem.target(rows)(output, {})
            for site in reversed(problem.sites):
                tensor = captured[site][0].tensor
                (slope,) = torch.autograd.grad(value.sum(), [tensor], retain_graph=True, materialize_grads=True)
                found = at_position(slope * tensor.detach(), problem.place[rows]).argmax(1)
                units[site][rows] = found.cpu().numpy()
                value = at_position(tensor, problem.place[rows]).gather(1, found[:, None])
    return list(units.values())


def _points(steps: int, rule: Rule) -> np.ndarray:
    return (np.arange(steps) + (0.5 if rule == "midpoint" else 0.0)) / steps


def _mean_by(values: np.ndarray, classes: np.ndarray) -> np.ndarray:
    found = np.empty_like(values)
    for each in np.unique(classes):
        found[classes == each] = values[classes == each].mean(0)
    return found


def _check(steps: int, score: str, rule: str) -> None:
    if steps < 2:
        raise DataError(f"an integral wants 2 steps or more, not {steps}")
    if score not in ("own", "joint") or rule not in ("midpoint", "left"):
        raise DataError(f'score is "own" or "joint", and rule "midpoint" or "left", not {score!r} and {rule!r}')
