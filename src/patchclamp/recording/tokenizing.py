"""`tokenize`: read all texts once, and keep what the model will read of them."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from patchclamp.data import Chats, Example, Texts
from patchclamp.data.chats import RESPONSE, ROLE
from patchclamp.data.token_labels import Span
from patchclamp.errors import DataError, ModelError
from patchclamp.model.model import Model
from patchclamp.model.signature import parameters
from patchclamp.model.tokenize import Encoded, TokenReader, require_tokenizer
from patchclamp.progress import Progress
from patchclamp.recording.codes import Codes, code_of, feed, places
from patchclamp.recording.documents import DocumentWriter, windows
from patchclamp.recording.folds import fold_of_content
from patchclamp.recording.positions import Positions
from patchclamp.recording.ragged import Ragged
from patchclamp.recording.text_corpus import TextCorpus

_TEXTS_AT_ONCE = 1000

LongTexts = Literal["cut", "windows"]


@dataclass(frozen=True)
class Reading:
    """How texts are read.

    Attributes:
        max_length: longest text in tokens, special ones included; None: what model and tokenizer can take.
        special_tokens: whether the tokens that the tokenizer adds count.
        long_texts: "cut" at `max_length`, or read in "windows".
        overlap: of the windows, in tokens.
        positions: which tokens count.
    """

    max_length: int | None = None
    special_tokens: bool = False
    long_texts: LongTexts = "cut"
    overlap: int = 0
    positions: Positions = field(default_factory=lambda: Positions("all"))

    def limit(self, reader: TokenReader) -> int | None:
        """The longest text in tokens.

        Raises:
            DataError: `max_length`, `long_texts` or `overlap` make no sense for this model.
        """
        if self.max_length is not None and self.max_length < 1:
            raise DataError(f"max_length is a number of tokens, at least 1; not {self.max_length}")
        if self.max_length is not None and reader.max_length is not None and self.max_length > reader.max_length:
            raise DataError(
                f"max_length={self.max_length} is more than the model and its tokenizer take: {reader.max_length}"
            )
        limit = reader.max_length if self.max_length is None else self.max_length
        if self.long_texts not in ("cut", "windows"):
            raise DataError(f"long_texts is 'cut' or 'windows', not {self.long_texts!r}")
        if isinstance(self.overlap, bool) or not isinstance(self.overlap, int) or self.overlap < 0:
            raise DataError(f"overlap is a number of tokens, at least 0; not {self.overlap!r}")
        if self.overlap and self.long_texts == "cut":
            raise DataError("overlap belongs to long_texts='windows': texts that are cut have no windows")
        if self.long_texts == "windows" and limit is None:
            raise DataError(
                "long_texts='windows': neither model nor tokenizer says how long a window is; max_length does"
            )
        return limit


def tokenize(
    model: Model, data: Texts | Chats, reading: Reading | None = None, bar: Progress | None = None
) -> TextCorpus:
    """Read all texts once.

    Raises:
        DataError: a text without tokens (its index is named), an empty corpus, a wrong `max_length`, windows without
            room, labels that do not fit, no position that counts.
        ModelError: the model has no tokenizer, takes no token ids, or its tokenizer cannot say what tokens are made of.
    """
    reading = reading or Reading()
    reader = require_tokenizer(model.reader, "a corpus of texts")
    if "input_ids" not in (taken := parameters(model.module)):
        listed = ", ".join(taken) or "nothing by name"
        raise ModelError(
            f"{type(model.module).__name__} cannot read texts: its forward takes {listed}, and not input_ids. "
            "Give it tensors: pc.Tensors(values)"
        )
    writer = _Writer(model, reader, data, reading)
    examples = data.rendered(model.tokenizer) if isinstance(data, Chats) else data
    for chunk in _chunks(examples, _TEXTS_AT_ONCE):
        writer.add(chunk)
        if bar is not None:
            bar.advance(len(chunk))
    return writer.finish()


class _Writer:
    """Encodes texts and adds them to a corpus."""

    def __init__(self, model: Model, reader: TokenReader, data: Texts | Chats, reading: Reading) -> None:
        self.reader, self.reading, self.data = reader, reading, data
        self.limit = reading.limit(reader)
        reading.positions.check(data)
        self.corpus = TextCorpus(model, reader, data.name, reading.special_tokens)
        self.corpus.limit = self.limit
        self.corpus.positions = reading.positions.kind
        self.of_tokens = data.token_labels
        if self.of_tokens and not reader.has_offsets:
            reader.encode([""], offsets=True)  # says why not
        self.corpus.token_labels = tuple(self.of_tokens)
        self.corpus.labels = data.labels | self.of_tokens
        self.corpus._token_codes = {label: Ragged() for label in self.of_tokens}
        if reading.long_texts == "windows" or reading.positions.kind != "all":
            self.corpus._flags = Ragged()
        self.documents = DocumentWriter() if reading.long_texts == "windows" else None
        self.codes = Codes(data.labels)
        self.places = places(self.of_tokens)
        self.digest = hashlib.sha256()
        self.counted = array("q")
        self.folds = array("B")
        self.read = 0

    def add(self, chunk: Sequence[Example]) -> None:
        """Add some texts."""
        encoded = self.reader.encode(
            [each.text for each in chunk],
            self.reading.max_length,
            whole=self.documents is not None,
            ready=isinstance(self.data, Chats),
            offsets=bool(self.of_tokens),
        )
        for example, of_text in zip(chunk, encoded, strict=True):
            self._add(example, of_text, f"text {self.read} of {self.data.name}")
            feed(
                self.digest,
                example.text,
                example.target,
                *(part for pair in sorted(example.labels.items()) for part in pair),
            )
            for label, spans in sorted(example.token_labels.items()):
                feed(self.digest, label, *(f"{each.start} {each.end} {each.label}" for each in spans))
            self.read += 1
        self._add_targets(chunk)

    def finish(self) -> TextCorpus:
        """The corpus, to be read."""
        corpus = self.corpus
        corpus.lengths = corpus._widths = corpus._ids.finish()
        corpus.tokens_sha256 = corpus._ids.sha256
        for each in (corpus._flags, *corpus._token_codes.values()):
            if each is not None:
                each.finish()
        if corpus._targets is not None:
            corpus._widths = np.maximum(corpus.lengths, corpus._targets.finish())
            corpus.tokens_sha256 += corpus._targets.sha256
        if not corpus.examples:
            raise DataError(f"no examples in {self.data.name}")
        corpus.counted = np.asarray(self.counted, np.int64)
        corpus.folds = np.asarray(self.folds, np.uint8)
        if not corpus.counted.any():
            raise DataError(f"positions chose no token of {self.data.name}: nothing is left to count")
        if self.documents is not None:
            corpus.documents = self.documents.finish()
        corpus.codes = self.codes.arrays()
        corpus.counts = _count(corpus)
        corpus.sha256 = self.digest.hexdigest()
        return corpus

    def _add(self, example: Example, encoded: Encoded, where: str) -> None:
        self._check_tokens(encoded, example.text, where)
        special = np.asarray(encoded.special, bool)
        codes = {
            label: _codes(encoded, example.text, example.token_labels[label], self.places[label], label, where)
            for label in self.of_tokens
        }
        eligible = np.ones(len(special), bool) if self.reading.special_tokens else ~special
        roles = None
        if self.reading.positions.kind == "response":
            roles = codes[ROLE] == self.places[ROLE][RESPONSE]
        counted = self.reading.positions.chosen(
            example, lambda: self.reader.strings(encoded.ids), eligible, roles, where
        )
        # Special tokens are stored as -1 - id.
        stored = np.where(special, -1 - np.asarray(encoded.ids, np.int64), encoded.ids)
        self.corpus.truncated += encoded.truncated
        if self.documents is None:
            self._store(stored, counted, codes, example, where)
            return
        assert self.limit is not None
        for piece in windows(encoded, self.limit, self.reading.overlap, where):
            of_piece = counted[piece.tokens]
            if piece.repeated:
                of_piece[np.flatnonzero(~special[piece.tokens])[: piece.repeated]] = False
            self.documents.add(self.read, piece.start)
            of_label = {label: each[piece.tokens] for label, each in codes.items()}
            self._store(stored[piece.tokens], of_piece, of_label, example, where)

    def _store(
        self, stored: np.ndarray, counted: np.ndarray, codes: Mapping[str, np.ndarray], example: Example, where: str
    ) -> None:
        self.corpus._ids.append(stored)
        if self.corpus._flags is not None:
            self.corpus._flags.append(counted)
        for label, each in codes.items():
            self.corpus._token_codes[label].append(each)
        self.counted.append(int(counted.sum()))
        self.folds.append(fold_of_content(example.text.encode("utf-8", "surrogatepass")))
        self.codes.add(example.labels, where)

    def _check_tokens(self, encoded: Encoded, text: str, where: str) -> None:
        empty = not encoded.ids or (all(encoded.special) and not self.reading.special_tokens)
        max_length = self.reading.max_length
        # A tokenizer that has no room for its own special tokens cuts nothing at all.
        too_long = max_length is not None and len(encoded.ids) > max_length and self.documents is None
        if too_long or (max_length is not None and empty and encoded.truncated):
            raise DataError(
                f"max_length={max_length} leaves no room for {where}: "
                f"the tokenizer adds {sum(encoded.special)} special tokens"
            )
        if empty:
            raise DataError(f"{where} has no tokens: {text if len(text) <= 60 else text[:60] + '...'!r}")

    def _add_targets(self, chunk: Sequence[Example]) -> None:
        given = [each.target for each in chunk]
        if all(target is None for target in given):
            return
        if self.documents is not None:
            raise DataError("long_texts='windows': a window of a text has no target of its own; leave out targets=")
        if self.reading.positions.kind == "callable":
            raise DataError("positions= is a function of the text, and the decoder reads targets: which is meant?")
        if self.corpus._targets is None:
            self.corpus._targets = Ragged()
        first = self.read - len(chunk)
        for offset, encoded in enumerate(self.reader.encode([each or "" for each in given], self.reading.max_length)):
            if not encoded.ids:
                raise DataError(f"target {first + offset} of {self.data.name} has no tokens")
            self.corpus._targets.append(np.where(encoded.special, -1 - np.asarray(encoded.ids), encoded.ids))


def _codes(
    encoded: Encoded, text: str, spans: Sequence[Span], place: Mapping[str, int], label: str, where: str
) -> np.ndarray:
    """The code of each token: of the span that covers its first character that is no space. `[tokens]` int32."""
    assert encoded.offsets is not None
    codes = np.full(len(encoded.ids), len(place) - 1, np.int32)
    starts = np.asarray([each.start for each in spans], np.int64)
    for token, (start, end) in enumerate(encoded.offsets):
        while start < end and text[start].isspace():
            start += 1
        if start >= end:
            continue
        number = int(np.searchsorted(starts, start, side="right")) - 1
        if number >= 0 and start < spans[number].end:
            codes[token] = code_of(place, spans[number].label, label, where)
    return codes


def _count(corpus: TextCorpus) -> np.ndarray:
    total = np.zeros(0, np.int64)
    for ids in corpus.pieces():
        counts = np.bincount(ids, minlength=len(total)).astype(np.int64)
        counts[: len(total)] += total
        total = counts
    return total


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
