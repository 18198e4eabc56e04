"""The card in a terminal and in a notebook: what it says is what the tables hold; no text can do anything."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser

import polars as pl
import pytest
from rich.console import Console
from tests.atlas_fixture import HOSTILE

from patchclamp.atlas import Atlas
from patchclamp.atlas.shown import visible, visible_token
from patchclamp.atlas.words import number, share

_SGR = re.compile(r"\x1b\[[0-9;]*m")


def _drawn(thing: object, color: str | None = None, width: int = 120) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=bool(color), color_system=color, _environ={})  # type: ignore[arg-type]
    console.print(thing)
    return stream.getvalue()


def test_the_card_says_what_the_tables_hold(atlas: Atlas) -> None:
    card = atlas.neuron("mlp.0:7")
    text = _drawn(card, width=200)
    facts = card.facts
    assert text.startswith("mlp.0:7\n")
    assert f"fires on {share(facts['firing_rate'])} of {facts['count']:,} tokens" in text
    assert f"strong above {number(facts['threshold'])}" in text
    assert f"range {number(facts['min'])} to {number(facts['max'])}" in text
    assert f"{share(facts['purity'])} of its strong firings are on “return, returns”" in text
    assert f"fires strongly on {share(facts['coverage'])} of the occurrences" in text
    for row in card.tokens.head(8).iter_rows(named=True):
        line = next(line for line in text.splitlines() if line.startswith(f"  {visible_token(row['token'])} "))
        assert f"{share(row['share_of_token'])} ({row['fired']} of {row['occurrences']})" in line
        assert share(row["share_of_firings"]) in line
    for row in card.labels.iter_rows(named=True):
        line = next(line for line in text.splitlines() if line.startswith(f"  {row['value']} "))
        assert line.split()[1:] == [
            number(row["mean"]), share(row["firing_rate"]), share(row["strong_rate"]), f"{row['count']:,}",
        ]  # fmt: skip
    for row in card.neighbors.iter_rows(named=True):
        assert f"{row['other_site']}:{row['other_index']} {row['correlation']:.2f}" in text


def test_each_example_shows_its_value_and_its_peak(atlas: Atlas) -> None:
    card = atlas.neuron("mlp.0:7")
    lines = _drawn(card, width=400).splitlines()
    first = lines.index("Strongest examples") + 1
    for line, row in zip(lines[first : first + 8], card.examples.head(8).iter_rows(named=True), strict=True):
        peak = row["tokens"][row["position"] - row["start"]].strip()
        assert line.split()[0] == number(row["value"])
        assert line.count("«") == 1 and f"«{visible(peak)}»" in line
        # Wide enough for the whole window: but for the marks it reads as the text does.
        whole = visible("".join(row["tokens"])).strip()
        assert line.split(maxsplit=1)[1].replace("«", "").replace("»", "") == whole


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_narrow_terminal_keeps_the_peak_in_sight(atlas: Atlas, width: int) -> None:
    for name in ("mlp.0:7", "mlp.0:12", "mlp.1:60"):
        lines = _drawn(atlas.neuron(name), width=width).splitlines()
        first = lines.index("Strongest examples") + 1
        shown = min(8, atlas.neuron(name).examples.height)
        assert all("«" in line and len(line) <= width for line in lines[first : first + shown])


def test_with_colour_the_peak_is_shaded_not_marked(atlas: Atlas) -> None:
    text = _drawn(atlas.neuron("mlp.0:7"), color="truecolor")
    assert "«" not in text
    # Bold, black on the deepest orange.
    assert re.search(r"\x1b\[1;38;2;20;14;0;48;2;255;176;32mreturn\x1b\[0m", text)
    assert _SGR.sub("", text).count("return") > 5


def test_shading_follows_the_activation(atlas: Atlas) -> None:
    row = atlas.neuron("mlp.0:7").examples.row(0, named=True)
    text = next(line for line in _drawn(atlas.neuron("mlp.0:7"), "truecolor", 400).splitlines() if "48;2" in line)
    greens = [int(green) for green in re.findall(r"48;2;\d+;(\d+);\d+m", text)]
    strengths = [value / max(v for v in row["values"] if v == v) for value in row["values"] if value == value]
    wanted = [round(44 + (176 - 44) * strength) for strength in strengths if strength >= 0.1]
    assert greens == wanted and len(set(greens)) > 1


def test_no_color_is_obeyed(atlas: Atlas) -> None:
    stream = io.StringIO()
    Console(file=stream, width=100, force_terminal=True, no_color=True, color_system="truecolor", _environ={}).print(
        atlas.neuron("mlp.0:7")
    )
    assert "«return»" in stream.getvalue() and "48;2" not in stream.getvalue()


@pytest.mark.parametrize("color", [None, "truecolor"])
def test_no_text_of_the_corpus_steers_the_terminal(atlas: Atlas, color: str | None) -> None:
    for name in ("mlp.0:11", "mlp.0:12", "mlp.0:13", "mlp.0:14", "mlp.1:52"):
        text = _SGR.sub("", _drawn(atlas.neuron(name), color)) if color else _drawn(atlas.neuron(name))
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
    escaped = _drawn(atlas.neuron("mlp.0:13"))
    assert r"«\x1b[31mred\x1b[0m»" in escaped
    # Rich's own markup is text as well.
    assert "[bold red]markup[/bold red]" in "".join(
        _drawn(atlas.neuron(f"mlp.0:{index}"), width=300) for index in range(20)
    )


def test_the_histogram_has_a_block_where_there_are_tokens(atlas: Atlas) -> None:
    card = atlas.neuron("mlp.0:7")
    lines = _drawn(card).splitlines()
    blocks = lines[lines.index("Activations, counts on a log scale") + 1][2:]
    merged = -(-card.histogram.height // 72)
    counts = [sum(card.histogram["count"][place : place + merged]) for place in range(0, card.histogram.height, merged)]
    blocks = blocks.ljust(len(counts))
    assert [block != " " for block in blocks] == [count > 0 for count in counts]
    assert blocks[counts.index(max(counts))] == "█"


def test_a_silent_neuron_is_drawn(atlas: Atlas) -> None:
    text = _drawn(atlas.neuron("mlp.1:3"))
    assert "Never above 0 in" in text and text.count("none") >= 2


def test_the_summary_names_the_most_striking(atlas: Atlas) -> None:
    text = _drawn(atlas)
    assert "192 neurons at 2 sites" in text and "tiny <b>network</b>" in text
    first = atlas.striking.to_polars().head(5)
    for site, index, purity, coverage in first.select("site", "index", "purity", "coverage").iter_rows():
        line = next(line for line in text.splitlines() if line.strip().startswith(f"{site}:{index} "))
        assert share(purity) in line and share(coverage) in line


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_notebook_card_is_escaped(atlas: Atlas) -> None:
    reader = _Reader()
    for index in range(96):
        reader.feed(atlas.neuron(f"mlp.0:{index}")._repr_html_())
    assert reader.tags <= {"div", "span", "strong", "code", "bdi"}
    assert reader.attributes <= {"style", "title"}
    for text in HOSTILE:
        assert visible(text) in reader.text


def test_the_notebook_card_says_what_the_tables_hold(atlas: Atlas) -> None:
    card, reader = atlas.neuron("mlp.0:7"), _Reader()
    reader.feed(card._repr_html_())
    assert card.headline in reader.text
    for row in card.examples.head(10).iter_rows(named=True):
        assert f"{number(row['value'])} {visible(''.join(row['tokens']))}" in reader.text
    for row in card.neighbors.iter_rows(named=True):
        assert f"{row['other_site']}:{row['other_index']} {number(row['correlation'])}" in reader.text


def test_neurons_without_tokens_are_drawn(atlas: Atlas) -> None:
    """A model of tensors has examples, and no tokens to show for them."""
    card = atlas.neuron("mlp.0:7")
    bare = card.examples.with_columns(pl.lit(None, pl.List(pl.String)).alias("tokens"))
    object.__setattr__(card, "examples", bare)
    row = bare.row(0, named=True)
    assert f"example {row['example']}, position {row['position']}" in _drawn(card)
    assert f"example {row['example']}, position {row['position']}" in card._repr_html_()
