"""`largest`: the k largest of each row of a matrix, exactly, and of equal ones the smaller index.

Most of a row is never looked at twice: the maximum of each group of neighbouring columns comes first, and only the
best k groups can hold the k largest. (Groups are compared like columns: by maximum, of equal ones the earlier. An
element of a group that is not among the best k has k better ones in other groups, one in each.)
"""

from __future__ import annotations

import torch

_GROUP = 64


def largest(values: torch.Tensor, k: int, smallest: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest values of each row, best first; of equal ones the smaller index comes first.

    Args:
        values: `[rows, columns]`, floating point, without NaN. Columns may be a part of a wider buffer.
        k: how many, at least 1; all columns where there are fewer.
        smallest: give the smallest instead, the smallest first.

    Returns:
        Values and indices (int64), `[rows, min(k, columns)]` each.
    """
    columns = values.shape[1]
    grouped = columns - columns % _GROUP
    if k >= grouped // _GROUP:
        return _exactly(values, k, smallest)
    groups = values[:, :grouped].unflatten(1, (-1, _GROUP))
    best = groups.amin(2) if smallest else groups.amax(2)
    chosen = _exactly(best, k, smallest)[1].sort(dim=1).values
    # Ascending indices, so that among equal candidates the first is the one with the smaller index.
    within = torch.arange(_GROUP, device=values.device)
    place = (chosen[:, :, None] * _GROUP + within).flatten(1)
    rest = torch.arange(grouped, columns, device=values.device).expand(len(values), -1)
    place = torch.cat([place, rest], dim=1)
    found, which = _exactly(values.gather(1, place), k, smallest)
    return found, place.gather(1, which)


def _exactly(values: torch.Tensor, k: int, smallest: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """As `largest`, looking at everything. `torch.topk` leaves open which of equal values it takes."""
    columns = values.shape[1]
    k = min(k, columns)
    found, index = values.topk(min(k + 1, columns), dim=1, largest=not smallest)
    if k < columns:
        tied = (found[:, k - 1] == found[:, k]).nonzero().squeeze(1)
        found, index = found[:, :k], index[:, :k]
        if len(tied):
            found, index = found.clone(), index.clone()
            whole = values[tied].sort(dim=1, descending=not smallest, stable=True)
            found[tied], index[tied] = whole.values[:, :k], whole.indices[:, :k]
    index = index.sort(dim=1).values
    found, order = values.gather(1, index).sort(dim=1, descending=not smallest, stable=True)
    return found, index.gather(1, order)
