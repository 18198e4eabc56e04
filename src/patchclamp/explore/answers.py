"""The answers of the JSON API: how they are made, and their shapes for the OpenAPI document.

JSON has no NaN and no infinity. A missing number (NaN or null) is `null`; an infinite one is the
text "Infinity" or "-Infinity", which JavaScript's `Number` and Python's `float` both read.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import polars as pl
from pydantic import BaseModel

from patchclamp.atlas.card import NeuronCard

if TYPE_CHECKING:
    from patchclamp.atlas import Atlas
    from patchclamp.explore.table import NeuronTable

Number = float | str | None
Value = bool | int | float | str | None


class Site(BaseModel):
    """A place in the model where neurons live."""

    name: str
    kind: str
    layer: int | None
    size: int
    activation: str | None


class ColumnWords(BaseModel):
    """What a column of the table is called, how its values are written, what they mean."""

    name: str
    title: str
    kind: str
    meaning: str


class About(BaseModel):
    """What was recorded."""

    patchclamp: str | None
    created: str | None
    model: dict[str, Value]
    data: dict[str, Value]
    labels: dict[str, list[str]]
    sites: list[Site]
    neurons: int
    striking: int
    columns: list[ColumnWords]


class Page(BaseModel):
    """One page of the table; `total` counts the neurons that the filters let through."""

    total: int
    offset: int
    limit: int
    sort: str
    descending: bool
    neurons: list[dict[str, Value]]


class Example(BaseModel):
    """A text on which the neuron is active; `values` is null on tokens that do not count."""

    rank: int
    value: Number
    example: int
    position: int
    start: int
    tokens: list[str]
    values: list[Number]
    labels: dict[str, str]


class Trigger(BaseModel):
    """A token on which the neuron fires strongly."""

    token: str
    fired: int
    occurrences: int
    share_of_firings: Number
    share_of_token: Number


class Neighbor(BaseModel):
    """A neuron whose activation runs alike."""

    neuron: str
    correlation: Number
    relation: str


class Category(BaseModel):
    """The neuron's activity in one category of a label."""

    label: str
    value: str
    count: int
    mean: Number
    firing_rate: Number
    strong_rate: Number


class Bin(BaseModel):
    """A bin of the histogram."""

    low: Number
    high: Number
    count: int


class Neuron(BaseModel):
    """Everything the atlas knows of one neuron."""

    neuron: str
    headline: str
    previous: str | None
    next: str | None
    facts: dict[str, Value]
    examples: list[Example]
    tokens: list[Trigger]
    neighbors: list[Neighbor]
    labels: list[Category]
    histogram: list[Bin]


class Refusal(BaseModel):
    """Why a request was refused."""

    detail: str


def about(atlas: Atlas, table: NeuronTable) -> dict[str, Any]:
    """The answer `About`."""
    manifest = atlas.manifest
    return {
        "patchclamp": manifest.get("patchclamp"),
        "created": manifest.get("created"),
        "model": _scalars(manifest["model"]),
        "data": _scalars(manifest["data"]),
        "labels": manifest.get("labels") or {},
        "sites": [{key: site.get(key) for key in Site.model_fields} for site in manifest["sites"]],
        "neurons": len(atlas.neurons),
        "striking": len(atlas.striking),
        "columns": [{"name": name, **words._asdict()} for name, words in table.columns.items()],
    }


def neuron(card: NeuronCard, previous: str | None, following: str | None) -> dict[str, Any]:
    """The answer `Neuron`."""
    return {
        "neuron": card.name,
        "headline": card.headline,
        "previous": previous,
        "next": following,
        "facts": plain(card.facts),
        "examples": [_example(row) for row in card.examples.iter_rows(named=True)],
        "tokens": _rows(card.tokens, Trigger),
        "neighbors": [
            {
                "neuron": f"{row['other_site']}:{row['other_index']}",
                "correlation": plain(row["correlation"]),
                "relation": row["relation"],
            }
            for row in card.neighbors.iter_rows(named=True)
        ],
        "labels": _rows(card.labels, Category),
        "histogram": _rows(card.histogram, Bin),
    }


def plain(value: Any) -> Any:
    """The value as JSON can hold it: NaN becomes None, infinity the text "Infinity"."""
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _example(row: dict[str, Any]) -> dict[str, Any]:
    shown = {key: row[key] for key in Example.model_fields if key in row}
    labels = json.loads(row["labels"]) if row.get("labels") else {}
    return plain(shown | {"tokens": row["tokens"] or [], "values": row["values"] or [], "labels": labels})


def _rows(frame: pl.DataFrame, shape: type[BaseModel]) -> list[dict[str, Any]]:
    return [plain(row) for row in frame.select(list(shape.model_fields)).iter_rows(named=True)]


def _scalars(facts: dict[str, Any]) -> dict[str, Any]:
    return {key: plain(value) for key, value in facts.items() if isinstance(value, (str, int, float)) or value is None}
