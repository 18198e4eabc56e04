"""An `Explanation` as an SVG, drawn by hand: it needs no library, and reads on light and on dark pages."""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

import polars as pl

if TYPE_CHECKING:
    from patchclamp.find.explanation import Explanation

_WIDTH, _MARGIN = 760, 20
_LETTER = 7.4  # of the monospaced font at 12 pixels
_MOST_TOKENS = 240
_STYLE = """
.pc-explanation{--ground:#ffffff;--ink:#1b1f24;--faint:#6a737d;--line:#d0d7de;--up:#1f6feb;--down:#d1570a;--second:#8250df}
@media (prefers-color-scheme:dark){
.pc-explanation{--ground:#15181d;--ink:#e6e9ed;--faint:#9aa4af;--line:#3a424c;--up:#6cb2ff;--down:#ff9d57;--second:#c297ff}}
.pc-explanation text{font:12px ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;fill:var(--ink);white-space:pre}
.pc-explanation .title{font-size:14px;font-weight:600}
.pc-explanation .faint{fill:var(--faint)}
.pc-explanation .ground{fill:var(--ground)}
.pc-explanation .axis{stroke:var(--line)}
.pc-explanation .up{fill:var(--up)}
.pc-explanation .down{fill:var(--down)}
.pc-explanation .second{fill:var(--second)}
"""


def drawn(found: Explanation) -> str:
    """The SVG, as text."""
    page = _Page()
    page.text(_title(found), "title", 18)
    page.text(_subtitle(found), "faint", 18)
    _tokens(page, found)
    _layers(page, found)
    _bars(page, f"Neurons, {_said(found)}", _neuron_rows(found), "up")
    _bars(page, f"Heads, {_said(found)}", _head_rows(found), "second")
    return page.svg(f"{_title(found)}. {found.sentence()}")


class _Page:
    """Shapes from the top of a page downwards."""

    def __init__(self) -> None:
        self.y = float(_MARGIN)
        self.shapes: list[str] = []

    def text(self, words: str, style: str = "", height: float = 16, x: float = _MARGIN) -> None:
        """One line, cut to the page."""
        self.put(words, x, self.y + 12, style, _WIDTH - _MARGIN - x)
        self.y += height

    def put(self, words: str, x: float, y: float, style: str = "", room: float = math.inf, anchor: str = "") -> None:
        """Words at a place, cut to the room there is."""
        shown = _cut(_visible(words), room)
        attributes = f' class="{style}"' * bool(style) + f' text-anchor="{anchor}"' * bool(anchor)
        self.shapes.append(f'<text x="{x:.1f}" y="{y:.1f}"{attributes}>{html.escape(shown)}</text>')

    def box(self, x: float, y: float, width: float, height: float, style: str, opacity: float = 1.0) -> None:
        """A filled rectangle."""
        self.shapes.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{max(height, 0):.1f}" rx="2" '
            f'class="{style}" fill-opacity="{opacity:.3f}"/>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float) -> None:
        """A thin line."""
        self.shapes.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="axis"/>')

    def svg(self, said: str) -> str:
        """All of it; `said` is what is read aloud."""
        height = self.y + _MARGIN / 2
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" class="pc-explanation" role="img" '
                f'viewBox="0 0 {_WIDTH} {height:.0f}" width="{_WIDTH}" height="{height:.0f}">',
                f"<title>{html.escape(_visible(said))}</title>",
                f"<style>{_STYLE}</style>",
                f'<rect class="ground" width="{_WIDTH}" height="{height:.0f}"/>',
                *self.shapes,
                "</svg>",
            ]
        )


def _title(found: Explanation) -> str:
    if found.what == "similarity":
        return f"Why are the texts alike? cosine {found.value:.3f}"
    against = "" if found.foil is None else f" rather than {found.foil!r}"
    return f"Why {found.target!r}{against}?"


