"""`ModelCorrelation`: which neurons of two models do the same. Made by `patchclamp.correlate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl

from patchclamp.errors import DataError
from patchclamp.neurons import Neuron, Neurons
from patchclamp.recording.summaries.pairs import Partners

Side = Literal["first", "second"]


@dataclass(frozen=True, eq=False)
class ModelCorrelation:
    """Pearson's correlation of the neurons of a first model with those of a second, on the same rows.

    The neurons of a model are numbered site after site, as in `sites["first"]`.

    Attributes:
        sites: "first" and "second" -> site -> number of neurons.
        count: rows (tokens or examples) that count.
        left_out: rows that were left out, because an activation was NaN or infinite.
        of_first: partners of the first model's neurons, `indices` `[n, k]` int64 and `scores` `[n, k]` float64, which
            is r; the largest |r| first, of equal ones the smaller index; -1 and NaN where there are fewer than k.
        of_second: the same of the second model's neurons.
        r: `[n, m]` float32 numpy, NaN for a neuron that is the same on every row; None where it was not asked for.
        passes: how often the data were gone through.
    """

    sites: Mapping[str, Mapping[str, int]]
    count: int
    left_out: int
    of_first: Partners
    of_second: Partners
    r: np.ndarray | None
    passes: int

    def neuron(self, side: Side, number: int) -> Neuron:
        """The neuron of that number, of the first or the second model.

        Raises:
            DataError: there is none of that number.
        """
        left = number
        for site, size in self._sizes(side).items():
            if 0 <= left < size:
                return Neuron(site, int(left))
            left -= size
        raise DataError(f"the {side} model has {sum(self._sizes(side).values())} neurons; there is no number {number}")

    def matches(self, side: Side = "first") -> Neurons:
        """Every neuron of one model with its best partner in the other, the best matched first.

        Args:
            side: whose neurons the rows are, "first" or "second".

        Returns:
            Columns: `score` (|r|), `r`, `partner_site`, `partner_index`, and `mutual`, whether it is its partner's best
            partner too. A neuron without partner (it is the same on every row) has no score, and comes last.

        Raises:
            DataError: `side` is something else.
        """
        other: Side = "second" if side == "first" else "first"
        own, theirs = (self.of_first, self.of_second) if side == "first" else (self.of_second, self.of_first)
        site, index = _numbered(self._sizes(side))
        partner_site, partner_index = _numbered(self._sizes(other))
        best = own.indices[:, 0]
        there = best >= 0
        mutual = there & (theirs.indices[best, 0] == np.arange(len(best)))
        frame = pl.DataFrame(
            {
                "site": site,
                "index": index,
                "score": np.abs(own.scores[:, 0]),
                "r": own.scores[:, 0],
                "partner_site": partner_site[best],
                "partner_index": partner_index[best],
                "mutual": mutual,
            },
            nan_to_null=True,
        )
        partner = pl.col("partner_site", "partner_index")
        frame = frame.with_columns(pl.when(pl.Series(there)).then(partner))
        order = frame.sort("score", descending=True, nulls_last=True, maintain_order=True)
        return Neurons.from_polars(order)

    def __repr__(self) -> str:
        first, second = (sum(each.values()) for each in self.sites.values())
        return f"ModelCorrelation({first:,} x {second:,} neurons, {self.count:,} rows)"

    def _sizes(self, side: str) -> Mapping[str, int]:
        if side not in self.sites:
            raise DataError(f"side is 'first' or 'second', not {side!r}")
        return self.sites[side]


def _numbered(sizes: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Site and index of each neuron of a model."""
    sites = np.repeat(np.asarray(list(sizes), dtype=object), list(sizes.values()))
    return sites, np.concatenate([np.arange(size) for size in sizes.values()])
