"""Find neurons by a word: in their family, their trigger tokens, their top examples."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from patchclamp.errors import DataError

_KEY = ["site", "index"]


def search(tables: Mapping[str, pl.LazyFrame], word: str, limit: int) -> pl.LazyFrame:
    """Neurons that have to do with `word`, best first, with a column `match` that says why.

    Four kinds of match, best first: the word is one of the family; it is a trigger token; it is part
    of either; it stands in a top example. Within a kind the stronger comes first: the family's score,
    the token's share of the firings times its share of the token, the number of examples.

    Args:
        tables: the lazy tables `neurons`, `tokens` and `examples` of an atlas.
        word: a word or a piece of text; upper and lower case are the same.
        limit: the most neurons to give.

    Raises:
        DataError: there is nothing to search for, or `limit` is below 1.
    """
    wanted = " ".join(str(word).lower().split())
    if not wanted:
        raise DataError("search() needs a word to look for")
    if limit < 1:
        raise DataError(f"limit={limit}: ask for at least one neuron")
    matches = pl.concat(
        [
            _families(tables["neurons"], wanted),
            _tokens(tables["tokens"], wanted),
            _examples(tables["examples"], wanted),
        ]
    )
    order = {"by": ["match_kind", "match_strength", *_KEY], "descending": [False, True, False, False]}
    best = matches.sort(**order).unique(subset=_KEY, keep="first", maintain_order=True).head(limit)
    return best.join(tables["neurons"], on=_KEY, how="left", maintain_order="left").drop("match_kind", "match_strength")


def _families(neurons: pl.LazyFrame, wanted: str) -> pl.LazyFrame:
    words = pl.col("family").str.to_lowercase().str.split(",").list.eval(pl.element().str.strip_chars())
    family = pl.col("family")
    return neurons.filter(family.str.to_lowercase().str.contains(wanted, literal=True)).select(
        *_KEY,
        match_kind=pl.when(words.list.contains(wanted)).then(0).otherwise(2),
        match_strength=pl.col("score").fill_nan(None).fill_null(0.0).cast(pl.Float64),
        match=pl.format("family “{}”", family),
    )


def _tokens(tokens: pl.LazyFrame, wanted: str) -> pl.LazyFrame:
    plain = pl.col("token").str.to_lowercase().str.strip_chars()
    return tokens.filter(plain.str.contains(wanted, literal=True)).select(
        *_KEY,
        match_kind=pl.when(plain == wanted).then(1).otherwise(2),
        match_strength=(pl.col("share_of_firings") * pl.col("share_of_token")).fill_nan(0.0).cast(pl.Float64),
        match=pl.format(
            "token “{}”, {}% of its firings",
            pl.col("token").str.strip_chars(),
            (pl.col("share_of_firings") * 100).fill_nan(0.0).round(1),
        ),
    )


def _examples(examples: pl.LazyFrame, wanted: str) -> pl.LazyFrame:
    text = pl.col("tokens").list.join("").str.to_lowercase().str.replace_all(r"\s+", " ")
    holds = text.str.contains(wanted, literal=True)
    return (
        examples.select(*_KEY, holds=holds)
        .group_by(_KEY)
        .agg(found=pl.col("holds").sum(), shown=pl.len())
        .filter(pl.col("found") > 0)
        .select(
            *_KEY,
            match_kind=pl.lit(3),
            match_strength=(pl.col("found") / pl.col("shown")).cast(pl.Float64),
            match=pl.format("{} of its {} examples", pl.col("found"), pl.col("shown")),
        )
    )
