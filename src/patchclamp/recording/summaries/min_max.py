"""`MinMax`: the smallest and the largest activation of every neuron."""

from __future__ import annotations

from typing import Self

import numpy as np
import torch

from patchclamp.recording.batch import Batch, Setting
from patchclamp.recording.summaries.summary import Summary


class MinMax(Summary):
    """The smallest and the largest activation of every neuron, exact."""

    name = "min_max"

    @property
    def min(self) -> np.ndarray:
        """[size], in the dtype of the values; NaN where nothing was seen."""
        return _seen(self.array("min"))

    @property
    def max(self) -> np.ndarray:
        """[size], in the dtype of the values; NaN where nothing was seen."""
        return _seen(self.array("max"))

    def empty(self, setting: Setting) -> dict[str, torch.Tensor]:
        return {
            "min": torch.full((setting.size,), float("inf"), dtype=setting.dtype),
            "max": torch.full((setting.size,), float("-inf"), dtype=setting.dtype),
        }

    def add(self, batch: Batch) -> None:
        self.join(batch.values.amin(0), batch.group_maximum.amax(0))

    def combine(self, other: Self) -> None:
        self.join(other.tensors["min"], other.tensors["max"])

    def join(self, smallest: torch.Tensor, largest: torch.Tensor) -> None:
        """Take in rows of which the extremes are known, [size] each."""
        held = self.tensors
        dtype = torch.promote_types(held["min"].dtype, smallest.dtype)
        # Adding zero turns -0.0 into 0.0, so that the order of the batches leaves no trace.
        held["min"] = torch.minimum(held["min"].to(dtype), smallest.to(dtype)) + 0.0
        held["max"] = torch.maximum(held["max"].to(dtype), largest.to(dtype)) + 0.0


def _seen(extreme: np.ndarray) -> np.ndarray:
    return np.where(np.isinf(extreme), np.array(np.nan, dtype=extreme.dtype), extreme)
