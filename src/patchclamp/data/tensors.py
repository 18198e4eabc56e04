"""`Tensors`: input for models without a tokenizer, with labels per example.

torch is imported when a `Tensors` is made, not with this file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from patchclamp.data.labels import categories, check_length, label_list
from patchclamp.errors import DataError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, eq=False)
class TensorExample:
    """One example: its tensor `[...]` (a view, without the dimension of the examples) and its labels."""

    values: torch.Tensor
    labels: Mapping[str, str]


class Tensors:
    """Examples that are tensors; iterate over it to get `TensorExample`s.

    Args:
        values: tensor or numpy array `[examples, ...]` of a floating or integer dtype, at least one
            example. dtype and device are kept, gradients are not. Memory is shared with a tensor or a
            contiguous array.
        labels: `{"digit": [one value per example]}`; values become `str`.
        name: how reports call this data.

    Raises:
        DataError: not a tensor, no examples, another dtype, or labels of the wrong length.

    Example:
        >>> import torch
        >>> data = Tensors(torch.zeros(2, 8), labels={"digit": [0, 1]})
        >>> len(data), data.labels
        (2, {'digit': ('0', '1')})
    """

    name: str
    values: torch.Tensor
    """The tensor, `[examples, ...]`."""

    def __init__(
        self,
        values: torch.Tensor | np.ndarray,
        labels: Mapping[str, Iterable[object]] | None = None,
        *,
        name: str = "tensors",
    ) -> None:
        self.name = name
        self.values = _tensor_of(values, name)
        if labels is not None and not isinstance(labels, Mapping):
            raise DataError(f'labels of {name} are given as {{"digit": [one value per example]}}')
        self._labels = {label: label_list(label, given, name) for label, given in (labels or {}).items()}
        for label, given in self._labels.items():
            check_length(f"label {label!r}", len(given), len(self), name)
        self._categories = categories(self._labels)

    @property
    def labels(self) -> dict[str, tuple[str, ...]]:
        """Label name -> its categories, sorted; `{}` without labels."""
        return dict(self._categories)

    def __iter__(self) -> Iterator[TensorExample]:
        for index in range(len(self)):
            labels = {label: given[index] for label, given in self._labels.items()}
            yield TensorExample(self.values[index], labels)

    def __len__(self) -> int:
        return int(self.values.shape[0])

    def __repr__(self) -> str:
        labels = f", labels: {', '.join(self._labels)}" if self._labels else ""
        return f"Tensors({self.name!r}, {list(self.values.shape)} {self.values.dtype}{labels})"


def is_tensor(value: object) -> TypeGuard[torch.Tensor]:
    """Whether the value is a torch tensor; torch is not imported to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _tensor_of(values: Any, name: str) -> torch.Tensor:
    import torch

    if isinstance(values, np.ndarray):
        if values.dtype.kind not in "iuf":
            raise DataError(f"{name} hold dtype {values.dtype}: expected floating or integer numbers")
        try:
            # torch refuses negative strides, hence order C, and warns about memory that it may not write.
            native = values.dtype.newbyteorder("=")
            values = torch.from_numpy(values.astype(native, order="C", copy=not values.flags.writeable))
        except TypeError as error:
            raise DataError(f"torch does not know the dtype {values.dtype} of {name}: {error}") from error
    if not isinstance(values, torch.Tensor):
        raise DataError(
            f"{name} are of type {type(values).__name__}: pass one tensor or numpy array [examples, ...] "
            "(torch.stack makes one of a list)"
        )
    if values.dtype == torch.bool or values.is_complex():
        raise DataError(f"{name} hold dtype {values.dtype}: expected floating or integer numbers")
    if values.layout != torch.strided:
        raise DataError(f"{name} are stored as {values.layout}: pass values.to_dense()")
    if values.ndim == 0:
        raise DataError(f"{name} are a single number: expected [examples, ...]")
    if values.shape[0] == 0:
        raise DataError(f"no examples in {name}: the shape is {list(values.shape)}")
    return values.detach()
