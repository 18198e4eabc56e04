"""Where examples come from: a list, any iterable, a file, a data set of the Hugging Face hub.

A source gives its rows anew for each pass, each with its place for messages: `(place, values of the wanted
columns)`. A source without columns gives the examples themselves, as the only value.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Protocol

from patchclamp.data.files import SUFFIXES, Row, open_file
from patchclamp.data.hub import HubDataset, is_hub_dataset
from patchclamp.errors import DataError


class Source(Protocol):
    """What `Texts` and `Chats` read."""

    name: str
    has_columns: ClassVar[bool]

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        """(place, values of `columns`) of each example."""
        ...

    def where(self, index: int, place: int) -> str:
        """An example in words."""
        ...

    def count(self) -> int | None:
        """Number of examples; None where only a pass can tell."""
        ...


class Held:
    """Examples in a list or tuple."""

    has_columns: ClassVar[bool] = False

    def __init__(self, examples: Sequence[Any], name: str, kind: str = "text") -> None:
        # A copy, so that a later change of the list does not part texts and labels.
        self._examples = tuple(examples)
        self.name, self._kind = name, kind

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        return ((index, (each,)) for index, each in enumerate(self._examples))

    def where(self, index: int, place: int) -> str:
        return f"{self._kind} {index} of {self.name}"

    def count(self) -> int | None:
        return len(self._examples)


class Streamed:
    """Examples of any other iterable, which is asked anew for each pass; an iterator can be read once."""

    has_columns: ClassVar[bool] = False

    def __init__(self, examples: Iterable[Any], name: str, kind: str = "text") -> None:
        self._examples = examples
        self._once = isinstance(examples, Iterator)
        self._spent = False
        self.name, self._kind = name, kind

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        if self._spent:
            kind = type(self._examples).__name__
            raise DataError(
                f"{self.name} was read once already, and a {kind} cannot be read again: pass a list or a file"
            )
        self._spent = self._once
        return ((index, (each,)) for index, each in enumerate(self._examples))

    def where(self, index: int, place: int) -> str:
        return f"{self._kind} {index} of {self.name}"

    def count(self) -> int | None:
        return None if self._once or not hasattr(self._examples, "__len__") else len(self._examples)  # type: ignore[arg-type]


def source_of(given: Any, name: str | None, *, kind: str = "text", maker: str = "pc.Texts") -> Source:
    """The source behind what a user passed.

    Args:
        given: a list, an iterable, a path, a data set of Hugging Face `datasets`.
        name: what to call it, where it has no name of its own.
        kind: what one example is, in messages.
        maker: how a user makes these data, in messages.

    Raises:
        DataError: it is nothing of the kind.
    """
    if isinstance(given, str) and not given.lower().endswith(SUFFIXES):
        begin = given if len(given) <= 60 else given[:60] + "..."
        raise DataError(
            f"{begin!r} is not a file of {kind}s, whose name ends in {', '.join(SUFFIXES)}. "
            f"For a single {kind} write {maker}([{kind}])."
        )
    if isinstance(given, (str, os.PathLike)):
        return open_file(given)
    if is_hub_dataset(given):
        return HubDataset(given, name)
    called = name or f"{kind}s"
    if isinstance(given, (list, tuple)):
        return Held(given, called, kind)
    of_type = type(given).__name__
    if isinstance(given, (bytes, bytearray)):
        raise DataError("bytes are not text: decode them, then write pc.Texts([text])")
    if isinstance(given, (set, frozenset)):
        raise DataError(f"a {of_type} has no order, so no example could be found again: pass sorted({kind}s)")
    # Columns of numpy, pandas and polars are lists to us; a series of pandas has keys, as a mapping has.
    in_memory = hasattr(given, "tolist") or hasattr(given, "to_list")
    if hasattr(given, "keys") and hasattr(given, "column_names"):
        raise DataError(f"a {of_type} holds several data sets ({', '.join(map(str, given))}): pass one of them")
    tabular = hasattr(given, "columns") or hasattr(given, "column_names")
    if tabular or (hasattr(given, "keys") and not in_memory):
        raise DataError(f"a {of_type} is a table, not {kind}s: pass one column of it, and others as labels=")
    if hasattr(given, "read"):
        raise DataError(f"pass the path of a file, not the open file ({of_type}): it is read more than once")
    if not hasattr(given, "__iter__") and not hasattr(given, "__getitem__"):
        raise DataError(f"cannot read {kind}s from {of_type}: pass a list {_of(kind)} or a path")
    return Held(list(given), called, kind) if in_memory else Streamed(given, called, kind)


def _of(kind: str) -> str:
    return "of str" if kind == "text" else f"of {kind}s"
