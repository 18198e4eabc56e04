"""`NGrams`: the short runs of tokens that most often make every neuron fire.

There are too many runs to count them all, so each neuron keeps the frequent ones only, by the algorithm of Misra and
Gries (1982): counters for at most `slots` runs; where there are more, the largest count that has no slot is taken
from all counters, and those that are left with nothing go. Merged by adding and reducing in the same way, the
sketches keep their guarantee (Agarwal et al., "Mergeable summaries", 2012): what a reduction takes from one counter
it takes from `slots + 1` at least, so `(slots + 1) * error` is never more than the firings that are not in a counter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch

from patchclamp.errors import DataError
from patchclamp.recording.batch import Batch, Setting
from patchclamp.recording.summaries.summary import Summary, whole
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
_TOKEN_BITS = 31


class NGrams(Summary):
    """The n-grams that most often make every neuron fire, with counts of a stated error.

    An n-gram belongs to the row of its last token: the neuron fires there, and the row and the n - 1 before it are
    adjacent positions of one example that all count (a special token between them breaks it). An example must not
    be split over two batches.

    `counts` are lower bounds: the true number of firings on an n-gram lies in [counts, counts + error], where an
    n-gram that is not listed has count 0; and `error` is at most (fired_total - counts.sum(1)) / (slots + 1). So
    every n-gram with more than fired_total / (slots + 1) firings is listed. All that holds whatever the order of
    the data and of merging; the counts themselves may depend on it unless the error is 0.

    Args:
        n: tokens of a run.
        slots: how many n-grams to keep per neuron.
        threshold: a neuron fires where its activation is greater; a number, or relative.

    Raises:
        DataError: n or slots is not a whole number >= 1, or a bad threshold.
    """

    name = "ngrams"
    needs_tokens = True
    agree = ("threshold",)

    def __init__(self, n: int = 3, slots: int = 32, threshold: Threshold = _HALF_OF_MAXIMUM) -> None:
        self.n = whole("NGrams", "n", n, at_least=1)
        self.slots = whole("NGrams", "slots", slots, at_least=1)
        self._threshold = as_threshold(threshold)

    @property
    def tokens(self) -> np.ndarray:
        """[size, slots, n] int64: the token ids of each n-gram, most frequent first; -1 in a free slot."""
        return np.where(self.counts[..., None] > 0, self.array("tokens").astype(np.int64), -1)

    @property
    def counts(self) -> np.ndarray:
        """[size, slots] int64: firings on each n-gram, at least; 0 in a free slot."""
        return self.array("counts")

    @property
    def error(self) -> np.ndarray:
        """[size] int64: by how much a count may be too low, at most."""
        return self.array("error")

    @property
    def fired_total(self) -> np.ndarray:
        """[size] int64: firings on all n-grams, listed or not."""
        return self.array("fired_total")

    @property
    def count(self) -> int:
        """Number of rows that end an n-gram."""
        return int(self.tensors["count"])

    @property
    def threshold(self) -> np.ndarray:
        """[size] float32: the threshold of each neuron as a number."""
        return self.array("threshold").astype(np.float32)

    @property
    def relative(self) -> bool:
        return is_relative(self._threshold)

    def parameters(self) -> dict[str, Any]:
        return {"n": self.n, "slots": self.slots, "threshold": to_json(self._threshold)}

    @classmethod
    def from_json(cls, parameters: Mapping[str, Any]) -> Self:
        return cls(parameters["n"], parameters["slots"], from_json(parameters["threshold"]))

    def empty(self, setting: Setting) -> dict[str, torch.Tensor]:
        return {
            "tokens": torch.zeros(setting.size, self.slots, self.n, dtype=torch.int32),
            "counts": torch.zeros(setting.size, self.slots, dtype=torch.int64),
            "error": torch.zeros(setting.size, dtype=torch.int64),
            "fired_total": torch.zeros(setting.size, dtype=torch.int64),
            "count": torch.zeros((), dtype=torch.int64),
            "threshold": torch.from_numpy(resolve(self._threshold, setting)),
        }

    def add(self, batch: Batch) -> None:
        last = _ends(batch, self.n)
        self.tensors["count"] += len(last)
        threshold = self.tensors["threshold"].to(batch.values.dtype)
        back = torch.arange(1 - self.n, 1, device=last.device)
        for rows in last.split(batch.block_rows):
            assert batch.token is not None  # `update` has checked it
            grams, place = _distinct(batch.token[rows[:, None] + back])
            # Summed in float32, which is many times faster than in integers and exact here.
            fired = torch.zeros(len(grams), self.size, device=last.device)
            fired.index_add_(0, place, (batch.values[rows] > threshold).float())
            gram, neuron = fired.nonzero(as_tuple=True)
            self._take(neuron, grams[gram], fired[gram, neuron].long())

    def combine(self, other: Self) -> None:
        there = other.tensors
        neuron, slot = there["counts"].nonzero(as_tuple=True)
        counts = there["counts"][neuron, slot]
        self._take(neuron, there["tokens"][neuron, slot].long(), counts)
        # `_take` has seen what is in the counters only.
        outside = there["fired_total"] - there["counts"].sum(1)
        self.tensors["fired_total"] += outside
        for name in ("error", "count"):
            self.tensors[name] += there[name]

    def _take(self, neuron: torch.Tensor, grams: torch.Tensor, counts: torch.Tensor) -> None:
        """Add counts [given] of n-grams [given, n] to those of their neurons [given], and keep the largest."""
        if not len(neuron):
            return
        held = self.tensors
        held["fired_total"].index_add_(0, neuron, counts)
        changed = torch.zeros(self.size, dtype=torch.bool, device=neuron.device)
        changed[neuron] = True
        mine, slot = (held["counts"] * changed[:, None]).nonzero(as_tuple=True)
        distinct, place = _distinct(torch.cat([held["tokens"][mine, slot].long(), grams]))
        # One number for each neuron and n-gram, in order of the neurons.
        pair, which = torch.unique(torch.cat([mine, neuron]) * len(distinct) + place, return_inverse=True)
        total = torch.zeros_like(pair).index_add_(0, which, torch.cat([held["counts"][mine, slot], counts]))
        owner, gram = pair // len(distinct), pair % len(distinct)

        order = total.argsort(descending=True, stable=True)
        order = order[owner[order].argsort(stable=True)]
        owner, gram, total = owner[order], gram[order], total[order]
        number = torch.bincount(owner, minlength=self.size)
        rank = torch.arange(len(owner), device=owner.device) - (number.cumsum(0) - number)[owner]

        cut = torch.zeros_like(held["error"])
        first_out = rank == self.slots
        cut[owner[first_out]] = total[first_out]
        held["error"] += cut
        total = total - cut[owner]
        stays = (total > 0) & (rank < self.slots)
        owner, rank = owner[stays], rank[stays]
        held["counts"][changed] = 0
        held["tokens"][changed] = 0
        held["counts"][owner, rank] = total[stays]
        held["tokens"][owner, rank] = distinct[gram[stays]].to(held["tokens"].dtype)


def _ends(batch: Batch, n: int) -> torch.Tensor:
    """[ends] int64: the rows at which an n-gram ends."""
    assert batch.token is not None
    low, high = (int(each) for each in torch.aminmax(batch.token))
    if low < 0 or high >> _TOKEN_BITS:
        raise DataError(f"NGrams: token ids are in 0 ... 2^31 - 1; this batch has {low if low < 0 else high}")
    if len(batch) < n:
        return torch.empty(0, dtype=torch.int64, device=batch.token.device)
    follows = (batch.example[1:] == batch.example[:-1]) & (batch.position[1:] == batch.position[:-1] + 1)
    ends = torch.ones(len(batch) - n + 1, dtype=torch.bool, device=batch.token.device)
    for back in range(n - 1):
        ends &= follows[n - 2 - back : len(follows) - back]
    return ends.nonzero().squeeze(1) + (n - 1)


def _distinct(grams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct ones [distinct, n] of some n-grams [given, n], in order, and the place of each given one in them."""
    # By columns, because sorting numbers is many times faster than sorting rows. Both halves fit into 63 bits.
    number = grams[:, 0]
    for column in range(1, grams.shape[1]):
        if column > 1:
            number = torch.unique(number, return_inverse=True)[1]
        number = (number << _TOKEN_BITS) | grams[:, column]
    distinct, place = torch.unique(number, return_inverse=True)
    one_of = torch.zeros_like(distinct).scatter_(0, place, torch.arange(len(place), device=place.device))
    return grams[one_of], place
