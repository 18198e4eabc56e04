"""The tables of an atlas, made from a recording: one row per neuron, and what belongs to each."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl

from patchclamp.find.striking import family_scores, striking
from patchclamp.recording import Recording, SiteRecording

_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_TOKENS_KEPT = 10
# Two examples show the same thing when this share of their different tokens is common to both.
_NEAR_DUPLICATE = 0.7


def neurons_table(recording: Recording, tokens: pl.DataFrame, labels: pl.DataFrame) -> pl.DataFrame:
    """One row per neuron: what the summaries say, its strongest token, its word family, its preferred label."""
    frames = [_facts(recording, name) for name in recording]
    table = pl.concat(frames, how="diagonal_relaxed")
    key = ["site", "index"]
    top = tokens.filter(pl.col("rank") == 0).select(
        *key,
        pl.col("token").alias("top_token"),
        pl.col("share_of_firings").alias("top_token_purity"),
        pl.col("share_of_token").alias("top_token_coverage"),
    )
    table = table.join(top, on=key, how="left", maintain_order="left")
    table = table.join(_preferred_label(labels), on=key, how="left", maintain_order="left")
    with_tokens = {name: each for name, each in recording.by_site.items() if "by_token" in each.summaries}
    if not with_tokens:
        return table.with_columns(pl.lit(False).alias("striking"))
    found = striking(replace(recording, by_site=with_tokens)).to_polars()
    table = table.join(found.select(*key, pl.lit(True).alias("striking")), on=key, how="left", maintain_order="left")
    return table.with_columns(pl.col("striking").fill_null(False))


def examples_table(recording: Recording, context: int = 12) -> pl.DataFrame:
    """The strongest examples of each neuron with the text around them; near-duplicates are left out.

    Where the data has no text, `tokens` and `values` are empty, and `start` is the position.
    """
    rows: dict[str, list[Any]] = {name: [] for name in _EXAMPLES_SCHEMA}
    for name, each in recording.by_site.items():
        if "top_examples" not in each.summaries:
            continue
        _examples_of(recording, name, each, context, rows)
    return pl.DataFrame(rows, schema=_EXAMPLES_SCHEMA)


def tokens_table(recording: Recording) -> pl.DataFrame:
    """The tokens on which each neuron fires strongly: up to ten, by share of its firings times share of the token."""
    frames = [_tokens_of(recording, name) for name in recording if "by_token" in recording[name].summaries]
    return pl.concat(frames) if frames else pl.DataFrame(schema=_TOKENS_SCHEMA)


def labels_table(recording: Recording) -> pl.DataFrame:
    """Every neuron by every category of every label: how many rows, mean, firing rates."""
    frames = []
    for name, each in recording.by_site.items():
        if "by_label" not in each.summaries:
            continue
        by_label = each.by_label
        for label in by_label.labels:
            mean, rate, count = by_label.mean(label), by_label.rate(label), by_label.count(label)
            for place, category in enumerate(by_label.categories(label)):
                frames.append(
                    pl.DataFrame(
                        {
                            "site": [name] * len(mean),
                            "index": np.arange(len(mean)),
                            "label": [label] * len(mean),
                            "value": [category] * len(mean),
                            "count": np.full(len(mean), count[place], np.int64),
                            "mean": mean[:, place],
                            "firing_rate": rate[:, place, 0],
                            "strong_rate": rate[:, place, -1],
                        },
                        schema=_LABELS_SCHEMA,
                    )
                )
    table = pl.concat(frames) if frames else pl.DataFrame(schema=_LABELS_SCHEMA)
    return table.with_columns(pl.col("mean", "firing_rate", "strong_rate").fill_nan(None))


def histograms_table(recording: Recording) -> pl.DataFrame:
    """Each neuron's histogram from its first to its last bin that is not empty; counts are exact."""
    sites, indices, edges, counts = [], [], [], []
    for name, each in recording.by_site.items():
        if "histogram" not in each.summaries:
            continue
        all_edges, all_counts = each.histogram.edges, each.histogram.counts
        for index, row in enumerate(all_counts):
            filled = np.flatnonzero(row)
            first, last = (filled[0], filled[-1] + 1) if len(filled) else (0, 0)
            sites.append(name)
            indices.append(index)
            edges.append(all_edges[first : last + 1].tolist() if len(filled) else [])
            counts.append(row[first:last].tolist())
    schema = {"site": pl.String, "index": pl.Int64, "edges": pl.List(pl.Float64), "counts": pl.List(pl.Int64)}
    return pl.DataFrame({"site": sites, "index": indices, "edges": edges, "counts": counts}, schema=schema)


# Neurons --------------------------------------------------------------------------------------------


