"""`TensorCorpus`: tensors as the model reads them."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch

from patchclamp.data import Tensors
from patchclamp.model.model import Model
from patchclamp.model.tokenize import PaddedBatch
from patchclamp.recording.codes import Codes, feed
from patchclamp.recording.folds import fold_of_content
from patchclamp.recording.forward import Forward, counted_rows


class TensorCorpus:
    """Tensors `[examples, ...]`; a batch holds as many examples as `batch_tokens` asks for."""

    special_tokens = True
    truncated = 0

    def __init__(self, model: Model, data: Tensors) -> None:
        self.name, self.labels, self.model, self.values = data.name, data.labels, model, data.values
        codes = Codes(self.labels)
        for example in data:
            codes.add(example.labels)
        self.codes = codes.arrays()
        self.examples = len(data)
        self._kept: np.ndarray | None = None  # ids of the examples whose tensors are here; None: all
        self.folds = np.asarray([fold_of_content(_bytes_of(each)) for each in data.values], np.uint8)
        self._is_ids = not data.values.is_floating_point() and data.values.ndim == 2
        self._main = getattr(model.module, "main_input_name", None) if hasattr(model.module, "config") else None
        # A row of numbers is one position, a sequence of ids as many as it is long; an image is not known before.
        self._positions = int(data.values.shape[1]) if self._is_ids else 1 if data.values.ndim == 2 else 128
        self.lengths = np.full(self.examples, self._positions, np.int64)
        ids = data.values.reshape(-1).cpu().numpy() if self._is_ids else np.zeros(0, np.int64)
        self.counts = np.bincount(ids[ids >= 0]).astype(np.int64) if self._is_ids else np.zeros(0, np.int64)
        self.tokens = int(self.lengths.sum()) if data.values.ndim == 2 else self.examples
        self.sha256 = self.tokens_sha256 = _hash_of(data, self.codes)

    def most_frequent(self, number: int) -> np.ndarray:
        """Ids of the most frequent tokens, most frequent first, ties by id. `[<= number]` int64."""
        return most_frequent(self.counts, number)

    def sample(self, tokens: int, seed: int) -> np.ndarray:
        """Ids of examples drawn at random that hold at most so many tokens, but of one at least; ascending."""
        return drawn(np.arange(self.examples), self.lengths, tokens, seed)

    def batches(self, batch_tokens: int, of: Sequence[int] | np.ndarray | None = None) -> list[np.ndarray]:
        """Example ids in order, in groups."""
        chosen = np.arange(self.examples) if of is None else np.asarray(of)
        width = max(1, batch_tokens // max(1, self._positions))
        return [chosen[start : start + width] for start in range(0, len(chosen), width)]

    def forward(self, examples: np.ndarray) -> Forward:
        """The examples as one tensor, on the model's device."""
        values = self._values_of(examples).to(self.model.device)
        arguments = () if self._main else (values,)
        keywords = {self._main: values} if self._main else {}
        rows = None
        tokens = len(examples)
        if self._is_ids:
            length = values.shape[1]
            mask = torch.ones(values.shape, dtype=torch.bool)
            position = torch.arange(length).expand(len(examples), -1)
            rows = counted_rows(PaddedBatch(values.cpu(), mask, position), mask, examples)
            tokens = len(rows.example)
        return Forward(arguments, keywords, examples, rows, rows, tokens)

    def shell(self) -> Self:
        """All but the tensors and the model: with a `part`, another process can read that part."""
        shell = copy.copy(self)
        shell.__dict__.pop("model")
        shell.values, shell.counts = self.values[:0], self.counts[:0]
        return shell

    def part(self, examples: np.ndarray) -> dict[str, Any]:
        """The tensors of these examples."""
        order = np.sort(examples)
        return {"rows": order, "values": self.values[torch.from_numpy(order)].cpu().numpy()}

    def filled(self, part: Mapping[str, Any], model: Model) -> Self:
        """A shell with the tensors of some examples, which can be read now, and no others."""
        filled = copy.copy(self)
        filled.model, filled.values = model, torch.from_numpy(np.array(part["values"]))
        filled._kept = part["rows"]
        return filled

    def _values_of(self, examples: np.ndarray) -> torch.Tensor:
        places = examples if self._kept is None else np.searchsorted(self._kept, examples)
        return self.values[torch.from_numpy(places)]

    def ids(self, example: int, decoder: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of one example, where the tensors are ids (else none), and that all of them count."""
        ids = self.values[example].cpu().numpy().astype(np.int64) if self._is_ids else np.zeros(0, np.int64)
        return ids, np.ones(len(ids), bool)


def most_frequent(counts: np.ndarray, number: int) -> np.ndarray:
    """Ids with the largest counts above 0, largest first, ties by id. `[<= number]` int64."""
    order = np.lexsort((np.arange(len(counts)), -counts))[:number]
    return order[counts[order] > 0].astype(np.int64)


def drawn(examples: np.ndarray, lengths: np.ndarray, tokens: int, seed: int) -> np.ndarray:
    """Some of the examples, at random, that hold at most so many tokens, but one at least; ascending."""
    order = np.random.default_rng(seed).permutation(examples)
    enough = int(np.searchsorted(np.cumsum(lengths[order]), tokens, side="right"))
    return np.sort(order[: max(enough, 1)])


def _hash_of(data: Tensors, codes: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(f"{tuple(data.values.shape)} {data.values.dtype}".encode())
    digest.update(_bytes_of(data.values))
    for name in sorted(codes):
        feed(digest, name, *data.labels[name])
        digest.update(codes[name].tobytes())
    return digest.hexdigest()


def _bytes_of(values: torch.Tensor) -> memoryview:
    flat = values.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
