"""`Texts`: a corpus of texts with labels per example.

A list, any iterable of `str`, or a file (`.txt`, `.jsonl`, `.parquet`) that is streamed: a pass
over the corpus holds one example at a time, however large the file is.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, ClassVar

from patchclamp.data.files import SUFFIXES, ParquetFile, Row, TextFile, open_file
from patchclamp.data.labels import (
    Unusable,
    categories,
    check_length,
    label_list,
    label_name,
    label_of,
    text_of,
)
from patchclamp.errors import DataError


@dataclass(frozen=True, slots=True)
class Example:
    """One text, the values of its labels, and what a decoder reads (None: the text itself)."""

    text: str
    labels: Mapping[str, str]
    target: str | None = None


class Texts:
    """Texts with labels, in a fixed order; iterate over it to get `Example`s.

    Args:
        source: texts, or a file of them. A list or any iterable of `str` (a generator can be read
            once only); or a path: a `str` that ends in `.txt`, `.jsonl` or `.parquet`, or a
            `pathlib.Path`. `.txt` holds one text per line, blank lines are left out.
        labels: `{"language": [one value per example]}`. For `.jsonl` and `.parquet` a label may also be
            a column: `["language"]`, or `{"language": "lang"}` for the column `lang`. Values become `str`.
        column: column of `.jsonl` or `.parquet` that holds the text.
        targets: what the decoder of an encoder-decoder model reads: a list with one text per example,
            or for `.jsonl` and `.parquet` the name of a column. None: the text itself.
        name: how reports call this corpus; by default the file's name, or "texts".

    Raises:
        DataError: at once for a missing file, an unknown suffix, no examples, labels or targets of
            the wrong length, a label without a value, a text of a list that is not `str`, or a faulty
            first line of a file; a fault further down in a file or iterable is raised when it is
            reached, with its place.

    Example:
        >>> texts = Texts(["A dog.", "Ein Hund."], labels={"language": ["en", "de"]})
        >>> texts.labels
        {'language': ('de', 'en')}
        >>> [(example.text, example.labels["language"]) for example in texts]
        [('A dog.', 'en'), ('Ein Hund.', 'de')]
    """

    name: str

    def __init__(
        self,
        source: str | os.PathLike[str] | Iterable[str],
        labels: Mapping[str, Iterable[object] | str] | Sequence[str] | str | None = None,
        *,
        column: str = "text",
        targets: Iterable[str] | str | None = None,
        name: str | None = None,
    ) -> None:
        self._source = _source_of(source, name)
        self.name = name or self._source.name
        if column != "text" and not self._source.has_columns:
            raise DataError(f"{self.name} has no columns, so column={column!r} means nothing")
        self._columns = [column]
        # Label name -> position of its column, or its values, one per example.
        self._labels: dict[str, int | tuple[str, ...]] = self._read_labels(labels)
        self._targets: int | tuple[str, ...] | None = self._read_targets(targets)
        self._categories: dict[str, tuple[str, ...]] | None = None
        self._check_start()

    @property
    def labels(self) -> dict[str, tuple[str, ...]]:
        """Label name -> its categories, sorted; `{}` without labels.

        The first use reads a file through once if a label is a column of it.
        """
        if self._categories is None:
            columns = {label: column for label, column in self._labels.items() if isinstance(column, int)}
            seen = self._scan(columns) if columns else {}
            lists = {label: values for label, values in self._labels.items() if isinstance(values, tuple)}
            known = categories({**lists, **seen})
            self._categories = {label: known[label] for label in self._labels}
        return dict(self._categories)

    def __iter__(self) -> Iterator[Example]:
        # Not itself a generator: a source that is spent says so here, not at the first example.
        return self._examples(self._source.rows(self._columns))

    def __len__(self) -> int:
        count = self._source.count()
        if count is None:
            raise TypeError(f"{self.name} has no length before it is read: its source cannot be counted")
        return count

    def __bool__(self) -> bool:
        # Without this, `if texts:` would count the lines of a file, and fail for a generator.
        return True

    def __repr__(self) -> str:
        labels = f", labels: {', '.join(self._labels)}" if self._labels else ""
        return f"Texts({self.name!r}{labels})"

    def _examples(self, rows: Iterator[Row]) -> Generator[Example]:
        index = -1
        for index, (place, values) in enumerate(rows):
            try:
                example = self._example(index, values)
            except Unusable as reason:
                raise DataError(f"{self._source.where(index, place)}: {reason}") from None
            yield example
        if index < 0:
            raise _empty(self.name)
        self._check_lengths(index + 1)

    def _scan(self, columns: Mapping[str, int]) -> dict[str, set[str]]:
        """The distinct values of labels that are columns, from one pass over these columns only."""
        seen: dict[str, set[str]] = {label: set() for label in columns}
        rows = self._source.rows([self._columns[column] for column in columns.values()])
        for index, (place, values) in enumerate(rows):
            try:
                for label, value in zip(columns, values, strict=True):
                    seen[label].add(label_of(value, label))
            except Unusable as reason:
                raise DataError(f"{self._source.where(index, place)}: {reason}") from None
        return seen

    def _example(self, index: int, values: Sequence[object]) -> Example:
        text = text_of(values[0])
        labels: dict[str, str] = {}
        for label, given in self._labels.items():
            if isinstance(given, int):
                labels[label] = label_of(values[given], label)
            else:
                labels[label] = _one(given, index, f"label {label!r}")
        if self._targets is None:
            return Example(text, labels)
        if isinstance(self._targets, int):
            return Example(text, labels, text_of(values[self._targets], "the target"))
        return Example(text, labels, _one(self._targets, index, "targets"))

    def _read_labels(self, labels: Any) -> dict[str, int | tuple[str, ...]]:
        if labels is None:
            return {}
        if isinstance(labels, Mapping):
            return {
                label_name(label): self._position(values)
                if isinstance(values, str) and self._source.has_columns
                else label_list(label, values, self.name)
                for label, values in labels.items()
            }
        names = [labels] if isinstance(labels, str) or not isinstance(labels, Iterable) else list(labels)
        if not self._source.has_columns:
            raise DataError(
                f"{self.name} has no columns to take labels from: give them as "
                '{"language": [one value per example]}, with the name of the label'
            )
        return {label_name(each): self._position(each) for each in names}

    def _read_targets(self, targets: Iterable[str] | str | None) -> int | tuple[str, ...] | None:
        if targets is None:
            return None
        if isinstance(targets, str):
            if not self._source.has_columns:
                raise DataError(f"targets of {self.name} are a list with one text per example, not one str")
            return self._position(targets)
        if isinstance(targets, (bytes, Mapping, set, frozenset)) or not isinstance(targets, Iterable):
            kind = type(targets).__name__
            raise DataError(f"targets of {self.name} are a list with one text per example, not {kind}")
        found: list[str] = []
        for index, target in enumerate(targets):
            try:
                found.append(text_of(target, "the target"))
            except Unusable as reason:
                raise DataError(f"example {index} of {self.name}: {reason}") from None
        return tuple(found)

    def _position(self, column: str) -> int:
        if column not in self._columns:
            self._columns.append(column)
        return self._columns.index(column)

    def _check_start(self) -> None:
        lists = any(isinstance(values, tuple) for values in (*self._labels.values(), self._targets))
        file = isinstance(self._source, (TextFile, ParquetFile))
        # A file is counted only where something has to be as long; otherwise its first line will do.
        count = self._source.count() if lists or not file else None
        if count == 0:
            raise _empty(self.name)
        if count is not None:
            self._check_lengths(count)
        if file:
            with closing(self._examples(self._source.rows(self._columns))) as examples:
                next(examples)
        elif isinstance(self._source, _Held):
            self._source.check()

    def _check_lengths(self, examples: int) -> None:
        for label, values in self._labels.items():
            if isinstance(values, tuple):
                check_length(f"label {label!r}", len(values), examples, self.name)
        if isinstance(self._targets, tuple):
            check_length("targets", len(self._targets), examples, self.name)


class _Held:
    """Texts in a list or tuple."""

    has_columns: ClassVar[bool] = False

    def __init__(self, texts: Sequence[str], name: str) -> None:
        # A copy, so that a later change of the list does not part texts and labels.
        self._texts = tuple(texts)
        self.name = name

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        return ((index, (text,)) for index, text in enumerate(self._texts))

    def where(self, index: int, place: int) -> str:
        return f"text {index} of {self.name}"

    def count(self) -> int | None:
        return len(self._texts)

    def check(self) -> None:
        for index, text in enumerate(self._texts):
            try:
                text_of(text)
            except Unusable as reason:
                raise DataError(f"{self.where(index, index)}: {reason}") from None


class _Streamed:
    """Texts of any other iterable, which is asked anew for each pass; an iterator can be read once."""

    has_columns: ClassVar[bool] = False

    def __init__(self, texts: Iterable[str], name: str) -> None:
        self._texts = texts
        self._once = isinstance(texts, Iterator)
        self._spent = False
        self.name = name

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        if self._spent:
            kind = type(self._texts).__name__
            raise DataError(
                f"{self.name} was read once already, and a {kind} cannot be read again: pass a list or a file"
            )
        self._spent = self._once
        return ((index, (text,)) for index, text in enumerate(self._texts))

    def where(self, index: int, place: int) -> str:
        return f"text {index} of {self.name}"

    def count(self) -> int | None:
        return None if self._once or not hasattr(self._texts, "__len__") else len(self._texts)  # type: ignore[arg-type]


def _source_of(source: Any, name: str | None) -> _Held | _Streamed | TextFile | ParquetFile:
    if isinstance(source, str) and not source.lower().endswith(SUFFIXES):
        begin = source if len(source) <= 60 else source[:60] + "..."
        raise DataError(
            f"{begin!r} is not a file of texts, whose name ends in {', '.join(SUFFIXES)}. "
            "For a single text write pc.Texts([text])."
        )
    if isinstance(source, (str, os.PathLike)):
        return open_file(source)
    called = name or "texts"
    if isinstance(source, (list, tuple)):
        return _Held(source, called)
    kind = type(source).__name__
    if isinstance(source, Texts):
        raise DataError("this is pc.Texts already; use it as it is")
    if isinstance(source, (bytes, bytearray)):
        raise DataError("bytes are not text: decode them, then write pc.Texts([text])")
    if isinstance(source, (set, frozenset)):
        raise DataError(f"a {kind} has no order, so no example could be found again: pass sorted(texts)")
    # Columns of numpy, pandas and polars are lists to us; a series of pandas has keys, as a mapping has.
    in_memory = hasattr(source, "tolist") or hasattr(source, "to_list")
    tabular = hasattr(source, "columns") or hasattr(source, "column_names")
    if tabular or (hasattr(source, "keys") and not in_memory):
        raise DataError(f"a {kind} is a table, not texts: pass one column of it, and others as labels=")
    if hasattr(source, "read"):
        raise DataError(f"pass the path of a file, not the open file ({kind}): it is read more than once")
    if not hasattr(source, "__iter__") and not hasattr(source, "__getitem__"):
        raise DataError(f"cannot read texts from {kind}: pass a list of str or a path")
    return _Held(list(source), called) if in_memory else _Streamed(source, called)


def _one(values: tuple[str, ...], index: int, what: str) -> str:
    if index >= len(values):
        raise Unusable(f"{what} has {len(values):,} values, but there are at least {index + 1:,} examples")
    return values[index]


def _empty(name: str) -> DataError:
    return DataError(f"no examples in {name}")
