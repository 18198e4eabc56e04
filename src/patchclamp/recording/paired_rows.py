"""What two models do on the same rows: run side by side over the same data, or read from two recordings."""

from __future__ import annotations

import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from patchclamp.errors import DataError, unknown
from patchclamp.model.model import Model
from patchclamp.model.site import Site
from patchclamp.recording.activation_store import StoredActivations
from patchclamp.recording.batch import Batch
from patchclamp.recording.corpus import Corpus, TextCorpus
from patchclamp.recording.recording import Recording
from patchclamp.recording.stream import stream

Per = Literal["token", "example"]
Paired = tuple[list[torch.Tensor], list[torch.Tensor]]

_STORED_ROWS = 4096
_INDICES_AT_ONCE = 1 << 16
_POOL = "per='example' correlates the means over each example's rows instead"


class PairedRows(ABC):
    """Both models' activations on the same rows, which can be gone through several times.

    Attributes:
        sizes: of each model, site -> number of neurons.
        dtypes: of the activations of each model.
        rows: about how many rows there are.
        left_out: rows that were left out in the last pass, because an activation was NaN or infinite.
        pass_in_words: what one pass costs.
    """

    sizes: tuple[dict[str, int], dict[str, int]]
    dtypes: tuple[torch.dtype, torch.dtype]
    rows: int
    left_out: int = 0
    pass_in_words: str

    @abstractmethod
    def read(self, columns: slice) -> Iterator[Paired]:
        """One pass over all rows that are finite.

        Args:
            columns: which neurons of the first model, all its sites side by side; of the second it is all.

        Returns:
            For some rows at a time, tensors `[rows, some]` that side by side are the first model's, and the second's.
        """


class ModelRows(PairedRows):
    """Two models that are run side by side.

    Args:
        models: both.
        corpora: the same data, as each of them reads it.
        sites: of each.
        batch_tokens: padded tokens of one forward pass of the first model.
        per: rows are tokens, or means over examples.

    Raises:
        DataError: the tokens of the texts are not the same, and rows are tokens.
    """

    def __init__(
        self,
        models: tuple[Model, Model],
        corpora: tuple[Corpus, Corpus],
        sites: tuple[list[Site], list[Site]],
        batch_tokens: int,
        per: Per,
    ) -> None:
        self._models, self._corpora, self._sites = models, corpora, sites
        self._per: Per = per
        first, second = corpora
        both = None
        if isinstance(first, TextCorpus) and isinstance(second, TextCorpus):
            if per == "token":
                _check_tokens(first, second, [model.name for model in models])
            both = np.flatnonzero((first.counted > 0) & (second.counted > 0))
            if not len(both):
                raise DataError("no example has a token that counts for both models")
        self._batches = first.batches(batch_tokens, both)
        tokens = first.tokens if isinstance(first, TextCorpus) else int(first.lengths.sum())
        self.rows = tokens if per == "token" else first.examples
        names = " and ".join(dict.fromkeys(model.name for model in models))
        self.pass_in_words = f"a pass runs {names} over {first.examples:,} examples, {first.tokens:,} tokens"
        # How many neurons some sites have, only a forward pass says. The last batch is that of the shortest texts.
        seen = next(self._read(self._batches[-1:]))
        self.sizes = (_sizes(sites[0], seen[0]), _sizes(sites[1], seen[1]))
        self.dtypes = (seen[0][0].dtype, seen[1][0].dtype)

    def read(self, columns: slice) -> Iterator[Paired]:
        """One pass."""
        self.left_out = 0
        for first, second in self._read(self._batches):
            finite = _finite([*first, *second])
            if finite is not None:
                self.left_out += int((~finite).sum())
                first, second = ([each[finite.to(each.device)] for each in side] for side in (first, second))
            yield [each[:, part] for each, part in _within(first, columns)], second

    def _read(self, batches: Sequence[np.ndarray]) -> Iterator[Paired]:
        """Every site of both, all rows."""
        streams = (stream(*each, batches) for each in zip(self._models, self._corpora, self._sites, strict=True))
        for reads in zip(*streams, strict=True):
            sides = [
                [read.batches[site.name] for site in of_model]
                for read, of_model in zip(reads, self._sites, strict=True)
            ]
            if self._per == "example":
                sides = [[_pooled(each) for each in side] for side in sides]
            names = [
                (model.name, site.name) for model, own in zip(self._models, self._sites, strict=True) for site in own
            ]
            every = [each for side in sides for each in side]
            for name, each in zip(names, every, strict=True):
                _check_rows(names[0], every[0], name, each, self._per)
            yield [each.values for each in sides[0]], [each.values for each in sides[1]]


