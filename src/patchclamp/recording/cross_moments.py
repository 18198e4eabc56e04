"""`CrossMoments`: sums of products of two sets of neurons over any number of rows, which do not cancel.

The rows come in blocks of at most m = 4096. A block is centred, one product of float32 matrices is made of it, and
that is added to float64 sums: the error does not grow with the number of blocks. It is centred about the mean of
all rows before it (the first about its own mean), and the difference to its true mean is made up for exactly, by the
formula of Chan, Golub and LeVeque (1979): with r = sum(x - c), n rows in the block and N before it, M their mean,

    C += sum((x - c)(y - c')) - r r'/n + (mean - M)(mean' - M') N n/(N + n).

What is rounded is the first term alone. Its parts are at most m 2^-24 sqrt(sum (x-c)^2 sum (y-c')^2) off, and
sum (x-c)^2 over all blocks is at most twice the neuron's deviation from its mean, wherever the data drift to: a block
whose mean is d away from that of the N rows before it adds at least n d^2 / 2 to that deviation, as n <= N from the
second block on. So, by Cauchy and Schwarz, r is off by less than 1e-3 whatever the data, and in practice by 1e-6.

Each neuron is multiplied by a power of two, which changes no digit, so that products stay in the range of float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from patchclamp.recording.summaries.pairs import pieces, product, spread

BLOCK_ROWS = 4096
# A chunk of rows stays in the processor's cache while several operations read it.
_CHUNK_ELEMENTS = 1 << 20
# The product of a block is made of some rows of the result at a time, before it is added to the sums.
_PRODUCT_ELEMENTS = 1 << 24
# What is not the product is saved up, and added for several blocks at once.
_PENDING = 16
# Scaled values this large are scaled anew: the sum of 4096 products of two such is below the range of float32.
_LARGEST = 2.0**40


class CrossMoments:
    """What two sets of neurons do together, on the same rows.

    Args:
        first: number of neurons of the first set, whose products with all of the second are kept.
        second: number of neurons of the second set.
        dtype: what is multiplied: float32, or float64.
        device: where.
        block_rows: rows that are multiplied at once.

    Attributes:
        count: rows that were taken in, after `close`.
        comoment: `[first, second]` float64, scaled.
    """

    def __init__(
        self,
        first: int,
        second: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        block_rows: int = BLOCK_ROWS,
    ) -> None:
        self.count = 0
        self._sides = tuple(_Side(size, block_rows, dtype, device) for size in (first, second))
        self._waiting = 0
        self._rows = _rows_of_a_product(first, second)
        self._product = torch.empty(self._rows, second, dtype=dtype, device=device)
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.comoment = torch.zeros(first, second, dtype=torch.float64, device=device)

    @staticmethod
    def bytes_for(first: int, second: int, block_rows: int, itemsize: int = 4) -> int:
        """Bytes that are held for so many neurons, what is made in between included."""
        columns = (first + second) * (block_rows * itemsize + 8 * (8 + 4 * _PENDING))
        between = itemsize * _rows_of_a_product(first, second) * second + 16 * min(first * second, 1 << 22)
        chunk = min(_CHUNK_ELEMENTS, block_rows * max(first, second))
        return 8 * first * second + columns + between + 2 * itemsize * chunk

    def add(self, first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> None:
        """Take in rows.

        Args:
            first: tensors `[rows, some]`, finite, that side by side are the first set.
            second: the same of the second set, on the same rows.
        """
        rows, start = len(first[0]), 0
        while start < rows:
            part = slice(start, min(rows, start + self._room))
            for side, given in zip(self._sides, (first, second), strict=True):
                side.fill(self._waiting, [each[part] for each in given])
            self._waiting += part.stop - part.start
            start = part.stop
            if not self._room:
                self._take()

    def close(self) -> None:
        """Take in what waits for a block to be full."""
        self._take()
        self._settle()

    def r(self, rows: slice, columns: slice = slice(None)) -> torch.Tensor:
        """Pearson's correlation of these neurons of the first set with those of the second, [rows, columns] float64.

        NaN where one of the two is the same on every row. `close` comes first.
        """
        spreads = [side.spread() for side in self._sides]
        found = self.comoment[rows, columns] / spreads[0][rows, None]
        return found.div_(spreads[1][columns]).clamp_(-1, 1)

    @property
    def _room(self) -> int:
        return len(self._sides[0].block) - self._waiting

    def _take(self) -> None:
        rows = self._waiting
        if not rows:
            return
        # Before anything is added that is scaled anew.
        if self._scale(rows):
            self._settle()
            for number, side in enumerate(self._sides):
                self.comoment.mul_(side.factor[:, None] if number == 0 else side.factor)
                side.rescale()
        parts = [side.take(rows, self.count) for side in self._sides]
        self._multiply(rows)
        total = self.count + rows
        (left, left_shift), (right, right_shift) = parts
        self._pending.append((left * (-1 / rows), right))
        self._pending.append((left_shift * (self.count * rows / total), right_shift))
        self.count, self._waiting = total, 0
        if len(self._pending) >= 2 * _PENDING:
            self._settle()

    def _scale(self, rows: int) -> bool:
        """Choose the scales of neurons that vary for the first time; whether others must be scaled anew."""
        return any([side.look(rows, self.count) for side in self._sides])

    def _multiply(self, rows: int) -> None:
        left, right = (side.block[:rows] for side in self._sides)
        for start in range(0, len(self.comoment), self._rows):
            held = self.comoment[start : start + self._rows]
            made = product(left[:, start : start + self._rows], right, out=self._product[: len(held)])
            for part in pieces(*held.shape):
                held[part] += made[part]

    def _settle(self) -> None:
        """Add what is pending."""
        if not self._pending:
            return
        left, right = (torch.stack(each) for each in zip(*self._pending, strict=True))
        for part in pieces(*self.comoment.shape):
            self.comoment[part].addmm_(left[:, part].T, right)
        self._pending = []


class _Side:
    """One set of neurons: the block that is being filled, and statistics of all rows. Sums are of scaled values."""

    def __init__(self, size: int, rows: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.block = torch.empty(rows, size, dtype=dtype, device=device)
        self.mean = torch.zeros(size, dtype=torch.float64, device=device)
        self.deviation = torch.zeros_like(self.mean)
        self.low = torch.full((size,), torch.inf, dtype=dtype, device=device)
        self.high = -self.low
        self.scale = torch.zeros(size, dtype=dtype, device=device)  # 0 as long as the neuron has not varied
        self.factor = torch.ones_like(self.mean)
        self._centre = torch.zeros(size, dtype=dtype, device=device)

    def fill(self, start: int, parts: Sequence[torch.Tensor]) -> None:
        """Put the rows of the parts, side by side, into the block."""
        column = 0
        for part in parts:
            self.block[start : start + len(part), column : column + part.shape[1]].copy_(part)
            column += part.shape[1]

    def look(self, rows: int, before: int) -> bool:
        """Find the extremes of the block, its centre and scale. Whether neurons that varied must be scaled anew."""
        chunks = self._chunks(rows)
        low = torch.stack([each.amin(0) for each in chunks]).amin(0)
        high = torch.stack([each.amax(0) for each in chunks]).amax(0)
        if before:
            self._centre = self.mean.to(self.block.dtype)
        else:  # within the extremes, so that what is constant is centred to 0
            mean = torch.stack([each.sum(0, dtype=torch.float64) for each in chunks]).sum(0) / rows
            self._centre = mean.to(self.block.dtype).clamp(low, high)
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        furthest = torch.maximum(high - self._centre, self._centre - low).double()
        most = math.frexp(torch.finfo(self.block.dtype).max)[1] - 2
        exponent = torch.frexp(furthest).exponent.clamp(-most, most)
        wanted = torch.where(furthest > 0, torch.ldexp(torch.ones_like(furthest), -exponent), 0.0)
        held = self.scale.double()
        fresh, outgrown = (held == 0) & (wanted > 0), furthest * held > _LARGEST
        self.factor = torch.where(outgrown, wanted / held, 1.0)
        self.scale = torch.where(fresh, wanted, held).to(self.block.dtype)
        return bool(outgrown.any())

    def rescale(self) -> None:
        """Scale what is held anew, by `factor`."""
        self.scale = (self.scale.double() * self.factor).to(self.block.dtype)
        self.deviation *= self.factor.square()
        self.factor = torch.ones_like(self.mean)

    def take(self, rows: int, before: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Centre and scale the block where it lies, and take it in.

        Returns:
            The sum of what it is now, and the difference of its mean to the mean before it: `[size]` float64, scaled.
        """
        shift = self._centre * -self.scale
        total, squares = torch.zeros_like(self.mean), torch.zeros_like(self.mean)
        for chunk in self._chunks(rows):
            torch.addcmul(shift, chunk, self.scale, out=chunk)
            total += chunk.sum(0)
            squares += chunk.square().sum(0)
        scale = self.scale.double()
        mean = self._centre.double() + torch.where(scale > 0, total / scale, 0.0) / rows
        difference = mean - self.mean
        share = rows / (before + rows)
        self.mean += difference * share
        scaled = difference * scale if before else torch.zeros_like(scale)
        self.deviation += squares - total.square() / rows + scaled.square() * (before * share)
        return total, scaled

    def spread(self) -> torch.Tensor:
        """[size] float64: the root of the deviation; NaN where the neuron is constant."""
        return spread(self.deviation, self.low, self.high)

    def _chunks(self, rows: int) -> tuple[torch.Tensor, ...]:
        return self.block[:rows].split(max(1, _CHUNK_ELEMENTS // max(1, self.block.shape[1])))


def _rows_of_a_product(first: int, second: int) -> int:
    return max(1, min(first, _PRODUCT_ELEMENTS // max(1, second)))
