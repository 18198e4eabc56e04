"""LinEAS: an elementwise affine map at each of several sites, all learned at once.

    T(z) = w z + b;    loss = sum over sites of 1/d sum over neurons of W2^2(source after T, target)

W2 is the distance of Wasserstein between two sets of numbers: sort both, and take the mean square of the differences.
Source examples run through the model with all maps in force, so that a later map is not asked to correct what an
earlier one has; targets come from the model as it is. Penalties on how far w is from 1 and b from 0 leave maps of most
neurons as the identity. Each step is one of gradient descent, then both penalties' proximal steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import polars as pl
import torch
from torch import nn

from patchclamp.directions import Directions
from patchclamp.errors import DataError, SiteNotReached
from patchclamp.model import Model, Site
from patchclamp.model.hooks import Edit, hooked
from patchclamp.neurons import Neurons
from patchclamp.published import published
from patchclamp.steer.pooling import Examples, How, Prepared, as_model, pooled, prepared, read_pooled


@published(
    row="S158",
    title="LinEAS: End-to-end Learning of Activation Steering with a Distributional Loss",
    authors="Rodríguez et al.",
    year=2025,
    url="https://arxiv.org/abs/2503.10679",
)
@dataclass(frozen=True)
class LinEAS:
    """Learn affine maps that make activations of one set of examples look like another's (Rodríguez et al., 2025).

    The model is frozen: only the maps are learned, and nothing of the model is changed.

    The optimum is that of the published loss with its penalties; the way there differs: each site has steps of its own
    length (at `learning_rate` 1 the longest with which the loss of a site by itself is sure to fall), and a step after
    which the loss with its penalties is larger is taken back, and halved from then on.

    Attributes:
        sites: where, by name or glob; in the paper the outputs of the norms of a language model, which are named
            `module:model.layers.0.input_layernorm` and so on, and into whose weights the maps can be folded.
        sparsity: weight of the sum of |w - 1| + |b|, 0 or more; chooses neurons.
        group_sparsity: weight of sqrt(d) (|w - 1|_2 + |b|_2) of each site, 0 or more; chooses sites.
        steps: of descent.
        learning_rate: in (0, 2].
        pool: "mean" over the tokens, as in the paper, or the "last" one.
    """

    sites: str | Site | Sequence[str | Site]
    sparsity: float = 0.0
    group_sparsity: float = 0.0
    steps: int = 1000
    learning_rate: float = 0.5
    pool: How = "mean"

    def __post_init__(self) -> None:
        for name in ("sparsity", "group_sparsity"):
            if not getattr(self, name) >= 0:
                raise DataError(f"LinEAS({name}=...) is 0 or more, not {getattr(self, name)!r}")
        if self.steps < 1 or not 0 < self.learning_rate <= 2:
            raise DataError("LinEAS() takes one step or more, and a learning rate in (0, 2]")
        if self.pool not in ("mean", "last"):
            raise DataError(f'LinEAS(pool=...) is "mean" or "last", not {self.pool!r}')

    def fit(self, model: Model | nn.Module, source: Examples, target: Examples) -> LinEASSteering:
        """Learn the maps.

        Args:
            model: what is steered.
            source: two examples or more that shall be changed: texts, a tensor `[examples, ...]`, or keywords.
            target: two or more that they shall look like; they need be neither as many nor paired.

        Raises:
            DataError: fewer than two examples, activations that are not finite.
            SiteNotReached: a pass never called a site.
        """
        model = as_model(model)
        sites = model.select(self.sites)
        given, wanted = prepared(model, source, "source"), prepared(model, target, "target")
        count = max(given.count, wanted.count)
        ends = {name: _quantiles(each, count) for name, each in read_pooled(model, wanted, sites, self.pool).items()}
        starts = read_pooled(model, given, sites, self.pool)
        maps = {site.name: _Map.identity(starts[site.name], self.learning_rate) for site in sites}
        curve = _Descent(maps, self.sparsity, self.group_sparsity)
        with model.evaluating():
            for _ in range(self.steps):
                curve.step(self._loss(model, sites, maps, given, ends, count))
            with torch.no_grad():
                last = float(self._loss(model, sites, maps, given, ends, count))
        losses = curve.ended(last)
        return LinEASSteering(
            tuple(sites),
            {name: each.weight.detach() for name, each in maps.items()},
            {name: each.bias.detach() for name, each in maps.items()},
            losses=losses,
        )

    def _loss(
        self,
        model: Model,
        sites: Sequence[Site],
        maps: Mapping[str, _Map],
        given: Prepared,
        ends: Mapping[str, torch.Tensor],
        count: int,
    ) -> torch.Tensor:
        after: dict[str, torch.Tensor] = {}

        def mapped(site: Site) -> Edit:
            def edit(tensor: torch.Tensor) -> torch.Tensor:
                new = maps[site.name](tensor)
                after[site.name] = pooled(site, new, given, self.pool)
                return new

            return edit

        with hooked(model.module, [(site, mapped(site)) for site in sites]):
            given.run(model)
        parts = []
        for site in sites:
            if site.name not in after:
                raise SiteNotReached(f"the forward pass never called {site.name} ({site.module})")
            moved = _quantiles(after[site.name].to(ends[site.name].dtype), count)
            parts.append((moved - ends[site.name]).square().mean())
        return torch.stack(parts).sum()


@dataclass(frozen=True, eq=False)
class LinEASSteering:
    """Affine maps at sites: an intervention for `model.intervene`. Made by `LinEAS.fit`.

    Attributes:
        sites: where, in the order in which a pass reaches them.
        weights: name of a site -> w, `[size]`.
        biases: name of a site -> b, `[size]`.
        amount: how much of the map is applied, z <- (1 - amount) z + amount T(z); 1 is all.
        losses: `[steps + 1]` float64, the distance between source and target before each step and after the last,
            without the penalties.
    """

    sites: tuple[Site, ...]
    weights: Mapping[str, torch.Tensor] = field(repr=False)
    biases: Mapping[str, torch.Tensor] = field(repr=False)
    amount: float = 1.0
    losses: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False)

    def strength(self, amount: float) -> LinEASSteering:
        """The same maps, applied in part (between 0 and 1), or beyond what was learned.

        Raises:
            DataError: not a finite number.
        """
        if not np.isfinite(amount):
            raise DataError(f"strength() takes a finite number, not {amount!r}")
        return replace(self, amount=float(amount))

    def neurons(self) -> Neurons:
        """The neurons whose map is not the identity, most changed first: `score` |w - 1| + |b|, `weight`, `bias`."""
        tables = []
        for site in self.sites:
            weight, bias = (each[site.name].double().cpu().numpy() for each in (self.weights, self.biases))
            changed = np.flatnonzero((weight != 1) | (bias != 0))
            weight, bias = weight[changed], bias[changed]
            columns = {"score": np.abs(weight - 1) + np.abs(bias), "weight": weight, "bias": bias}
            names = pl.Series("site", [site.name] * len(changed), pl.String)
            tables.append(pl.DataFrame([names, *(pl.Series(*each) for each in {"index": changed, **columns}.items())]))
        return Neurons.from_polars(pl.concat(tables).sort("score", descending=True, maintain_order=True))

    def shifts(self) -> Directions:
        """The biases as directions, one named "shift" at each site, for `pc.steer`: the maps without their weights."""
        return Directions({site.name: self.biases[site.name][None] for site in self.sites}, ["shift"])

    def edits(self, model: Model) -> dict[str, Edit]:
        """Site -> function from the site's tensor `[..., size]` to the changed one.

        Raises:
            UnknownName: the model has no such site.
            DataError: the site is of another width there.
        """
        found: dict[str, Edit] = {}
        for place in self.sites:
            site, size = model.site(place.name), len(self.weights[place.name])
            if site.size not in (None, size):
                raise DataError(f"{site.name} has {site.size} neurons here; the map was learned for {size}")
            found[site.name] = self._edit(place.name)
        return found

    def _edit(self, name: str) -> Edit:
        def edit(tensor: torch.Tensor) -> torch.Tensor:
            # (1 - s) z + s (w z + b)
            weight = 1 + self.amount * (self.weights[name] - 1)
            return tensor * weight.to(tensor) + (self.amount * self.biases[name]).to(tensor)

        return edit


# Helpers --------------------------------------------------------------------------------------------


@dataclass
class _Map:
    """w and b of one site, and the length of the steps for each."""

    weight: torch.Tensor
    bias: torch.Tensor
    rate_weight: float
    rate_bias: float

    @classmethod
    def identity(cls, start: torch.Tensor, learning_rate: float) -> _Map:
        """Steps by curvature: that of the loss of one site is at most twice 2/d (E z^2 for w, 1 for b), taken apart."""
        size = start.shape[1]
        largest = max(float(start.square().mean(0).max()), 1e-6)
        weight, bias = torch.ones(size).to(start), torch.zeros(size).to(start)
        return cls(
            weight.requires_grad_(),
            bias.requires_grad_(),
            learning_rate * size / (4 * largest),
            learning_rate * size / 4,
        )

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * self.weight.to(tensor.dtype) + self.bias.to(tensor.dtype)

    @torch.no_grad()
    def step(self, gradients: Sequence[torch.Tensor], share: float, sparsity: float, group_sparsity: float) -> None:
        parts = ((self.weight, self.rate_weight, 1.0), (self.bias, self.rate_bias, 0.0))
        for (values, most, rest), gradient in zip(parts, gradients, strict=True):
            rate = share * most
            moved = values - rest - rate * gradient
            moved = nn.functional.softshrink(moved, rate * sparsity) if sparsity else moved
            if group_sparsity:
                length = float(moved.norm())
                least = rate * group_sparsity * len(moved) ** 0.5
                moved = moved * (max(0.0, 1 - least / length) if length else 0.0)
            values.copy_(rest + moved)

    def penalty(self, sparsity: float, group_sparsity: float) -> float:
        with torch.no_grad():
            parts = (self.weight - 1, self.bias)
            ones = sum(float(each.abs().sum()) for each in parts)
            group = sum(float(each.norm()) for each in parts) * len(self.bias) ** 0.5
        return sparsity * ones + group_sparsity * group


class _Descent:
    """Steps that are taken back, and halved from then on, when what is minimised has risen."""

    def __init__(self, maps: Mapping[str, _Map], sparsity: float, group_sparsity: float) -> None:
        self.maps = list(maps.values())
        self.penalties = sparsity, group_sparsity
        self.share = 1.0
        self.losses: list[float] = []
        self.before: tuple[float, float, list[torch.Tensor], tuple[torch.Tensor, ...]] | None = None

    @property
    def learned(self) -> list[torch.Tensor]:
        return [each for one in self.maps for each in (one.weight, one.bias)]

    def step(self, loss: torch.Tensor) -> None:
        now = float(loss.detach())
        whole = now + sum(each.penalty(*self.penalties) for each in self.maps)
        if self._is_worse(whole):
            self._back()
            self.losses.append(self.losses[-1])
        else:
            gradients = torch.autograd.grad(loss, self.learned)
            self.before = whole, now, [each.detach().clone() for each in self.learned], gradients
            self.losses.append(now)
        assert self.before is not None
        gradients = self.before[3]
        for number, one in enumerate(self.maps):
            one.step(gradients[2 * number : 2 * number + 2], self.share, *self.penalties)

    def ended(self, last: float) -> np.ndarray:
        if self._is_worse(last + sum(each.penalty(*self.penalties) for each in self.maps)):
            self._back()
            last = self.losses[-1]
        return np.asarray([*self.losses, last])

    def _is_worse(self, whole: float) -> bool:
        if self.before is None:
            if not np.isfinite(whole):
                raise DataError("the distance between source and target is not finite")
            return False
        return not whole <= self.before[0] * (1 + 1e-9) + 1e-15

    @torch.no_grad()
    def _back(self) -> None:
        assert self.before is not None
        self.share /= 2
        for values, old in zip(self.learned, self.before[2], strict=True):
            values.copy_(old)


def _quantiles(values: torch.Tensor, count: int) -> torch.Tensor:
    """`[size, count]`: each column sorted; of fewer values, the quantiles between them."""
    ordered = values.T.contiguous().sort(-1).values  # many times faster along rows
    number = ordered.shape[-1]
    if number == count:
        return ordered
    at = (torch.arange(count, device=values.device, dtype=values.dtype) + 0.5) / count * number - 0.5
    at = at.clamp(0, number - 1)
    low = at.floor().long()
    high = (low + 1).clamp(max=number - 1)
    return ordered[:, low].lerp(ordered[:, high], at - low)
