"""The k best places of every neuron, and the windows around them: what `TopExamples` and `Exemplars` share.

A shelf is a dictionary of tensors [shelves, k, ...], best place first. Its "rank" says where each place is
(`Batch.rank`), or that nothing has taken it yet. A place is better if its key is larger; of two equal keys, if its
rank is smaller. That order is total, so what is kept does not depend on the order in which places are offered.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from patchclamp.recording.batch import Batch

# What stands in a place that nothing has taken yet; the rank alone says so.
NO_RANK = torch.iinfo(torch.int64).max
_NOTHING = {"values": float("-inf"), "rank": NO_RANK, "window": float("nan"), "mask": 0}


def best_places(
    shelf: torch.Tensor, key: torch.Tensor, rank: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gather candidates [candidates] by shelf, at most the k best of each.

    Returns:
        The shelves that have any [changed]; indices of their candidates [changed, width], best first;
        which of these are there [changed, width], the rest being padding.
    """
    order = rank.argsort()
    order = order[key[order].argsort(descending=True, stable=True)]
    order = order[shelf[order].argsort(stable=True)]
    changed, count = torch.unique_consecutive(shelf[order], return_counts=True)
    place = torch.arange(min(k, int(count.max())), device=count.device)
    index = (count.cumsum(0) - count)[:, None] + place
    return changed, order[index.clamp(max=len(order) - 1)], place < count[:, None]


def keep_best(
    held: Mapping[str, torch.Tensor],
    held_key: torch.Tensor,
    shelf: torch.Tensor,
    given: Mapping[str, torch.Tensor],
    given_key: torch.Tensor,
) -> None:
    """Sort candidates into what their shelves hold, in place, and keep the k best of each.

    Args:
        held: tensors [shelves, k, ...] by name, "rank" among them.
        held_key: [shelves, k] their keys; the smallest there is where nothing is held.
        shelf: [candidates] which shelf each candidate is for.
        given: tensors [candidates, ...] by the same names.
        given_key: [candidates] their keys.
    """
    if not len(shelf):
        return
    k = held_key.shape[1]
    changed, place, there = best_places(shelf, given_key, given["rank"], k)
    both = {name: torch.cat([held[name][changed], each[place]], dim=1) for name, each in given.items()}
    for name, tensor in both.items():
        tensor[:, k:][~there] = _NOTHING[name]
    # Padding repeats a candidate, so its key is a real one; its rank comes last, but only among equal keys.
    key = torch.cat([held_key[changed], torch.where(there, given_key[place], _smallest(given_key.dtype))], dim=1)
    best = _order(key, both["rank"])[:, :k]
    row = torch.arange(len(changed), device=best.device)[:, None]
    for name, tensor in both.items():
        held[name][changed] = tensor[row, best]


def windows_around(batch: Batch, row: torch.Tensor, neuron: torch.Tensor, context: int) -> torch.Tensor:
    """[candidates, 2 * context + 1] float16: the values at the neighbouring positions of the same example.

    NaN outside the example and at positions that do not count; values beyond the range of float16 are cut to it.
    """
    ranks, rows = torch.sort(batch.rank)
    offsets = torch.arange(-context, context + 1, device=row.device)
    wanted = batch.rank[row][:, None] + offsets
    place = torch.searchsorted(ranks, wanted).clamp(max=len(ranks) - 1)
    there = (ranks[place] == wanted) & (batch.position[row][:, None] + offsets >= 0)
    limit = torch.finfo(torch.float16).max
    values = batch.values[rows[place], neuron[:, None]].clamp(-limit, limit).to(torch.float16)
    return torch.where(there, values, torch.nan)


def _order(key: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
    """[shelves, columns]: the order that sorts each row by key, descending, and ties by rank, ascending."""
    by_rank = rank.argsort(dim=1)
    by_key = key.gather(1, by_rank).argsort(dim=1, descending=True, stable=True)
    return by_rank.gather(1, by_key)


def _smallest(dtype: torch.dtype) -> float | int:
    return float("-inf") if dtype.is_floating_point else torch.iinfo(dtype).min
