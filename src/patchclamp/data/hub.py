"""Data sets of Hugging Face `datasets`, whole or streaming, by what they can do: the library itself is not needed.

A data set of the hub has `features` and `column_names` (None where a stream does not know them), and gives a
`dict` for each example. A stream may break off, or give other examples when it is read again: both are noticed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeGuard

from patchclamp.data.files import Row, no_column
from patchclamp.data.labels import Unusable
from patchclamp.errors import DataError


def is_hub_dataset(given: Any) -> TypeGuard[HubLike]:
    """Whether it is a `datasets.Dataset` or `datasets.IterableDataset`, or behaves as one."""
    return (
        hasattr(type(given), "__iter__")
        and hasattr(given, "features")
        and hasattr(given, "column_names")
        and not hasattr(given, "keys")
    )


HubLike = Any


class HubDataset:
    """A data set of Hugging Face `datasets`: each of its examples is one example."""

    has_columns: ClassVar[bool] = True

    def __init__(self, dataset: HubLike, name: str | None = None) -> None:
        self._dataset = dataset
        self.name = name or _name(dataset)
        self._features: Mapping[str, Any] = dataset.features or {}
        known = dataset.column_names or list(self._features)
        self._columns = None if not known else [str(each) for each in known]
        # What the passes before have shown: how many examples, and a hash of each column that was read.
        self._seen_count: int | None = None
        self._seen: dict[str, str] = {}

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        """(number, values of `columns`) of each example; a class label is its name."""
        for column in columns:
            if self._columns is not None and column not in self._columns:
                raise no_column(self.name, column, self._columns)
        return self._rows(list(columns))

    def where(self, index: int, place: int) -> str:
        return f"example {index} of {self.name}"

    def count(self) -> int | None:
        """Number of examples; None for a stream."""
        return len(self._dataset) if hasattr(self._dataset, "__len__") else None

    def _rows(self, columns: list[str]) -> Iterator[Row]:
        digests = {column: hashlib.blake2b(digest_size=16) for column in columns}
        names = {column: _class_names(self._features.get(column)) for column in columns}
        index = -1
        for index, row in enumerate(self._examples(columns)):
            if self._seen_count is not None and index >= self._seen_count:
                raise self._changed(f"has more than {self._seen_count:,} examples")
            values = []
            for column in columns:
                if column not in row:
                    raise no_column(self.where(index, index), column, list(row))
                try:
                    value = _named(row[column], names[column])
                except Unusable as reason:
                    raise DataError(f"{self.where(index, index)}: column {column!r} {reason}") from None
                digests[column].update(repr(value).encode("utf-8", "surrogatepass") + b"\0")
                values.append(value)
            yield index, values
        self._compare(index + 1, {column: digest.hexdigest() for column, digest in digests.items()})

    def _examples(self, columns: list[str]) -> Iterator[Mapping[str, Any]]:
        """The examples as they come; whatever goes wrong inside the data set is said with its place."""
        index = 0
        try:
            dataset = self._dataset
            if self._columns is not None and hasattr(dataset, "select_columns"):
                dataset = dataset.select_columns(columns)  # the others may be images, to be decoded in vain
            if hasattr(dataset, "with_format"):
                dataset = dataset.with_format(None)
            iterator = iter(dataset)
        except Exception as error:
            raise self._broken(index, error) from error
        while True:
            try:
                row = next(iterator, None)
            except Exception as error:
                raise self._broken(index, error) from error
            if row is None:
                return
            if not isinstance(row, Mapping):
                raise DataError(f"{self.where(index, index)} is not a dict of columns but {type(row).__name__}")
            yield row
            index += 1

    def _broken(self, index: int, error: Exception) -> DataError:
        return DataError(f"{self.name} ends early, at example {index}: {type(error).__name__}: {error}")

    def _compare(self, count: int, digests: Mapping[str, str]) -> None:
        """Remember what a whole pass has shown; it must be what the passes before have."""
        if self._seen_count is not None and count != self._seen_count:
            raise self._changed(f"ends after {count:,} of {self._seen_count:,} examples")
        for column, digest in digests.items():
            if self._seen.get(column, digest) != digest:
                raise self._changed(f"gives other values of {column!r}")
        self._seen_count = count
        self._seen |= digests

    def _changed(self, what: str) -> DataError:
        return DataError(
            f"{self.name} is not the same when it is read again: it {what}. "
            "Give it a fixed order (no shuffling without a seed), or take a part of it: pc.Texts(...).take(n)"
        )


def _class_names(feature: Any) -> Sequence[str] | None:
    """The names of a class label, or of a list of class labels."""
    if isinstance(feature, (list, tuple)) and len(feature) == 1:
        feature = feature[0]
    feature = getattr(feature, "feature", feature)
    names = getattr(feature, "names", None)
    return list(names) if names and hasattr(feature, "int2str") else None


def _named(value: Any, names: Sequence[str] | None) -> Any:
    if names is None or value is None or isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)) or getattr(value, "ndim", 0):
        return [_named(each, names) for each in value]
    code = int(value)
    if code == -1:
        raise Unusable("has no value (-1)")
    if not 0 <= code < len(names):
        raise Unusable(f"is {code}, and its class label has {len(names)} names")
    return names[code]


def _name(dataset: Any) -> str:
    info = getattr(dataset, "info", None)
    name = getattr(info, "dataset_name", None) or getattr(info, "builder_name", None)
    return str(name) if name else "dataset"
