"""`Atlas`: open the folder, look up a neuron, search by word, ask in SQL.

An atlas is a folder with a manifest and six Parquet tables, all keyed by `site` and `index`.
Reading it needs neither torch nor the model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from patchclamp.atlas import searching, sql
from patchclamp.atlas.card import NeuronCard
from patchclamp.errors import DamagedStore, UnknownName, unknown
from patchclamp.neurons import Neuron, Neurons
from patchclamp.storage import OpenedStore, opened

if TYPE_CHECKING:
    from rich.console import RenderableType

# Table -> the columns that readers rely on; a table may hold more.
TABLES: Mapping[str, tuple[str, ...]] = {
    table: tuple(columns.split())
    for table, columns in {
        "neurons": "neuron site kind layer index count firing_rate threshold mean std min max top_token "
        "family purity coverage score striking",
        "examples": "site index rank value example position start tokens values labels",
        "tokens": "site index rank token fired occurrences share_of_firings share_of_token",
        "neighbors": "site index rank other_site other_index correlation relation",
        "labels": "site index label value count mean firing_rate strong_rate",
        "histograms": "site index edges counts",
    }.items()
}


class Atlas:
    """What is known of the neurons of one model, in a folder. Make one with `Atlas.open` or `Atlas.build`.

    Attributes:
        path: the folder with its tables.
        manifest: what the folder says of itself: model, data, labels, sites, versions, and the
            SHA-256 of every file.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any], store: OpenedStore | None = None) -> None:
        self.path = path
        self.manifest = manifest
        self._store = store  # what was fetched from an object store goes with it

    @classmethod
    def build(cls, model: Any, data: Any, path: str | os.PathLike[str], **options: Any) -> Atlas:
        """Record `model` on `data` and write its atlas into the folder `path`.

        The options are those of `patchclamp.atlas.build.build`.
        """
        from patchclamp.atlas.build import build

        return build(model, data, path, **options)

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: bool = True) -> Atlas:
        """Open the atlas in the folder `path`.

        Args:
            path: the folder, or the place in an object store (`s3://bucket/name`), from where the tables are
                copied into a temporary folder.
            verify: compare the tables with their checksums, so that a damaged file is named now
                and not met later. Of the recording inside only the presence of its files is checked.

        Raises:
            StoreError: there is no atlas, it cannot be read, or it is of a newer format.
            DamagedStore: a file is missing, altered or unreadable; the message names it.
        """
        store = opened(path, "atlas", later=lambda name: name.startswith("recording/"), verify=lambda name: verify)
        for table in TABLES:
            if f"{table}.parquet" not in store.manifest["files"]:
                raise DamagedStore(f"{store.path / 'manifest.json'} is damaged: it does not list {table}.parquet")
        atlas = cls(store.folder, store.manifest, store)
        for table, columns in TABLES.items():
            atlas._check(table, columns)
        return atlas

    @cached_property
    def neurons(self) -> Neurons:
        """Every neuron with its measurements, in the order of the model's sites."""
        return Neurons.from_polars(self._collect(self.table("neurons"), "neurons"))

    @property
    def striking(self) -> Neurons:
        """The neurons that fire strongly on one word family, nearly always and nearly only; best first."""
        chosen = self._collect(self.table("neurons").filter("striking"), "neurons")
        return Neurons.from_polars(chosen.sort("score", descending=True, nulls_last=True, maintain_order=True))

    def neuron(self, name: str | Neuron) -> NeuronCard:
        """The card of one neuron, written `mlp.3:417`.

        Raises:
            DataError: the text does not name a neuron.
            UnknownName: the atlas has no such neuron; the message says which it has.
        """
        neuron = Neuron.parse(name) if isinstance(name, str) else Neuron(*name)
        row = self._of(neuron, "neurons")
        if row.is_empty():
            raise self._no_such(neuron)
        histogram = self._of(neuron, "histograms").select("edges", "counts")
        return NeuronCard(
            facts=row.row(0, named=True),
            examples=self._of(neuron, "examples").sort("rank"),
            tokens=self._of(neuron, "tokens").sort("rank"),
            neighbors=self._of(neuron, "neighbors").sort("relation", "rank"),
            labels=self._of(neuron, "labels"),
            histogram=_bins(histogram, self.path / "histograms.parquet"),
        )

    def search(self, word: str, limit: int = 50) -> Neurons:
        """Neurons whose word family, trigger tokens or top examples hold a word; best first.

        A neuron whose family or trigger token is the word comes before one where the word is only a
        part of it, and both before one that merely has the word in its examples. Upper and lower
        case are the same.

        Args:
            word: a word or a piece of text.
            limit: the most neurons to return.

        Returns:
            Neurons with their measurements and a column `match` that says why each was found.

        Raises:
            DataError: there is nothing to search for, or `limit` is below 1.
        """
        found = searching.search({name: self.table(name) for name in ("neurons", "tokens", "examples")}, word, limit)
        return Neurons.from_polars(self._collect(found, "neurons"))

    def sql(self, query: str) -> pl.DataFrame:
        """Ask the six tables in SQL, by DuckDB.

        The query sees `neurons`, `examples`, `tokens`, `neighbors`, `labels` and `histograms`, and
        nothing else: no other file can be read, and none can be written.

        Raises:
            DataError: the query is not one SELECT, or DuckDB refuses it; the message says why.
        """
        return sql.ask({name: self._file(name) for name in TABLES}, query)

    def table(self, name: str) -> pl.LazyFrame:
        """One of the six tables as a lazy polars frame.

        Raises:
            UnknownName: there is no such table.
        """
        if name not in TABLES:
            raise unknown("table of an atlas", name, TABLES)
        # glob=False: a folder may be called "run[1]".
        return pl.scan_parquet(self._file(name), glob=False)

    def __len__(self) -> int:
        return sum(site["size"] for site in self.manifest["sites"])

    def __repr__(self) -> str:
        place = self.path if self._store is None else self._store.path
        return f"Atlas({str(place)!r}: {self.manifest['model']['name']}, {len(self):,} neurons)"

    def __rich__(self) -> RenderableType:
        from patchclamp.atlas.terminal import draw_summary

        return draw_summary(self)

    def _file(self, table: str) -> Path:
        return self.path / f"{table}.parquet"

    def _of(self, neuron: Neuron, table: str) -> pl.DataFrame:
        key = (pl.col("site") == neuron.site) & (pl.col("index") == neuron.index)
        return self._collect(self.table(table).filter(key), table)

    def _collect(self, frame: pl.LazyFrame, table: str) -> pl.DataFrame:
        try:
            return frame.collect()
        except (pl.exceptions.PolarsError, OSError) as error:
            raise DamagedStore(f"{self._file(table)} cannot be read: {str(error).splitlines()[0]}") from error

    def _check(self, table: str, columns: tuple[str, ...]) -> None:
        try:
            present = self.table(table).collect_schema().names()
        except (pl.exceptions.PolarsError, OSError) as error:
            raise DamagedStore(f"{self._file(table)} cannot be read: {str(error).splitlines()[0]}") from error
        if missing := [column for column in columns if column not in present]:
            raise DamagedStore(f"{self._file(table)} is damaged: it has no column {missing[0]!r}")

    def _no_such(self, neuron: Neuron) -> UnknownName:
        of_site = self.table("neurons").filter(pl.col("site") == neuron.site).select("index")
        indices = self._collect(of_site, "neurons")["index"]
        if indices.is_empty():
            return unknown("site of this atlas", neuron.site, (site["name"] for site in self.manifest["sites"]))
        first, last = indices.min(), indices.max()
        nearest = min(indices.to_list(), key=lambda index: abs(index - neuron.index))
        return UnknownName(
            f"no neuron of this atlas is called '{neuron}': {neuron.site} has {len(indices):,}, "
            f"from {first} to {last}. The nearest: {neuron.site}:{nearest}."
        )


def _bins(row: pl.DataFrame, file: Path) -> pl.DataFrame:
    """One row per bin of a histogram: `low`, `high`, `count`."""
    edges = row["edges"][0].to_list() if not row.is_empty() else []
    counts = row["counts"][0].to_list() if not row.is_empty() else []
    if counts and len(edges) != len(counts) + 1:
        raise DamagedStore(f"{file} is damaged: a histogram has {len(edges)} edges and {len(counts)} counts")
    return pl.DataFrame(
        {"low": edges[:-1], "high": edges[1:], "count": counts},
        schema={"low": pl.Float64, "high": pl.Float64, "count": pl.Int64},
    )