class RecordedRows(PairedRows):
    """Two recordings that kept every activation.

    Args:
        recordings: both.
        sites: names or globs, of each.
        per: rows are tokens, or means over examples.

    Raises:
        UnknownName: a site that was not recorded.
        DataError: activations were not kept, or the recordings are of other data or rows.
    """

    def __init__(self, recordings: tuple[Recording, Recording], sites: tuple[Any, Any], per: Per) -> None:
        data = [each.facts["data"] for each in recordings]
        if data[0]["sha256"] != data[1]["sha256"]:
            raise DataError(
                f"the recordings are of different data, {data[0].get('name')!r} and {data[1].get('name')!r}"
            )
        self._per: Per = per
        self._kept = tuple(_kept(*each) for each in zip(recordings, sites, strict=True))
        self.sizes = (_stored_sizes(self._kept[0]), _stored_sizes(self._kept[1]))
        self.dtypes = (_dtype(self._kept[0]), _dtype(self._kept[1]))
        every = [(name, each) for side in self._kept for name, each in side.items()]
        for name, each in every[1:]:
            _check_stored(every[0], (name, each), per)
        self._examples = every[0][1].example[:]
        self.rows = len(self._examples) if per == "token" else len(np.unique(self._examples))
        # Which rows are left out must not depend on which neurons a pass is about.
        self._clean = not any(
            recording[name].nonfinite["rows"]
            for recording, side in zip(recordings, self._kept, strict=True)
            for name in side
        )
        width = sum(sum(each.values()) for each in self.sizes)
        nbytes = len(self._examples) * width * self.dtypes[0].itemsize
        self.pass_in_words = f"a pass reads up to {nbytes / 1e9:.3g} GB of activations"

    def read(self, columns: slice) -> Iterator[Paired]:
        """One pass."""
        self.left_out = 0
        for rows in self._parts():
            first = self._side(0, rows, columns if self._clean else None)
            second = self._side(1, rows, None)
            if not self._clean:
                finite = _finite([*first, *second])
                if finite is not None:
                    self.left_out += int((~finite).sum())
                    first, second = ([each[finite] for each in side] for side in (first, second))
                first = [each[:, part] for each, part in _within(first, columns)]
            yield first, second

    def _side(self, side: int, rows: slice, columns: slice | None) -> list[torch.Tensor]:
        found, start = [], 0
        for name, kept in self._kept[side].items():
            size = self.sizes[side][name]
            part = slice(0, size) if columns is None else slice(max(0, columns.start - start), columns.stop - start)
            start += size
            if part.stop <= 0 or part.start >= size:
                continue
            values = torch.from_numpy(kept.values[rows])[:, part]
            if self._per == "example":
                example = torch.from_numpy(kept.example[rows])
                values = _pooled(Batch(values, example, torch.zeros_like(example))).values
            found.append(values)
        return found

    def _parts(self) -> Iterator[slice]:
        """Rows at a time: whole chunks of the store; where examples are pooled, whole examples."""
        total, start = len(self._examples), 0
        while start < total:
            stop = min(total, start + _STORED_ROWS)
            if self._per == "example" and stop < total:
                before = np.flatnonzero(np.diff(self._examples[start : stop + 1])) + 1
                if len(before):
                    stop = start + int(before[-1])
                else:  # one example, longer than that
                    later = np.flatnonzero(self._examples[stop:] != self._examples[start])
                    stop = stop + int(later[0]) if len(later) else total
            yield slice(start, stop)
            start = stop


# The same rows --------------------------------------------------------------------------------------


def _check_tokens(first: TextCorpus, second: TextCorpus, names: Sequence[str]) -> None:
    """Say before the pass which text the tokenizers cut differently."""
    if first.tokens_sha256 == second.tokens_sha256 and np.array_equal(first.counted, second.counted):
        return
    for example in range(first.examples):
        ids, others = (each.ids(example) for each in (first, second))
        if not np.array_equal(ids[0][ids[1]], others[0][others[1]]):
            raise DataError(
                f"{names[0]} and {names[1]} do not read the same tokens: of text {example}, {int(ids[1].sum())} tokens "
                f"count for the one and {int(others[1].sum())} for the other, or they are others; so which rows belong "
                f"together cannot be said. {_POOL}"
            )


