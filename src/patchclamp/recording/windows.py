"""The stretches of text that a recording keeps: those around the positions that it shows.

So a neuron can be described and drawn without the model, the tokenizer or the corpus.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from patchclamp.errors import UnknownName
from patchclamp.recording.batch import POSITION_BITS, unpack_rank
from patchclamp.recording.corpus import Corpus

CONTEXT = 32


class Window(NamedTuple):
    """Adjacent tokens of one example. Arrays `[tokens]`."""

    example: int
    start: int  # position of the first token in the example
    ids: np.ndarray  # int64
    counted: np.ndarray  # bool: False for special tokens


class Windows:
    """Token ids around the positions that a recording shows, each stretch once."""

    def __init__(
        self, examples: np.ndarray, starts: np.ndarray, ends: np.ndarray, ids: np.ndarray, counted: np.ndarray
    ) -> None:
        self._examples, self._starts, self._ends = examples, starts, ends
        self._ids, self._counted = ids, counted
        self._first = {int(example): place for place, example in reversed(list(enumerate(examples.tolist())))}

    @classmethod
    def around(cls, corpus: Corpus, places: Iterable[tuple[np.ndarray, np.ndarray]], decoder: bool = False) -> Windows:
        """Cut the windows around (example, position) pairs out of a corpus; -1 marks an absent example.

        `decoder` takes what the decoder of an encoder-decoder model reads.
        """
        ranks = [np.zeros(0, np.int64)]
        ranks += [(e[e >= 0].astype(np.int64) << POSITION_BITS) | p[e >= 0] for e, p in places]
        both = np.stack(unpack_rank(_ascending(np.concatenate(ranks))))
        examples: list[int] = []
        starts: list[int] = []
        ids: list[np.ndarray] = []
        counted: list[np.ndarray] = []
        splits = np.flatnonzero(np.diff(both[0])) + 1
        for group in np.split(both, splits, axis=1) if both.shape[1] else []:
            example = int(group[0, 0])
            whole, flags = corpus.ids(example, decoder)
            for start, stop in _stretches(group[1], len(whole)):
                examples.append(example)
                starts.append(start)
                ids.append(whole[start:stop])
                counted.append(flags[start:stop])
        ends = np.cumsum([len(each) for each in ids]) if ids else np.zeros(0)
        return cls(
            np.asarray(examples, np.int64),
            np.asarray(starts, np.int64),
            ends.astype(np.int64),
            np.concatenate(ids) if ids else np.zeros(0, np.int64),
            np.concatenate(counted) if counted else np.zeros(0, bool),
        )

    def at(self, example: int, position: int, context: int = CONTEXT) -> Window:
        """The tokens around a position that the recording shows, at most `context` on each side.

        Raises:
            UnknownName: the recording does not keep that place.
        """
        place = self._first.get(int(example))
        while place is not None and place < len(self._examples) and self._examples[place] == example:
            begin = int(self._ends[place - 1]) if place else 0
            start, length = int(self._starts[place]), int(self._ends[place]) - begin
            if start <= position < start + length:
                low, high = max(start, position - context), min(start + length, position + context + 1)
                cut = slice(begin + low - start, begin + high - start)
                return Window(int(example), low, self._ids[cut], self._counted[cut])
            place += 1
        raise UnknownName(f"the recording keeps no text around position {position} of example {example}")

    @property
    def examples(self) -> np.ndarray:
        """The examples of which something is kept, ascending. int64."""
        return np.unique(self._examples)

    @property
    def token_ids(self) -> np.ndarray:
        """All token ids that occur, ascending."""
        return np.unique(self._ids)

    def state(self) -> dict[str, np.ndarray]:
        """As arrays, to be saved."""
        return {
            "example": self._examples,
            "start": self._starts,
            "end": self._ends,
            "ids": self._ids.astype(np.int32),
            "counted": self._counted.astype(np.uint8),
        }

    @classmethod
    def restored(cls, state: Mapping[str, np.ndarray]) -> Windows:
        """The inverse of `state`."""
        return cls(
            state["example"],
            state["start"],
            state["end"],
            state["ids"].astype(np.int64),
            state["counted"].astype(bool),
        )


def _ascending(values: np.ndarray) -> np.ndarray:
    """Each once, in order: as `np.unique`, which hashes whole numbers and is slower here."""
    values = np.sort(values)
    return values[np.append(True, np.diff(values) != 0)[: len(values)]]


def _stretches(positions: np.ndarray, length: int) -> list[tuple[int, int]]:
    """Start and stop of what is around the positions, which ascend; what touches is one."""
    positions = positions[positions < length + CONTEXT]
    starts, stops = (positions - CONTEXT).clip(min=0), (positions + CONTEXT + 1).clip(max=length)
    apart = np.flatnonzero(starts[1:] > stops[:-1]) + 1
    first, last = np.append(0, apart), np.append(apart, len(positions)) - 1
    return list(zip(starts[first].tolist(), stops[last].tolist(), strict=True)) if len(positions) else []
