"""`ByToken`: how often every neuron fires on each of the most frequent tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self

import numpy as np
import torch

from patchclamp.errors import DataError
from patchclamp.recording.batch import Batch, Setting
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


class ByToken(Summary):
    """How often every neuron fires on each of some tokens, and on all tokens together; exact.

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
        return self.array("occurrences")

    @property
    def fired(self) -> np.ndarray:
        """[slots, size] int32 (int64 beyond 2^31 rows): rows of this token on which the neuron fires."""
        return self.array("fired")

    @property
    def count(self) -> int:
        """Number of rows (tokens) seen, with a slot or without."""
        return int(self.tensors["count"])

    @property
    def fired_total(self) -> np.ndarray:
        """[size] int64: rows on which the neuron fires, whatever the token."""
        return self.array("fired_total")

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
        held, threshold = self.tensors, self.tensors["threshold"].to(batch.values.dtype)
        self._widen(self.count + len(batch))
        held["count"] += len(batch)
        slot = self._slot(batch.token)
        held["occurrences"] += torch.bincount(slot, minlength=len(held["tokens"]) + 1)[:-1]
        for values, slots in zip(batch.values.split(_ROWS_AT_ONCE), slot.split(_ROWS_AT_ONCE), strict=True):
            present, place = torch.unique(slots, return_inverse=True)
            # Summed in float32, which is many times faster than in integers and exact here. One row for
            # each token in the batch; tokens without a slot share the last.
            fired = torch.zeros(len(present), self.size, device=values.device)
            rows = max(1, min(len(values), batch.block_rows))
            above = torch.empty(rows, self.size, device=values.device)
            for block, places in zip(values.split(rows), place.split(rows), strict=True):
                fired.index_add_(0, places, torch.gt(block, threshold, out=above[: len(block)]))
            held["fired_total"] += fired.sum(0, dtype=torch.float64).long()
            kept = int((present < len(held["tokens"])).sum())
            held["fired"].index_add_(0, present[:kept], fired[:kept].to(held["fired"].dtype))

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
        "occurrences": torch.zeros(len(tokens), dtype=torch.int64),
        "fired": torch.zeros(len(tokens), size, dtype=torch.int32),
    }


def _totals(threshold: np.ndarray) -> dict[str, torch.Tensor]:
    return {
        "count": torch.zeros((), dtype=torch.int64),
        "fired_total": torch.zeros(len(threshold), dtype=torch.int64),
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
