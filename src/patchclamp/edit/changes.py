"""`Changes`: what was written into the weights of a copy, and what stood there before.

What stood there is kept, so that a change can be shown and taken back to the bit. Only the rows of the neurons are
kept where rows were written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import polars as pl
import torch
from torch import nn

from patchclamp.errors import ModelError
from patchclamp.model.slices import WeightSlice


@dataclass(frozen=True, eq=False)
class Kept:
    """What stood in a parameter before one change.

    Attributes:
        parameter: dotted name of it.
        before: the rows, or the whole; None where the parameter was not there.
        slice: which rows are whose; None for the whole.
        indices: of the neurons whose rows were written.
        site: of these neurons.
    """

    parameter: str
    before: torch.Tensor | None
    slice: WeightSlice | None = None
    indices: torch.Tensor | None = None
    site: str = ""


@dataclass(frozen=True, eq=False)
class Constant:
    """What neurons that are held at a value add to a bias.

    Attributes:
        site: of the neurons.
        indices: of the neurons.
        parameter: dotted name of the bias.
        added: `[neurons, ...]`, what each adds.
    """

    site: str
    indices: torch.Tensor
    parameter: str
    added: torch.Tensor


class Changes:
    """Writes into a network and keeps what stood there.

    Args:
        root: the network that is changed; a copy, for it is changed in place.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.kept: list[Kept] = []
        self.constants: list[Constant] = []
        self.flags: dict[str, tuple[Any, Any]] = {}

    def rows(self, site: str, where: WeightSlice, indices: torch.Tensor, new: torch.Tensor) -> None:
        """Write the rows of some neurons of a site, `[neurons, ...]`; they are converted to the parameter's type."""
        every = rows_of(self.tensor(where.parameter), where)
        there = indices.to(every.device)
        self.kept.append(Kept(where.parameter, every[there].clone(), where, there, site))
        every[there] = new.to(every)

    def whole(self, parameter: str, new: torch.Tensor) -> None:
        """Write a whole parameter, or buffer, of the same shape."""
        tensor = self.tensor(parameter)
        self.kept.append(Kept(parameter, tensor.clone()))
        tensor.copy_(new.to(tensor))

    def add_to(self, bias: str, index: tuple[int, ...], constants: Sequence[Constant]) -> None:
        """Add constants to a bias, or to the entry of one at `index`; they are summed in float64."""
        new = self.tensor(bias).clone().double()
        there = new[index] if index else new
        for each in constants:
            there += each.added.sum(0).to(new)
        self.whole(bias, new)
        self.constants += [each for each in constants if len(each.indices)]

    def zero_biases(self, names: Iterable[str]) -> None:
        """Give linear layers the biases that they lack, zero."""
        for name in names:
            layer = self.root.get_submodule(name.rpartition(".")[0])
            weight = cast(nn.Parameter, layer.weight)
            layer.bias = nn.Parameter(weight.new_zeros(weight.shape[0]), weight.requires_grad)
            self.kept.append(Kept(name, None))

    def set_flag(self, path: str, value: Any) -> None:
        """Set an attribute of the network's configuration, `mlp_bias` or `text_config.mlp_bias`."""
        config, name = _config(self.root, path)
        before = self.flags[path][0] if path in self.flags else getattr(config, name)
        self.flags[path] = before, value
        setattr(config, name, value)

    def undo(self, root: nn.Module) -> None:
        """Put back, in a network that has these changes as its last ones, what stood there before."""
        for each in reversed(self.kept):
            path, _, name = each.parameter.rpartition(".")
            if each.before is None:
                setattr(root.get_submodule(path), name, None)
            else:
                _put_back(_named(root, each.parameter), each)
        for path, (before, _) in self.flags.items():
            config, name = _config(root, path)
            setattr(config, name, before)

    def tensor(self, parameter: str) -> torch.Tensor:
        """A parameter, or buffer, as it is now: without gradient, to be written into."""
        return _named(self.root, parameter)


