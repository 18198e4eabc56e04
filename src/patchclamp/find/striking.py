"""`striking`: neurons that fire strongly on the words of one family, and on little else.

A neuron fires strongly above half of its own maximum, as the width of a tuning curve is measured at
half its height. For a family of words, *purity* is the share of those firings that fall on its words,
and *coverage* the share of its words on which the neuron fires strongly. Both are corrected for
chance, as Cohen's kappa is: 0 where firing has nothing to do with the words, 1 where they are the same
thing. The score is their product.

    purity'   = (purity - p) / (1 - p)       p: share of all tokens that are words of the family
    coverage' = (coverage - r) / (1 - r)     r: share of all tokens on which the neuron fires strongly
    score     = max(purity', 0) * max(coverage', 0)

A family is the inflected forms of one word (`return`, `returns`, `returned`, by the Snowball stemmer), or
up to eight such groups together, taken in the order of their coverage: the prefix with the best score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from patchclamp.errors import DataError
from patchclamp.neurons import Neurons
from patchclamp.recording import Recording

_MOST_GROUPS = 8


def striking(
    recording: Recording,
    *,
    minimum_score: float = 0.3,
    minimum_words: int = 2,
    minimum_occurrences: int = 20,
    minimum_firings: int = 30,
    spread: bool = False,
) -> Neurons:
    """Neurons that answer to a family of words, best first.

    Args:
        recording: one with the summary `ByToken`, which `record` keeps by default.
        minimum_score: least score, in [0, 1].
        minimum_words: least number of different words in the family. With 1, neurons for a single word count.
        minimum_occurrences: a group of inflected forms counts from this many occurrences on.
        minimum_firings: a neuron counts from this many strong firings on.
        spread: order by turns, the best neuron of each site first, and leave out a neuron whose family is
            that of an earlier one: for a first look, where the best would otherwise resemble each other.

    Returns:
        `Neurons` with `score`, `purity`, `coverage` (shares, not corrected for chance), `family` (its words,
        most covered first), `firings`. Empty where no neuron passes: if tokens are paired with activations
        at random (`recording.with_tokens_permuted`), that is so.

    Raises:
        DataError: the recording has no `ByToken`.
    """
    frames = [family_scores(recording, site, minimum_occurrences, minimum_firings) for site in recording]
    table = pl.concat(frames)
    table = table.filter((pl.col("score") >= minimum_score) & (pl.col("words") >= minimum_words))
    table = table.sort("score", descending=True, maintain_order=True)
    return Neurons.from_polars((_spread(table) if spread else table).drop("words"))


def family_scores(
    recording: Recording, site: str, minimum_occurrences: int = 20, minimum_firings: int = 30
) -> pl.DataFrame:
    """The best family of every neuron of a site, however weak: one row per neuron, in order.

    Returns:
        Columns `site`, `index`, `score`, `purity`, `coverage`, `family`, `words` (how many), `firings`.
        A neuron that never passes the minima has score 0 and family `""`.

    Raises:
        DataError: the recording has no `ByToken` at this site.
    """
    if "by_token" not in recording[site].summaries:
        raise DataError(f"{site} was recorded without ByToken: record(..., summaries=[..., pc.ByToken()])")
    by_token = recording[site].by_token
    groups = word_groups(recording.text(by_token.tokens))
    firings = by_token.fired_total
    size = len(firings)
    empty = pl.DataFrame(
        {
            "site": [site] * size,
            "index": np.arange(size),
            "score": np.zeros(size),
            "purity": np.zeros(size),
            "coverage": np.zeros(size),
            "family": [""] * size,
            "words": np.zeros(size, np.int64),
            "firings": firings,
        }
    )
    occurrences = np.asarray([by_token.occurrences[group.slots].sum() for group in groups])
    kept = [group for group, number in zip(groups, occurrences, strict=True) if number >= minimum_occurrences]
    if not kept or not by_token.count:
        return empty
    best = _best_prefix(
        np.stack([by_token.fired[group.slots].sum(0) for group in kept]).astype(np.float64),
        occurrences[occurrences >= minimum_occurrences].astype(np.float64),
        firings.astype(np.float64),
        by_token.count,
    )
    enough = (firings >= minimum_firings) & (best.score > 0)
    families = [
        [word for place in best.order[: best.length[neuron], neuron] for word in kept[place].words]
        if enough[neuron]
        else []
        for neuron in range(size)
    ]
    return empty.with_columns(
        score=pl.Series(np.where(enough, best.score, 0.0)),
        purity=pl.Series(np.where(enough, best.purity, 0.0)),
        coverage=pl.Series(np.where(enough, best.coverage, 0.0)),
        family=pl.Series([", ".join(words) for words in families]),
        words=pl.Series([len(words) for words in families], dtype=pl.Int64),
    )


@dataclass(frozen=True)
class WordGroup:
    """The inflected forms of one word: the words, and the places of their tokens in a list."""

    words: tuple[str, ...]
    slots: np.ndarray


def word_groups(tokens: Sequence[str]) -> list[WordGroup]:
    """Group those tokens that are whole words by their stem; tokens come most frequent first.

    A whole word begins with a space (as tokens read) and has two letters or more. Where no token begins
    with a space, as in a tokenizer of words, every token does.
    """
    import snowballstemmer

    stem = snowballstemmer.stemmer("english").stemWord
    spaced = any(token.startswith(" ") and token.strip() for token in tokens)
    found: dict[str, dict[str, list[int]]] = {}
    for slot, token in enumerate(tokens):
        word = token.strip().lower()
        if len(word) >= 2 and word.isalpha() and (token.startswith(" ") or not spaced):
            found.setdefault(stem(word), {}).setdefault(word, []).append(slot)
    return [
        WordGroup(tuple(words), np.asarray([slot for slots in words.values() for slot in slots]))
        for words in found.values()
    ]


@dataclass(frozen=True)
class _Best:
    score: np.ndarray  # [size]
    purity: np.ndarray
    coverage: np.ndarray
    length: np.ndarray  # [size] int: how many groups of `order` the family has
    order: np.ndarray  # [groups <= 8, size]: groups by coverage


def _best_prefix(fired: np.ndarray, occurrences: np.ndarray, firings: np.ndarray, count: int) -> _Best:
    """`fired` is [groups, size]; for each neuron the prefix of its best covered groups with the highest score."""
    coverage = fired / occurrences[:, None]
    most = min(_MOST_GROUPS, len(coverage))
    order = np.argsort(-coverage, axis=0, kind="stable")[:most]
    inside = np.take_along_axis(fired, order, axis=0).cumsum(0)
    words = occurrences[order].cumsum(0)
    purity, coverage = inside / np.maximum(firings, 1), inside / words
    score = _above_chance(purity, words / count) * _above_chance(coverage, firings / count)
    length = score.argmax(0)
    pick = (length, np.arange(len(firings)))
    return _Best(score[pick], purity[pick], coverage[pick], length + 1, order)


def _above_chance(share: np.ndarray, chance: np.ndarray) -> np.ndarray:
    corrected = (share - chance) / np.maximum(1 - chance, 1e-12)
    return np.clip(corrected, 0, 1)


def _spread(table: pl.DataFrame) -> pl.DataFrame:
    seen: list[set[str]] = []
    kept: list[int] = []
    for place, family in enumerate(table["family"].to_list()):
        words = set(family.split(", "))
        if all(len(words & other) * 2 < min(len(words), len(other)) for other in seen):
            seen.append(words)
            kept.append(place)
    turn = pl.int_range(pl.len()).over("site").alias("turn")
    ordered = table[kept].with_columns(turn).sort("turn", "score", descending=[False, True])
    return ordered.drop("turn")
