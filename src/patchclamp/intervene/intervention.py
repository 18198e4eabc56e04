"""`Intervention`: a value that says what to do to neurons. It holds no model and no hook."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from patchclamp.errors import DataError, UnknownName
from patchclamp.intervene.where import Where
from patchclamp.model.model import Model
from patchclamp.neurons import Neurons

Edit = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Intervention:
    """Replace the activation of each neuron by `factor * activation + value`.

    Made by `ablate`, `clamp` and `scale`. With `factor` 0 the activation is replaced outright, so that a
    NaN or an infinity does not survive.

    Attributes:
        kind: `ablate`, `clamp` or `scale`.
        neurons: the neurons it acts on.
        factor: what the activations are multiplied by.
        values: site -> `[neurons at the site]` float64, what is added after that.
        where: the positions and examples at which it acts; None for all.
        pools: site -> `[rows, size]`: instead of a value, each position gets a row drawn from these.
        seed: of the drawing.
    """

    kind: str
    neurons: Neurons
    factor: float
    values: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    where: Where | None = None
    pools: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)
    seed: int = 0

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Intervention)
            and (self.kind, self.factor, self.where) == (other.kind, other.factor, other.where)
            and self.neurons == other.neurons
            and self.values.keys() == other.values.keys()
            and all(np.array_equal(each, other.values[site]) for site, each in self.values.items())
            and (self.pools.keys(), self.seed) == (other.pools.keys(), other.seed)
            and all(torch.equal(each, other.pools[site]) for site, each in self.pools.items())
        )

    __hash__ = None  # type: ignore[assignment]

    def edits(self, model: Model) -> dict[str, Edit]:
        """Site -> function from the site's tensor `[..., size]` to the changed one (a new tensor, same type).

        Raises:
            UnknownName: the model has no such site, or the site no such neuron.
            DataError: attention probabilities are to be resampled.
        """
        found: dict[str, Edit] = {}
        for name in self.neurons.sites:
            site = model.site(name)
            indices = self.neurons.indices(name)
            if site.size is not None and int(indices.max()) >= site.size:
                raise UnknownName(f"{name}:{indices.max()} does not exist: {name} has neurons 0 to {site.size - 1}")
            there = torch.from_numpy(indices.copy())
            if name in self.pools:
                if site.through == "attention":
                    raise DataError(f"{name} cannot be resampled: each of its queries has as many keys as the text")
                found[name] = _drawing(name, there, self.pools[name], self.seed)
            else:
                found[name] = _edit(name, there, self.factor, self.values.get(name))
        return found

    def moved(self, neurons: Neurons, means: Mapping[str, np.ndarray]) -> Intervention:
        """The same on other neurons: row by row in the place of these, at the same sites.

        Args:
            neurons: as many, each at the site of the one whose place it takes.
            means: site -> `[size]`, mean activations; ablation to the mean holds each neuron at its own.
        """
        values = self.values
        if self.kind == "ablate" and values:
            values = {site: means[site][neurons.indices(site)] for site in neurons.sites}
        return replace(self, neurons=neurons, values=values)


def checked_neurons(neurons: Neurons, what: str) -> Neurons:
    """The neurons, if they are a table of neurons.

    Raises:
        DataError: something else was given.
    """
    if not isinstance(neurons, Neurons):
        raise DataError(f'{what} takes Neurons, as in pc.Neurons({{"mlp.3": [417]}}), not {type(neurons).__name__}')
    return neurons


def _edit(name: str, indices: torch.Tensor, factor: float, values: np.ndarray | None) -> Edit:
    added = None if values is None else torch.from_numpy(np.asarray(values, np.float64).copy())

    def edit(tensor: torch.Tensor) -> torch.Tensor:
        where = _there(name, indices, tensor)
        changed = tensor.clone()
        if factor == 0.0:
            changed[..., where] = 0.0 if added is None else added.to(tensor)
        else:
            new = tensor[..., where] * factor
            changed[..., where] = new if added is None else new + added.to(tensor)
        return changed

    return edit


def _drawing(name: str, indices: torch.Tensor, pool: torch.Tensor, seed: int) -> Edit:
    generator = torch.Generator().manual_seed(seed)

    def edit(tensor: torch.Tensor) -> torch.Tensor:
        where = _there(name, indices, tensor)
        rows = torch.randint(len(pool), tensor.shape[:-1], generator=generator)
        changed = tensor.clone()
        changed[..., where] = pool[:, indices][rows].to(tensor)
        return changed

    return edit


def _there(name: str, indices: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    last = int(indices.max())
    if last >= tensor.shape[-1]:
        raise UnknownName(f"{name}:{last} does not exist: {name} has {tensor.shape[-1]} neurons")
    return indices.to(tensor.device)
