"""`Intervention`: a value that says what to do to neurons. It holds no model and no hook."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from patchclamp.errors import DataError, UnknownName
from patchclamp.model.model import Model
from patchclamp.neurons import Neurons

Edit = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Intervention:
    """Replace the activation of each neuron by `factor * activation + value`, at every position.

    Made by `ablate`, `clamp` and `scale`. With `factor` 0 the activation is replaced outright, so that a
    NaN or an infinity does not survive.

    Attributes:
        kind: `ablate`, `clamp` or `scale`.
        neurons: the neurons it acts on.
        factor: what the activations are multiplied by.
        values: site -> `[neurons at the site]` float64, what is added after that.
    """

    kind: str
    neurons: Neurons
    factor: float
    values: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Intervention)
            and (self.kind, self.factor, self.neurons) == (other.kind, other.factor, other.neurons)
            and self.values.keys() == other.values.keys()
            and all(np.array_equal(each, other.values[site]) for site, each in self.values.items())
        )

    __hash__ = None  # type: ignore[assignment]

    def edits(self, model: Model) -> dict[str, Edit]:
        """Site -> function from the site's tensor `[..., size]` to the changed one (a new tensor, same type).

        Raises:
            UnknownName: the model has no such site, or the site no such neuron.
        """
        found: dict[str, Edit] = {}
        for name in self.neurons.sites:
            site = model.site(name)
            indices = self.neurons.indices(name)
            if site.size is not None and int(indices.max()) >= site.size:
                raise UnknownName(f"{name}:{indices.max()} does not exist: {name} has neurons 0 to {site.size - 1}")
            found[name] = _edit(name, torch.from_numpy(indices.copy()), self.factor, self.values.get(name))
        return found


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
        where = indices.to(tensor.device)
        if int(indices.max()) >= tensor.shape[-1]:
            raise UnknownName(f"{name}:{int(indices.max())} does not exist: {name} has {tensor.shape[-1]} neurons")
        changed = tensor.clone()
        if factor == 0.0:
            changed[..., where] = 0.0 if added is None else added.to(tensor)
        else:
            new = tensor[..., where] * factor
            changed[..., where] = new if added is None else new + added.to(tensor)
        return changed

    return edit
