"""`Neurons`: an ordered table of neurons, one row each.

What every finder returns and every intervention takes. A row is a `site` and an `index`, then
any measurements (`score`, `p`, `q`, `firing_rate`, ...). Values are never changed in place: each
method returns a new table. A neuron is written `mlp.3:417`.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex, TypeGuard

import polars as pl

from patchclamp.errors import DataError, StoreError, unknown

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

_KEY = ["site", "index"]


class Neuron(NamedTuple):
    """One neuron: the name of its site and its index there. `str()` writes `mlp.3:417`."""

    site: str
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]

    def __str__(self) -> str:
        return f"{self.site}:{self.index}"

    @classmethod
    def parse(cls, name: str) -> Neuron:
        """Read `mlp.3:417`.

        Raises:
            DataError: the text is not a site, a colon and a whole number.
        """
        site, colon, index = str(name).rpartition(":")
        if not colon or not site or not index.isascii() or not index.isdigit():
            raise DataError(f"{name!r} does not name a neuron: write site:index, as in mlp.3:417")
        return cls(site, int(index))


class Neurons:
    """An ordered table of neurons, one row each.

    Args:
        source: `{"mlp.3": [417, 9]}`, or names `["mlp.3:417", "mlp.3:9"]`, or `Neuron`s.

    Raises:
        DataError: an index is not a whole number >= 0, or a neuron is named twice.

    Example:
        >>> neurons = Neurons({"mlp.3": [417, 9], "mlp.4": [0]})
        >>> len(neurons), neurons.names[0], neurons.at("mlp.4").names
        (3, 'mlp.3:417', ['mlp.4:0'])
    """

    def __init__(self, source: Mapping[str, Iterable[int]] | Iterable[str | tuple[str, int]] = ()) -> None:
        self._frame = _checked(_frame_of(source))

    @classmethod
    def from_polars(cls, frame: pl.DataFrame) -> Neurons:
        """A table from a polars frame with columns `site` and `index`, and any measurements; the order is kept."""
        new = cls.__new__(cls)
        new._frame = _checked(frame)
        return new

    # Selecting ------------------------------------------------------------------------------------

    def top(self, n: int | float, by: str | None = None) -> Neurons:
        """The best `n` neurons (a whole number), or the best fraction of them (a float in (0, 1]).

        Best is the largest value of the column `by`; without one, of `score`; without that, the order
        of the table. Ties keep the order of the table; neurons without a value come last.
        """
        if not _is_whole(n):
            if not isinstance(n, float):
                raise DataError(f"top() takes a whole number or a fraction, not {n!r}")
            if not 0 < n <= 1:
                hint = f". For a number of neurons write {int(n)}" if n > 1 and n.is_integer() else ""
                raise DataError(f"a fraction lies in (0, 1]; {n} does not{hint}")
            # 0.07 * 100 is a little more than 7, and means 7.
            n = math.ceil(round(n * len(self), 9))
        n = int(n)
        if n < 0:
            raise DataError(f"cannot take the top {n} neurons")
        if by is None:
            by = "score" if "score" in self._frame.columns else None
        elif by not in self._frame.columns:
            raise unknown("column", by, self._frame.columns)
        frame = self._frame
        if by is not None:
            # NaN counts as no value: it must not come out as the largest.
            key = pl.col(by).fill_nan(None) if frame.schema[by].is_float() else pl.col(by)
            frame = frame.sort(key, descending=True, nulls_last=True, maintain_order=True)
        return Neurons.from_polars(frame.head(n))

    def where(self, expression: pl.Expr) -> Neurons:
        """The neurons for which a polars expression over the columns holds, in the same order.

        Raises:
            UnknownName: a column that is not there.
            DataError: not an expression, or not one that is true or false for each neuron.
        """
        try:
            return Neurons.from_polars(self._frame.filter(expression))
        except pl.exceptions.ColumnNotFoundError as error:
            missing = str(error).split('"')[1] if '"' in str(error) else str(error).splitlines()[0]
            raise unknown("column", missing, self._frame.columns) from error
        except (pl.exceptions.PolarsError, TypeError) as error:
            raise DataError(f"where() takes a condition such as pl.col('score') > 0.5: {error}") from error

    def at(self, site: str) -> Neurons:
        """The neurons of one site (none, if it holds none of them)."""
        return self.where(pl.col("site") == site)

    def sample(self, n: int | None = None, seed: int = 0, like: Neurons | None = None) -> Neurons:
        """`n` neurons drawn at random without replacement; the same `seed` gives the same neurons.

        With `like` they are a matched control: none of them is in `like`, and they spread over the
        sites in the same proportions as `like` does (`n` defaults to as many).

        Raises:
            DataError: there are not enough neurons to draw from; the message names the site.
        """
        given: object = n
        if given is not None and not _is_whole(given):
            raise DataError(f"sample() draws a whole number of neurons, not {n!r}")
        generator = random.Random(seed)
        if like is None:
            if n is None:
                raise DataError("sample() needs a number of neurons, or like=")
            return Neurons.from_polars(_draw(self._frame, n, generator, "the table"))
        n = len(like) if n is None else n
        pool = (self - like)._frame
        wanted = _proportional(like._frame.group_by("site", maintain_order=True).len().rows(), n)
        parts = [
            _draw(pool.filter(pl.col("site") == site), count, generator, f"site {site}, less those in like,")
            for site, count in wanted
        ]
        return Neurons.from_polars(pl.concat(parts)) if parts else Neurons.from_polars(pool.head(0))

    # Combining ------------------------------------------------------------------------------------

    def __or__(self, other: Neurons) -> Neurons:
        """Both tables; a neuron of both keeps the row of the left one."""
        if not isinstance(other, Neurons):
            return NotImplemented
        extra = other._frame.join(self._frame, on=_KEY, how="anti", maintain_order="left")
        return Neurons.from_polars(pl.concat([self._frame, extra], how="diagonal_relaxed"))

    def __and__(self, other: Neurons) -> Neurons:
        """The neurons of the left table that the right one holds too."""
        if not isinstance(other, Neurons):
            return NotImplemented
        return Neurons.from_polars(self._frame.join(other._frame, on=_KEY, how="semi", maintain_order="left"))

    def __sub__(self, other: Neurons) -> Neurons:
        """The neurons of the left table that the right one does not hold."""
        if not isinstance(other, Neurons):
            return NotImplemented
        return Neurons.from_polars(self._frame.join(other._frame, on=_KEY, how="anti", maintain_order="left"))

    # Reading --------------------------------------------------------------------------------------

    @property
    def columns(self) -> list[str]:
        """Names of the columns: `site`, `index`, then the measurements."""
        return self._frame.columns

    @property
    def names(self) -> list[str]:
        """Each neuron written `mlp.3:417`, in order."""
        return [str(neuron) for neuron in self]

    @property
    def sites(self) -> list[str]:
        """The sites that hold at least one of the neurons, in order of first appearance."""
        return self._frame["site"].unique(maintain_order=True).to_list()

    def indices(self, site: str) -> np.ndarray:
        """Indices of the neurons at `site`, in order. `[n]` int64."""
        return self._frame.filter(pl.col("site") == site)["index"].to_numpy()

    def __len__(self) -> int:
        return self._frame.height

    def __iter__(self) -> Iterator[Neuron]:
        for site, index in self._frame.select(_KEY).iter_rows():
            yield Neuron(site, index)

    def __contains__(self, neuron: object) -> bool:
        wanted = Neuron.parse(neuron) if isinstance(neuron, str) else neuron
        if not isinstance(wanted, tuple) or len(wanted) != 2:
            return False
        return not self._frame.filter((pl.col("site") == wanted[0]) & (pl.col("index") == wanted[1])).is_empty()

    def __getitem__(self, key: slice | str) -> Any:
        """A slice gives a table, the name of a column its values as a polars series."""
        if isinstance(key, slice):
            return Neurons.from_polars(self._frame[key])
        if key not in self._frame.columns:
            raise unknown("column", key, self._frame.columns)
        return self._frame[key]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Neurons) and self._frame.equals(other._frame)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(str(neuron) for neuron in self[:6])
        return f"Neurons({len(self)}: {shown}{', ...' if len(self) > 6 else ''})"

    def _repr_html_(self) -> str:
        return self._frame._repr_html_()

    # Leaving --------------------------------------------------------------------------------------

    def to_polars(self) -> pl.DataFrame:
        """The table as a polars frame."""
        return self._frame.clone()

    def to_pandas(self) -> pd.DataFrame:
        """The table as a pandas frame."""
        return self._frame.to_pandas()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table to a `.parquet` or `.csv` file.

        Raises:
            StoreError: the file cannot be written or its suffix is neither.
        """
        file = Path(path)
        part = file.with_name(file.name + ".part")
        try:
            if _suffix(file) == ".csv":
                self._frame.write_csv(part)
            else:
                self._frame.write_parquet(part)
            os.replace(part, file)
        except (OSError, pl.exceptions.PolarsError) as error:
            part.unlink(missing_ok=True)
            raise StoreError(f"cannot write {file}: {getattr(error, 'strerror', None) or error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Neurons:
        """Read a table that `save` wrote.

        Raises:
            StoreError: the file is missing, of another kind, or not a table of neurons.
        """
        file = Path(path)
        if not file.is_file():
            raise StoreError(f"there is no file {file}")
        suffix = _suffix(file)
        try:
            # Types are settled by all rows: a column may begin with many neurons that have no value.
            frame = pl.read_csv(file, infer_schema_length=None) if suffix == ".csv" else pl.read_parquet(file)
            return cls.from_polars(frame)
        except (pl.exceptions.PolarsError, OSError, DataError) as error:
            raise StoreError(f"{file} is not a table of neurons: {error}") from error


def _frame_of(source: Mapping[str, Iterable[int]] | Iterable[str | tuple[str, int]]) -> pl.DataFrame:
    if isinstance(source, Neurons):
        return source._frame
    sites: list[str] = []
    indices: list[int] = []
    if isinstance(source, Mapping):
        for site, each in source.items():
            listed: list[Any] = list(each) if isinstance(each, Iterable) and getattr(each, "ndim", 1) else [each]
            for index in listed:
                sites.append(str(site))
                indices.append(_index(site, index))
    elif isinstance(source, str):
        return _frame_of([source])
    elif not isinstance(source, Iterable):
        raise DataError(f'neurons are given as {{"mlp.3": [417]}} or ["mlp.3:417"], not as {source!r}')
    else:
        for each in source:
            neuron = Neuron.parse(each) if isinstance(each, str) else each
            if not isinstance(neuron, tuple) or len(neuron) != 2:
                raise DataError(f"{each!r} does not name a neuron: write site:index, as in mlp.3:417")
            sites.append(str(neuron[0]))
            indices.append(_index(neuron[0], neuron[1]))
    return pl.DataFrame({"site": sites, "index": indices}, schema={"site": pl.String, "index": pl.Int64})


def _index(site: object, index: Any) -> int:
    if not _is_whole(index):
        raise DataError(f"{index!r} is not the index of a neuron at {site}: indices are whole numbers")
    return int(index)


def _is_whole(value: object) -> TypeGuard[SupportsIndex]:
    return not isinstance(value, bool) and hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0


def _checked(frame: pl.DataFrame) -> pl.DataFrame:
    for column in _KEY:
        if column not in frame.columns:
            raise DataError(f"a table of neurons has columns 'site' and 'index'; this one has {frame.columns}")
    if not frame.schema["index"].is_integer() and frame.height:
        raise DataError(f"the column 'index' holds whole numbers, not {frame.schema['index']}")
    frame = frame.with_columns(pl.col("site").cast(pl.String), pl.col("index").cast(pl.Int64))
    frame = frame.select([*_KEY, *(column for column in frame.columns if column not in _KEY)])
    bad = frame.filter(pl.col("index").is_null() | (pl.col("index") < 0) | pl.col("site").is_null())
    if not bad.is_empty():
        raise DataError(f"{bad['site'][0]}:{bad['index'][0]} is not a neuron: indices are whole numbers from 0 on")
    twice = frame.filter(frame.select(_KEY).is_duplicated())
    if not twice.is_empty():
        raise DataError(f"{twice['site'][0]}:{twice['index'][0]} is named twice; each neuron has one row")
    return frame


def _draw(frame: pl.DataFrame, n: int, generator: random.Random, where: str) -> pl.DataFrame:
    if n < 0 or n > frame.height:
        raise DataError(f"cannot draw {n} neurons: {where} has {frame.height}")
    return frame[generator.sample(range(frame.height), n)]


def _proportional(counts: Sequence[tuple[str, int]], n: int) -> list[tuple[str, int]]:
    # Largest remainders: the parts are whole, sum to n, and stray from the exact share by less than one.
    total = sum(count for _, count in counts)
    if not total:
        if n:
            raise DataError("like= holds no neurons to match")
        return []
    exact = [(site, n * count / total) for site, count in counts]
    whole = {site: math.floor(share) for site, share in exact}
    left = n - sum(whole.values())
    for site, _ in sorted(exact, key=lambda pair: (math.floor(pair[1]) - pair[1], pair[0]))[:left]:
        whole[site] += 1
    return list(whole.items())


def _suffix(file: Path) -> str:
    if file.suffix not in (".parquet", ".csv"):
        raise StoreError(f"a table of neurons is a .parquet or .csv file, not {file.name!r}")
    return file.suffix
