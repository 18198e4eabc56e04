"""`Pooled`: one number for every neuron and example, which is what a permutation test, a bootstrap or a probe needs.

It grows with the data, two bytes a neuron and example: in memory where there is room, else in a temporary file that
goes when the summary does.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch

from patchclamp.errors import DataError, unknown
from patchclamp.recording.batch import Batch, Setting
from patchclamp.recording.summaries.summary import Summary
from patchclamp.recording.thresholds import Threshold, as_threshold, from_json, is_relative, resolve, to_json

_HOWS = ("max", "mean", "last", "fired")
_DTYPES = ("float16", "float32")
_BYTES_AT_ONCE = 1 << 24


class Pooled(Summary):
    """One number for every example and neuron, over the positions of the example that count.

    Labels are not in it: they belong to the analysis, and can be permuted without recording again.

    Args:
        how: "max", "mean", "last" (the value at the last position that counts), or "fired" (the share of the
            positions on which the neuron fires: above 0 if it fires at all).
        threshold: for "fired": a neuron fires where its activation is greater; a number, or relative.
        dtype: "float16" or "float32", what the numbers are rounded to; what is larger than its range is cut to it.

    Raises:
        UnknownName: no such way of pooling, or dtype.
        DataError: a bad threshold; when it starts: how many examples the data has is not known.
    """

    name = "pooled"
    agree = ("threshold",)
    large = ("values",)

    def __init__(self, how: str = "max", threshold: Threshold = 0.0, dtype: str = "float16") -> None:
        if how not in _HOWS:
            raise unknown("way of pooling", str(how), _HOWS)
        if dtype not in _DTYPES:
            raise unknown("dtype of Pooled", str(dtype), _DTYPES)
        self.how, self.dtype = how, dtype
        self._threshold = as_threshold(threshold)

    @property
    def values(self) -> np.ndarray:
        """[examples, size] in `dtype`, row i for the example i; NaN where it had no position that counts.

        Not a copy: it can only be read, and changes with the summary. It may lie on disk (`numpy.memmap`).
        """
        view = self._held().view()
        view.flags.writeable = False
        return view

    @property
    def example(self) -> np.ndarray:
        """[examples] int64: the id of the example of each row."""
        return np.arange(self._examples)

    @property
    def threshold(self) -> np.ndarray:
        """[size] float32: what a neuron is above when it fires; read for "fired" only."""
        return self.array("threshold").astype(np.float32)

    @property
    def on_disk(self) -> bool:
        """Whether the numbers lie in a file."""
        return isinstance(self._array, np.memmap)

    @property
    def relative(self) -> bool:
        return self.how == "fired" and is_relative(self._threshold)

    def parameters(self) -> dict[str, Any]:
        return {"how": self.how, "threshold": to_json(self._threshold), "dtype": self.dtype}

    @classmethod
    def from_json(cls, parameters: Mapping[str, Any]) -> Self:
        return cls(parameters["how"], from_json(parameters["threshold"]), parameters["dtype"])

    def empty(self, setting: Setting) -> dict[str, torch.Tensor]:
        if setting.examples is None:
            raise DataError(f"Pooled keeps a row for each example, and how many {setting.site} sees is not known")
        self._examples, self._scratch = setting.examples, setting.scratch
        self._array: np.ndarray | None = None  # made when the first rows arrive
        fires = resolve(self._threshold, setting) if self.how == "fired" else np.zeros(setting.size)
        return {"threshold": torch.from_numpy(fires)}

    def add(self, batch: Batch) -> None:
        ids = batch.spans[0].cpu().numpy()
        if ids.min() < 0 or ids.max() >= self._examples:
            outside = int(ids.min() if ids.min() < 0 else ids.max())
            raise DataError(f"{self.site} sees {self._examples} examples; this batch has example {outside}")
        held = self._held()
        self._refuse_twice(ids[~np.isnan(held[ids, 0])])
        limit = float(np.finfo(self.dtype).max)
        held[ids] = self._pool(batch).clamp(-limit, limit).cpu().numpy()

    def combine(self, other: Self) -> None:
        if other._array is None:
            return
        held = self._held()
        for start in range(0, self._examples, self._rows_at_once()):
            part = slice(start, start + self._rows_at_once())
            theirs = other._array[part]
            seen = ~np.isnan(theirs[:, 0])
            held[part][seen] = theirs[seen]

    def state(self) -> dict[str, np.ndarray]:
        """As of every summary; but `values` is not copied where it lies on disk."""
        return super().state() | {"values": self.values if self.on_disk else self._held().copy()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """As of every summary; `values` that are mapped from a file for this purpose (copy on write) stay there."""
        values = self._fitting_values(state)
        super().restore({name: array for name, array in state.items() if name != "values"})
        mapped = isinstance(values, np.memmap) and values.mode == "c" and values.flags.writeable
        self._examples = len(values)
        self._array = values if mapped else values.astype(self.dtype)

    def nbytes(self, sites: Sequence[Setting]) -> int:
        """Bytes that the accumulators of these sites take, in memory or on disk.

        Raises:
            DataError: how many examples the data has is not known.
        """
        values = 0
        for each in sites:
            if each.examples is None:
                raise DataError(f"what Pooled takes depends on how many examples {each.site} sees: not known")
            values += each.examples * each.size * np.dtype(self.dtype).itemsize
        return values + super().nbytes(sites)

    def held_bytes(self) -> int:
        """Bytes that it holds in memory now."""
        return super().held_bytes() + (0 if self._array is None or self.on_disk else self._array.nbytes)

    def refuse_unlike(self, other: Self) -> None:
        super().refuse_unlike(other)
        if other._examples != self._examples:
            raise DataError(
                f"cannot merge {self.name} of {other.site}, {other._examples} examples, into that of {self.site}, "
                f"{self._examples}"
            )
        if self._array is not None and other._array is not None:
            both = ~np.isnan(self._array[:, 0]) & ~np.isnan(other._array[:, 0])
            self._refuse_twice(np.flatnonzero(both))

    def _pool(self, batch: Batch) -> torch.Tensor:
        """[examples, size] of the `spans` of a batch."""
        ids, first, count = batch.spans
        if self.how == "max":
            return batch.maxima[0]
        if self.how == "last":
            return batch.values[first + count - 1]
        total = torch.zeros(len(ids), self.size, dtype=torch.float64, device=ids.device)
        threshold = self.tensors["threshold"].to(batch.values.dtype)
        of_row = torch.arange(len(ids), device=ids.device).repeat_interleave(count)
        for block, rows in zip(batch.blocks(), of_row.split(batch.block_rows), strict=True):
            counted = block > threshold if self.how == "fired" else block
            total.index_add_(0, rows, counted.double())
        return total / count[:, None]

    def _held(self) -> np.ndarray:
        if self._array is None:
            shape, folder = (self._examples, self.size), self._scratch
            self._array = np.empty(shape, self.dtype) if folder is None else _file(folder, shape, self.dtype)
            for start in range(0, self._examples, self._rows_at_once()):
                self._array[start : start + self._rows_at_once()] = np.nan
        return self._array

    def _rows_at_once(self) -> int:
        return max(1, _BYTES_AT_ONCE // (self.size * np.dtype(self.dtype).itemsize))

    def _refuse_twice(self, ids: np.ndarray) -> None:
        if len(ids):
            raise DataError(f"Pooled takes in each example once, and {self.site} shows example {int(ids[0])} twice")

    def _fitting_values(self, state: Mapping[str, np.ndarray]) -> np.ndarray:
        if "values" not in state:
            raise DataError(f"the state of {self.name} lacks the array 'values'")
        values = np.asanyarray(state["values"])
        if values.dtype.kind != "f":
            raise DataError(f"the state of {self.name} has {values.dtype} in 'values': fractions are wanted")
        rows = self._examples or (len(values) if values.ndim else 0)
        if values.shape != (rows, self.size):
            raise DataError(
                f"the state of {self.name} has 'values' of shape {list(values.shape)}; "
                f"{[rows, self.size]} is wanted for {self.site}"
            )
        return values


def _file(folder: str, shape: tuple[int, int], dtype: str) -> np.ndarray:
    """An array in a file of its own, which is removed when nothing uses the array any more."""
    try:
        handle, path = tempfile.mkstemp(prefix="patchclamp-", dir=folder)
    except OSError as error:
        raise DataError(f"Pooled cannot write in {folder}: {error.strerror or error}") from error
    needed = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        # A disk that fills up under a mapped file would end the process: take all of it now.
        getattr(os, "posix_fallocate", _lengthen)(handle, 0, needed)
        array = np.memmap(path, dtype=dtype, mode="r+", shape=shape)
    except OSError as error:
        _remove(path)
        size = f"{needed / 1e6:,.0f} MB"
        raise DataError(f"no room for Pooled, {size}, in {folder}: {error.strerror or error}") from error
    finally:
        os.close(handle)
    weakref.finalize(array, _remove, path)
    return array


def _lengthen(handle: int, offset: int, length: int) -> None:
    os.ftruncate(handle, offset + length)


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):  # it is gone with the folder
        os.unlink(path)
