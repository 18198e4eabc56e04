"""Induction heads and previous-token heads, by what they attend to where the answer is known.

    induction strength      = attention from the query to what is to be copied - to what is not
    previous-token strength = attention of a token to the one before it

Both are read off the pattern alone: a head that looks at the right token may still copy nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import nn

from patchclamp.errors import DataError, SiteNotReached
from patchclamp.model import Model, Site, load
from patchclamp.model.hooks import reading
from patchclamp.neurons import Neurons
from patchclamp.published import published

Positions = int | Sequence[int] | np.ndarray | torch.Tensor
_TITLE = (
    "What needs to go right for an induction head? A mechanistic study of in-context learning circuits and their "
    "formation"
)
_URL = "https://arxiv.org/abs/2404.07129"


@published(row="S044", title=_TITLE, authors="Singh et al.", year=2024, url=_URL, part="induction strength")
def induction_strength(
    model: Model | nn.Module,
    inputs: Any,
    right: Positions,
    wrong: Positions | None = None,
    query: Positions = -1,
    sites: str | Site | Iterable[str | Site] = "pattern.*",
) -> Neurons:
    """Heads by how much more the query attends to the right token than to wrong ones (Singh et al., 2024).

    Args:
        model: a transformer whose attention probabilities can be read.
        inputs: texts, a tensor, or a mapping of keywords.
        right: position of the token that is to be copied (behind the match), one for all examples or `[examples]`.
        wrong: `[examples]` or `[examples, n]`, positions that a head without induction would attend to as well; the
            mean over n is subtracted. None: nothing is.
        query: position of the token that is predicted from; negative ones count from the end, padding included.
        sites: patterns.

    Returns:
        Heads (`pattern.1:3` is head 3), best first: `score`, the strength in [-1, 1], mean over examples; `right` and
        `wrong`, both attentions.

    Raises:
        DataError: a position outside of the sequences, or not one for each example.
    """
    tables = []
    for site, pattern, _ in _patterns(model, inputs, sites):
        rows = torch.arange(len(pattern))[:, None]
        asked = _positions(query, pattern, "query", 1)[:, :1]
        to_right = pattern[rows, asked, _positions(right, pattern, "right", 1)].mean((0, 1))
        others = None if wrong is None else _positions(wrong, pattern, "wrong", 2)
        to_wrong = torch.zeros_like(to_right) if others is None else pattern[rows, asked, others].mean((0, 1))
        columns = {"score": to_right - to_wrong, "right": to_right, "wrong": to_wrong}
        tables.append(_table(site, columns))
    return _best(tables)


@published(row="S044", title=_TITLE, authors="Singh et al.", year=2024, url=_URL, part="previous-token strength")
def previous_token_strength(
    model: Model | nn.Module,
    inputs: Any,
    tokens: Sequence[int] | None = None,
    sites: str | Site | Iterable[str | Site] = "pattern.*",
) -> Neurons:
    """Heads by how much tokens attend to the one before them (Singh et al., 2024).

    Args:
        model: a transformer whose attention probabilities can be read.
        inputs: texts, a tensor, or a mapping of keywords.
        tokens: positions that are looked at (in the paper: labels, each behind its exemplar); None: all but the first.
        sites: patterns.

    Returns:
        Heads, best first: `score`, the mean attention in [0, 1]. Pairs with padding are left out.

    Raises:
        DataError: a position that has none before it, or lies outside.
    """
    tables = []
    for site, pattern, mask in _patterns(model, inputs, sites):
        length = pattern.shape[1]
        chosen = list(range(1, length)) if tokens is None else [int(each) for each in tokens]
        for each in chosen:
            if not 1 <= each < length:
                raise DataError(f"no token before position {each}, or no such position: there are {length}")
        if not chosen:
            raise DataError("previous_token_strength() wants sequences of two tokens or more")
        at = torch.tensor(chosen)
        before = pattern[:, at, at - 1]
        there = torch.ones(before.shape[:2]) if mask is None else (mask[:, at] * mask[:, at - 1]).to(before)
        if not bool(there.sum()):
            raise DataError("no token at these positions has one before it: all are padding")
        tables.append(_table(site, {"score": (before * there[..., None]).sum((0, 1)) / there.sum()}))
    return _best(tables)


# Helpers --------------------------------------------------------------------------------------------


def _patterns(
    given: Model | nn.Module, inputs: Any, sites: str | Site | Iterable[str | Site]
) -> list[tuple[Site, torch.Tensor, torch.Tensor | None]]:
    """Each site with its pattern `[examples, queries, keys, heads]` float32, and the mask of the tokens."""
    model = given if isinstance(given, Model) else load(given)
    chosen = model.select(sites)
    for site in chosen:
        if site.kind != "pattern":
            raise DataError(f"{site.name} is no pattern of attention but of kind {site.kind!r}")
    texts = isinstance(inputs, (str, list, tuple))
    keywords: Mapping[str, Any] | None = model.inputs(inputs) if texts else None
    if isinstance(inputs, Mapping):
        keywords = inputs
    with model.evaluating(), torch.no_grad(), reading(model.module, chosen) as captured:
        model.module(inputs) if keywords is None else model.module(**keywords)
    mask = None if keywords is None else keywords.get("attention_mask")
    found = []
    for site in chosen:
        if not captured[site.name]:
            raise SiteNotReached(f"the forward pass never called {site.name}")
        found.append((site, captured[site.name][-1].tensor.float().cpu(), None if mask is None else mask.cpu()))
    return found


def _positions(given: Positions, pattern: torch.Tensor, what: str, most: int) -> torch.Tensor:
    """`[examples, n]` int64, counted from 0."""
    examples, length = pattern.shape[0], pattern.shape[1]
    at = torch.as_tensor(given)
    if at.is_floating_point() or at.dtype == torch.bool or at.ndim > most:
        raise DataError(f"{what}= holds whole numbers, one for each example; not {list(at.shape)} of {at.dtype}")
    at = at.expand(examples) if at.ndim == 0 else at
    if len(at) != examples:
        raise DataError(f"{what}= has positions for {len(at)} examples; there are {examples}")
    if bool(((at < -length) | (at >= length)).any()):
        raise DataError(f"{what}= names a position that is not there: sequences have {length} tokens")
    return at.long().reshape(examples, -1) % length


def _table(site: Site, columns: dict[str, torch.Tensor]) -> pl.DataFrame:
    heads = len(columns["score"])
    values = {name: each.double().numpy() for name, each in columns.items()}
    return pl.DataFrame({"site": [site.name] * heads, "index": range(heads), **values})


def _best(tables: list[pl.DataFrame]) -> Neurons:
    return Neurons.from_polars(pl.concat(tables).sort("score", descending=True, maintain_order=True))
