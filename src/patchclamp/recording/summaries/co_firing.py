"""`CoFiring`: how often two neurons of a site fire on the same row.

Firing is a matrix F [rows, neurons] of ones and zeros, and F^T F counts every pair. Partners are ranked by the
Jaccard index: of the rows on which either fires, the share on which both do,

    J[i, j] = both[i, j] / (fired[i] + fired[j] - both[i, j]).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self

import numpy as np
import torch

from patchclamp.recording.batch import Batch, Setting
from patchclamp.recording.summaries.pairs import (
    Partners,
    best_partners,
    checked_block,
    checked_partners,
    pieces,
    product,
    rows_of,
)
from patchclamp.recording.summaries.summary import Summary
from patchclamp.recording.thresholds import (
    FractionOfMaximum,
    Threshold,
    as_threshold,
    from_json,
    is_relative,
    resolve,
    to_json,
)

_HALF_OF_MAXIMUM = FractionOfMaximum(0.5)
# Sums of ones and zeros in float32 are exact below 2^24, also where a GPU multiplies in TF32.
_ROWS_AT_ONCE = 1 << 12


class CoFiring(Summary):
    """How often every two neurons of a site fire on the same row, exact.

    It holds 4 bytes for every pair, of at most 2^28 pairs a site (all of 16,384 neurons).

    Args:
        threshold: a neuron fires where its activation is greater; a number, or relative.
        partners: how many `partners()` gives each neuron; None for all others.
        block: (start, stop): only the pairs of these neurons, each with every neuron of the site.

    Raises:
        DataError: a bad threshold, number or block; when it starts: the block is not in the site, or the pairs
            are too many.
    """

    name = "co_firing"
    agree = ("threshold",)

    def __init__(
        self,
        threshold: Threshold = _HALF_OF_MAXIMUM,
        partners: int | None = 20,
        block: Iterable[int] | None = None,
    ) -> None:
        self._threshold = as_threshold(threshold)
        self._partners = checked_partners("CoFiring", partners)
        self.block = checked_block("CoFiring", block)

    @property
    def count(self) -> int:
        """Number of rows (tokens) seen."""
        return int(self.tensors["count"])

    @property
    def fired(self) -> np.ndarray:
        """[size] int64: rows on which the neuron fires."""
        return self.array("fired")

    @property
    def both(self) -> np.ndarray:
        """[size, size] int64, or [stop - start, size] of a block: rows on which both neurons fire."""
        return self.array("both").astype(np.int64)

    @property
    def threshold(self) -> np.ndarray:
        """[size] float32: the threshold of each neuron as a number."""
        return self.array("threshold").astype(np.float32)

    def jaccard(self) -> np.ndarray:
        """[size, size] float64, or [stop - start, size] of a block: the Jaccard index; NaN where neither ever fires."""
        return self._jaccard(slice(0, len(self.tensors["both"])))

    def partners(self, k: int | None = None) -> Partners:
        """The neurons that fire most together with each neuron (of the block), by Jaccard index.

        Args:
            k: how many; by default what the summary was made with.

        Returns:
            `indices` [neurons, k] int64 and `scores` [neurons, k] float64, best first, the smaller index first where
            two are equal; -1 and NaN where fewer than k others ever fire together with the neuron.

        Raises:
            DataError: k is not a whole number >= 1.
        """
        k = self._partners if k is None else checked_partners("CoFiring", k)
        return best_partners(len(self.tensors["both"]), self.size, self._together, k, own=self._rows.start)

    @property
    def relative(self) -> bool:
        return is_relative(self._threshold)

    def parameters(self) -> dict[str, Any]:
        block = None if self.block is None else list(self.block)
        return {"threshold": to_json(self._threshold), "partners": self._partners, "block": block}

    @classmethod
    def from_json(cls, parameters: Mapping[str, Any]) -> Self:
        return cls(from_json(parameters["threshold"]), parameters["partners"], parameters["block"])

    def empty(self, setting: Setting) -> dict[str, torch.Tensor]:
        self._rows = rows_of("CoFiring", self.block, setting.site, setting.size, setting.size)
        return {
            "count": torch.zeros((), dtype=torch.int64),
            "fired": torch.zeros(setting.size, dtype=torch.int64),
            "both": torch.zeros(self._rows.stop - self._rows.start, setting.size, dtype=torch.int32),
            "threshold": torch.from_numpy(resolve(self._threshold, setting)),
        }

    def add(self, batch: Batch) -> None:
        held, threshold = self.tensors, self.tensors["threshold"].to(batch.values.dtype)
        self._widen(self.count + len(batch))
        held["count"] += len(batch)
        for values in batch.values.split(_ROWS_AT_ONCE):
            fires = (values > threshold).float()
            held["fired"] += fires.sum(0).long()
            mine = fires[:, self._rows]
            for part in pieces(*held["both"].shape):
                held["both"][part].add_(product(mine[:, part], fires).to(held["both"].dtype))

    def combine(self, other: Self) -> None:
        self._widen(self.count + other.count)
        for name in ("count", "fired", "both"):
            self.tensors[name] += other.tensors[name]

    def _widen(self, count: int) -> None:
        if count > torch.iinfo(torch.int32).max:
            self.tensors["both"] = self.tensors["both"].long()

    def _jaccard(self, part: slice) -> np.ndarray:
        """[rows of the part, size] float64, of the rows of `both`."""
        both = self.tensors["both"][part].cpu().numpy().astype(np.int64)
        fired = self.fired
        either = fired[self._rows][part, None] + fired - both
        return np.divide(both, either, out=np.full(both.shape, np.nan), where=either > 0)

    def _together(self, part: slice) -> np.ndarray:
        """As `_jaccard`, but NaN also for two that never fire together: they are no partners."""
        found = self._jaccard(part)
        found[found == 0] = np.nan
        return found