def _facts(recording: Recording, name: str) -> pl.DataFrame:
    each = recording[name]
    size = each.site.size or 0
    rates = each.firing_rate
    table = pl.DataFrame(
        {
            "neuron": [f"{name}:{index}" for index in range(size)],
            "site": [name] * size,
            "kind": [each.site.kind] * size,
            "layer": pl.Series([each.site.layer] * size, dtype=pl.Int64),
            "index": np.arange(size),
            "count": np.full(size, each.count, np.int64),
            "firing_rate": rates.rate[:, 0],
            "strong_rate": rates.rate[:, -1],
            "threshold": rates.thresholds[:, -1].astype(np.float64),
            "mean": each.moments.mean,
            "std": each.moments.std,
            "min": each.min_max.min.astype(np.float64),
            "max": each.min_max.max.astype(np.float64),
        }
    )
    # A quantile is read off bins, whose edges may lie outside of what was seen.
    low, high = each.min_max.min, each.min_max.max
    quantiles = [
        pl.Series(f"q{round(q * 100):02d}", np.clip(each.histogram.quantile(q), low, high)) for q in _QUANTILES
    ]
    table = table.with_columns(*quantiles)
    if "by_token" in each.summaries:
        families = family_scores(recording, name).select("family", "purity", "coverage", "score")
        table = pl.concat([table, families], how="horizontal")
    else:
        blank = [pl.lit(0.0).alias(column) for column in ("purity", "coverage", "score")]
        table = table.with_columns(pl.lit("").alias("family"), *blank)
    numbers = pl.selectors.float()
    return table.with_columns(numbers.fill_nan(None))


def _preferred_label(labels: pl.DataFrame) -> pl.DataFrame:
    """The category whose share of strong firing exceeds that of the other categories together by the most."""
    fired = (pl.col("strong_rate") * pl.col("count")).fill_null(0.0)
    group = ["site", "index", "label"]
    others = pl.col("count").sum().over(group) - pl.col("count")
    rest = (fired.sum().over(group) - fired) / pl.when(others > 0).then(others)
    return (
        labels.with_columns((pl.col("strong_rate") - rest).alias("label_contrast"))
        .filter(pl.col("label_contrast").is_not_null())
        .sort("label_contrast", descending=True, maintain_order=True)
        .unique(["site", "index"], keep="first", maintain_order=True)
        .select("site", "index", "label", pl.col("value").alias("label_value"), "label_contrast")
    )


# Examples -------------------------------------------------------------------------------------------

_EXAMPLES_SCHEMA = {
    "site": pl.String,
    "index": pl.Int64,
    "rank": pl.Int64,
    "value": pl.Float64,
    "example": pl.Int64,
    "position": pl.Int64,
    "start": pl.Int64,
    "tokens": pl.List(pl.String),
    "values": pl.List(pl.Float32),
    "labels": pl.String,
}


def _examples_of(
    recording: Recording, name: str, each: SiteRecording, context: int, rows: dict[str, list[Any]]
) -> None:
    top = each.top_examples
    values, examples, positions = top.values, top.example, top.position
    kept_context = int(top.parameters()["context"])
    around = top.window.astype(np.float32) if kept_context else values[..., None]
    for index in range(len(values)):
        seen: list[frozenset[int]] = []
        for rank in range(values.shape[1]):
            example, position = int(examples[index, rank]), int(positions[index, rank])
            if example < 0:
                break
            start, tokens, shown = position, [], []
            if recording.windows:
                window = recording.window(name, example, position, min(context, kept_context))
                different = frozenset(window.ids.tolist())
                if any(_alike(different, other) for other in seen):
                    continue
                seen.append(different)
                start, tokens = window.start, recording.text(window.ids)
                first = start - position + kept_context
                beside = around[index, rank, first : first + len(tokens)]
                shown = np.where(window.counted, beside, np.nan).astype(np.float32).tolist()
            row = (
                name,
                index,
                rank,
                float(values[index, rank]),
                example,
                position,
                start,
                tokens,
                shown,
                json.dumps(recording.labels_of(example), ensure_ascii=False),
            )
            for column, value in zip(rows, row, strict=True):
                rows[column].append(value)


def _alike(left: frozenset[int], right: frozenset[int]) -> bool:
    return len(left & right) >= _NEAR_DUPLICATE * len(left | right)


# Tokens ---------------------------------------------------------------------------------------------

_TOKENS_SCHEMA = {
    "site": pl.String,
    "index": pl.Int64,
    "rank": pl.Int64,
    "token": pl.String,
    "token_id": pl.Int64,
    "fired": pl.Int64,
    "occurrences": pl.Int64,
    "share_of_firings": pl.Float64,
    "share_of_token": pl.Float64,
}

_LABELS_SCHEMA = {
    "site": pl.String,
    "index": pl.Int64,
    "label": pl.String,
    "value": pl.String,
    "count": pl.Int64,
    "mean": pl.Float64,
    "firing_rate": pl.Float64,
    "strong_rate": pl.Float64,
}


def _tokens_of(recording: Recording, name: str) -> pl.DataFrame:
    by_token = recording[name].by_token
    fired, occurrences = by_token.fired, by_token.occurrences
    firings = np.broadcast_to(by_token.fired_total, fired.shape)
    of_firings = fired / np.maximum(firings, 1)
    of_token = fired / np.maximum(occurrences, 1)[:, None]
    best = np.argsort(-(of_firings * of_token), axis=0, kind="stable")[:_TOKENS_KEPT]  # [kept, size]
    places = np.indices(best.shape)
    held = np.take_along_axis(fired, best, axis=0) > 0
    slot, rank, index = best.T[held.T], places[0].T[held.T], places[1].T[held.T]
    strings = recording.text(by_token.tokens)
    return pl.DataFrame(
        {
            "site": [name] * len(slot),
            "index": index,
            "rank": rank,
            "token": [strings[each] for each in slot],
            "token_id": by_token.tokens[slot],
            "fired": fired[slot, index].astype(np.int64),
            "occurrences": occurrences[slot],
            "share_of_firings": of_firings[slot, index],
            "share_of_token": of_token[slot, index],
        },
        schema=_TOKENS_SCHEMA,
    )
