"""`TopExamples`: where in the data every neuron was most active.

Almost every activation is below the k-th largest that its neuron has shown so far. So a batch is first
reduced to the largest value of every few rows, and only where that beats the k-th value are the rows
looked at and the survivors sorted. A batch that beats it nearly everywhere (the first ones) is reduced to its
own k best per neuron instead.

The order is total, which makes the result independent of the order of the batches: a larger value comes
first, then the smaller example id, then the smaller position.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch

from patchclamp.errors import DataError
from patchclamp.recording.batch import GROUP_ROWS, Batch, Setting, unpack_rank
from patchclamp.recording.summaries.best import NO_RANK, keep_best, windows_around
from patchclamp.recording.summaries.summary import Summary, whole

# Where more than this share of the batch would have to be looked at, take the k best of the whole batch.
_SPARSE_SHARE = 0.25
_COLUMNS_AT_ONCE = 128


class TopExamples(Summary):
    """The k largest activations of every neuron over all rows, exact, with their examples and positions.

    Args:
        k: how many to keep per neuron.
        context: also keep the neuron's values at this many positions before and after, within the
            example. An example must then not be split over two batches.

    Raises:
        DataError: k is not a whole number >= 1, or context not one >= 0.
    """

    name = "top_examples"

    def __init__(self, k: int = 20, context: int = 0) -> None:
        self.k = whole("TopExamples", "k", k, at_least=1)
        self.context = whole("TopExamples", "context", context, at_least=0)

    @property
    def values(self) -> np.ndarray:
        """[size, k] in the dtype of the values, largest first; NaN where fewer than k were seen."""
        values = self.array("values")
        return np.where(self._empty_places(), np.array(np.nan, dtype=values.dtype), values)

    @property
    def example(self) -> np.ndarray:
        """[size, k] int64, ids of the examples; -1 where fewer than k were seen."""
        return np.where(self._empty_places(), -1, unpack_rank(self.array("rank"))[0])

    @property
    def position(self) -> np.ndarray:
        """[size, k] int64, index of the token in its example; -1 where fewer than k were seen."""
        return np.where(self._empty_places(), -1, unpack_rank(self.array("rank"))[1])

    @property
    def window(self) -> np.ndarray:
        """[size, k, 2 * context + 1] float16: the values around each place, which is the centre.

        NaN outside the example and at positions that do not count; values beyond the range of float16
        (65504) are cut to it.

        Raises:
            DataError: no context was asked for.
        """
        if not self.context:
            raise DataError("no windows were kept: ask for TopExamples(k, context=...)")
        return self.array("window")

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """`example` and `position`, [size, k] each."""
        return self.example, self.position

    def parameters(self) -> dict[str, Any]:
        return {"k": self.k, "context": self.context}

    def empty(self, setting: Setting) -> dict[str, torch.Tensor]:
        shape = (setting.size, self.k)
        tensors = {
            "values": torch.full(shape, -torch.inf, dtype=setting.dtype),
            "rank": torch.full(shape, NO_RANK, dtype=torch.int64),  # as Batch.rank
        }
        if self.context:
            width = 2 * self.context + 1
            tensors["window"] = torch.full((*shape, width), torch.nan, dtype=torch.float16)
        return tensors

    def add(self, batch: Batch) -> None:
        row, neuron = self._candidates(batch)
        window = windows_around(batch, row, neuron, self.context) if self.context else None
        self._insert(neuron, batch.values[row, neuron], batch.rank[row], window)

    def combine(self, other: Self) -> None:
        there = other.tensors
        neuron, place = (there["rank"] != NO_RANK).nonzero(as_tuple=True)
        window = there["window"][neuron, place] if self.context else None
        self._insert(neuron, there["values"][neuron, place], there["rank"][neuron, place], window)

    def _candidates(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and neurons [candidates] that may enter; none that would is missing."""
        last, last_rank = self.tensors["values"][:, -1], self.tensors["rank"][:, -1]
        tied = (batch.group_maximum == last) & (batch.group_rank[:, None] < last_rank)
        group, neuron = ((batch.group_maximum > last) | tied).nonzero(as_tuple=True)
        if len(group) * GROUP_ROWS > _SPARSE_SHARE * batch.values.numel():
            return _best_of(batch, self.k)
        rows = group[:, None] * GROUP_ROWS + torch.arange(GROUP_ROWS, device=group.device)
        inside = rows < len(batch)
        rows = rows.clamp(max=len(batch) - 1)
        found, last = batch.values[rows, neuron[:, None]], last[neuron, None]
        better = (found > last) | ((found == last) & (batch.rank[rows] < last_rank[neuron, None]))
        which, place = (better & inside).nonzero(as_tuple=True)
        return rows[which, place], neuron[which]

    def _insert(
        self, neuron: torch.Tensor, value: torch.Tensor, rank: torch.Tensor, window: torch.Tensor | None
    ) -> None:
        """Sort candidates [candidates] into what their neurons hold, and keep the k best of each."""
        held = self.tensors
        if value.dtype != held["values"].dtype:
            held["values"], value = held["values"].double(), value.double()
        # Adding zero turns -0.0 into 0.0: which of the two was seen must not depend on the order.
        new = {"values": value + 0.0, "rank": rank} | ({} if window is None else {"window": window})
        keep_best(held, held["values"], neuron, new, new["values"])

    def _empty_places(self) -> np.ndarray:
        return self.array("rank") == NO_RANK


def _best_of(batch: Batch, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and neurons [size * min(k, rows)] of each neuron's k best in this batch."""
    k, rows = min(k, len(batch)), torch.argsort(batch.rank)
    found = []
    for columns in batch.values.split(_COLUMNS_AT_ONCE, dim=1):
        # [columns, rows], rows by rank: the earlier of two ties comes first.
        ranked = columns[rows].t().contiguous()
        if ranked.dtype == torch.float32:
            places = _sortable(ranked).topk(k, dim=1, sorted=False).indices
        else:
            places = ranked.sort(dim=1, descending=True, stable=True).indices[:, :k]
        found.append(rows[places])
    neuron = torch.arange(batch.size, device=rows.device).repeat_interleave(k)
    return torch.cat(found).flatten(), neuron


def _sortable(ranked: torch.Tensor) -> torch.Tensor:
    """Distinct int64 keys [columns, rows], ordered as the float32 values; the earlier of ties is larger."""
    bits = (ranked + 0.0).view(torch.int32)
    # Negative floats are ordered backwards by their bits.
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) - torch.arange(ranked.shape[1], device=ranked.device)
