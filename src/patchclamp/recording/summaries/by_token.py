"""`ByToken`: how often every neuron fires on each of the most frequent tokens, in each of the two folds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from patchclamp.errors import DataError
from patchclamp.recording.batch import Batch, Setting
from patchclamp.recording.folds import FOLDS
from patchclamp.recording.summaries.summary import Summary
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
_ROWS_AT_ONCE = 1 << 20  # counts in float32 are exact below 2^24


@dataclass(frozen=True, eq=False)
class TokenCounts:
    """What `ByToken` counted on the examples of one fold; the attributes are those of `ByToken`."""

    tokens: np.ndarray
    occurrences: np.ndarray
    fired: np.ndarray
    count: int
    fired_total: np.ndarray
    threshold: np.ndarray


class ByToken(Summary):
    """How often every neuron fires on each of some tokens, and on all tokens together; exact.

    The attributes count all examples; `fold(0)` and `fold(1)` those of one fold (`recording.folds`): tokens that
    are chosen by the first can be scored on the second.

    Args:
        tokens: token ids to keep a slot for; None for the most frequent ones of the data (the recording
            finds them). A token without a slot counts in `count` and `fired_total` only.
        most_frequent: how many slots at most, where `tokens` is None.
        threshold: a neuron fires where its activation is greater; a number, or relative.

    Raises:
        DataError: a token is not a whole number >= 0 or is named twice; a bad number or threshold.
    """

    name = "by_token"
    needs_tokens = True
    agree = ("tokens", "threshold")

    def __init__(
        self,
        tokens: Iterable[int] | None = None,
        most_frequent: int = 2000,
        threshold: Threshold = _HALF_OF_MAXIMUM,
    ) -> None:
        self._chosen = None if tokens is None else _token_ids(tokens)
        if isinstance(most_frequent, bool) or not isinstance(most_frequent, int) or most_frequent < 1:
            raise DataError(f"ByToken: most_frequent is a whole number >= 1, not {most_frequent!r}")
        self._most_frequent = most_frequent
        self._threshold = as_threshold(threshold)

    @property
    def tokens(self) -> np.ndarray:
        """[slots] int64: the token ids that have a slot."""
        return self.array("tokens")

    @property
    def occurrences(self) -> np.ndarray:
        """[slots] int64: rows that are this token."""
        return self.array("occurrences").sum(axis=0)

    @property
    def fired(self) -> np.ndarray:
        """[slots, size] int32 (int64 beyond 2^31 rows): rows of this token on which the neuron fires."""
        first, second = self.array("fired")
        fits = self.count <= np.iinfo(np.int32).max
        return np.add(first, second, dtype=first.dtype if fits else np.int64)

    @property
    def count(self) -> int:
        """Number of rows (tokens) seen, with a slot or without."""
        return int(self.tensors["count"].sum())

    @property
    def fired_total(self) -> np.ndarray:
        """[size] int64: rows on which the neuron fires, whatever the token."""
        return self.array("fired_total").sum(axis=0)

    def fold(self, fold: int) -> TokenCounts:
        """The same counts over the examples of one fold only: 0 is for describing, 1 for scoring.

        Raises:
            DataError: there is no such fold.
        """
        if fold not in range(FOLDS):
            raise DataError(f"ByToken keeps the folds 0 and 1, not {fold!r}")
        return TokenCounts(
            self.tokens,
            self.array("occurrences")[fold],
            self.array("fired")[fold],
            int(self.tensors["count"][fold]),
            self.array("fired_total")[fold],
            self.threshold,
        )

    @property
    def threshold(self) -> np.ndarray:
        """[size] float32: the threshold of each neuron as a number."""
        return self.array("threshold").astype(np.float32)

    @property
    def relative(self) -> bool:
        return is_relative(self._threshold)

    def parameters(self) -> dict[str, Any]:
        return {
            "tokens": None if self._chosen is None else self._chosen.tolist(),
            "most_frequent": self._most_frequent,
            "threshold": to_json(self._threshold),
        }

    @classmethod
    def from_json(cls, parameters: Mapping[str, Any]) -> Self:
        return cls(parameters["tokens"], parameters["most_frequent"], from_json(parameters["threshold"]))

    def empty(self, setting: Setting) -> dict[str, torch.Tensor]:
        if setting.tokens is None:
            raise DataError(f"ByToken needs data with tokens, and that of {setting.site} has none")
        tokens = _token_ids(setting.tokens)[: self._most_frequent] if self._chosen is None else self._chosen
        return {**_slots(tokens, setting.size), **_totals(resolve(self._threshold, setting))}

    def add(self, batch: Batch) -> None:
        assert batch.token is not None  # `update` has checked it
        threshold = self.tensors["threshold"].to(batch.values.dtype)
        # A number for each fold and slot; in each fold, the tokens without a slot share the last.
        group = batch.folds * (len(self.tensors["tokens"]) + 1) + self._slot(batch.token)
        self.count_up(group, torch.ones_like(group))
        for values, groups in zip(batch.values.split(_ROWS_AT_ONCE), group.split(_ROWS_AT_ONCE), strict=True):
            present, place = torch.unique(groups, return_inverse=True)
            # Summed in float32, which is many times faster than in integers and exact here. One row for
            # each group in the batch.
            fired = torch.zeros(len(present), self.size, device=values.device)
            rows = max(1, min(len(values), batch.block_rows))
            above = torch.empty(rows, self.size, device=values.device)
            for block, places in zip(values.split(rows), place.split(rows), strict=True):
                fired.index_add_(0, places, torch.gt(block, threshold, out=above[: len(block)]))
            self._count(present, fired)

    def count_up(self, group: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in so many rows of each of these groups, `fold * (slots + 1) + slot`; the last slot is that of no slot.

        Returns:
            `fired` [folds, slots, size] and `fired_total` [folds, size], for their firings to be added to.
        """
        held, slots = self.tensors, len(self.tensors["tokens"])
        self._widen(self.count + int(rows.sum()))
        occurrences = torch.zeros(FOLDS * (slots + 1), dtype=torch.int64, device=group.device)
        occurrences = occurrences.index_add_(0, group, rows).view(FOLDS, slots + 1)
        held["count"] += occurrences.sum(1)
        held["occurrences"] += occurrences[:, :-1]
        return held["fired"], held["fired_total"]

    def combine(self, other: Self) -> None:
        self._widen(self.count + other.count)
        for name in ("count", "occurrences", "fired", "fired_total"):
            self.tensors[name] += other.tensors[name]

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        before = self.tensors
        if "tokens" in state:  # a state brings its own tokens
            self.tensors = before | _slots(_token_ids(np.asarray(state["tokens"])), self.size)
        try:
            super().restore(state)
        except DataError:
            self.tensors = before
            raise

    def _count(self, present: torch.Tensor, fired: torch.Tensor) -> None:
        """Add the firings [groups, size] of the groups [groups] that are present, which are in order."""
        held, slots = self.tensors, len(self.tensors["tokens"])
        for fold in range(FOLDS):
            first = fold * (slots + 1)
            start, named, stop = (int((present < each).sum()) for each in (first, first + slots, first + slots + 1))
            held["fired_total"][fold] += fired[start:stop].sum(0, dtype=torch.float64).long()
            part = fired[start:named].to(held["fired"].dtype)
            held["fired"][fold].index_add_(0, present[start:named] - first, part)

    def _slot(self, token: torch.Tensor) -> torch.Tensor:
        """[rows] int64: the slot of each token; one past the last slot where it has none."""
        tokens = self.tensors["tokens"]
        if not len(tokens):
            return torch.zeros_like(token)
        ordered, slots = torch.sort(tokens)
        place = torch.searchsorted(ordered, token).clamp(max=len(tokens) - 1)
        return torch.where(ordered[place] == token, slots[place], len(tokens))

    def _widen(self, count: int) -> None:
        if count > torch.iinfo(torch.int32).max:
            self.tensors["fired"] = self.tensors["fired"].long()


