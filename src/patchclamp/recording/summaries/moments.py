"""`Moments`: mean and variance of every neuron.

Each block of rows gives its count, mean and sum of squared deviations in float64; they are joined by
the parallel formula of Chan, Golub and LeVeque (1979), which does not cancel as a sum of squares does:

    d = mean_b - mean_a     mean = mean_a + d n_b / n     M2 = M2_a + M2_b + d^2 n_a n_b / n
"""

from __future__ import annotations

from typing import Self

import numpy as np
import torch

from patchclamp.recording.batch import Batch, Setting
from patchclamp.recording.summaries.summary import Summary


class Moments(Summary):
    """Mean and variance of every neuron, accumulated in float64.

    However the data is cut into batches, the result agrees with that of the full matrix in float64
    to better than 1e-6 relative (in practice to about 1e-12).
    """

    name = "moments"

    @property
    def count(self) -> int:
        """Number of rows (tokens) seen."""
        return int(self.tensors["count"])

    @property
    def mean(self) -> np.ndarray:
        """[size] float64; NaN where nothing was seen."""
        return self.array("mean") if self.count else np.full(self.size, np.nan)

    @property
    def variance(self) -> np.ndarray:
        """[size] float64, of the population (divided by the count); NaN where nothing was seen."""
        return self.array("deviation") / self.count if self.count else np.full(self.size, np.nan)

    @property
    def std(self) -> np.ndarray:
        """[size] float64, the square root of `variance`."""
        return np.sqrt(self.variance)

    def empty(self, setting: Setting) -> dict[str, torch.Tensor]:
        return {
            "count": torch.zeros((), dtype=torch.int64),
            "mean": torch.zeros(setting.size, dtype=torch.float64),
            "deviation": torch.zeros(setting.size, dtype=torch.float64),  # sum of squared ones from the mean
        }

    def add(self, batch: Batch) -> None:
        wide = torch.empty(batch.block_rows, self.size, dtype=torch.float64, device=batch.values.device)
        for block in batch.blocks():
            centred = wide[: len(block)].copy_(block)
            mean = centred.mean(0)
            centred.sub_(mean).square_()
            self.join(len(block), mean, centred.sum(0))

    def combine(self, other: Self) -> None:
        self.join(other.tensors["count"], other.tensors["mean"], other.tensors["deviation"])

    def join(self, count: int | torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor) -> None:
        """Take in rows of which these are known: how many, their means and sums of squared deviations, [size]."""
        held = self.tensors
        count = torch.as_tensor(count, device=mean.device)
        share = count.double() / (held["count"] + count).clamp(min=1)
        difference = mean - held["mean"]
        held["deviation"] += deviation + difference.square() * (held["count"] * share)
        held["mean"] += difference * share
        held["count"] += count
