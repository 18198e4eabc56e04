"""`Histogram`: how the activations of every neuron are distributed, in bins that are the same for all.

The bins are read off the bits of a float: eight equal bins in every octave [2^e, 2^(e+1)) from 2^-14 to
2^14, for each sign; one bin around zero, and one beyond each end. So every bin is at most an eighth
as wide as the values in it are large, small and large neurons are resolved alike, nothing has to be
known in advance, and histograms can be added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self, overload

import numpy as np
import torch

from patchclamp.errors import DataError
from patchclamp.recording.batch import Batch, Setting
from patchclamp.recording.summaries.summary import Summary

_PER_OCTAVE_BITS = 3
_LOWEST, _HIGHEST = -14, 14
_OCTAVES = _HIGHEST - _LOWEST
_ONE_SIDE = (_OCTAVES << _PER_OCTAVE_BITS) + 1  # with the bin beyond the end
BINS = 2 * _ONE_SIDE + 1
_RANGE = 2.0**_HIGHEST
# A bincount pays for its output, so it takes several blocks at once.
_COUNTED_AT_ONCE = 1 << 22


class Histogram(Summary):
    """Counts of every neuron's activations in fixed log-linear bins, exact; quantiles from them to 1/8.

    Bin j counts `edges[j] <= value < edges[j + 1]`.
    """

    name = "histogram"

    @property
    def edges(self) -> np.ndarray:
        """[bins + 1] float64, ascending, the same for every neuron; -inf and inf at the ends."""
        return _EDGES.copy()

    @property
    def counts(self) -> np.ndarray:
        """[size, bins] int64."""
        return self.array("counts")

    @overload
    def quantile(self, q: float) -> np.ndarray: ...
    @overload
    def quantile(self, q: Sequence[float] | np.ndarray) -> np.ndarray: ...
    def quantile(self, q: float | Sequence[float] | np.ndarray) -> np.ndarray:
        """Estimate quantiles, interpolated between neighbouring values as `numpy.quantile` does.

        Args:
            q: in [0, 1]; one number, or several.

        Returns:
            [size] float64, or [size, len(q)] for several; NaN where nothing was seen. With values between
            2^-14 and 2^14 in magnitude, the two neighbouring values are each off by less than 1/8 of
            themselves, and so is the quantile unless they differ in sign. Smaller ones count as 0,
            larger ones as +-2^14.

        Raises:
            DataError: q is outside [0, 1].
        """
        wanted = np.asarray(q, dtype=np.float64)
        if wanted.ndim > 1 or not ((wanted >= 0) & (wanted <= 1)).all():
            raise DataError(f"a quantile is asked for with q in [0, 1], not {q!r}")
        counts = self.counts
        below = counts.cumsum(axis=1)
        found = np.stack([_quantile(counts, below, float(each)) for each in wanted.reshape(-1)], axis=1)
        return found if wanted.ndim else found[:, 0]

    def probability_above(self, x: float) -> np.ndarray:
        """Estimate the share of rows with a value above `x`.

        Values are taken as evenly spread over their bin (those in the bin around zero as 0), so the
        error is less than the share of rows in the bin of `x`. Beyond +-2^14 it is a lower bound.

        Returns:
            [size] float64; NaN where nothing was seen.

        Raises:
            DataError: x is NaN.
        """
        if np.isnan(x):
            raise DataError("probability_above needs a number, not NaN")
        counts = self.counts
        place = min(int(np.searchsorted(_EDGES, x, side="right")) - 1, BINS - 1)
        low, high = _EDGES[place], _EDGES[place + 1]
        share = (high - x) / (high - low) if np.isfinite(high - low) else 0.0
        if place == _ONE_SIDE:
            share = float(x < 0)
        above = counts[:, place + 1 :].sum(axis=1) + share * counts[:, place]
        total = counts.sum(axis=1)
        return np.divide(above, total, out=np.full(self.size, np.nan), where=total > 0)

    def empty(self, setting: Setting) -> dict[str, torch.Tensor]:
        return {"counts": torch.zeros(setting.size, BINS, dtype=torch.int64)}

    def add(self, batch: Batch) -> None:
        counts = self.tensors["counts"]
        dtype = torch.int32 if counts.numel() < 1 << 31 else torch.int64
        first = torch.arange(self.size, dtype=dtype, device=counts.device) * BINS + _ONE_SIDE
        rows, step = max(1, min(len(batch), _COUNTED_AT_ONCE // max(1, self.size))), batch.block_rows
        places = torch.empty(rows, self.size, dtype=dtype, device=counts.device)
        for start in range(0, len(batch), rows):
            part = batch.values[start : start + rows]
            found = places[: len(part)]
            for piece, into in zip(part.split(step), found.split(step), strict=True):
                torch.add(_signed_bin(piece), first, out=into)
            counts += torch.bincount(found.flatten(), minlength=counts.numel()).view_as(counts)

    def combine(self, other: Self) -> None:
        self.tensors["counts"] += other.tensors["counts"]


def _signed_bin(values: torch.Tensor) -> torch.Tensor:
    """The bin of each value, counted from the bin around zero: negative bins for negative values.

    The exponent and the first three bits of the mantissa number the bins of a magnitude. A magnitude
    with its sign, shifted right, rounds down: so that also below zero a bin includes its lower edge.
    """
    wide = values.dtype == torch.float64
    bits = values.view(torch.int64 if wide else torch.int32)
    mantissa, bias = (52, 1023) if wide else (23, 127)
    sign = bits >> (63 if wide else 31)
    magnitude = bits & (2**63 - 1 if wide else 2**31 - 1)
    octave = magnitude.bitwise_xor_(sign).sub_(sign).bitwise_right_shift_(mantissa - _PER_OCTAVE_BITS)
    smallest = (bias + _LOWEST) << _PER_OCTAVE_BITS
    positive = (octave - (smallest - 1)).clamp_(0, _ONE_SIDE)
    return octave.add_(smallest).clamp_(-_ONE_SIDE, 0).add_(positive)


def _edges() -> np.ndarray:
    steps = 1 << _PER_OCTAVE_BITS
    octaves = 2.0 ** np.arange(_LOWEST, _HIGHEST)
    positive = np.append(np.outer(octaves, 1 + np.arange(steps) / steps).ravel(), _RANGE)
    return np.concatenate([[-np.inf], -positive[::-1], positive, [np.inf]])


_EDGES = _edges()


def _quantile(counts: np.ndarray, below: np.ndarray, q: float) -> np.ndarray:
    total = below[:, -1]
    place = q * np.maximum(total - 1, 0)
    lower = np.floor(place)
    low = _value_at(counts, below, lower)
    high = _value_at(counts, below, np.ceil(place))
    found = low + (place - lower) * (high - low)
    return np.where(total > 0, found, np.nan)


def _value_at(counts: np.ndarray, below: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The value [size] with `index` [size] smaller or equal ones before it, as evenly spread over its bin."""
    place = np.minimum((below <= index[:, None]).sum(axis=1), BINS - 1)
    row = np.arange(len(counts))
    inside = counts[row, place]
    share = (index - (below[row, place] - inside) + 0.5) / np.maximum(inside, 1)
    low, high = np.clip(_EDGES[place], -_RANGE, _RANGE), np.clip(_EDGES[place + 1], -_RANGE, _RANGE)
    return np.where(place == _ONE_SIDE, 0.0, low + share * (high - low))
