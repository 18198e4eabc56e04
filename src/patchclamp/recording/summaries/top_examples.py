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
from patchclamp.recording.summaries.summary import Summary

# What stands in a place that nothing has taken yet; the rank alone says so.
_NO_RANK = torch.iinfo(torch.int64).max
_NOTHING = {"values": float("-inf"), "rank": _NO_RANK, "window": float("nan")}
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
        self.k = _whole("k", k, at_least=1)
        self.context = _whole("context", context, at_least=0)

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

    def parameters(self) -> dict[str, Any]:
        return {"k": self.k, "context": self.context}

    def empty(self, setting: Setting) -> dict[str, torch.Tensor]:
        shape = (setting.size, self.k)
        tensors = {
            "values": torch.full(shape, _NOTHING["values"], dtype=setting.dtype),
            "rank": torch.full(shape, _NO_RANK, dtype=torch.int64),  # as Batch.rank
        }
        if self.context:
            width = 2 * self.context + 1
            tensors["window"] = torch.full((*shape, width), _NOTHING["window"], dtype=torch.float16)
        return tensors

    def add(self, batch: Batch) -> None:
        row, neuron = self._candidates(batch)
        window = _windows(batch, row, neuron, self.context) if self.context else None
        self._insert(neuron, batch.values[row, neuron], batch.rank[row], window)

    def combine(self, other: Self) -> None:
        there = other.tensors
        neuron, place = (there["rank"] != _NO_RANK).nonzero(as_tuple=True)
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
        if not len(neuron):
            return
        if value.dtype != held["values"].dtype:
            held["values"], value = held["values"].double(), value.double()
        # Adding zero turns -0.0 into 0.0: which of the two was seen must not depend on the order.
        new = {"values": value + 0.0, "rank": rank} | ({} if window is None else {"window": window})
        changed, place, count = _best_places(neuron, new["values"], rank, self.k)
        missing = torch.arange(place.shape[1], device=place.device) >= count[:, None]
        both = {name: torch.cat([held[name][changed], given[place]], dim=1) for name, given in new.items()}
        for name, tensor in both.items():
            tensor[:, self.k :][missing] = _NOTHING[name]
        best = _order(both["values"], both["rank"])[:, : self.k]
        for name, tensor in both.items():
            held[name][changed] = tensor[torch.arange(len(changed), device=best.device)[:, None], best]

    def _empty_places(self) -> np.ndarray:
        return self.array("rank") == _NO_RANK


def _order(values: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    """[rows, columns]: the order that sorts each row by value, descending, and ties by rank, ascending."""
    by_rank = ranks.argsort(dim=1)
    by_value = values.gather(1, by_rank).argsort(dim=1, descending=True, stable=True)
    return by_rank.gather(1, by_value)


def _best_places(
    neuron: torch.Tensor, value: torch.Tensor, rank: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gather candidates [candidates] by neuron, at most the k best of each.

    Returns:
        The neurons that have any [neurons]; indices of their candidates [neurons, width], best first;
        how many of these there are [neurons], the rest being padding.
    """
    order = rank.argsort()
    order = order[value[order].argsort(descending=True, stable=True)]
    order = order[neuron[order].argsort(stable=True)]
    changed, count = torch.unique_consecutive(neuron[order], return_counts=True)
    width = min(k, int(count.max()))
    place = (count.cumsum(0) - count)[:, None] + torch.arange(width, device=count.device)
    return changed, order[place.clamp(max=len(order) - 1)], count


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


def _windows(batch: Batch, row: torch.Tensor, neuron: torch.Tensor, context: int) -> torch.Tensor:
    """[candidates, 2 * context + 1] float16: the values at the neighbouring positions of the same example."""
    ranks, rows = torch.sort(batch.rank)
    offsets = torch.arange(-context, context + 1, device=row.device)
    wanted = batch.rank[row][:, None] + offsets
    place = torch.searchsorted(ranks, wanted).clamp(max=len(ranks) - 1)
    there = (ranks[place] == wanted) & (batch.position[row][:, None] + offsets >= 0)
    limit = torch.finfo(torch.float16).max
    values = batch.values[rows[place], neuron[:, None]].clamp(-limit, limit).to(torch.float16)
    return torch.where(there, values, torch.nan)


def _whole(name: str, number: int, at_least: int) -> int:
    if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < at_least:
        raise DataError(f"TopExamples: {name} is a whole number >= {at_least}, not {number!r}")
    return int(number)
