"""What `Texts` and `Chats` share: examples from a source in a fixed order, with labels per example."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, Generic, TypeVar

from patchclamp.data.files import ParquetFile, Row, TextFile
from patchclamp.data.labels import Unusable, categories, check_length, label_list, label_name, label_of
from patchclamp.data.sources import Held, Source
from patchclamp.errors import DataError

T = TypeVar("T")

# A label is a column of the source (its number among those that are read), or has one value per example.
Given = int | tuple[Any, ...]


class Labelled(ABC, Generic[T]):
    """Examples with labels; a subclass makes one of a row."""

    name: str

    def __init__(self, source: Source, labels: Any, column: str, name: str | None) -> None:
        self._source = source
        self.name = name or source.name
        self._columns = [column]
        self._labels: dict[str, Given] = self._read_labels(labels)
        self._categories: dict[str, tuple[str, ...]] | None = None

    @abstractmethod
    def _example(self, index: int, values: Sequence[object]) -> T:
        """One example, from the values of `_columns`; `Unusable` says what is wrong with it."""

    @property
    def labels(self) -> dict[str, tuple[str, ...]]:
        """Label name -> its categories, sorted; `{}` without labels.

        The first use reads a file or a data set through once if a label is a column of it.
        """
        if self._categories is None:
            columns = {label: column for label, column in self._labels.items() if isinstance(column, int)}
            seen = self._scan(columns, lambda value, label: [label_of(value, label)])
            lists = {label: values for label, values in self._labels.items() if isinstance(values, tuple)}
            known = categories({**lists, **seen})
            self._categories = {label: known[label] for label in self._labels}
        return dict(self._categories)

    def __iter__(self) -> Iterator[T]:
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
        return f"{type(self).__name__}({self.name!r}{labels})"

    def _examples(self, rows: Iterator[Row]) -> Generator[T]:
        index = -1
        for index, (place, values) in enumerate(rows):
            try:
                example = self._example(index, values)
            except Unusable as reason:
                raise DataError(f"{self._source.where(index, place)}: {reason}") from None
            yield example
        if index < 0:
            raise DataError(f"no examples in {self.name}")
        self._check_lengths(index + 1)

    def _scan(
        self, columns: Mapping[str, int], values_of: Callable[[object, str], Iterable[str]]
    ) -> dict[str, set[str]]:
        """The distinct values of labels that are columns, from one pass over these columns only."""
        seen: dict[str, set[str]] = {label: set() for label in columns}
        rows = self._source.rows([self._columns[column] for column in columns.values()]) if columns else iter(())
        for index, (place, values) in enumerate(rows):
            try:
                for label, value in zip(columns, values, strict=True):
                    seen[label].update(values_of(value, label))
            except Unusable as reason:
                raise DataError(f"{self._source.where(index, place)}: {reason}") from None
        return seen

    def _labels_of(self, index: int, values: Sequence[object]) -> dict[str, str]:
        found: dict[str, str] = {}
        for label, given in self._labels.items():
            if isinstance(given, int):
                found[label] = label_of(values[given], label)
            else:
                found[label] = one(given, index, f"label {label!r}")
        return found

    def _read_labels(self, labels: Any) -> dict[str, Given]:
        if labels is None:
            return {}
        if isinstance(labels, Mapping):
            return {
                label_name(label): self._position(values)
                if isinstance(values, str) and self._source.has_columns
                else label_list(label, values, self.name)
                for label, values in labels.items()
            }
        return {label_name(each): self._position(each) for each in self._names(labels, "language")}

    def _names(self, labels: Any, example: str) -> list[Any]:
        """Labels that were given by the names of columns alone."""
        if not self._source.has_columns:
            raise DataError(
                f"{self.name} has no columns to take labels from: give them as "
                f'{{"{example}": [one value per example]}}, with the name of the label'
            )
        return [labels] if isinstance(labels, str) or not isinstance(labels, Iterable) else list(labels)

    def _position(self, column: str) -> int:
        if column not in self._columns:
            self._columns.append(column)
        return self._columns.index(column)

    def _lists(self) -> dict[str, tuple[Any, ...]]:
        """What was given as a list with one value per example, by what to call it."""
        return {f"label {label!r}": values for label, values in self._labels.items() if isinstance(values, tuple)}

    def _check_start(self, whole: bool) -> None:
        """Find out at once what can be: lengths, the first example of a file, all of a list if `whole`."""
        file = isinstance(self._source, (TextFile, ParquetFile))
        # A file is counted only where something has to be as long; otherwise its first line will do.
        count = self._source.count() if self._lists() or not file else None
        if count == 0:
            raise DataError(f"no examples in {self.name}")
        if count is not None:
            self._check_lengths(count)
        if file or (self._source.has_columns and count is not None):
            with closing(self._examples(self._source.rows(self._columns))) as examples:
                next(examples)
        elif whole and isinstance(self._source, Held):
            for _ in self:
                pass
        elif self._source.has_columns:
            self._source.rows(self._columns)  # a stream: not read, but asked for its columns

    def _check_lengths(self, examples: int) -> None:
        for what, values in self._lists().items():
            check_length(what, len(values), examples, self.name)


def one(values: Sequence[Any], index: int, what: str) -> Any:
    """The value of one example from a list with one per example, or `Unusable`."""
    if index >= len(values):
        raise Unusable(f"{what} has {len(values):,} values, but there are at least {index + 1:,} examples")
    return values[index]