def rows_of(tensor: torch.Tensor, where: WeightSlice) -> torch.Tensor:
    """The numbers of all neurons in a parameter, neurons first: a view."""
    counted = (tensor[where.index] if where.index else tensor).movedim(where.axis, 0)
    return counted[where.offset : where.offset + where.stride * (where.size - 1) + 1 : where.stride]


def by_parameter(root: nn.Module, kept: Sequence[Kept]) -> pl.DataFrame:
    """A row for each parameter that was written: its size, how many numbers are others now, the largest change."""
    rows = []
    for name in dict.fromkeys(each.parameter for each in kept):
        now = _named(root, name)
        before = _before(now, [each for each in kept if each.parameter == name])
        added = before is None
        change = (now.double() - (0 if added else before.double())).abs()
        changed = int((change != 0).sum()) if not added else int(now.numel())
        rows.append((name, str(list(now.shape)), now.numel(), changed, float(change.max()) if changed else 0.0, added))
    schema = {
        "parameter": pl.String,
        "shape": pl.String,
        "numbers": pl.Int64,
        "changed": pl.Int64,
        "largest_change": pl.Float64,
        "added": pl.Boolean,
    }
    return pl.DataFrame(rows, schema=schema, orient="row")


def by_neuron(root: nn.Module, kept: Sequence[Kept], constants: Sequence[Constant]) -> pl.DataFrame:
    """A row for each neuron and parameter: how many of its numbers are others now, the largest change."""
    frames: list[tuple[str, str, torch.Tensor, torch.Tensor]] = []
    written: dict[tuple[str, WeightSlice], list[torch.Tensor]] = {}
    for each in kept:
        if each.slice is not None and each.indices is not None:
            written.setdefault((each.site, each.slice), []).append(each.indices)
    for (site, where), parts in written.items():
        now = _named(root, where.parameter)
        before = _before(now, [each for each in kept if each.parameter == where.parameter])
        indices = torch.cat(parts).unique()
        old = 0 if before is None else rows_of(before, where)[indices].double()
        frames.append((site, where.parameter, indices, (rows_of(now, where)[indices].double() - old).abs()))
    frames += [(each.site, each.parameter, each.indices, each.added.abs()) for each in constants]
    tables = [
        pl.DataFrame(
            {
                "site": [site] * len(indices),
                "index": indices.cpu().numpy(),
                "parameter": [parameter] * len(indices),
                "changed": (change.flatten(1) != 0).sum(1).cpu().numpy(),
                "largest_change": change.flatten(1).amax(1).double().cpu().numpy(),
            },
            schema={name: kind for name, kind in _OF_NEURONS.items()},
        )
        for site, parameter, indices, change in frames
    ]
    return pl.concat(tables) if tables else pl.DataFrame(schema=_OF_NEURONS)


_OF_NEURONS = {
    "site": pl.String,
    "index": pl.Int64,
    "parameter": pl.String,
    "changed": pl.Int64,
    "largest_change": pl.Float64,
}


def _before(now: torch.Tensor, kept: Sequence[Kept]) -> torch.Tensor | None:
    """A parameter as it was before all of these changes of it; None where it was not there."""
    if kept[0].before is None:
        return None
    tensor = now.clone()
    for each in reversed(kept):
        _put_back(tensor, each)
    return tensor


def _put_back(tensor: torch.Tensor, kept: Kept) -> None:
    assert kept.before is not None
    if kept.slice is None:
        tensor.copy_(kept.before)
    else:
        rows_of(tensor, kept.slice)[kept.indices] = kept.before


def _named(root: nn.Module, parameter: str) -> torch.Tensor:
    path, _, name = parameter.rpartition(".")
    found = getattr(root.get_submodule(path), name, None)
    if not isinstance(found, torch.Tensor):
        raise ModelError(f"the network has no parameter {parameter}")
    return found.detach()


def _config(root: nn.Module, path: str) -> tuple[Any, str]:
    *parts, name = path.split(".")
    config: Any = root.config
    for part in parts:
        config = getattr(config, part)
    return config, name
