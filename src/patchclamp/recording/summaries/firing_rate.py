"""`FiringRate`: how often every neuron is above one or several thresholds, in one pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch

from patchclamp.errors import DataError
from patchclamp.recording.batch import Batch, Setting
from patchclamp.recording.summaries.summary import Summary
from patchclamp.recording.thresholds import Threshold, as_threshold, from_json, is_relative, resolve, to_json


class FiringRate(Summary):
    """How often every neuron fires: the share of rows on which its activation is greater than a threshold.

    For ReLU 0 is silence; for GELU and SiLU it is only the sign, so that a second threshold,
    `FractionOfMaximum(0.5)` or `OwnQuantile(0.99)`, says more.

    Args:
        thresholds: numbers or relative thresholds, one column each; 0 by default. A number is
            compared in the dtype of the values, as torch does.

    Raises:
        DataError: a threshold is not a finite number or a relative threshold.
    """

    name = "firing_rate"
    agree = ("thresholds",)

    def __init__(self, *thresholds: Threshold) -> None:
        if len(thresholds) == 1 and isinstance(thresholds[0], list | tuple):
            inside = ", ".join(repr(each) for each in thresholds[0])
            raise DataError(f"write FiringRate({inside}) without brackets")
        self._thresholds = tuple(as_threshold(each) for each in thresholds or (0.0,))

    @property
    def count(self) -> int:
        """Number of rows (tokens) seen."""
        return int(self.tensors["count"])

    @property
    def fired(self) -> np.ndarray:
        """[size, thresholds] int64: rows on which the neuron was above the threshold."""
        return self.array("fired")

    @property
    def rate(self) -> np.ndarray:
        """[size, thresholds] float64: `fired / count`; NaN where nothing was seen."""
        return self.fired / self.count if self.count else np.full(self.fired.shape, np.nan)

    @property
    def thresholds(self) -> np.ndarray:
        """[size, thresholds] float32: the thresholds as numbers."""
        return self.array("thresholds").astype(np.float32)

    @property
    def relative(self) -> bool:
        return any(is_relative(each) for each in self._thresholds)

    def parameters(self) -> dict[str, Any]:
        return {"thresholds": [to_json(each) for each in self._thresholds]}

    @classmethod
    def from_json(cls, parameters: Mapping[str, Any]) -> Self:
        return cls(*(from_json(each) for each in parameters["thresholds"]))

    def empty(self, setting: Setting) -> dict[str, torch.Tensor]:
        thresholds = np.stack([resolve(each, setting) for each in self._thresholds], axis=1)
        return {
            "count": torch.zeros((), dtype=torch.int64),
            "fired": torch.zeros(thresholds.shape, dtype=torch.int64),
            "thresholds": torch.from_numpy(thresholds),
        }

    def add(self, batch: Batch) -> None:
        thresholds = self.tensors["thresholds"].to(batch.values.dtype).unbind(1)
        # Ones and zeros in float32: summing them is many times faster than counting booleans, and exact,
        # because a block has fewer than 2^24 rows.
        above = torch.empty(batch.block_rows, self.size, device=batch.values.device)
        for block in batch.blocks():
            fires = above[: len(block)]
            for column, threshold in enumerate(thresholds):
                torch.gt(block, threshold.contiguous(), out=fires)
                self.tensors["fired"][:, column] += fires.sum(0).long()
        self.tensors["count"] += len(batch)

    def combine(self, other: Self) -> None:
        self.count_up(other.tensors["count"], other.tensors["fired"])

    def count_up(self, rows: int | torch.Tensor, fired: torch.Tensor) -> None:
        """Take in so many rows, of which the firings [size, thresholds] are known."""
        self.tensors["count"] += rows
        self.tensors["fired"] += fired
