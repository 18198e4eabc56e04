"""The card of a neuron as HTML for a notebook. Every text of the data is escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

from patchclamp.atlas.shown import visible, visible_token
from patchclamp.atlas.words import number, share

if TYPE_CHECKING:
    from patchclamp.atlas.card import NeuronCard

_EXAMPLES = 10
_TOKENS = 8


def draw_card(card: NeuronCard) -> str:
    """The card as one HTML element that brings its own look and needs no script."""
    facts = card.facts
    fires = f"fires on {share(facts['firing_rate']) or 'none'} of {number(facts['count'])} tokens"
    sections = [
        f"<strong>{_safe(card.name)}</strong> <span>{_safe(fires)}, maximum {number(facts['max'])}</span>",
        f"<div>{_safe(card.headline)}</div>",
        _section("Strongest examples", _examples(card)),
        _section("Tokens that trigger it", _triggers(card)),
        _section("Nearest neurons", _neighbors(card)),
    ]
    look = "font-family:system-ui,sans-serif;line-height:1.5;max-width:60em"
    return f'<div style="{look}">{"".join(sections)}</div>'


def _examples(card: NeuronCard) -> Iterable[str]:
    for row in card.examples.head(_EXAMPLES).iter_rows(named=True):
        tokens, values = row["tokens"] or [], row["values"] or []
        strongest = max((value for value in values if value == value), default=0.0)
        peak = row["position"] - row["start"]
        spans = [
            _token(token, values[place] if place < len(values) else math.nan, strongest, place == peak)
            for place, token in enumerate(tokens)
        ]
        words = "".join(spans) or f"example {row['example']}, position {row['position']}"
        text = f'<bdi style="white-space:pre-wrap">{words}</bdi>'
        yield f"<div><code>{number(row['value'])}</code> {text}</div>"


def _token(token: str, value: float, strongest: float, is_peak: bool) -> str:
    strength = value / strongest if strongest > 0 and value == value else 0.0
    # Orange under the text's own colour: readable in light and dark themes.
    shade = f"background:rgba(240,140,0,{0.55 * min(strength, 1):.2f});" if strength >= 0.05 else ""
    weight = "font-weight:bold;" if is_peak else ""
    return f'<span style="{shade}{weight}" title="{number(value) or "not counted"}">{_safe(token)}</span>'


def _triggers(card: NeuronCard) -> Iterable[str]:
    for row in card.tokens.head(_TOKENS).iter_rows(named=True):
        yield (
            f"<div><bdi><code>{escape(visible_token(row['token']))}</code></bdi> "
            f"{share(row['share_of_firings'])} of its strong firings, "
            f"{share(row['share_of_token'])} of the token "
            f"({number(row['fired'])} of {number(row['occurrences'])})</div>"
        )


def _neighbors(card: NeuronCard) -> Iterable[str]:
    for row in card.neighbors.iter_rows(named=True):
        where = "next layer" if row["relation"] == "next" else "same layer"
        name = f"{row['other_site']}:{row['other_index']}"
        yield f"<div><code>{_safe(name)}</code> {number(row['correlation'])}, {where}</div>"


def _section(title: str, lines: Iterable[str]) -> str:
    return f'<div style="margin-top:.6em;opacity:.75">{title}</div>{"".join(lines) or "none"}'


def _safe(text: str) -> str:
    return escape(visible(text))
