"""`Forward`: one forward pass to be made, and `Rows`: which of its positions count and whose they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch

from patchclamp.errors import DataError
from patchclamp.model.model import Model
from patchclamp.model.tokenize import PaddedBatch

# On a processor what a pass makes should stay in the cache, and below the 32 MB from which on the C library asks the
# system for each block anew.
_BATCH_TOKENS, _BATCH_TOKENS_ELSEWHERE = 2048, 4096
_NO_LABELS: Mapping[str, torch.Tensor] = MappingProxyType({})


class Rows(NamedTuple):
    """Which positions of a batch count, and what they are. `flat` points into the batch's `[examples * length]`.

    Where several texts share a line of the batch, the batch is `[lines * length]`.
    """

    shape: tuple[int, int]
    flat: torch.Tensor | None  # [rows] int64; None: every position counts
    example: torch.Tensor  # [rows] int64
    position: torch.Tensor  # [rows] int64
    token: torch.Tensor | None  # [rows] int64
    row: torch.Tensor  # [rows] int64: which example of the batch
    labels: Mapping[str, torch.Tensor] = _NO_LABELS  # label of the tokens -> [rows] int64 category codes


def batch_tokens_for(model: Model, given: int | None) -> int:
    """How many padded tokens one forward pass has: what was asked for, else what suits the device.

    Raises:
        DataError: less than one is asked for.
    """
    if given is None:
        return _BATCH_TOKENS if model.device.type == "cpu" else _BATCH_TOKENS_ELSEWHERE
    if given < 1:
        raise DataError(f"batch_tokens is a number of tokens, at least 1; not {given}")
    return given


@dataclass(frozen=True)
class Forward:
    """One forward pass: what to call the module with, and which of its positions count, by stack."""

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    examples: np.ndarray  # [batch] ids
    rows: Rows | None  # None: tensors, whose positions are known only when a site has been read
    decoder_rows: Rows | None
    tokens: int


def counted_rows(
    batch: PaddedBatch,
    counted: torch.Tensor,
    examples: np.ndarray,
    labels: Mapping[str, torch.Tensor] = _NO_LABELS,
    owner: torch.Tensor | None = None,
) -> Rows:
    """The positions of a batch that count.

    Args:
        batch: the batch, `[lines, length]`.
        counted: `[lines, length]` bool.
        examples: ids of its examples.
        labels: label of the tokens -> `[lines, length]` int64 codes.
        owner: `[lines, length]` int64, which of `examples` a position belongs to; None: line n is example n.
    """
    flat = counted.reshape(-1).nonzero().squeeze(1)
    height, length = counted.shape
    row = flat // length if owner is None else owner.reshape(-1)[flat]
    return Rows(
        (height, length),
        None if len(flat) == height * length else flat,
        torch.from_numpy(examples.astype(np.int64))[row],
        batch.position.reshape(-1)[flat],
        batch.ids.reshape(-1)[flat],
        row,
        {name: codes.reshape(-1)[flat] for name, codes in labels.items()},
    )