def _check_rows(name: tuple[str, str], one: Batch, other_name: tuple[str, str], other: Batch, per: Per) -> None:
    tokens = one.token is not None and other.token is not None
    pairs = [(one.example, other.example)]
    if per == "token":
        pairs.append((one.token, other.token) if tokens else (one.position, other.position))  # type: ignore[arg-type]
    if not all(torch.equal(here, there.to(here.device)) for here, there in pairs):
        what = "examples" if per == "example" else "rows (examples and tokens)"
        raise DataError(
            f"{name[1]} of {name[0]} has {len(one)} rows where {other_name[1]} of {other_name[0]} has {len(other)}, or "
            f"others: neurons can be correlated only on the same {what}" + ("" if per == "example" else f". {_POOL}")
        )


def _check_stored(one: tuple[str, StoredActivations], other: tuple[str, StoredActivations], per: Per) -> None:
    (name, here), (other_name, there) = one, other
    same = len(here.example) == len(there.example)
    for start in range(0, len(here.example), _INDICES_AT_ONCE) if same else ():
        part = slice(start, start + _INDICES_AT_ONCE)
        same = same and np.array_equal(here.example[part], there.example[part])
        if per == "token":
            tokens = here.token[part], there.token[part]
            without = bool((tokens[0] < 0).any() or (tokens[1] < 0).any())
            places = (here.position[part], there.position[part]) if without else tokens
            same = same and np.array_equal(places[0], places[1])
    if not same:
        raise DataError(
            f"{name} of the first recording has {len(here.example):,} rows where {other_name} has "
            f"{len(there.example):,}, or others: neurons can be correlated only on the same rows. Give the models and "
            "data; there, per='example' correlates means over examples"
        )


# Helpers --------------------------------------------------------------------------------------------


def _pooled(batch: Batch) -> Batch:
    """One row an example: the mean."""
    ids, first, count = batch.spans
    total = torch.zeros(len(ids), batch.size, dtype=torch.float64, device=batch.values.device)
    place = torch.arange(len(ids), device=first.device).repeat_interleave(count)
    total.index_add_(0, place, batch.values.double())
    return Batch((total / count[:, None]).to(batch.values.dtype), ids, torch.zeros_like(ids))


def _finite(tensors: Iterable[torch.Tensor]) -> torch.Tensor | None:
    """[rows] bool, whether all of a row is finite; None where all rows are."""
    found = None
    for each in tensors:
        # If the sum is finite, all of it is; the other way round a look at each value decides.
        if bool(torch.isfinite(each.sum())):
            continue
        finite = torch.isfinite(each).all(1).cpu()
        found = finite if found is None else found & finite
    return None if found is None or bool(found.all()) else found


def _within(tensors: Sequence[torch.Tensor], columns: slice) -> Iterator[tuple[torch.Tensor, slice]]:
    """The tensors, side by side, that hold some of the columns, and which of theirs."""
    start = 0
    for each in tensors:
        size = each.shape[1]
        part = slice(max(0, columns.start - start), max(0, min(size, columns.stop - start)))
        start += size
        if part.start < part.stop:
            yield each, part


def _sizes(sites: Sequence[Site], tensors: Sequence[torch.Tensor]) -> dict[str, int]:
    return {site.name: each.shape[1] for site, each in zip(sites, tensors, strict=True)}


def _kept(recording: Recording, sites: Any) -> dict[str, StoredActivations]:
    """The stored activations of the sites that were asked for, in the recording's order."""
    wanted = [sites] if isinstance(sites, str | Site) else list(sites)
    found = []
    for each in wanted:
        pattern = each.name if isinstance(each, Site) else each
        matching = [name for name in recording if fnmatch.fnmatchcase(name, pattern)]
        matching = matching or [name for name in recording if fnmatch.fnmatchcase(name, f"*.{pattern}")]
        if not matching:
            raise unknown("site", pattern, recording, "Only recorded sites can be read.")
        found += matching
    if not found:
        raise DataError("no sites are asked for: sites='mlp.*' takes every MLP")
    return {name: _activations(recording, name) for name in recording if name in found}


def _activations(recording: Recording, name: str) -> StoredActivations:
    kept = recording[name].activations
    if kept is None:
        raise DataError(f"the activations of {name} were not kept: record(..., activations=True)")
    return kept


def _stored_sizes(kept: Mapping[str, StoredActivations]) -> dict[str, int]:
    return {name: each.values.shape[1] for name, each in kept.items()}


def _dtype(kept: Mapping[str, StoredActivations]) -> torch.dtype:
    return torch.float64 if any(each.values.dtype == np.float64 for each in kept.values()) else torch.float32
