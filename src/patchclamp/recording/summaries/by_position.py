"""`ByPosition`: what every neuron does at each position of an example.

The first positions have a bin each; the later ones share bins that are each as wide as all positions before it, so
that examples may be of any length and recordings of different data can still be compared.

Mean and variance of a bin are joined by the formula that `Moments` explains.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch

from patchclamp.errors import DataError
from patchclamp.recording.batch import Batch, Setting
from patchclamp.recording.summaries.summary import Summary, whole
from patchclamp.recording.thresholds import Threshold, as_threshold, from_json, is_relative, resolve, to_json

_MOST_OF_THEIR_OWN = 1 << 16
_MOST = 1 << 31  # one more than the largest position of a batch


class ByPosition(Summary):
    """Mean, variance and firing rate of every neuron by position in the example.

    A position is the index of a token in its own sequence, special tokens included; for a map of a channel, the index
    of a pixel, row by row. Bin j holds the positions from `edges[j]` up to, not including, `edges[j + 1]`.

    Args:
        positions: so many positions from the start have a bin each; later ones share bins, which double in width.
        threshold: a neuron fires where its activation is greater; a number, or relative.

    Raises:
        DataError: positions is not a whole number from 1 to 65,536, or a bad threshold.
    """

    name = "by_position"
    agree = ("threshold",)

    def __init__(self, positions: int = 64, threshold: Threshold = 0.0) -> None:
        self.positions = whole("ByPosition", "positions", positions, at_least=1)
        if self.positions > _MOST_OF_THEIR_OWN:
            raise DataError(f"ByPosition: at most {_MOST_OF_THEIR_OWN} positions have a bin each, not {positions!r}")
        self._threshold = as_threshold(threshold)

    @property
    def edges(self) -> np.ndarray:
        """[bins + 1] int64, ascending: 0, 1, 2, ... positions, 2 * positions, 4 * positions, ..., 2^31."""
        edges = list(range(self.positions + 1))
        while edges[-1] < _MOST:
            edges.append(min(2 * edges[-1], _MOST))
        return np.asarray(edges, dtype=np.int64)

    @property
    def count(self) -> np.ndarray:
        """[bins] int64: rows seen at the positions of each bin."""
        return self.array("count")

    @property
    def mean(self) -> np.ndarray:
        """[size, bins] float64; NaN where nothing was seen."""
        return np.where(self.count > 0, self.array("mean").T, np.nan)

    @property
    def variance(self) -> np.ndarray:
        """[size, bins] float64, of the population (divided by the count); NaN where nothing was seen."""
        return self._per_row("deviation")

    @property
    def std(self) -> np.ndarray:
        """[size, bins] float64, the square root of `variance`."""
        return np.sqrt(self.variance)

    @property
    def fired(self) -> np.ndarray:
        """[size, bins] int64: rows on which the neuron fires."""
        return np.ascontiguousarray(self.array("fired").T)

    @property
    def rate(self) -> np.ndarray:
        """[size, bins] float64: `fired / count`; NaN where nothing was seen."""
        return self._per_row("fired")

    @property
    def threshold(self) -> np.ndarray:
        """[size] float32: the threshold of each neuron as a number."""
        return self.array("threshold").astype(np.float32)

    @property
    def relative(self) -> bool:
        return is_relative(self._threshold)

    def parameters(self) -> dict[str, Any]:
        return {"positions": self.positions, "threshold": to_json(self._threshold)}

    @classmethod
    def from_json(cls, parameters: Mapping[str, Any]) -> Self:
        return cls(parameters["positions"], from_json(parameters["threshold"]))

    def empty(self, setting: Setting) -> dict[str, torch.Tensor]:
        shape = (len(self.edges) - 1, setting.size)
        return {
            "count": torch.zeros(shape[0], dtype=torch.int64),
            "mean": torch.zeros(shape, dtype=torch.float64),
            "deviation": torch.zeros(shape, dtype=torch.float64),  # sum of squared ones from the mean
            "fired": torch.zeros(shape, dtype=torch.int64),
            "threshold": torch.from_numpy(resolve(self._threshold, setting)),
        }

    def add(self, batch: Batch) -> None:
        threshold = self.tensors["threshold"].to(batch.values.dtype)
        bins, place = torch.unique(self._bins(batch), return_inverse=True)
        count = torch.bincount(place, minlength=len(bins))
        mean, deviation, fired = torch.zeros(3, len(bins), self.size, dtype=torch.float64, device=bins.device)
        blocks = list(zip(batch.blocks(), place.split(batch.block_rows), strict=True))
        for block, places in blocks:
            mean.index_add_(0, places, block.double())
        mean /= count[:, None]
        for block, places in blocks:
            deviation.index_add_(0, places, (block.double() - mean[places]).square_())
            fired.index_add_(0, places, (block > threshold).double())
        self._join(bins, count, mean, deviation, fired.long())

    def combine(self, other: Self) -> None:
        there = other.tensors
        bins = there["count"].nonzero().squeeze(1)
        self._join(bins, *(there[name][bins] for name in ("count", "mean", "deviation", "fired")))

    def _bins(self, batch: Batch) -> torch.Tensor:
        position = batch.position
        low, high = (int(each) for each in torch.aminmax(position))
        if low < 0 or high >= _MOST:
            raise DataError(f"position must be in 0 ... {_MOST - 1}; this batch has {low if low < 0 else high}")
        edges = torch.from_numpy(self.edges).to(position.device)
        return torch.searchsorted(edges, position, right=True) - 1

    def _join(
        self,
        bins: torch.Tensor,
        count: torch.Tensor,
        mean: torch.Tensor,
        deviation: torch.Tensor,
        fired: torch.Tensor,
    ) -> None:
        """Add what was seen in some bins, at least one row in each."""
        held = self.tensors
        before = held["count"][bins].double()[:, None]
        share = count.double()[:, None] / (before + count[:, None])
        difference = mean - held["mean"][bins]
        held["deviation"][bins] += deviation + difference.square() * (before * share)
        held["mean"][bins] += difference * share
        held["fired"][bins] += fired
        held["count"][bins] += count

    def _per_row(self, name: str) -> np.ndarray:
        count = self.count
        return np.where(count > 0, self.array(name).T / np.maximum(count, 1), np.nan)
