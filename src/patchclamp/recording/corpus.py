"""The data as the model reads it: token ids (or tensors) by example, in batches of similar length.

Texts are tokenized once. The ids go to a temporary file (4 bytes a token), so memory does not grow
with the corpus, and lengths, frequencies and hashes of all of it are known before the first forward pass.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from patchclamp.data import Tensors, Texts
from patchclamp.errors import DataError, ModelError
from patchclamp.model.model import Model
from patchclamp.model.signature import parameters
from patchclamp.model.tokenize import Encoded, PaddedBatch, TokenReader, pad, require_tokenizer
from patchclamp.progress import Progress
from patchclamp.recording.ragged import Ragged

_TEXTS_AT_ONCE = 1000


class Rows(NamedTuple):
    """Which positions of a batch count, and what they are. `flat` points into the batch's `[examples * length]`."""

    shape: tuple[int, int]
    flat: torch.Tensor | None  # [rows] int64; None: every position counts
    example: torch.Tensor  # [rows] int64
    position: torch.Tensor  # [rows] int64
    token: torch.Tensor | None  # [rows] int64
    row: torch.Tensor  # [rows] int64: which example of the batch


@dataclass(frozen=True)
class Forward:
    """One forward pass: what to call the module with, and which of its positions count, by stack."""

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    examples: np.ndarray  # [batch] ids
    rows: Rows | None  # None: tensors, whose positions are known only when a site has been read
    decoder_rows: Rows | None
    tokens: int


