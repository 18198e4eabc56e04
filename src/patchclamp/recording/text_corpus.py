"""`TextCorpus`: texts as the model reads them, in batches of similar length, or several on a line.

The token ids are in a temporary file (4 bytes a token), and so are the codes of token labels: memory does not
grow with the tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch

from patchclamp.model.model import Model
from patchclamp.model.tokenize import PaddedBatch, TokenReader, pad
from patchclamp.recording.documents import Documents
from patchclamp.recording.forward import Forward, Rows, counted_rows
from patchclamp.recording.packing import Packing, lines_of, packed_batch, packed_lines
from patchclamp.recording.positions import last_of
from patchclamp.recording.ragged import Ragged
from patchclamp.recording.tensor_corpus import drawn, most_frequent


class TextCorpus:
    """Tokenized texts. Made by `tokenize`.

    Attributes:
        name: of the data.
        labels: label -> categories; those of token labels too, the last of which is that of tokens without one.
        token_labels: names of the labels that belong to tokens.
        codes: label -> `[examples]` int32, the category of each example; without the labels of tokens.
        folds: `[examples]` uint8, the fold of each example: that of its whole text.
        lengths: `[examples]` int64, tokens of each example, special ones included.
        counted: `[examples]` int64, how many of them count.
        counts: `[vocabulary]` int64, how often each token counts.
        truncated: how many texts were cut at `max_length`.
        limit: longest text in tokens; None where neither the user nor the model says one.
        positions: which tokens count, as `Positions.kind`.
        documents: of which document each example is a window; None where examples are whole texts.
        sha256: hash of texts, labels and targets.
        tokens_sha256: hash of the token ids that the tokenizer made of them.
        packing: how several texts share a line of a batch; None where each has a line of its own.
    """

    def __init__(self, model: Model, reader: TokenReader, name: str, special_tokens: bool) -> None:
        self.name = name
        self.model, self.reader, self.special_tokens = model, reader, special_tokens
        self.labels: dict[str, tuple[str, ...]] = {}
        self.token_labels: tuple[str, ...] = ()
        self.codes: dict[str, np.ndarray] = {}
        self.folds = np.zeros(0, np.uint8)
        self.lengths = self.counted = self.counts = np.zeros(0, np.int64)
        self.truncated = 0
        self.limit: int | None = None
        self.positions = "all"
        self.documents: Documents | None = None
        self.packing: Packing | None = None
        self.sha256 = self.tokens_sha256 = ""
        self._widths = self.lengths
        self._ids = Ragged()
        self._flags: Ragged | None = None  # which tokens count; None: all that are not special
        self._token_codes: dict[str, Ragged] = {}
        self._targets: Ragged | None = None

    @property
    def examples(self) -> int:
        """Number of examples."""
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Number of tokens that count."""
        return int(self.counts.sum())

    def facts(self) -> dict[str, Any]:
        """What a recording says of these texts beside their number: how many documents, which labels are of tokens."""
        said: dict[str, Any] = {} if self.documents is None else {"documents": self.documents.count}
        return said | ({"token_labels": list(self.token_labels)} if self.token_labels else {})

    def ids(self, example: int, decoder: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of one example as the model (or its decoder) reads them, int64, and which of them count, bool."""
        if not decoder:
            return plain(self._ids[example]), self._counting(example)
        read = self.forward(np.asarray([example]))
        assert read.decoder_rows is not None
        length = read.decoder_rows.shape[1]
        counted = np.zeros(length, bool)
        counted[read.decoder_rows.position.numpy()] = True
        return read.keywords["decoder_input_ids"][0].cpu().numpy(), counted

    def most_frequent(self, number: int) -> np.ndarray:
        """Ids of the most frequent tokens that count, most frequent first, ties by id. `[<= number]` int64."""
        return most_frequent(self.counts, number)

    def batches(self, batch_tokens: int, of: Sequence[int] | np.ndarray | None = None) -> list[np.ndarray]:
        """Example ids grouped by length, longest first, so that no batch exceeds `batch_tokens` padded tokens.

        A single longer text makes a batch of its own. Examples of which no token counts are left out.
        """
        chosen = np.arange(self.examples) if of is None else np.asarray(of, np.int64)
        chosen = chosen[self.counted[chosen] > 0]
        order = chosen[np.lexsort((chosen, -self._widths[chosen]))]
        if self.packing is not None:
            return self._packed_batches(order, batch_tokens, self.packing)
        batches, start = [], 0
        while start < len(order):
            width = max(int(self._widths[order[start]]), 1)
            stop = start + max(1, batch_tokens // width)
            batches.append(order[start:stop])
            start = stop
        return batches

    def forward(self, examples: np.ndarray) -> Forward:
        """Pad the examples into one batch, or pack them."""
        if self.packing is not None:
            return self._packed(examples, self.packing)
        stored = [self._ids[int(example)] for example in examples]
        batch = pad([plain(each) for each in stored], self.reader.pad_id, self.model.safe_padding_side)
        counted = batch.mask.clone()
        counted[batch.mask] = torch.from_numpy(np.concatenate([self._counting(int(each)) for each in examples]))
        labels = {name: _grid(batch.mask, codes) for name, codes in self._codes_of(examples).items()}
        decoder = decoder_rows = None
        if self.model.is_encoder_decoder:
            decoder, decoder_rows = self._decoder(batch, stored, examples)
        rows = counted_rows(batch, counted, examples, labels)
        return Forward((), self.model.text_inputs(batch, decoder), examples, rows, decoder_rows, len(rows.example))

    def sample(self, tokens: int, seed: int) -> np.ndarray:
        """Ids of examples drawn at random that hold at most so many tokens, but of one at least; ascending."""
        some = np.arange(self.examples)
        return drawn(some if self.counted.all() else some[self.counted > 0], self.lengths, tokens, seed)

    def pieces(self) -> Iterator[np.ndarray]:
        """Ids of the tokens that count, some at a time."""
        if self._flags is not None:
            for stored, counted in zip(self._ids.pieces(), self._flags.pieces(), strict=True):
                yield plain(stored)[counted > 0]
            return
        for stored in self._ids.pieces():
            yield plain(stored) if self.special_tokens else stored[stored >= 0]

    # Sent to another process -----------------------------------------------------------------------

    def shell(self) -> Self:
        """All that does not grow with the tokens, and no model: with a `part`, another process can read that part."""
        shell = copy.copy(self)
        shell.__dict__.pop("model")
        shell.__dict__.pop("reader")
        shell.counts, shell.documents = self.counts[:0], None
        shell._ids = shell._flags = shell._targets = None  # type: ignore[assignment]
        shell._token_codes = {}
        return shell

    def part(self, examples: np.ndarray) -> dict[str, Any]:
        """What is stored of these examples."""
        return {
            "ids": self._ids.part(examples),
            "flags": None if self._flags is None else self._flags.part(examples),
            "targets": None if self._targets is None else self._targets.part(examples),
            "token_codes": {name: codes.part(examples) for name, codes in self._token_codes.items()},
        }

    def filled(self, part: Mapping[str, Any], model: Model) -> Self:
        """A shell with what is stored of some examples, which can be read now, and no others."""
        assert model.reader is not None
        filled = copy.copy(self)
        filled.model, filled.reader = model, model.reader
        filled._ids, filled._flags, filled._targets = part["ids"], part["flags"], part["targets"]
        filled._token_codes = part["token_codes"]
        return filled

    # Packed -----------------------------------------------------------------------------------------

    def _packed_batches(self, order: np.ndarray, batch_tokens: int, packing: Packing) -> list[np.ndarray]:
        batches: list[np.ndarray] = []
        waiting: list[np.ndarray] = []
        width = 0
        for line in packed_lines(order, self.lengths, packing.length):
            wider = max(width, int(self.lengths[line].sum()))
            if waiting and wider * (len(waiting) + 1) > batch_tokens:
                batches.append(np.concatenate(waiting))
                waiting, wider = [], int(self.lengths[line].sum())
            waiting.append(line)
            width = wider
        return [*batches, np.concatenate(waiting)] if waiting else batches

    def _packed(self, examples: np.ndarray, packing: Packing) -> Forward:
        lines = lines_of(self.lengths[examples], packing.length)
        sequences = [plain(self._ids[int(example)]) for example in examples]
        packed = packed_batch(sequences, lines, self.reader.pad_id)
        counted = packed.batch.mask.clone()
        counted[packed.batch.mask] = torch.from_numpy(
            np.concatenate([self._counting(int(example)) for example in examples])
        )
        labels = {name: _grid(packed.batch.mask, codes) for name, codes in self._codes_of(examples).items()}
        rows = counted_rows(packed.batch, counted, examples, labels, packed.owner)
        return Forward((), packed.inputs(self.model, packing.way), examples, rows, None, len(rows.example))

    # What is stored ---------------------------------------------------------------------------------

    def _counting(self, example: int) -> np.ndarray:
        """Which tokens of an example count, `[tokens]` bool."""
        if self._flags is not None:
            return self._flags[example] > 0
        return np.ones(len(self._ids[example]), bool) if self.special_tokens else self._ids[example] >= 0

    def _codes_of(self, examples: np.ndarray) -> dict[str, np.ndarray]:
        """Token label -> codes of all tokens of the examples, one after the other."""
        return {
            name: np.concatenate([codes[int(example)] for example in examples]).astype(np.int64)
            for name, codes in self._token_codes.items()
        }

    def _decoder(self, batch: PaddedBatch, stored: list[np.ndarray], examples: np.ndarray) -> tuple[PaddedBatch, Rows]:
        """What the decoder reads of the batch: the targets (by default the texts), shifted by the start token."""
        counting = [self._counting(int(example)) for example in examples]
        eligible = [np.ones(len(each), bool) if self.special_tokens else each >= 0 for each in stored]
        codes = {name: [each[int(example)] for example in examples] for name, each in self._token_codes.items()}
        if self._targets is not None:
            stored = [self._targets[int(example)] for example in examples]
            batch = pad([plain(each) for each in stored], self.reader.pad_id)
            eligible = [np.ones(len(each), bool) if self.special_tokens else each >= 0 for each in stored]
            # Labels of words belong to the text, and the decoder reads another.
            codes = {name: [np.full(len(each), self._unlabelled(name)) for each in stored] for name in codes}
        decoder = self.model.shifted(batch)
        counted = decoder.mask.clone()
        # The start token is nobody's text: it counts where all special tokens do.
        start = self.special_tokens and self.positions == "all"
        # The decoder never reads the last token of what it writes.
        shifted = [_shifted(start, each) for each in eligible]
        if self.positions == "last":
            shifted = [last_of(each & flags.any()) for each, flags in zip(shifted, counting, strict=True)]
        elif self._targets is None and self._flags is not None:
            shifted = [_shifted(start, each) for each in counting]
        counted[decoder.mask] = torch.from_numpy(np.concatenate(shifted))
        labels = {
            name: _grid(decoder.mask, np.concatenate([_shifted(self._unlabelled(name), each) for each in of_label]))
            for name, of_label in codes.items()
        }
        return decoder, counted_rows(decoder, counted, examples, labels)

    def _unlabelled(self, name: str) -> int:
        return len(self.labels[name]) - 1


def plain(stored: np.ndarray) -> np.ndarray:
    """Token ids from what is stored: special tokens are stored as -1 - id."""
    return np.where(stored < 0, -1 - stored, stored).astype(np.int64)


def _shifted(first: int | bool, values: np.ndarray) -> np.ndarray:
    """What a decoder reads when it writes `values`: all but the last, behind the start token."""
    return np.concatenate([np.asarray([first], values.dtype), values[:-1]])


def _grid(mask: torch.Tensor, codes: np.ndarray) -> torch.Tensor:
    """Codes of the tokens one after the other, in the rectangle of the batch. `[lines, length]` int64."""
    grid = torch.zeros(mask.shape, dtype=torch.int64)
    grid[mask] = torch.from_numpy(codes.astype(np.int64))
    return grid