def _subtitle(found: Explanation) -> str:
    if found.what == "similarity":
        return f"with: {found.target!r}"
    chance = " against ".join(f"{each:.3g}" for each in found.probabilities)
    name = "logit" if found.foil is None else "difference of logits"
    parts = "" if found.completeness is None else f", parts sum to it within {abs(found.completeness.error):.0e}"
    return f"{name} {found.value:.2f}, probability {chance}{parts}"


def _said(found: Explanation) -> str:
    return "what each wrote directly" if found.ranked_by == "direct" else "gradient x activation (to first order)"


# Tokens ---------------------------------------------------------------------------------------------


def _tokens(page: _Page, found: Explanation) -> None:
    table = found.by_token
    if table.is_empty():
        return
    left_out = max(0, table.height - _MOST_TOKENS)
    table = table.tail(_MOST_TOKENS)
    page.y += 8
    more = f" (the last {_MOST_TOKENS} of {left_out + _MOST_TOKENS})" * bool(left_out)
    page.text(f"Tokens, gradient x embedding (to first order){more}", "faint", 20)
    most = max(map(abs, table["gradient"]), default=0.0) or 1.0
    x = float(_MARGIN)
    for token, value in table.select("token", "gradient").iter_rows():
        shown = _visible(token)
        width = min(_length(shown) * _LETTER + 4, _WIDTH - 2 * _MARGIN)
        if x + width > _WIDTH - _MARGIN:
            x, page.y = float(_MARGIN), page.y + 22
        page.box(x, page.y, width - 1, 18, "up" if value >= 0 else "down", 0.6 * abs(value) / most)
        page.put(token, x + 2, page.y + 13, room=width)
        x += width
    page.y += 26
    page.box(_MARGIN, page.y, 10, 10, "up", 0.6)
    page.put("raises it", _MARGIN + 16, page.y + 9, "faint")
    page.box(_MARGIN + 110, page.y, 10, 10, "down", 0.6)
    page.put("lowers it", _MARGIN + 126, page.y + 9, "faint")
    page.y += 20


# Layers ---------------------------------------------------------------------------------------------


def _layers(page: _Page, found: Explanation) -> None:
    """Two bars a layer, for heads and for neurons, up or down."""
    table = found.by_layer.filter(pl.col("layer").is_not_null() & pl.col("part").is_in(["heads", "neurons"]))
    table = table.drop_nulls(found.ranked_by)
    if table.is_empty():
        return
    values = {(layer, part): each for layer, part, each in table.select("layer", "part", found.ranked_by).iter_rows()}
    layers = sorted({layer for layer, _ in values})
    page.y += 8
    page.text(f"Layers, {_said(found)}", "faint", 26)
    most, least = max(0.0, *values.values()), min(0.0, *values.values())
    span, height, left = (most - least) or 1.0, 110.0, _MARGIN + 54
    zero = page.y + height * most / span
    step = min((_WIDTH - _MARGIN - left) / len(layers), 90.0)
    bar = step * 0.36
    page.line(left, zero, left + step * len(layers), zero)
    for value in {most, least}:
        if abs(value) > 0.02 * span:
            page.put(f"{value:+.2g}", left - 8, page.y + height * (most - value) / span + 4, "faint", anchor="end")
    for place, layer in enumerate(layers):
        for number, (part, style) in enumerate((("heads", "second"), ("neurons", "up"))):
            value = values.get((layer, part), 0.0)
            x = left + step * place + step * 0.1 + number * (bar + step * 0.04)
            top = zero - max(value, 0.0) / span * height
            page.box(x, top, bar, abs(value) / span * height, style)
        if place % max(1, math.ceil(len(layers) * 30 / (_WIDTH - left))) == 0:
            page.put(str(layer), left + step * (place + 0.45), page.y + height + 18, "faint", anchor="middle")
    page.y += height + 26
    page.box(left, page.y, 10, 10, "second")
    page.put("heads", left + 16, page.y + 9, "faint")
    page.box(left + 90, page.y, 10, 10, "up")
    page.put("neurons", left + 106, page.y + 9, "faint")
    page.put(_others(found), left + 200, page.y + 9, "faint", _WIDTH - _MARGIN - left - 200)
    page.y += 22


