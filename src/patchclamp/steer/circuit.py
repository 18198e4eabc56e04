"""A circuit of a class: how much each sublayer moves the end of the residual stream, and its best units moved together.

    importance of a sublayer = <h_end' - h_end, v_end> / (alpha sigma),    h' with alpha sigma v added at the sublayer
    units = of each sublayer the best neurons or heads, as many as its share of all importance
    modulation: activation of each unit <- activation + strength * difference of the class at that unit

v is the direction of the class at the sublayer, sigma the mean root mean square of the stream there, and v_end the
mean direction of those layers in which it has settled. Directions, contributions and differences are those of
`find.class_directions`, `find.direction_contribution` and `find.head_contribution`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl
import torch
from torch import nn

from patchclamp.directions import Directions
from patchclamp.errors import DataError, UnknownName, unknown
from patchclamp.model import Model, Site
from patchclamp.model.hooks import Edit, hooked
from patchclamp.neurons import Neurons
from patchclamp.published import published
from patchclamp.steer.pooling import Examples, Prepared, as_model, prepared, read_pooled

_TITLE = 'Do LLMs "Feel"? Emotion Circuits Discovery and Control'
_URL = "https://arxiv.org/abs/2510.11328"


@dataclass(frozen=True, eq=False)
class SublayerImportance:
    """How much each sublayer moves the end of the residual stream along each class. Made by `sublayer_importance`.

    Attributes:
        names: of the classes.
        by_strength: site of the residual stream behind the sublayer -> `[strengths, classes]` float64.
        reference: the directions of the end, of length 1.
        settled: the sites whose directions they are the mean of.
    """

    names: list[str]
    by_strength: Mapping[str, np.ndarray] = field(repr=False)
    reference: Directions
    settled: list[str]

    def of(self, name: str) -> dict[str, float]:
        """Site -> importance for one class, the mean over strengths.

        Raises:
            UnknownName: there is no such class.
        """
        if name not in self.names:
            raise unknown("class", name, self.names)
        return {site: float(each.mean(0)[self.names.index(name)]) for site, each in self.by_strength.items()}


@published(row="S033", title=_TITLE, authors="Wang et al.", year=2025, url=_URL, part="sublayers")
def sublayer_importance(
    model: Model | nn.Module,
    examples: Examples,
    directions: Directions,
    *,
    settled: Sequence[str] | None = None,
    strengths: Sequence[float] = (0.1, 0.3, 0.5, 0.7),
) -> SublayerImportance:
    """How much a push along the direction of a class at each sublayer arrives at the end (Wang et al., 2025).

    The push is made at the last token, in the residual stream right behind the sublayer, which is the same as in what
    the sublayer adds to it. It takes a forward pass for each site, class and strength.

    Args:
        model: the model.
        examples: texts, a tensor or keywords; the importance is the mean over them.
        directions: of the classes, by residual stream, the last of which is where the end is read.
        settled: the sites whose mean direction is the reference; None: the longest run of layers over which the
            direction turns least (in the paper 21 to 25 of 28, by eye).
        strengths: of the push, in root mean squares of the stream.

    Raises:
        UnknownName: a site that is not there, or has no direction.
        DataError: a direction without length, strengths that are none.
    """
    model = as_model(model)
    if not len(strengths) or not all(math.isfinite(each) and each != 0 for each in strengths):
        raise DataError(f"strengths are finite numbers other than 0, not {list(strengths)}")
    unit = directions.unit()
    sites = model.select(directions.sites)
    given = prepared(model, examples, "examples", least=1)
    chosen = _settled(sites, unit) if settled is None else list(settled)
    reference = _reference(unit.at(*chosen), sites[-1].name)
    plain = read_pooled(model, given, sites, "last")
    end = plain[sites[-1].name].double()
    toward = torch.tensor(reference[sites[-1].name]).double().to(end.device)
    found = {}
    for site in sites:
        sigma = float(plain[site.name].double().square().mean(1).sqrt().mean())
        values = np.zeros((len(strengths), unit.count))
        for row, alpha in enumerate(strengths):
            for column in range(unit.count):
                push = alpha * sigma * torch.tensor(unit[site.name][column])
                with hooked(model.module, [(site, _pushed(push, given))]):
                    moved = read_pooled(model, given, [sites[-1]], "last")[sites[-1].name].double()
                values[row, column] = float(((moved - end) @ toward[column]).mean()) / (alpha * sigma)
        found[site.name] = values
    return SublayerImportance(unit.names, found, reference, chosen)


@dataclass(frozen=True, eq=False)
class Circuit:
    """The units of each class, and what they are moved by.

    Attributes:
        units: class -> its neurons, at `mlp.*` and `attn.*`.
        differences: of the classes at these sites, those of `find.class_directions`, not scaled.
    """

    units: Mapping[str, Neurons]
    differences: Directions

    @classmethod
    def build(
        cls,
        importance: SublayerImportance,
        differences: Directions,
        *,
        neurons: Neurons | None = None,
        neuron_count: int = 0,
        heads: Neurons | None = None,
        head_count: int = 0,
    ) -> Circuit:
        """Take the best units of each sublayer, as many as its share of the importance.

        The rule of the paper could not be read in full; here the shares are of the importances above 0, rounded by
        largest remainders, and a sublayer gives no more than write along the direction.

        Args:
            importance: of the sublayers.
            differences: of the classes at `mlp.*`, and at `attn.*` where there are heads.
            neurons: contributions of the neurons of MLPs, with `score_<class>`.
            neuron_count: how many of them for each class.
            heads: contributions of heads, with `head` and `score_<class>`.
            head_count: how many of them for each class.

        Raises:
            DataError: nothing is asked for, or nothing writes along a class.
            UnknownName: a table without scores of a class, or a site without differences.
        """
        asked = [(neurons, neuron_count, "index"), (heads, head_count, "head")]
        tables = [(table.to_polars(), count, by) for table, count, by in asked if table is not None and count > 0]
        if not tables:
            raise DataError("a circuit wants neurons with neuron_count, or heads with head_count, above 0")
        units = {}
        for name in importance.names:
            parts = [_allocated(table, count, by, name, importance.of(name)) for table, count, by in tables]
            units[name] = Neurons.from_polars(pl.concat(parts))
            if not len(units[name]):
                raise DataError(f"no sublayer writes along {name!r}: its circuit is empty")
            for site in units[name].sites:
                if site not in differences:
                    raise unknown("site with differences", site, differences.sites)
        return cls(units, differences)


@published(row="S033", title=_TITLE, authors="Wang et al.", year=2025, url=_URL, part="modulation")
def modulate(circuit: Circuit, strengths: Mapping[str, float]) -> Modulation:
    """Move the units of circuits together, at every position (Wang et al., 2025).

    Args:
        circuit: the units, and what they are moved by.
        strengths: class -> what its differences are multiplied by; 1 is the mean difference to the other classes.

    Returns:
        An intervention for `model.intervene`.

    Raises:
        UnknownName: a class without circuit.
        DataError: a strength that is not finite.
    """
    for name, each in strengths.items():
        if name not in circuit.units:
            raise unknown("class with a circuit", name, circuit.units)
        if not math.isfinite(each):
            raise DataError(f"the strength of {name!r} is a finite number, not {each!r}")
    added: dict[str, np.ndarray] = {}
    for name, strength in strengths.items():
        row = circuit.differences.names.index(name)
        for site in circuit.units[name].sites:
            at = circuit.units[name].indices(site)
            whole = added.setdefault(site, np.zeros(circuit.differences[site].shape[1], np.float32))
            whole[at] += strength * circuit.differences[site][row, at]
    return Modulation(added)


@dataclass(frozen=True, eq=False)
class Modulation:
    """Add a constant to each unit. Made by `modulate`.

    Attributes:
        added: name of a site -> `[size]` float32, 0 for units that are left as they are.
    """

    added: Mapping[str, np.ndarray] = field(repr=False)

    def edits(self, model: Model) -> dict[str, Edit]:
        """Site -> function from the site's tensor `[..., size]` to the changed one.

        Raises:
            UnknownName: the model has no such site, or it is of another size.
        """
        found: dict[str, Edit] = {}
        for name, values in self.added.items():
            site = model.site(name)
            if site.size not in (None, len(values)):
                raise UnknownName(f"{site.name} has {site.size} neurons here; the circuit knows {len(values)}")
            found[site.name] = _adding(torch.tensor(values))
        return found


# Helpers --------------------------------------------------------------------------------------------


def _adding(values: torch.Tensor) -> Edit:
    return lambda tensor: tensor + values.to(tensor)


def _pushed(push: torch.Tensor, given: Prepared) -> Edit:
    """Add a vector at the last token of each example."""

    def edit(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim == 2:
            return tensor + push.to(tensor)
        length = tensor.shape[1]
        at = torch.arange(length, device=tensor.device)
        known = given.mask is not None and given.mask.shape == tensor.shape[:2]
        last = (given.mask * (at + 1)).argmax(1) if known and given.mask is not None else torch.tensor([length - 1])
        here = (at == last.to(at)[:, None]).to(tensor.dtype)
        return tensor + here[..., None] * push.to(tensor)

    return edit


def _settled(sites: Sequence[Site], unit: Directions) -> list[str]:
    """The longest run of layers between which the directions turn less than halfway from the least to the most."""
    ends = [site.name for site in sites if site.kind != "resid_mid"]
    if len(ends) < 3:
        return [site.name for site in sites if site.name in ends[-1:]]
    cosines = np.asarray([(unit[one] * unit[two]).sum(1).mean() for one, two in itertools.pairwise(ends)])
    calm = cosines >= (cosines.min() + cosines.max()) / 2
    runs, start = [], 0
    for place in range(len(calm) + 1):
        if place == len(calm) or not calm[place]:
            runs.append((place - start, place))
            start = place + 1
    length, last = max(runs)
    layers = {site.layer for site in sites if site.name in ends[last - length : last + 1] and site.layer is not None}
    return [site.name for site in sites if site.layer in layers or site.name in ends[last - length : last + 1]]


def _reference(unit: Directions, end: str) -> Directions:
    """The mean of directions after those against the last one are turned round, by class."""
    stacked = np.stack([unit[site] for site in unit.sites])  # [sites, classes, size]
    sign = np.where((stacked * stacked[-1]).sum(-1) < 0, -1.0, 1.0)
    return Directions({end: (sign[..., None] * stacked).mean(0)}, unit.names).unit()


def _allocated(table: pl.DataFrame, count: int, by: str, name: str, importance: Mapping[str, float]) -> pl.DataFrame:
    """The rows of the best units of one kind: `by` says what is one unit of a site."""
    score = f"score_{name}"
    for column in (score, by):
        if column not in table.columns:
            raise unknown("column", column, table.columns)
    writing = table.filter(pl.col(score) > 0)
    sites = writing["site"].unique(maintain_order=True).to_list()
    best = {
        site: writing.filter(site=site)
        .sort(score, descending=True, maintain_order=True)[by]
        .unique(maintain_order=True)
        for site in sites
    }
    weight = {site: max(0.0, importance[_stream(site, importance)]) for site in sites}
    share = _shares(weight, {site: len(each) for site, each in best.items()}, count)
    parts = [
        table.filter((pl.col("site") == site) & pl.col(by).is_in(best[site].head(share[site]).implode()))
        for site in sites
    ]
    return pl.concat([table.head(0), *parts]).select("site", "index", pl.col(score).alias("score"))


def _stream(site: str, importance: Mapping[str, float]) -> str:
    stack, _, rest = site.rpartition(".")[0].rpartition(".")
    layer = site.rpartition(".")[2]
    prefix = f"{stack}." if stack else ""
    kinds = ("resid_mid", "resid_post") if rest == "attn" else ("resid_post",)
    for kind in kinds:
        if (name := f"{prefix}{kind}.{layer}") in importance:
            return name
    raise unknown("sublayer", f"{prefix}{kinds[0]}.{layer}", importance)


def _shares(weight: Mapping[str, float], capacity: Mapping[str, int], count: int) -> dict[str, int]:
    """Whole parts of `count` in proportion to the weights; what a site cannot take goes to the others."""
    given = dict.fromkeys(weight, 0)
    while (left := count - sum(given.values())) > 0:
        free = {site: each for site, each in weight.items() if each > 0 and given[site] < capacity[site]}
        if not free:
            break
        exact = {site: left * each / sum(free.values()) for site, each in free.items()}
        whole = {site: math.floor(each) for site, each in exact.items()}
        for site in sorted(exact, key=lambda site: whole[site] - exact[site])[: left - sum(whole.values())]:
            whole[site] += 1
        for site, each in whole.items():
            given[site] = min(given[site] + each, capacity[site])
    return given
