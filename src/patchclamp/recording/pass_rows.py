"""`PassRows`: which positions of one forward pass count and what they are, as numpy, each thing computed once."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import torch

from patchclamp.errors import unknown
from patchclamp.recording.batch import ranks_of
from patchclamp.recording.forward import Rows


class PassRows:
    """The rows of a pass, for all sites that have one for each position.

    Args:
        rows: which positions count.
        examples: [batch] int64, ids of the examples of the pass.
        codes: label -> [examples of the data] category codes.
        folds: [examples of the data] fold.

    Attributes:
        rows: as given.
    """

    def __init__(self, rows: Rows, examples: np.ndarray, codes: Mapping[str, np.ndarray], folds: np.ndarray) -> None:
        self.rows = rows
        self._examples, self._codes, self._folds = examples, codes, folds
        self._groups: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self._of_tokens: tuple[torch.Tensor, tuple[np.ndarray, np.ndarray, np.ndarray]] | None = None

    def __len__(self) -> int:
        return len(self.rows.example)

    @cached_property
    def flat(self) -> np.ndarray:
        """[rows] int64: where they are among all positions of the pass."""
        flat = self.rows.flat
        return np.arange(self.rows.shape[0] * self.rows.shape[1]) if flat is None else flat.numpy()

    @cached_property
    def rank(self) -> np.ndarray:
        """[rows] int64, as `Batch.rank`."""
        return ranks_of(self.rows.example, self.rows.position).numpy()

    @cached_property
    def labels(self) -> dict[str, torch.Tensor]:
        """Label -> [rows] int64 category codes."""
        found = {
            name: torch.from_numpy(each[self._examples].astype(np.int64))[self.rows.row]
            for name, each in self._codes.items()
        }
        return found | dict(self.rows.labels)

    @cached_property
    def folds(self) -> torch.Tensor:
        """[rows] int64."""
        return torch.from_numpy(self._folds[self._examples].astype(np.int64))[self.rows.row]

    def groups(self, label: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The categories that are there [groups], all positions sorted by them [rows], where each begins [groups + 1].

        Raises:
            UnknownName: the data has no such label.
        """
        if label not in self.labels:
            raise unknown("label in a pass", label, self.labels)
        if label not in self._groups:
            self._groups[label] = self._sorted(self.labels[label].numpy())
        return self._groups[label]

    def token_groups(self, tokens: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `groups`, by fold and slot: number `fold * (slots + 1) + slot`; tokens without a slot share the last."""
        if self._of_tokens is None or not torch.equal(self._of_tokens[0], tokens):
            self._of_tokens = (tokens, self._sorted(self._slots(tokens)))
        return self._of_tokens[1]

    def _slots(self, tokens: torch.Tensor) -> np.ndarray:
        assert self.rows.token is not None
        names, given = tokens.numpy(), self.rows.token.numpy()
        order = np.argsort(names)
        place = np.searchsorted(names, given, sorter=order).clip(max=max(len(names) - 1, 0))
        slot = np.full(len(given), len(names))
        if len(names):
            known = names[order[place]] == given
            slot[known] = order[place][known]
        return self.folds.numpy() * (len(names) + 1) + slot

    def _sorted(self, group: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        order = np.argsort(group, kind="stable")
        present, first = np.unique(group[order], return_index=True)
        return present, self.flat[order], np.append(first, len(group))
