"""`Correlation`: Pearson's correlation of every two neurons, of one site or of two.

As in `Moments`, what has been seen is joined by the formulas of Chan, Golub and LeVeque (1979), which do not cancel
where means are large: with d the difference of the means of two parts a and b,

    C[i, j] = C_a[i, j] + C_b[i, j] + d[i] d[j] n_a n_b / n,     r[i, j] = C[i, j] / sqrt(C[i, i] C[j, j]).

A part of at most m = 1024 rows is centred in float64, divided by a power of two and rounded to float32; C_b is then
one product of float32 matrices, and everything else is float64. Rounding a factor costs 2^-24 of it, and a sum of m
products at most m 2^-24 of the sum of their magnitudes, which is at most sqrt(C_b[i, i] C_b[j, j]). Summed over the
parts that is, by Cauchy and Schwarz, at most (m + 2) 2^-24 sqrt(C[i, i] C[j, j]): r is off by less than 1e-4
whatever the data, and in practice by less than 1e-6. Values in float64 are multiplied in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self

import numpy as np
import torch

from patchclamp.errors import DataError
from patchclamp.recording.batch import Batch, Setting
from patchclamp.recording.summaries.pairs import (
    Partners,
    best_partners,
    checked_block,
    checked_partners,
    multiplied_in,
    pieces,
    product,
    rows_of,
    spread,
)
from patchclamp.recording.summaries.summary import Summary

_ROWS_AT_ONCE = 1 << 10
_SIDES = ("row", "column")


class Correlation(Summary):
    """Pearson's correlation of every neuron with those of its own site, or of another one of the same recording.

    It is off by less than 1e-4 for activations in float32 (in practice by less than 1e-6), by about 1e-12 for float64.
    It holds 8 bytes for every pair, of at most 2^28 pairs a site (all of 16,384 neurons).

    Args:
        with_: the other site, which must be recorded in the same pass and have the same rows; None for the
            neuron's own site. Rows that are not finite at one of the two are left out for both.
        partners: how many `partners()` gives each neuron; None for all others.
        block: (start, stop): only the pairs of these neurons of a site, each with every neuron of the other.

    Raises:
        DataError: `with_` names no site; a bad number or block; when it starts: the block is not in the site, or
            the pairs are too many.
    """

    name = "correlation"

    def __init__(self, with_: str | None = None, partners: int | None = 20, block: Iterable[int] | None = None) -> None:
        if with_ is not None and (not isinstance(with_, str) or not with_):
            raise DataError(f"Correlation: with_ is the name of a site, as 'mlp.3', not {with_!r}")
        self.with_ = with_
        self._partners = checked_partners("Correlation", partners)
        self.block = checked_block("Correlation", block)

    @property
    def wants_sites(self) -> tuple[str, ...]:
        """Other sites whose values a batch must bring."""
        return () if self.with_ is None else (self.with_,)

    @property
    def count(self) -> int:
        """Number of rows (tokens) that count: finite at both sites."""
        return int(self.tensors["count"])

    @property
    def r(self) -> np.ndarray:
        """[size, other size] float64, or [stop - start, other size] of a block.

        NaN for a neuron whose activation is the same on every row.
        """
        return self._r(slice(0, len(self.tensors["comoment"])))

    def partners(self, k: int | None = None) -> Partners:
        """The neurons of the other site (of the own one, without itself) that are most correlated, either way.

        Args:
            k: how many; by default what the summary was made with.

        Returns:
            `indices` [neurons, k] int64 and `scores` [neurons, k] float64, which is r, the largest |r| first, the
            smaller index first where two are equal; -1 and NaN where fewer than k are correlated at all.

        Raises:
            DataError: k is not a whole number >= 1.
        """
        k = self._partners if k is None else checked_partners("Correlation", k)
        rows, columns = self.tensors["comoment"].shape
        return best_partners(rows, columns, self._r, k, self._own)

    def parameters(self) -> dict[str, Any]:
        block = None if self.block is None else list(self.block)
        return {"with_": self.with_, "partners": self._partners, "block": block}

    def empty(self, setting: Setting) -> dict[str, torch.Tensor]:
        own = self.with_ is None or self.with_ == setting.site
        if not own and self.with_ not in setting.sizes:
            raise DataError(f"Correlation of {setting.site} with {self.with_}: that site's size is not known")
        columns = setting.size if own or self.with_ is None else setting.sizes[self.with_]
        self._rows = rows_of("Correlation", self.block, setting.site, setting.size, columns)
        self._own = self._rows.start if own else None
        sizes = dict(zip(_SIDES, (self._rows.stop - self._rows.start, columns), strict=True))
        return {
            "count": torch.zeros((), dtype=torch.int64),
            **{f"{side}_mean": torch.zeros(size, dtype=torch.float64) for side, size in sizes.items()},
            # Sums of squared differences from the mean.
            **{f"{side}_deviation": torch.zeros(size, dtype=torch.float64) for side, size in sizes.items()},
            # A neuron is constant where these two are equal: the deviation may be a little above 0 by rounding.
            **{f"{side}_min": torch.full((size,), torch.inf, dtype=torch.float64) for side, size in sizes.items()},
            **{f"{side}_max": torch.full((size,), -torch.inf, dtype=torch.float64) for side, size in sizes.items()},
            "comoment": torch.zeros(*sizes.values(), dtype=torch.float64),
        }

    def add(self, batch: Batch) -> None:
        left, right = batch.values, self._other(batch)
        if right is not left and not bool(torch.isfinite(right.sum())):
            finite = torch.isfinite(right).all(1)
            left, right = left[finite], right[finite]
        dtype = multiplied_in(left.dtype, right.dtype)
        for here, there in zip(left.split(_ROWS_AT_ONCE), right.split(_ROWS_AT_ONCE), strict=True):
            if len(here):
                self._add(_Part(here[:, self._rows], dtype), _Part(there, dtype))

    def combine(self, other: Self) -> None:
        there = other.tensors
        differences = self._join(there)
        for part in pieces(*there["comoment"].shape):
            held = self.tensors["comoment"][part]
            held.add_(there["comoment"][part])
            held.addr_(differences[0][part], differences[1])

    def refuse_unlike(self, other: Self) -> None:
        super().refuse_unlike(other)
        mine, theirs = (each.tensors["comoment"].shape[1] for each in (self, other))
        if mine != theirs:
            raise DataError(
                f"cannot merge {self.name} of {other.site} into {self.site}: {theirs} neurons of {self.with_} there, "
                f"{mine} here"
            )

    def _other(self, batch: Batch) -> torch.Tensor:
        """[rows, other size]: the values of the other site on the rows of the batch."""
        if self.with_ is None or self.with_ == self.site:
            return batch.values
        if self.with_ not in batch.others:
            raise DataError(f"Correlation of {self.site} needs the values of {self.with_}, and this batch has none")
        other = batch.others[self.with_]
        columns = self.tensors["comoment"].shape[1]
        if other.shape[1] != columns:
            raise DataError(f"{self.with_} has {columns} neurons; the batch has {other.shape[1]}")
        return other.to(batch.values.device)

    def _add(self, here: _Part, there: _Part) -> None:
        seen = {"count": torch.tensor(here.count, device=here.mean.device)}
        for side, each in zip(_SIDES, (here, there), strict=True):
            seen |= {f"{side}_mean": each.mean, f"{side}_deviation": each.deviation}
            seen |= {f"{side}_min": each.min, f"{side}_max": each.max}
        differences = self._join(seen)
        for part in pieces(*self.tensors["comoment"].shape):
            scaled = product(here.scaled[:, part], there.scaled).double()
            held = self.tensors["comoment"][part]
            held.add_(scaled.mul_(here.scale[part, None]).mul_(there.scale))
            held.addr_(differences[0][part], differences[1])

    def _join(self, seen: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in all of `seen` but the comoment, and give the two vectors whose outer product joins that."""
        held = self.tensors
        share = seen["count"].double() / (held["count"] + seen["count"]).clamp(min=1)
        weight = held["count"] * share
        differences = []
        for side in _SIDES:
            difference = seen[f"{side}_mean"] - held[f"{side}_mean"]
            held[f"{side}_deviation"] += seen[f"{side}_deviation"] + difference.square() * weight
            held[f"{side}_mean"] += difference * share
            held[f"{side}_min"] = torch.minimum(held[f"{side}_min"], seen[f"{side}_min"])
            held[f"{side}_max"] = torch.maximum(held[f"{side}_max"], seen[f"{side}_max"])
            differences.append(difference)
        held["count"] += seen["count"]
        return differences[0] * weight, differences[1]

    def _r(self, part: slice) -> np.ndarray:
        """[rows of the part, columns] float64, of the rows of the comoment."""
        found = self.tensors["comoment"][part].cpu().numpy() / self._spread("row")[part, None]
        found /= self._spread("column")
        np.clip(found, -1, 1, out=found)
        if self._own is not None:  # a neuron with itself, which is exact
            line = np.arange(len(found))
            column = self._own + part.start + line
            found[line, column] = np.where(np.isnan(found[line, column]), np.nan, 1.0)
        return found

    def _spread(self, side: str) -> np.ndarray:
        """Square root of the deviation; NaN for a constant neuron."""
        kept = (self.tensors[f"{side}_{name}"].cpu() for name in ("deviation", "min", "max"))
        return spread(*kept).numpy()


class _Part:
    """Some rows of one side: their statistics in float64, and the rows themselves, centred and ready to multiply."""

    def __init__(self, values: torch.Tensor, dtype: torch.dtype) -> None:
        wide = values.double()
        self.count = len(wide)
        self.mean = wide.mean(0)
        self.min, self.max = (each.double() for each in torch.aminmax(values, dim=0))
        centred = wide.sub_(self.mean) if wide is not values else wide - self.mean
        self.deviation = centred.square().sum(0)
        # A power of two changes no digit, and keeps the product of two very small or very large values in range.
        exponent = torch.frexp(centred.abs().amax(0)).exponent
        self.scale = torch.ldexp(torch.ones_like(self.mean), exponent)
        self.scaled = (centred / self.scale).to(dtype)