def _others(found: Explanation) -> str:
    """What no layer's bar shows."""
    if found.completeness is None:
        return ""
    table = found.by_layer.filter(~pl.col("part").is_in(["heads", "neurons"])).drop_nulls("direct")
    summed = table.group_by("part", maintain_order=True).agg(pl.col("direct").sum())
    return ", ".join(f"{part} {value:+.2f}" for part, value in summed.iter_rows() if abs(value) >= 0.005)


# Neurons and heads --------------------------------------------------------------------------------------


def _neuron_rows(found: Explanation) -> list[tuple[str, float, str]]:
    column = found.ranked_by
    table = found.neurons.to_polars().drop_nulls(column)
    # Those that speak against it are worth a look too.
    against = table.filter(pl.col(column) < 0).tail(3).reverse()
    rows = pl.concat([table.filter(pl.col(column) >= 0).head(found.k), against])
    other = "gradient" if column == "direct" else None
    return [
        (
            f"{row['site']}:{row['index']}",
            row[column],
            ("" if other is None else f"gradient {row[other]:+.2g}")
            + ("" if row["token"] is None else f"  most at {row['token']!r}"),
        )
        for row in rows.iter_rows(named=True)
    ]


def _head_rows(found: Explanation) -> list[tuple[str, float, str]]:
    rows = found.heads.drop_nulls(found.ranked_by).head(min(found.k, 8))
    return [
        (
            row["site"] if row["head"] is None else f"{row['site']} head {row['head']}",
            row[found.ranked_by],
            "" if row["attends_to"] is None else f"looks at {row['attends_to']!r} ({row['attention']:.0%})",
        )
        for row in rows.iter_rows(named=True)
    ]


def _bars(page: _Page, title: str, rows: Sequence[tuple[str, float, str]], style: str) -> None:
    if not rows:
        return
    page.y += 8
    page.text(title, "faint", 20)
    names = min(max(_length(name) for name, _, _ in rows) * _LETTER + 10, 220.0)
    left, room = _MARGIN + names, 210.0
    most = max(abs(value) for _, value, _ in rows) or 1.0
    for name, value, note in rows:
        page.put(name, _MARGIN, page.y + 12, room=names)
        page.box(left, page.y + 2, max(1.0, abs(value) / most * room), 12, style if value >= 0 else "down")
        page.put(f"{value:+.3g}", left + abs(value) / most * room + 6, page.y + 12)
        page.put(note, left + room + 70, page.y + 12, "faint", _WIDTH - _MARGIN - left - room - 70)
        page.y += 18


# Words ----------------------------------------------------------------------------------------------


def _visible(words: str) -> str:
    """Line ends as a sign, and nothing that XML does not allow."""
    shown = words.replace("\n", "\u21b5").replace("\t", "\u21e5")
    return "".join(_sign(each) for each in shown)


def _sign(letter: str) -> str:
    if ord(letter) < 0x20:
        return chr(0x2400 + ord(letter))
    # Halves of a pair, and what is no character at all.
    return "\ufffd" if 0xD800 <= ord(letter) <= 0xDFFF or ord(letter) in (0x7F, 0xFFFE, 0xFFFF) else letter


def _length(words: str) -> int:
    """In letters of the monospaced font: those of East Asia take two."""
    return sum(2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in words)


def _cut(words: str, room: float) -> str:
    if _length(words) * _LETTER <= room + _LETTER / 2:
        return words
    kept, used = "", 1
    for letter in words:
        used += _length(letter)
        if used * _LETTER > room:
            break
        kept += letter
    return f"{kept}\u2026"
