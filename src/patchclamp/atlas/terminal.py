"""The card of a neuron and the summary of an atlas, drawn for a terminal with rich.

Everything that comes from the data goes through `visible`, and into `Text` objects, which read no
markup: no text of a corpus can colour, move or hide anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import polars as pl
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.style import Style
from rich.table import Table
from rich.text import Text

from patchclamp.atlas.shown import visible, visible_token
from patchclamp.atlas.words import number, share

if TYPE_CHECKING:
    from patchclamp.atlas.atlas import Atlas
    from patchclamp.atlas.card import NeuronCard

_EXAMPLES = 8
_TOKENS = 8
_NEIGHBORS = 5
_BLOCKS = " ▁▂▃▄▅▆▇█"
_HEADING = Style(bold=True, color="cyan")
_QUIET = Style(dim=True)


def draw_card(card: NeuronCard) -> RenderableType:
    """The card as a rich renderable; without colour the peak token of an example stands in «»."""
    return _Card(card)


def draw_summary(atlas: Atlas, striking: int = 5) -> RenderableType:
    """What an atlas holds and its most striking neurons, as a rich renderable."""
    manifest, found = atlas.manifest, atlas.striking
    data, model = manifest["data"], manifest["model"]
    lines: list[RenderableType] = [
        _title(
            visible(str(model["name"])),
            f"{len(atlas):,} neurons at {len(manifest['sites'])} site{'s' * (len(manifest['sites']) != 1)}",
        ),
        Text(
            f"recorded on {number(data['tokens'])} tokens of {number(data['examples'])} examples "
            f"of {visible(str(data['name']))}"
        ),
    ]
    if not len(found):
        lines.append(Text("No neuron is striking: none answers to a family of words."))
        return Group(*lines)
    lines.append(
        Text(f"{len(found)} striking, the first {min(striking, len(found))}:" if len(found) > 1 else "1 striking:")
    )
    table = Table(box=None, padding=(0, 2, 0, 0), header_style=_QUIET)
    for title, justify in (
        ("neuron", "left"),
        ("fires on", "left"),
        ("purity", "right"),
        ("coverage", "right"),
    ):
        table.add_column(title, justify=justify)  # type: ignore[arg-type]
    for row in found.to_polars().head(striking).iter_rows(named=True):
        name = Text(f"{row['site']}:{row['index']}", style="bold")
        table.add_row(name, Text(visible(row["family"] or "")), share(row["purity"]), share(row["coverage"]))
    lines.append(Padding(table, (0, 0, 0, 2)))
    return Group(*lines)


class _Card:
    def __init__(self, card: NeuronCard) -> None:
        self.card = card

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        marked = console.no_color or console.color_system is None
        width = max(options.max_width, 40)
        yield from _head(self.card)
        yield from _examples(self.card, width, marked)
        yield from _triggers(self.card)
        yield from _histogram(self.card, min(width - 4, 72))
        yield from _labels(self.card)
        yield from _neighbors(self.card)


def _head(card: NeuronCard) -> Iterator[RenderableType]:
    facts = card.facts
    yield _title(visible(card.name), "striking" if facts.get("striking") else "")
    parts = [
        f"{visible(str(facts['kind']))}" + ("" if facts.get("layer") is None else f" of layer {facts['layer']}"),
        f"fires on {share(facts['firing_rate']) or 'none'} of {number(facts['count'])} tokens",
        f"mean {number(facts['mean'])}",
        f"deviation {number(facts['std'])}",
        f"range {number(facts['min'])} to {number(facts['max'])}",
        f"strong above {number(facts['threshold'])}",
    ]
    yield Text(" · ".join(parts), style=_QUIET)
    yield Text(visible(card.headline))


def _examples(card: NeuronCard, width: int, marked: bool) -> Iterator[RenderableType]:
    yield _heading("Strongest examples")
    if card.examples.is_empty():
        yield Text("  none", style=_QUIET)
    for row in card.examples.head(_EXAMPLES).iter_rows(named=True):
        line = Text(f"  {number(row['value']):>8}  ", style="bold", no_wrap=True, overflow="ellipsis", end="\n")
        tokens, values = row["tokens"] or [], row["values"] or []
        if tokens:
            line.append_text(_shaded(tokens, values, row["position"] - row["start"], width - 13, marked))
        else:
            line.append(f"example {row['example']}, position {row['position']}", style=Style(bold=False))
        yield line
    if card.examples.height > _EXAMPLES:
        yield Text(f"  and {card.examples.height - _EXAMPLES} more", style=_QUIET)


def _shaded(tokens: Sequence[str], values: Sequence[float], peak: int, room: int, marked: bool) -> Text:
    """The tokens around the peak that fit into `room` cells, shaded by activation."""
    shown = [visible(token) for token in tokens]
    peak = min(max(peak, 0), len(shown) - 1)
    first, last = _window([cell_len(token) for token in shown], peak, room - 4)
    strongest = max((value for value in values if value == value), default=0.0)
    text = Text("…" if first else "", style=Style(bold=False))
    for place in range(first, last + 1):
        token, value = shown[place], values[place] if place < len(values) else math.nan
        # Shade and mark hug the word: «return», not « return».
        word = token.lstrip() or token
        text.append("" if place == first == 0 else token[: len(token) - len(word)])
        style = _shade(value, strongest)
        if place == peak:
            word, style = f"«{word}»" if marked else word, style + Style(bold=True)
        text.append(word, style)
    if last < len(shown) - 1:
        text.append("…")
    return text


def _window(lengths: Sequence[int], peak: int, room: int) -> tuple[int, int]:
    """First and last token of the widest stretch around the peak that fits."""
    first = last = peak
    used = lengths[peak]
    while True:
        before = lengths[first - 1] if first else None
        after = lengths[last + 1] if last + 1 < len(lengths) else None
        # Two parts of what comes before for one of what comes after: what led to the peak explains more.
        if before is not None and used + before <= room and (after is None or peak - first <= 2 * (last - peak)):
            first, used = first - 1, used + before
        elif after is not None and used + after <= room:
            last, used = last + 1, used + after
        elif before is not None and used + before <= room:
            first, used = first - 1, used + before
        else:
            return first, last


def _shade(value: float, strongest: float) -> Style:
    strength = value / strongest if strongest > 0 and value == value else 0.0
    if strength < 0.1:
        return Style(bold=False)
    low, high = (58, 44, 20), (255, 176, 32)
    red, green, blue = (round(a + (b - a) * min(strength, 1.0)) for a, b in zip(low, high, strict=True))
    dark = strength > 0.55
    return Style(bold=False, bgcolor=f"rgb({red},{green},{blue})", color="rgb(20,14,0)" if dark else "rgb(255,246,230)")


def _triggers(card: NeuronCard) -> Iterator[RenderableType]:
    yield _heading("Tokens that trigger it")
    if card.tokens.is_empty():
        yield Text("  none", style=_QUIET)
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style=_QUIET)
    for title, justify in (
        ("token", "left"),
        ("of its strong firings", "right"),
        ("", "left"),
        ("of the token", "right"),
    ):
        table.add_column(title, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row in card.tokens.head(_TOKENS).iter_rows(named=True):
        of_token = f"{share(row['share_of_token'])} ({number(row['fired'])} of {number(row['occurrences'])})"
        bar = Text(_bar(row["share_of_firings"], 12), style="yellow")
        table.add_row(Text(visible_token(row["token"]), style="bold"), share(row["share_of_firings"]), bar, of_token)
    yield Padding(table, (0, 0, 0, 2))


def _histogram(card: NeuronCard, width: int) -> Iterator[RenderableType]:
    yield _heading("Activations, counts on a log scale")
    bins = card.histogram
    if bins.is_empty():
        yield Text("  none", style=_QUIET)
        return
    merged = -(-bins.height // width)
    rows = bins.with_row_index("place").group_by(pl.col("place") // merged, maintain_order=True)
    columns = rows.agg(pl.col("low").first(), pl.col("high").last(), pl.col("count").sum())
    tallest = math.log1p(max(columns["count"].to_list()))
    threshold = card.facts.get("threshold")
    line, strong_from = Text("  "), None
    for place, (low, high, count) in enumerate(columns.select("low", "high", "count").iter_rows()):
        strong = threshold is not None and low >= threshold
        if threshold is not None and low <= threshold < high:
            strong_from = place
        height = math.log1p(count) / tallest if tallest else 0.0
        # A bin with a single token still shows.
        line.append(_BLOCKS[max(math.ceil(height * 8), 1) if count else 0], "yellow" if strong else "cyan")
    yield line
    yield _axis(card, columns.height, strong_from)


def _axis(card: NeuronCard, width: int, strong_from: int | None) -> Text:
    """The smallest and the largest activation under the ends, a mark where strong begins."""
    low, high = number(card.facts["min"]), number(card.facts["max"])
    axis = f"{low}{' ' * max(width - len(low) - len(high), 1)}{high}"
    mark = f"▲ strong above {number(card.facts['threshold'])}"
    if strong_from is None:
        return Text(f"  {axis}", style=_QUIET)
    # On its own line, so that it never runs into the ends.
    start = strong_from if strong_from + len(mark) <= max(width, len(mark)) else strong_from - len(mark) + 1
    if start < strong_from:
        mark = f"strong above {number(card.facts['threshold'])} ▲"
    return Text(f"  {' ' * max(start, 0)}{mark}\n  {axis}", style=_QUIET)


def _labels(card: NeuronCard) -> Iterator[RenderableType]:
    for (label,), rows in card.labels.group_by("label", maintain_order=True):
        yield _heading(f"By {visible(str(label))}")
        table = Table(box=None, padding=(0, 2, 0, 0), header_style=_QUIET)
        table.add_column("")
        for title in ("mean", "fires on", "strongly on", "tokens"):
            table.add_column(title, justify="right")
        for row in rows.iter_rows(named=True):
            numbers = (
                number(row["mean"]),
                share(row["firing_rate"]),
                share(row["strong_rate"]),
                number(row["count"]),
            )
            table.add_row(Text(visible(str(row["value"])), style="bold"), *numbers)
        yield Padding(table, (0, 0, 0, 2))


def _neighbors(card: NeuronCard) -> Iterator[RenderableType]:
    yield _heading("Nearest neurons, by correlation")
    if card.neighbors.is_empty():
        yield Text("  none", style=_QUIET)
    words = {"layer": "same layer", "next": "next layer"}
    for (relation,), rows in card.neighbors.group_by("relation", maintain_order=True):
        line = Text(f"  {words.get(str(relation), visible(str(relation)))}", no_wrap=True, overflow="ellipsis")
        line.stylize(_QUIET)
        for row in rows.head(_NEIGHBORS).iter_rows(named=True):
            line.append(f"  {visible(row['other_site'])}:{row['other_index']}", "bold")
            line.append(f" {row['correlation']:.2f}")
        yield line


def _title(name: str, note: str) -> Text:
    text = Text()
    text.append(name, Style(bold=True))
    if note:
        text.append(f"  {note}", Style(color="yellow"))
    return text


def _heading(words: str) -> Text:
    return Text(f"\n{words}", style=_HEADING)


def _bar(part: float, width: int) -> str:
    """A bar of eighths of a cell; `part` in 0..1."""
    eighths = round((part if part == part else 0.0) * width * 8)
    return "█" * (eighths // 8) + ("▏▎▍▌▋▊▉"[eighths % 8 - 1] if eighths % 8 else "")
