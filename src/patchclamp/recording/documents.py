"""Long documents in windows: how they are cut, and from which document and place an example comes."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from patchclamp.errors import DataError, UnknownName
from patchclamp.model.tokenize import Encoded


class Place(NamedTuple):
    """Where an example begins: token `position` of the example is token `start + position` of the document."""

    document: int
    start: int


class Documents:
    """From which document of the data each example is, and at which of its tokens it begins.

    Attributes:
        document: `[examples]` int64, number of the document in the data.
        start: `[examples]` int64; token p of the example is token `start + p` of the document as the model would
            read it in one piece.
    """

    def __init__(self, document: np.ndarray, start: np.ndarray) -> None:
        self.document, self.start = document, start

    def __len__(self) -> int:
        return len(self.document)

    @property
    def count(self) -> int:
        """Number of documents."""
        return int(self.document[-1]) + 1 if len(self) else 0

    def place(self, example: int) -> Place:
        """Document and start of an example.

        Raises:
            UnknownName: there is no such example.
        """
        if not 0 <= example < len(self):
            raise UnknownName(f"there is no example {example}: the recording has {len(self):,}")
        return Place(int(self.document[example]), int(self.start[example]))

    def examples(self, document: int) -> np.ndarray:
        """The examples of a document, ascending, int64.

        Raises:
            UnknownName: there is no such document.
        """
        if not 0 <= document < self.count:
            raise UnknownName(f"there is no document {document}: the data have {self.count:,}")
        first, last = np.searchsorted(self.document, [document, document + 1])
        return np.arange(first, last)

    def state(self) -> dict[str, np.ndarray]:
        """As arrays, to be saved."""
        return {"document": self.document, "start": self.start}

    @classmethod
    def restored(cls, state: Mapping[str, np.ndarray]) -> Documents:
        """The inverse of `state`."""
        return cls(state["document"].astype(np.int64), state["start"].astype(np.int64))


class DocumentWriter:
    """Collects where the examples come from, 16 bytes an example."""

    def __init__(self) -> None:
        self._document, self._start = array("q"), array("q")

    def add(self, document: int, start: int) -> None:
        """Add the next example."""
        self._document.append(document)
        self._start.append(start)

    def finish(self) -> Documents:
        """All of it."""
        return Documents(np.asarray(self._document, np.int64), np.asarray(self._start, np.int64))


class Piece(NamedTuple):
    """A window of a document: which of its tokens it holds, and how many of them an earlier window has counted."""

    tokens: np.ndarray  # int64 indices into the whole document's tokens, special ones included
    start: int
    repeated: int  # how many tokens of text at the beginning are context only


def windows(encoded: Encoded, limit: int, overlap: int, where: str) -> Iterator[Piece]:
    """Cut a document into windows of at most `limit` tokens, the special tokens at its ends put around each.

    Raises:
        DataError: the special tokens and the overlap leave no room for anything new in a window.
    """
    special = np.asarray(encoded.special, bool)
    text = np.flatnonzero(~special)
    first, stop = (int(text[0]), int(text[-1]) + 1) if len(text) else (len(special), len(special))
    before, after = np.arange(first), np.arange(stop, len(special))
    room = limit - len(before) - len(after)
    if room - overlap < 1 and len(special) > limit:
        raise DataError(
            f"windows of {limit} tokens that overlap by {overlap} leave no room for the text of {where}: "
            f"the tokenizer adds {len(before) + len(after)} special tokens"
        )
    start = 0
    while True:
        end = min(first + start + room, stop) if len(special) > limit else stop
        yield Piece(np.concatenate([before, np.arange(first + start, end), after]), start, overlap if start else 0)
        if end >= stop:
            return
        start += room - overlap
