"""What a summary is given: a `Setting` before the first batch, then one `Batch` after the other.

A recording shows every summary the same batches: the activations of one site on the positions
that count, one row each, with the example, the position and the token they belong to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from patchclamp.errors import DataError
from patchclamp.recording.folds import fold_of

# A block of rows should stay in the processor's cache while several operations read it; a GPU wants large
# ones. Never above 2^24, so that counts in float32 within one block are exact.
_BLOCK_ELEMENTS = 1 << 20
_BLOCK_ELEMENTS_ELSEWHERE = 1 << 24
GROUP_ROWS = 32

POSITION_BITS = 31
_POSITION_MASK = (1 << POSITION_BITS) - 1
_LARGEST_EXAMPLE = (1 << 32) - 1


@dataclass(frozen=True)
class Calibration:
    """What a small sample of the data showed of one site, to turn relative thresholds into numbers.

    Attributes:
        maximum: [size] float32, the largest activation of each neuron in the sample.
        quantile: gives for q in [0, 1] the quantile of each neuron in the sample, [size] float32.
        quantile_of_examples: the same of the largest activation in each example; None where only rows were looked at.
    """

    maximum: np.ndarray
    quantile: Callable[[float], np.ndarray]
    quantile_of_examples: Callable[[float], np.ndarray] | None = None


@dataclass(frozen=True)
class Setting:
    """What a summary knows of its site before the first batch.

    Attributes:
        site: name of the site, as in "mlp.3".
        size: number of neurons.
        tokens: [slots] int64 token ids for `ByToken`, most frequent first; None for data without tokens.
        labels: label name -> its categories; a row's category code is an index into them.
        calibration: only needed where a threshold is relative.
        dtype: torch.float32 or torch.float64, what the values will arrive in (so that `nbytes` is right).
        grid: as in the batches of this site; None where it has none, or before the first of them.
        examples: how many examples the data has, which number from 0; None where that is not known.
        scratch: folder for what grows with the data; None keeps that in memory.
        sizes: site -> number of neurons, of the other sites that are recorded too, as far as that is known.
    """

    site: str
    size: int
    tokens: np.ndarray | None = None
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    calibration: Calibration | None = None
    dtype: torch.dtype = torch.float32
    grid: tuple[int, ...] | None = None
    examples: int | None = None
    scratch: str | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Batch:
    """What one forward pass showed at one site, on the positions that count.

    Attributes:
        values: [rows, size] float32 or float64, finite, without gradient.
        example: [rows] int64, id of the example in the data; rows of one example are adjacent, in
            order of position.
        position: [rows] int64, index of the token in the example's own sequence.
        token: [rows] int64 token ids; None for data without tokens.
        labels: label name -> [rows] int64 category code.
        fold: [rows] int64, 0 or 1, the fold of the example; None: by a hash of its id.
        grid: where every example gives the same number of rows, which lie on a grid (the pixels of a channel's
            map, `(height, width)`), its shape; a row's position counts along the last dimension first. Else None.
        others: site -> [rows, its size], what other sites did on the same rows, finite or not; only those that a
            summary asks for (`wants_sites`).

    Raises:
        DataError: the shapes do not belong together, or the values are neither float32 nor float64.
    """

    values: torch.Tensor
    example: torch.Tensor
    position: torch.Tensor
    token: torch.Tensor | None = None
    labels: Mapping[str, torch.Tensor] = field(default_factory=dict)
    grid: tuple[int, ...] | None = None
    fold: torch.Tensor | None = None
    others: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.values.ndim != 2:
            raise DataError(f"a batch has values [rows, size], not {list(self.values.shape)}")
        if self.values.dtype not in (torch.float32, torch.float64):
            raise DataError(f"a batch has values in float32 or float64, not {self.values.dtype}")
        columns = {"example": self.example, "position": self.position, "token": self.token, "fold": self.fold}
        columns |= {f"label {name!r}": codes for name, codes in self.labels.items()}
        for name, column in columns.items():
            if column is not None and column.shape != (len(self),):
                raise DataError(f"a batch of {len(self)} rows has {name} of shape {list(column.shape)}")
        for site, values in self.others.items():
            if values.ndim != 2 or len(values) != len(self):
                raise DataError(f"a batch of {len(self)} rows has {site} of shape {list(values.shape)}")

    def __len__(self) -> int:
        return self.values.shape[0]

    @property
    def size(self) -> int:
        """Number of neurons."""
        return self.values.shape[1]

    def blocks(self) -> Iterator[torch.Tensor]:
        """The values in order, a view of some rows at a time: [rows of the block, size]."""
        yield from self.values.split(self.block_rows)

    @property
    def block_rows(self) -> int:
        """Rows of the largest of the `blocks`."""
        elements = _BLOCK_ELEMENTS if self.values.device.type == "cpu" else _BLOCK_ELEMENTS_ELSEWHERE
        return max(1, min(len(self), elements // max(1, self.size)))

    def select(self, rows: torch.Tensor | slice) -> Batch:
        """The batch of these rows only."""
        return Batch(
            values=self.values[rows],
            example=self.example[rows],
            position=self.position[rows],
            token=None if self.token is None else self.token[rows],
            labels={name: codes[rows] for name, codes in self.labels.items()},
            grid=self.grid,
            fold=None if self.fold is None else self.fold[rows],
            others={site: values[rows] for site, values in self.others.items()},
        )

    # Below: what several summaries need of the same batch, computed once.

    @cached_property
    def rank(self) -> torch.Tensor:
        """[rows] int64: orders rows by example, then by position. `unpack_rank` gives both back."""
        return ranks_of(self.example, self.position)

    @cached_property
    def folds(self) -> torch.Tensor:
        """[rows] int64: which fold each row belongs to."""
        return fold_of(self.example) if self.fold is None else self.fold

    @cached_property
    def group_maximum(self) -> torch.Tensor:
        """[groups, size]: the largest value of each neuron in every `GROUP_ROWS` rows (fewer in the last)."""
        whole = len(self) - len(self) % GROUP_ROWS
        parts = []
        if whole:
            parts.append(self.values[:whole].unflatten(0, (-1, GROUP_ROWS)).amax(1))
        if whole < len(self):
            parts.append(self.values[whole:].amax(0, keepdim=True))
        return torch.cat(parts) if parts else self.values

    @cached_property
    def group_rank(self) -> torch.Tensor:
        """[groups] int64: the smallest `rank` in every `GROUP_ROWS` rows."""
        return torch.stack([part.min() for part in self.rank.split(GROUP_ROWS)])

    @cached_property
    def spans(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The examples of this batch: their ids, first rows, and numbers of rows; [examples] int64 each.

        Raises:
            DataError: the rows of an example are not adjacent.
        """
        ids, count = torch.unique_consecutive(self.example, return_counts=True)
        present, times = torch.unique(ids, return_counts=True)
        if len(present) < len(ids):
            split = int(present[times > 1][0])
            raise DataError(f"the rows of example {split} are not adjacent in a batch")
        return ids, count.cumsum(0) - count, count

    @cached_property
    def maxima(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The largest value of each neuron in each of the `spans`, and the first row that has it.

        Both [examples, size], the second int64. A zero has no sign.

        Raises:
            DataError: the rows of an example are not adjacent.
        """
        _, first, count = self.spans
        if not len(self):
            return self.values, self.values.long()
        longest = int(count.max())
        # All examples as long as the longest: the last row once more is not larger, and not earlier.
        inside = torch.arange(longest, device=first.device).minimum(count[:, None] - 1)
        at_once = max(1, self.block_rows // longest)
        found, row = [], []
        for start, offset in zip(first.split(at_once), inside.split(at_once), strict=True):
            value, place = self.values[start[:, None] + offset].max(dim=1)
            found.append(value + 0.0)
            row.append(start[:, None] + place)
        return torch.cat(found), torch.cat(row)


def ranks_of(example: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """[rows] int64: orders rows by example, then by position. `unpack_rank` gives both back.

    Raises:
        DataError: an example or a position is out of range (looked at on the processor only).
    """
    if example.device.type == "cpu" and len(example):
        _check_range("example", example, _LARGEST_EXAMPLE)
        _check_range("position", position, _POSITION_MASK)
    return (example << POSITION_BITS) | position


def example_of(rank: torch.Tensor) -> torch.Tensor:
    """The example ids, int64, that `Batch.rank` was made of."""
    return rank >> POSITION_BITS


def unpack_rank(rank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The example ids and the positions, int64 each, that `Batch.rank` was made of."""
    return rank >> POSITION_BITS, rank & _POSITION_MASK


def _check_range(name: str, column: torch.Tensor, largest: int) -> None:
    low, high = (int(each) for each in torch.aminmax(column))
    if low < 0 or high > largest:
        raise DataError(f"{name} must be in 0 ... {largest}; this batch has {low if low < 0 else high}")
