"""Files of examples, read row by row: `.txt`, `.jsonl`, `.parquet`.

Each kind knows its `columns` (None where it has none), counts its rows without keeping them, and
gives the values of the wanted columns together with the row's place, for messages. A file is
opened anew by each call of `rows` and never read whole.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from patchclamp.errors import DataError

if TYPE_CHECKING:
    import pyarrow.parquet

Row = tuple[int, Sequence[object]]

_BOM = b"\xef\xbb\xbf"
_VISIBLE = re.compile(rb"[!-~]")
_PARQUET_ROWS = 1024
_PARQUET_BUFFER = 1 << 20


class TextFile:
    """A `.txt` file: each line that is not blank is one example."""

    has_columns: ClassVar[bool] = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self._count: int | None = None

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        """(line number, [the line without its end]) of each example."""
        for line, text in self._lines():
            yield line, (text,)

    def where(self, index: int, place: int) -> str:
        return f"{self.path}, line {place} (example {index})"

    def count(self) -> int:
        """Number of examples. Reads the file once, in pieces; nothing is parsed."""
        if self._count is None:
            self._count = sum(1 for _ in self._raw())
        return self._count

    def _raw(self) -> Iterator[tuple[int, bytes]]:
        # Split at \n only, in bytes: U+2028 and its like are characters of a text, not ends of lines.
        try:
            with self.path.open("rb") as stream:
                for number, line in enumerate(stream, start=1):
                    if number == 1 and line.startswith(_BOM):
                        line = line[len(_BOM) :]
                    if _VISIBLE.search(line) or line.decode("utf-8", "replace").strip():
                        yield number, line
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror or error}") from error

    def _lines(self) -> Iterator[tuple[int, str]]:
        for number, line in self._raw():
            try:
                yield number, line.decode("utf-8").removesuffix("\n").removesuffix("\r")
            except UnicodeDecodeError as error:
                hint = " (it looks like UTF-16)" if b"\0" in line else ""
                raise DataError(
                    f"{self.path}, line {number} is not UTF-8{hint}: byte 0x{line[error.start]:02x} "
                    f"at position {error.start} of the line. Convert the file to UTF-8."
                ) from None


class JsonLinesFile(TextFile):
    """A `.jsonl` file: each line that is not blank is one JSON object."""

    has_columns: ClassVar[bool] = True

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        """(line number, values of `columns`) of each example."""
        for number, line in self._lines():
            record = self._record(number, line)
            for column in columns:
                if column not in record:
                    raise no_column(f"{self.path}, line {number}", column, list(record))
            yield number, [record[column] for column in columns]

    def _record(self, number: int, line: str) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            broken = isinstance(error, json.JSONDecodeError)
            reason = f"{error.msg.removesuffix(' at')} at column {error.colno}" if broken else str(error)
            raise DataError(
                f"{self.path}, line {number} is not JSON: {reason}. The line begins {_begin(line)!r}"
            ) from None
        if not isinstance(record, dict):
            raise DataError(
                f"{self.path}, line {number} is not a JSON object but {type(record).__name__}: "
                f'write {{"text": ...}} on each line. The line begins {_begin(line)!r}'
            )
        return record


class ParquetFile:
    """A `.parquet` file: each row is one example."""

    has_columns: ClassVar[bool] = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        with self._opened() as file:
            self._count = int(file.metadata.num_rows)
            self._columns = [str(name) for name in file.schema_arrow.names]

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        """(row number from 0, values of `columns`) of each example."""
        for column in columns:
            if column not in self._columns:
                raise no_column(str(self.path), column, self._columns)
        return self._rows(columns)

    def where(self, index: int, place: int) -> str:
        return f"{self.path}, row {place}"

    def count(self) -> int:
        """Number of rows, from the file's own metadata."""
        return self._count

    def _rows(self, columns: Sequence[str]) -> Iterator[Row]:
        import pyarrow

        with self._opened() as file:
            row = 0
            batches = file.iter_batches(batch_size=_PARQUET_ROWS, columns=list(columns), use_threads=False)
            while True:
                try:
                    batch = next(batches, None)
                    read = [] if batch is None else [batch.column(column).to_pylist() for column in columns]
                except (pyarrow.ArrowException, OSError, ValueError) as error:
                    raise DataError(f"{self.path} is damaged after row {row}: {error}") from error
                if batch is None:
                    break
                for values in zip(*read, strict=True):
                    yield row, values
                    row += 1

    def _opened(self) -> pyarrow.parquet.ParquetFile:
        import pyarrow
        import pyarrow.parquet

        try:
            # With a buffer, and without reading ahead, a big row group is streamed too.
            return pyarrow.parquet.ParquetFile(self.path, buffer_size=_PARQUET_BUFFER, pre_buffer=False)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{self.path} cannot be read as Parquet: {error}") from error


_KINDS = {".txt": TextFile, ".jsonl": JsonLinesFile, ".parquet": ParquetFile}
SUFFIXES = tuple(_KINDS)


def open_file(source: str | os.PathLike[str]) -> TextFile | ParquetFile:
    """The file behind a path, by its suffix.

    Raises:
        DataError: no such file, a folder, an unknown suffix, or a Parquet file that cannot be opened.
    """
    given = Path(source).expanduser()
    kind = _KINDS.get(given.suffix.lower())
    if kind is None:
        found = f"its suffix {given.suffix!r} is" if given.suffix else "it has no suffix, which is"
        raise DataError(f"cannot read {_begin(str(given), 200)!r}: {found} not one of {', '.join(SUFFIXES)}")
    # Absolute, so that a change of folder between two passes does not change the data.
    path = given.absolute()
    try:
        found = path.is_file()
        folder = path.is_dir()
    except OSError:
        found = folder = False
    if not found:
        what = "a folder, not a file" if folder else "no such file"
        shown = _begin(str(given), 200)
        raise DataError(f"cannot read {shown!r}: {what}. For a single text write pc.Texts([text]).")
    return kind(path)


def no_column(where: str, column: str, columns: Sequence[str]) -> DataError:
    """The error for a column that is not there."""
    there = ", ".join(repr(each) for each in columns) or "none"
    return DataError(f"{where} has no column {column!r}. It has: {there}")


def _begin(line: str, length: int = 60) -> str:
    return line if len(line) <= length else line[:length] + "..."
