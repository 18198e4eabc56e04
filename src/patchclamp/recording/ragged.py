"""`Ragged`: integer sequences of different lengths, on disk instead of in memory."""

from __future__ import annotations

import hashlib
import tempfile
import weakref
from array import array
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np


class Ragged:
    """Sequences of int32 in a temporary file that goes with this object: first all are written, then they are read."""

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="patchclamp-")  # noqa: SIM115 - lives with the object
        weakref.finalize(self, self._file.close)
        self._lengths = array("q")
        self._digest = hashlib.sha256()
        self._ends = np.zeros(0, np.int64)
        self._values = np.zeros(0, np.int32)

    def append(self, sequence: np.ndarray) -> None:
        """Add a sequence `[length]`."""
        data = np.ascontiguousarray(sequence, np.int32).tobytes()
        self._file.write(data)
        self._digest.update(len(data).to_bytes(8, "little") + data)
        self._lengths.append(len(sequence))

    def finish(self) -> np.ndarray:
        """Lengths of all sequences; from now on they can be read."""
        self._file.flush()
        lengths = np.asarray(self._lengths, np.int64)
        self._ends = np.cumsum(lengths)
        if len(lengths) and self._ends[-1]:
            self._values = np.memmap(self._file, np.int32, mode="r")
        self._lengths = array("q")
        return lengths

    @property
    def sha256(self) -> str:
        """Hash of all sequences."""
        return self._digest.hexdigest()

    def __len__(self) -> int:
        return len(self._lengths) or len(self._ends)

    def __getitem__(self, index: int) -> np.ndarray:
        start = int(self._ends[index - 1]) if index else 0
        return np.asarray(self._values[start : int(self._ends[index])])

    def pieces(self) -> Iterator[np.ndarray]:
        """All values one after the other, in pieces of at most a million."""
        for start in range(0, len(self._values), 1 << 20):
            yield np.asarray(self._values[start : start + (1 << 20)])

    def part(self, indices: Sequence[int] | np.ndarray) -> RaggedPart:
        """Some of the sequences, in memory."""
        return RaggedPart(np.asarray(indices, np.int64), [self[int(each)] for each in indices])


class RaggedPart:
    """Some of the sequences of a `Ragged`, under the numbers that they have there; another process can be sent it."""

    def __init__(self, indices: np.ndarray, sequences: Sequence[np.ndarray]) -> None:
        order = np.argsort(indices, kind="stable")
        self._indices = indices[order]
        chosen = [sequences[each] for each in order]
        self._ends = np.cumsum([len(each) for each in chosen], dtype=np.int64)
        self._values = np.concatenate([np.zeros(0, np.int32), *chosen])

    def __getitem__(self, index: int) -> np.ndarray:
        place = int(np.searchsorted(self._indices, index))
        if place == len(self._indices) or self._indices[place] != index:
            raise KeyError(f"sequence {index} is not in this part")
        return self._values[int(self._ends[place - 1]) if place else 0 : int(self._ends[place])]
