"""`Weights`: selected single weights of a network: name of a parameter -> places in it.

A sibling of `Neurons` and `Directions`, for methods that select neither: a weight is one number of a parameter, and
only its place is kept. Values are never changed in place: each method returns a new object.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from patchclamp.errors import DataError, ModelError, StoreError, unknown
from patchclamp.storage import existing_file, write_file

if TYPE_CHECKING:
    import torch
    from torch import nn

_KIND = "patchclamp weights"


class Weights(Mapping[str, np.ndarray]):
    """Places of single weights, by parameter.

    Args:
        by_parameter: name of a parameter, as in `module.named_parameters()` -> flat indices of weights in it (of
            `[rows, columns]`: `row * columns + column`), or a bool array of its shape. Parameters without any are
            left out.

    Raises:
        DataError: an index is not a whole number >= 0.

    Example:
        >>> weights = Weights({"0.weight": [7, 2], "2.bias": [0]})
        >>> len(weights), weights.count, weights["0.weight"].tolist()
        (2, 3, [2, 7])
        >>> (weights & Weights({"0.weight": [7]})).count
        1
    """

    def __init__(self, by_parameter: Mapping[str, Any]) -> None:
        if not isinstance(by_parameter, Mapping):
            raise DataError('weights are given by parameter, as in {"0.weight": [17, 3]}')
        found = {str(name): _checked(name, places) for name, places in by_parameter.items()}
        self._by_parameter = {name: places for name, places in found.items() if len(places)}

    # Reading --------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """How many weights there are in all parameters."""
        return sum(map(len, self._by_parameter.values()))

    @property
    def counts(self) -> dict[str, int]:
        """How many weights there are in each parameter."""
        return {name: len(places) for name, places in self._by_parameter.items()}

    def jaccard(self, other: Weights) -> float:
        """Share of the weights in either that are in both, between 0 and 1; of two empty sets 1."""
        either = (self | other).count
        return (self & other).count / either if either else 1.0

    def __getitem__(self, parameter: str) -> np.ndarray:
        """Places in one parameter, `[n]` int64, ascending."""
        if parameter not in self._by_parameter:
            raise unknown("parameter with selected weights", parameter, self._by_parameter)
        return self._by_parameter[parameter]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_parameter)

    def __len__(self) -> int:
        return len(self._by_parameter)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Weights)
            and set(self) == set(other)
            and all(np.array_equal(places, other[name]) for name, places in self._by_parameter.items())
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(f"{number} in {name}" for name, number in list(self.counts.items())[:4])
        return f"Weights({self.count}: {shown}{', ...' if len(self) > 4 else ''})"

    # Sets -----------------------------------------------------------------------------------------

    def __or__(self, other: Weights) -> Weights:
        """The weights in either."""
        return self._with(other, np.union1d) if isinstance(other, Weights) else NotImplemented

    def __and__(self, other: Weights) -> Weights:
        """The weights in both."""
        return self._with(other, np.intersect1d) if isinstance(other, Weights) else NotImplemented

    def __sub__(self, other: Weights) -> Weights:
        """The weights of the left one that are not in the right one."""
        return self._with(other, np.setdiff1d) if isinstance(other, Weights) else NotImplemented

    def sample_like(self, module: nn.Module, seed: int = 0) -> Weights:
        """As many weights of each parameter, by chance: what a finding is compared with.

        Raises:
            UnknownName: the module has no such parameter.
        """
        made = np.random.default_rng(seed)
        sizes = {name: parameter.numel() for name, parameter in self._parameters(module).items()}
        return Weights({name: made.choice(sizes[name], number, replace=False) for name, number in self.counts.items()})

    # Acting ---------------------------------------------------------------------------------------

    def zeroed(self, module: nn.Module) -> nn.Module:
        """A copy of the module in which these weights are 0.

        Raises:
            UnknownName: the module has no such parameter.
            ModelError: a parameter is smaller than a place in it.
        """
        made = copy.deepcopy(module)
        self._fill(self._parameters(made), 0.0)
        return made

    @contextmanager
    def silenced(self, module: nn.Module) -> Iterator[nn.Module]:
        """The module itself, in which these weights are 0 while the block runs; afterwards they are as before.

        Raises:
            UnknownName: the module has no such parameter.
            ModelError: a parameter is smaller than a place in it.
        """
        parameters = self._parameters(module)
        before = {name: self._values(name, parameter) for name, parameter in parameters.items()}
        try:
            self._fill(parameters, 0.0)
            yield module
        finally:
            self._fill(parameters, before)

    # Leaving --------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a `.safetensors` file.

        Raises:
            StoreError: the file cannot be written.
        """
        from safetensors.numpy import save

        write_file(path, save(dict(self._by_parameter), metadata={"kind": _KIND}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Weights:
        """Read what `save` wrote.

        Raises:
            StoreError: the file is missing, or holds no places of weights.
        """
        from safetensors import SafetensorError, safe_open

        file = existing_file(path)
        try:
            with safe_open(file, framework="numpy") as opened:
                if (opened.metadata() or {}).get("kind") != _KIND:
                    raise StoreError(f"{file} holds no places of weights: it was not written by Weights.save")
                return cls({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
        except (SafetensorError, DataError) as error:
            raise StoreError(f"{file} holds no places of weights: {error}") from error

    # Helpers --------------------------------------------------------------------------------------

    def _with(self, other: Weights, both: Any) -> Weights:
        nothing = np.zeros(0, np.int64)
        names = list(dict.fromkeys([*self, *other]))
        return Weights(
            {n: both(self._by_parameter.get(n, nothing), other._by_parameter.get(n, nothing)) for n in names}
        )

    def _parameters(self, module: nn.Module) -> dict[str, torch.Tensor]:
        known: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
        for name, places in self._by_parameter.items():
            if name not in known:
                raise unknown("parameter", name, known)
            if places[-1] >= known[name].numel():
                raise ModelError(f"{name} has {known[name].numel()} weights, and {places[-1]} is among its places")
        return {name: known[name] for name in self}

    def _values(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        import torch

        return parameter.detach().flatten()[torch.from_numpy(self[name]).to(parameter.device)].clone()

    def _fill(self, parameters: Mapping[str, torch.Tensor], values: float | Mapping[str, torch.Tensor]) -> None:
        import torch

        with torch.no_grad():
            for name, parameter in parameters.items():
                # Not through a view: a parameter need not lie contiguously.
                places = np.unravel_index(self[name], tuple(parameter.shape))
                where = tuple(torch.from_numpy(each).to(parameter.device) for each in places)
                parameter[where] = values[name] if isinstance(values, Mapping) else values


def _checked(name: object, places: Any) -> np.ndarray:
    if hasattr(places, "detach"):
        places = places.detach().cpu().numpy()
    array = np.asarray(places)
    if array.dtype == bool:
        return np.flatnonzero(array).astype(np.int64)
    if array.size and array.dtype.kind not in "iu":
        raise DataError(f"places of weights in {name} are whole numbers, not {array.dtype}")
    array = np.unique(array.astype(np.int64).ravel())
    if array.size and array[0] < 0:
        raise DataError(f"{array[0]} is no place of a weight in {name}: places are counted from 0 on")
    return array