class TextCorpus:
    """Tokenized texts. Made by `tokenize`.

    Attributes:
        name: of the data.
        labels: label -> categories.
        codes: label -> `[examples]` int32, the category of each example.
        lengths: `[examples]` int64, tokens of each example, special ones included.
        counts: `[vocabulary]` int64, how often each token counts.
        truncated: how many texts were cut at `max_length`.
        sha256: hash of texts, labels and targets.
        tokens_sha256: hash of the token ids that the tokenizer made of them.
    """

    def __init__(self, model: Model, reader: TokenReader, data: Texts, special_tokens: bool) -> None:
        self.name, self.labels = data.name, data.labels
        self.model, self.reader, self.special_tokens = model, reader, special_tokens
        self.codes: dict[str, np.ndarray] = {}
        self.lengths = np.zeros(0, np.int64)
        self.counts = np.zeros(0, np.int64)
        self.truncated = 0
        self.sha256 = self.tokens_sha256 = ""
        self._widths = self.lengths
        self._ids = Ragged()
        self._targets: Ragged | None = None

    @property
    def examples(self) -> int:
        """Number of examples."""
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Number of tokens that count."""
        return int(self.counts.sum())

    def ids(self, example: int, decoder: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of one example as the model (or its decoder) reads them, int64, and which of them count, bool."""
        stored = self._ids[example]
        counted = np.ones(len(stored), bool) if self.special_tokens else stored >= 0
        if not decoder:
            return _plain(stored), counted
        read = self.forward(np.asarray([example]))
        assert read.decoder_rows is not None
        length = read.decoder_rows.shape[1]
        counted = np.zeros(length, bool)
        counted[read.decoder_rows.position.numpy()] = True
        return read.keywords["decoder_input_ids"][0].cpu().numpy(), counted

    def most_frequent(self, number: int) -> np.ndarray:
        """Ids of the most frequent tokens that count, most frequent first, ties by id. `[<= number]` int64."""
        order = np.lexsort((np.arange(len(self.counts)), -self.counts))[:number]
        return order[self.counts[order] > 0].astype(np.int64)

    def batches(self, batch_tokens: int, of: Sequence[int] | np.ndarray | None = None) -> list[np.ndarray]:
        """Example ids grouped by length, longest first, so that no batch exceeds `batch_tokens` padded tokens.

        A single longer text makes a batch of its own.
        """
        chosen = np.arange(self.examples) if of is None else np.asarray(of)
        order = chosen[np.lexsort((chosen, -self._widths[chosen]))]
        batches, start = [], 0
        while start < len(order):
            width = max(int(self._widths[order[start]]), 1)
            stop = start + max(1, batch_tokens // width)
            batches.append(order[start:stop])
            start = stop
        return batches

    def forward(self, examples: np.ndarray) -> Forward:
        """Pad the examples into one batch."""
        stored = [self._ids[int(example)] for example in examples]
        batch = pad([_plain(each) for each in stored], self.reader.pad_id, self.model.safe_padding_side)
        counted = batch.mask.clone()
        if not self.special_tokens:
            counted[batch.mask] = torch.from_numpy(np.concatenate(stored) >= 0)
        decoder = decoder_rows = None
        if self.model.is_encoder_decoder:
            decoder, decoder_rows = self._decoder(batch, stored, examples)
        rows = _rows(batch, counted, examples)
        return Forward((), self.model.text_inputs(batch, decoder), examples, rows, decoder_rows, len(rows.example))

    def sample(self, tokens: int, seed: int) -> np.ndarray:
        """Ids of examples drawn at random that hold at most so many tokens, but of one at least; ascending."""
        order = np.random.default_rng(seed).permutation(self.examples)
        enough = int(np.searchsorted(np.cumsum(self.lengths[order]), tokens, side="right"))
        return np.sort(order[: max(enough, 1)])

    def _decoder(self, batch: PaddedBatch, stored: list[np.ndarray], examples: np.ndarray) -> tuple[PaddedBatch, Rows]:
        """What the decoder reads of the batch: the targets (by default the texts), shifted by the start token."""
        if self._targets is not None:
            stored = [self._targets[int(example)] for example in examples]
            batch = pad([_plain(each) for each in stored], self.reader.pad_id)
        decoder = self.model.shifted(batch)
        counted = decoder.mask.clone()
        if not self.special_tokens:
            # The start token is nobody's text.
            flags = [np.concatenate([[False], each[:-1] >= 0]) for each in stored]
            counted[decoder.mask] = torch.from_numpy(np.concatenate(flags))
        return decoder, _rows(decoder, counted, examples)


class TensorCorpus:
    """Tensors `[examples, ...]`; a batch holds as many examples as `batch_tokens` asks for."""

    special_tokens = True
    truncated = 0

    def __init__(self, model: Model, data: Tensors) -> None:
        self.name, self.labels, self.model, self.values = data.name, data.labels, model, data.values
        codes = _Codes(self.labels)
        for example in data:
            codes.add(example.labels)
        self.codes = codes.arrays()
        self.examples = len(data)
        self._is_ids = not data.values.is_floating_point() and data.values.ndim == 2
        self._main = getattr(model.module, "main_input_name", None) if hasattr(model.module, "config") else None
        # A row of numbers is one position, a sequence of ids as many as it is long; an image is not known before.
        self._positions = int(data.values.shape[1]) if self._is_ids else 1 if data.values.ndim == 2 else 128
        self.lengths = np.full(self.examples, self._positions, np.int64)
        ids = data.values.reshape(-1).cpu().numpy() if self._is_ids else np.zeros(0, np.int64)
        self.counts = np.bincount(ids[ids >= 0]).astype(np.int64) if self._is_ids else np.zeros(0, np.int64)
        self.tokens = int(self.lengths.sum()) if data.values.ndim == 2 else self.examples
        self.sha256 = self.tokens_sha256 = _hash_of_tensors(data, self.codes)

    most_frequent = TextCorpus.most_frequent
    sample = TextCorpus.sample

    def batches(self, batch_tokens: int, of: Sequence[int] | np.ndarray | None = None) -> list[np.ndarray]:
        """Example ids in order, in groups."""
        chosen = np.arange(self.examples) if of is None else np.asarray(of)
        width = max(1, batch_tokens // max(1, self._positions))
        return [chosen[start : start + width] for start in range(0, len(chosen), width)]

    def forward(self, examples: np.ndarray) -> Forward:
        """The examples as one tensor, on the model's device."""
        values = self.values[torch.from_numpy(examples)].to(self.model.device)
        arguments = () if self._main else (values,)
        keywords = {self._main: values} if self._main else {}
        rows = None
        tokens = len(examples)
        if self._is_ids:
            length = values.shape[1]
            mask = torch.ones(values.shape, dtype=torch.bool)
            position = torch.arange(length).expand(len(examples), -1)
            rows = _rows(PaddedBatch(values.cpu(), mask, position), mask, examples)
            tokens = len(rows.example)
        return Forward(arguments, keywords, examples, rows, rows, tokens)

    def ids(self, example: int, decoder: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of one example, where the tensors are ids (else none), and that all of them count."""
        ids = self.values[example].cpu().numpy().astype(np.int64) if self._is_ids else np.zeros(0, np.int64)
        return ids, np.ones(len(ids), bool)


Corpus = TextCorpus | TensorCorpus


def tokenize(
    model: Model,
    data: Texts,
    max_length: int | None,
    special_tokens: bool = False,
    bar: Progress | None = None,
) -> TextCorpus:
    """Read all texts once.

    Raises:
        DataError: a text without tokens (its index is named), an empty corpus, a wrong `max_length`.
        ModelError: the model has no tokenizer, or takes no token ids.
    """
    reader = require_tokenizer(model.reader, "a corpus of texts")
    if "input_ids" not in (taken := parameters(model.module)):
        listed = ", ".join(taken) or "nothing by name"
        raise ModelError(
            f"{type(model.module).__name__} cannot read texts: its forward takes {listed}, and not input_ids. "
            "Give it tensors: pc.Tensors(values)"
        )
    if max_length is not None and max_length < 1:
        raise DataError(f"max_length is a number of tokens, at least 1; not {max_length}")
    if max_length is not None and reader.max_length is not None and max_length > reader.max_length:
        raise DataError(f"max_length={max_length} is more than the model and its tokenizer take: {reader.max_length}")
    corpus = TextCorpus(model, reader, data, special_tokens)
    digest = hashlib.sha256()
    codes = _Codes(corpus.labels)
    for chunk in _chunks(data, _TEXTS_AT_ONCE):
        first = len(corpus._ids)
        for offset, encoded in enumerate(reader.encode([each.text for each in chunk], max_length)):
            where = f"text {first + offset} of {data.name}"
            _check_tokens(encoded, chunk[offset].text, where, max_length, special_tokens)
            corpus._ids.append(_stored(encoded))
            corpus.truncated += encoded.truncated
        _encode_targets(corpus, chunk, reader, max_length, first)
        for each in chunk:
            _feed(
                digest,
                each.text,
                each.target,
                *(part for pair in sorted(each.labels.items()) for part in pair),
            )
            codes.add(each.labels)
        if bar is not None:
            bar.advance(len(chunk))
    corpus.lengths = corpus._widths = corpus._ids.finish()
    corpus.tokens_sha256 = corpus._ids.sha256
    if corpus._targets is not None:
        corpus._widths = np.maximum(corpus.lengths, corpus._targets.finish())
        corpus.tokens_sha256 += corpus._targets.sha256
    if not corpus.examples:
        raise DataError(f"no examples in {data.name}")
    corpus.codes = codes.arrays()
    corpus.counts = _count(corpus, reader)
    corpus.sha256 = digest.hexdigest()
    return corpus


def _check_tokens(encoded: Encoded, text: str, where: str, max_length: int | None, special_tokens: bool) -> None:
    empty = not encoded.ids or (all(encoded.special) and not special_tokens)
    # A tokenizer that has no room for its own special tokens cuts nothing at all.
    if max_length is not None and (len(encoded.ids) > max_length or (empty and encoded.truncated)):
        raise DataError(
            f"max_length={max_length} leaves no room for {where}: "
            f"the tokenizer adds {sum(encoded.special)} special tokens"
        )
    if empty:
        raise DataError(f"{where} has no tokens: {text if len(text) <= 60 else text[:60] + '...'!r}")


def _encode_targets(
    corpus: TextCorpus, chunk: Sequence[Any], reader: TokenReader, max_length: int | None, first: int
) -> None:
    given = [each.target for each in chunk]
    if all(target is None for target in given):
        return
    if corpus._targets is None:
        corpus._targets = Ragged()
    for offset, encoded in enumerate(reader.encode([target or "" for target in given], max_length)):
        if not encoded.ids:
            raise DataError(f"target {first + offset} of {corpus.name} has no tokens")
        corpus._targets.append(_stored(encoded))


def _rows(batch: PaddedBatch, counted: torch.Tensor, examples: np.ndarray) -> Rows:
    flat = counted.reshape(-1).nonzero().squeeze(1)
    height, length = counted.shape
    row = flat // length
    return Rows(
        (height, length),
        None if len(flat) == height * length else flat,
        torch.from_numpy(examples.astype(np.int64))[row],
        batch.position.reshape(-1)[flat],
        batch.ids.reshape(-1)[flat],
        row,
    )


def _stored(encoded: Encoded) -> np.ndarray:
    # Special tokens are stored as -1 - id.
    return np.where(encoded.special, -1 - np.asarray(encoded.ids), encoded.ids)


def _plain(stored: np.ndarray) -> np.ndarray:
    return np.where(stored < 0, -1 - stored, stored).astype(np.int64)


def _count(corpus: TextCorpus, reader: TokenReader) -> np.ndarray:
    total = np.zeros(0, np.int64)
    for stored in corpus._ids.pieces():
        ids = _plain(stored) if corpus.special_tokens else stored[stored >= 0]
        counts = np.bincount(ids, minlength=len(total)).astype(np.int64)
        counts[: len(total)] += total
        total = counts
    return total


class _Codes:
    """Label values as numbers, four bytes an example."""

    def __init__(self, labels: Mapping[str, tuple[str, ...]]) -> None:
        self._place = {name: {category: code for code, category in enumerate(each)} for name, each in labels.items()}
        self._codes = {name: array("i") for name in labels}

    def add(self, labels: Mapping[str, str]) -> None:
        for name, codes in self._codes.items():
            codes.append(self._place[name][labels[name]])

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: np.asarray(each, np.int32) for name, each in self._codes.items()}


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _feed(digest: Any, *parts: str | None) -> None:
    for part in parts:
        data = b"" if part is None else part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + (b"\0" if part is None else b"\1") + data)


def _hash_of_tensors(data: Tensors, codes: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(f"{tuple(data.values.shape)} {data.values.dtype}".encode())
    flat = data.values.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().data)
    for name in sorted(codes):
        _feed(digest, name, *data.labels[name])
        digest.update(codes[name].tobytes())
    return digest.hexdigest()