def _slots(tokens: np.ndarray, size: int) -> dict[str, torch.Tensor]:
    return {
        "tokens": torch.from_numpy(tokens),
        "occurrences": torch.zeros(FOLDS, len(tokens), dtype=torch.int64),
        "fired": torch.zeros(FOLDS, len(tokens), size, dtype=torch.int32),
    }


def _totals(threshold: np.ndarray) -> dict[str, torch.Tensor]:
    return {
        "count": torch.zeros(FOLDS, dtype=torch.int64),
        "fired_total": torch.zeros(FOLDS, len(threshold), dtype=torch.int64),
        "threshold": torch.from_numpy(threshold),
    }


def _token_ids(tokens: Iterable[int] | np.ndarray) -> np.ndarray:
    """[slots] int64, checked."""
    given = tokens if isinstance(tokens, np.ndarray) else list(tokens)
    ids = np.asarray(given) if len(given) else np.empty(0, dtype=np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or (len(ids) and int(ids.min()) < 0):
        raise DataError(f"ByToken: tokens are whole numbers >= 0, not {given!r}")
    if len(np.unique(ids)) < len(ids):
        values, counts = np.unique(ids, return_counts=True)
        raise DataError(f"ByToken: the token {int(values[counts > 1][0])} is named twice")
    return ids.astype(np.int64)
