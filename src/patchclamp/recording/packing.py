"""Packing: several short texts on one line of a batch, none of which sees another.

A model is told so in one of two ways: by positions that begin anew with each text and no mask, from which
transformers finds the texts itself and keeps a sliding window as it is; or by a mask `[lines, 1, queries, keys]`
that is 0 inside a text and minus infinity elsewhere. Whether a model heeds either is not asked of its class but
tried: texts of the corpus, packed, must give what they give by themselves.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch

from patchclamp.model.model import Model
from patchclamp.model.signature import parameters
from patchclamp.model.tokenize import PaddedBatch

Way = Literal["positions", "mask"]
WAYS: tuple[Way, ...] = ("positions", "mask")


@dataclass(frozen=True)
class Packing:
    """How texts share a line.

    Attributes:
        length: most tokens of a line.
        way: how the model is told where a text ends.
    """

    length: int
    way: Way


class PackedBatch(NamedTuple):
    """Texts on lines. All `[lines, length]`."""

    batch: PaddedBatch  # its positions begin anew with each text, and with the padding
    text: torch.Tensor  # int64: number of the text on its line; padding is a text of its own
    owner: torch.Tensor  # int64: number of the text in the batch; 0 on padding

    def inputs(self, model: Model, way: Way) -> dict[str, torch.Tensor]:
        """Keyword arguments for the model, without those it does not take."""
        given = {"input_ids": self.batch.ids, "position_ids": self.batch.position}
        if way == "mask":
            dtype = next((each.dtype for each in model.module.parameters() if each.is_floating_point()), torch.float32)
            same = self.text[:, :, None] == self.text[:, None, :]
            mask = torch.where(same.tril(), 0.0, torch.finfo(dtype).min).to(dtype)
            given["attention_mask"] = mask[:, None]
        taken = parameters(model.module)
        return {name: value.to(model.device) for name, value in given.items() if name in taken}


def packed_lines(examples: np.ndarray, lengths: np.ndarray, length: int) -> list[np.ndarray]:
    """Put examples on lines of at most `length` tokens: each, in the order given, on the fullest that has room.

    Args:
        examples: ids, longest first.
        lengths: tokens of every example, by id.
        length: most tokens of a line; a longer text has a line of its own.

    Returns:
        Example ids by line. `lines_of` gives the same lines back from any run of them, because the first text of
        a line had no room on those before.
    """
    lines: list[list[int]] = []
    rooms: list[int] = []  # what is left on some line, each amount once, ascending
    with_room: dict[int, list[int]] = {}
    for example in examples.tolist():
        tokens = int(lengths[example])
        place = bisect.bisect_left(rooms, tokens)
        if place < len(rooms):
            room = rooms[place]
            line = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
            lines[line].append(example)
        else:
            room, line = max(length, tokens), len(lines)
            lines.append([example])
        left = room - tokens
        if left:
            if left not in with_room:
                with_room[left] = []
                bisect.insort(rooms, left)
            with_room[left].append(line)
    return [np.asarray(line, np.int64) for line in lines]


def lines_of(lengths: np.ndarray, length: int) -> list[list[int]]:
    """Texts in order, on lines of at most `length` tokens: a new line where the next one has no room. Their numbers."""
    lines: list[list[int]] = []
    used = 0
    for number, tokens in enumerate(lengths.tolist()):
        if not lines or used + tokens > length:
            lines.append([])
            used = 0
        lines[-1].append(number)
        used += tokens
    return lines


def packed_batch(sequences: Sequence[np.ndarray], lines: Sequence[Sequence[int]], pad_id: int) -> PackedBatch:
    """Put the token ids of texts on lines; what is left of a line is padding."""
    width = max(sum(len(sequences[number]) for number in line) for line in lines)
    ids = np.full((len(lines), width), pad_id, np.int64)
    mask = np.zeros((len(lines), width), bool)
    position, text, owner = (np.zeros((len(lines), width), np.int64) for _ in range(3))
    for place, line in enumerate(lines):
        start = 0
        for number_on_line, number in enumerate(line):
            part = slice(start, start + len(sequences[number]))
            ids[place, part], mask[place, part] = sequences[number], True
            position[place, part] = np.arange(len(sequences[number]))
            text[place, part], owner[place, part] = number_on_line, number
            start = part.stop
        position[place, start:] = np.arange(width - start)
        text[place, start:] = len(line)
    batch = PaddedBatch(torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(position))
    return PackedBatch(batch, torch.from_numpy(text), torch.from_numpy(owner))
