"""The table of neurons as the explorer asks for it: filter, sort and cut, quick for a million rows."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import polars as pl

from patchclamp.atlas import Atlas
from patchclamp.atlas.words import COLUMNS, Column, column
from patchclamp.errors import DataError, PatchclampError, unknown
from patchclamp.explore.answers import plain
from patchclamp.neurons import Neuron

_SEARCHED = ("neuron", "family", "top_token", "label_value")
_PLACE, _TEXT, _SITE_PLACE = " place", " text", " site place"


class Selection(NamedTuple):
    """Which rows to show, and in which order."""

    sort: str = "score"
    descending: bool = True
    search: str = ""
    sites: tuple[str, ...] = ()
    striking: bool | None = None
    minimum: tuple[str, ...] = ()  # "firing_rate:0.01"
    maximum: tuple[str, ...] = ()
    offset: int = 0
    limit: int = 50


class NeuronTable:
    """The neurons of an atlas in memory, in the order of the model's sites."""

    def __init__(self, atlas: Atlas) -> None:
        frame = atlas.neurons.to_polars()
        self.columns: dict[str, Column] = {
            name: column(name, not frame.schema[name].is_numeric())
            for name in (*(known for known in COLUMNS if known in frame.columns), *frame.columns)
        }
        self.sites: list[str] = frame["site"].unique(maintain_order=True).to_list()
        self._frame = frame
        searched = [pl.col(name).fill_null("") for name in _SEARCHED if name in frame.columns]
        site_places = pl.DataFrame(
            {"site": self.sites, _SITE_PLACE: range(len(self.sites))}, schema_overrides={"site": pl.String}
        )
        # What a request needs to decide which rows it shows; the rows themselves are looked up after.
        self._keys = frame.with_columns(
            pl.int_range(pl.len()).alias(_PLACE),
            pl.concat_str(searched, separator="\n").str.to_lowercase().alias(_TEXT),
        ).join(site_places, on="site", how="left", maintain_order="left")

    def page(self, selection: Selection) -> dict[str, Any]:
        """The rows of one page, and how many there are in all.

        Raises:
            UnknownName: there is no such column or site.
            DataError: a minimum or maximum is not `column:number`.
        """
        key = self._sort_key(selection.sort)
        chosen = self._keys.lazy().filter(*self._conditions(selection)).select(_PLACE, key.alias("key")).collect()
        order = chosen.sort("key", descending=selection.descending, nulls_last=True, maintain_order=True)
        places = order[_PLACE].slice(selection.offset, selection.limit)
        return {
            "total": chosen.height,
            "offset": selection.offset,
            "limit": selection.limit,
            "sort": selection.sort,
            "descending": selection.descending,
            "neurons": [plain(row) for row in self._frame.select(list(self.columns))[places].iter_rows(named=True)],
        }

    def has(self, name: str) -> bool:
        """Whether a neuron of this name, `mlp.3:417`, is in the table."""
        try:
            neuron = Neuron.parse(name)
        except PatchclampError:
            return False
        return not self._frame.filter((pl.col("site") == neuron.site) & (pl.col("index") == neuron.index)).is_empty()

    def beside(self, site: str, index: int) -> tuple[str | None, str | None]:
        """The names of the neurons before and after one, at its own site."""
        indices = self._frame.filter(pl.col("site") == site)["index"]
        before, after = indices.filter(indices < index).max(), indices.filter(indices > index).min()
        return (None if before is None else f"{site}:{before}"), (None if after is None else f"{site}:{after}")

    def _sort_key(self, name: str) -> pl.Expr:
        self._check_column(name)
        # As text "mlp.10" would come before "mlp.2", and ":10" before ":2".
        if name in ("neuron", "site"):
            return pl.col(_PLACE if name == "neuron" else _SITE_PLACE)
        dtype = self._frame.schema[name]
        if dtype.is_float():
            return pl.col(name).fill_nan(None)
        if dtype == pl.String:
            return pl.when(pl.col(name) != "").then(pl.col(name).str.to_lowercase())
        return pl.col(name)

    def _conditions(self, selection: Selection) -> list[pl.Expr]:
        conditions = [pl.lit(True)]
        for word in selection.search.lower().split():
            conditions.append(pl.col(_TEXT).str.contains(word, literal=True))
        for site in selection.sites:
            if site not in self.sites:
                raise unknown("site of this atlas", site, self.sites)
        if selection.sites:
            conditions.append(pl.col("site").is_in(list(selection.sites)))
        if selection.striking is not None:
            conditions.append(pl.col("striking").fill_null(False) == selection.striking)
        for bound in selection.minimum:
            name, value = self._bound(bound)
            conditions.append(pl.col(name) >= value)
        for bound in selection.maximum:
            name, value = self._bound(bound)
            conditions.append(pl.col(name) <= value)
        return conditions

    def _bound(self, bound: str) -> tuple[str, float]:
        name, _, text = bound.rpartition(":")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not name or math.isnan(value):
            raise DataError(f"{bound!r} is no bound: write a column, a colon and a number, as in firing_rate:0.01")
        self._check_column(name)
        if not self._frame.schema[name].is_numeric():
            raise DataError(f"the column {name!r} does not hold numbers")
        return name, value

    def _check_column(self, name: str) -> None:
        if name not in self.columns:
            raise unknown("column", name, self.columns)
