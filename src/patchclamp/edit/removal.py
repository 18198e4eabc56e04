"""`Removal`: deletes the slices of neurons from parameters, keeps what stood there, and puts it back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import polars as pl
import torch
from torch import nn

from patchclamp.edit.changes import Changes
from patchclamp.edit.edited import Edit
from patchclamp.edit.widths import built, take_over_numbers
from patchclamp.model.modules import is_convolution
from patchclamp.model.slices import WeightSlice


class Removal(Changes):
    """Deletes neurons from a network, or sets all of their weights to zero.

    Args:
        root: a copy, for it is changed in place.
        earlier: edits of this network before; to undo the removal is to undo them as well.
    """

    def __init__(self, root: nn.Module, earlier: Sequence[Edit] = ()) -> None:
        super().__init__(root)
        self._earlier = tuple(earlier)
        self._done: list[_Zeroed | _Deleted] = []
        self._of_neurons: list[pl.DataFrame] = []
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._settings: dict[str, Any] = {}

    def set_flag(self, path: str, value: Any) -> None:
        """As `Changes.set_flag`; what stood there is kept apart from what earlier edits changed."""
        super().set_flag(path, value)
        self._settings.setdefault(path, self.flags[path][0])

    def zero(self, site: str, slices: Iterable[WeightSlice], indices: np.ndarray) -> None:
        """Set all that makes and reads some neurons to zero."""
        for each in slices:
            self._note(site, each, indices)
            part, places = _part(_tensor(self.root, each.parameter), each.index), _places(each, indices)
            places = places.to(part.device)
            self._done.append(
                _Zeroed(each.parameter, each.axis, each.index, places, part.index_select(each.axis, places))
            )
            part.index_fill_(each.axis, places, 0)

    def delete(self, sites: Mapping[str, tuple[Iterable[WeightSlice], np.ndarray]]) -> None:
        """Delete all that makes and reads some neurons, `site -> (slices, indices)`, of all sites at once."""
        doomed: dict[tuple[str, int], dict[tuple[int, ...], list[torch.Tensor]]] = {}
        for site, (slices, indices) in sites.items():
            for each in slices if len(indices) else ():
                self._note(site, each, indices)
                parts = doomed.setdefault((each.parameter, each.axis), {})
                parts.setdefault(each.index, []).append(_places(each, indices))
        for (parameter, axis), parts in doomed.items():
            deleted = _Deleted(parameter, axis)
            made: dict[tuple[int, ...], torch.Tensor] = {}
            for index, places in parts.items():
                made[index] = deleted.take(_part(_tensor(self.root, parameter), index), index, torch.cat(places))
            _put(self.root, parameter, _joined(made))
            self._done.append(deleted)

    def undo(self, root: nn.Module) -> None:
        """Put back what was deleted, and take back the edits before."""
        for each in reversed(self._done):
            each.undo(root)
        for parameter in self._shapes:
            say_widths(root.get_submodule(parameter.rpartition(".")[0]))
        settings = Changes(root)
        settings.flags = {path: (before, None) for path, before in self._settings.items()}
        settings.undo(root)
        if self._settings and (other := built(root, {})) is not None:
            take_over_numbers(root, other)
        for edit in reversed(self._earlier):
            edit.changes.undo(root)

    def by_parameter(self) -> pl.DataFrame:
        """A row for each parameter that became smaller or has zeros now; see `PrunedModel.diff`."""
        rows = []
        for name, before in self._shapes.items():
            now = _tensor(self.root, name)
            there = [each for each in self._done if each.parameter == name]
            changed = sum(each.numbers for each in there)
            largest = max(each.largest for each in there)
            rows.append((name, str(list(now.shape)), now.numel(), changed, largest, False, str(list(before))))
        return pl.DataFrame(rows, schema=_OF_PARAMETERS, orient="row")

    def by_neuron(self) -> pl.DataFrame:
        """A row for each neuron and parameter; see `PrunedModel.diff`."""
        return pl.concat(self._of_neurons)

    def _note(self, site: str, where: WeightSlice, indices: np.ndarray) -> None:
        tensor = _tensor(self.root, where.parameter)
        self._shapes.setdefault(where.parameter, tuple(tensor.shape))
        places = _places(where, indices).to(tensor.device)
        rows = _part(tensor, where.index).movedim(where.axis, 0)[places].reshape(len(places), -1)
        self._of_neurons.append(
            pl.DataFrame(
                {
                    "site": [site] * len(indices),
                    "index": indices,
                    "parameter": [where.parameter] * len(indices),
                    "changed": [rows.shape[1]] * len(indices),
                    "largest_change": rows.double().abs().amax(1).cpu().numpy(),
                }
            )
        )


def say_widths(module: Any) -> None:
    """Tell a layer how wide its weights are: `in_features`, `out_channels`, `num_features`, ..."""
    weight = module._parameters.get("weight")
    if weight is None:
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif type(module).__name__ == "Conv1D":
        module.nx, module.nf = weight.shape
    elif is_convolution(module):
        first, second = weight.shape[:2]
        module.in_channels, module.out_channels = (first, second) if module.transposed else (second, first)
    elif hasattr(module, "num_features"):
        module.num_features = len(weight)


# What was done to one parameter -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Zeroed:
    """Part of a parameter that became zero: `values` stood at `places` along `axis`, in the entry `index`."""

    parameter: str
    axis: int
    index: tuple[int, ...]
    places: torch.Tensor
    values: torch.Tensor

    @property
    def numbers(self) -> int:
        return self.values.numel()

    @property
    def largest(self) -> float:
        return float(self.values.double().abs().max())

    def undo(self, root: nn.Module) -> None:
        part = _part(_tensor(root, self.parameter), self.index)
        part.index_copy_(self.axis, self.places.to(part.device), self.values.to(part))


@dataclass(frozen=True, eq=False)
class _Deleted:
    """What was deleted from a parameter along an axis: entry of the parameter -> (places, what stood there)."""

    parameter: str
    axis: int
    parts: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def take(self, part: torch.Tensor, index: tuple[int, ...], places: torch.Tensor) -> torch.Tensor:
        """What is left of an entry without these places."""
        places = places.unique().to(part.device)
        self.parts[index] = places, part.index_select(self.axis, places)
        return part.index_select(self.axis, _others(places, part.shape[self.axis]))

    @property
    def numbers(self) -> int:
        return sum(values.numel() for _, values in self.parts.values())

    @property
    def largest(self) -> float:
        return max(float(values.double().abs().max()) for _, values in self.parts.values())

    def undo(self, root: nn.Module) -> None:
        tensor = _tensor(root, self.parameter)
        made = {}
        for index, (places, values) in self.parts.items():
            part, there = _part(tensor, index), places.to(tensor.device)
            length = part.shape[self.axis] + len(there)
            shape = [*part.shape]
            shape[self.axis] = length
            made[index] = part.new_empty(shape)
            made[index].index_copy_(self.axis, there, values.to(part))
            made[index].index_copy_(self.axis, _others(there, length), part)
        _put(root, self.parameter, _joined(made))


_OF_PARAMETERS = {
    "parameter": pl.String,
    "shape": pl.String,
    "numbers": pl.Int64,
    "changed": pl.Int64,
    "largest_change": pl.Float64,
    "added": pl.Boolean,
    "shape_before": pl.String,
}


def _joined(parts: Mapping[tuple[int, ...], torch.Tensor]) -> torch.Tensor:
    """The whole parameter of its entries: one of them, or one for each expert."""
    return parts[()] if () in parts else torch.stack([parts[(place,)] for place in range(len(parts))])


def _part(tensor: torch.Tensor, index: tuple[int, ...]) -> torch.Tensor:
    return tensor[index] if index else tensor


def _places(where: WeightSlice, indices: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(where.offset + where.stride * np.asarray(indices, np.int64))


def _others(places: torch.Tensor, length: int) -> torch.Tensor:
    stays = torch.ones(length, dtype=torch.bool, device=places.device)
    stays[places] = False
    return stays.nonzero().flatten()


def _tensor(root: nn.Module, parameter: str) -> torch.Tensor:
    path, _, name = parameter.rpartition(".")
    return cast(torch.Tensor, getattr(root.get_submodule(path), name)).detach()


def _put(root: nn.Module, parameter: str, new: torch.Tensor) -> None:
    path, _, name = parameter.rpartition(".")
    module = root.get_submodule(path)
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
