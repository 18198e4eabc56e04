"""Compare the page of a neuron, piece by piece, with the rows of the Parquet files."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import pytest
from tests.browser.reading import lone, on_page, open_neuron, texts

from patchclamp.atlas import NeuronCard
from patchclamp.atlas.words import column, number, share, written

if TYPE_CHECKING:
    from playwright.sync_api import Page


def check_neuron(page: Page, card: NeuronCard) -> None:
    """Open the page of a neuron; all that it says must be what the tables hold."""
    open_neuron(page, card.name)
    _check_facts(page, card)
    _check_examples(page, card)
    _check_lists(page, card)
    _check_histogram(page, card)


def _check_facts(page: Page, card: NeuronCard) -> None:
    facts = card.facts
    said = page.evaluate("""() => Object.fromEntries([...document.querySelectorAll('.facts dd')].map((fact) =>
        [fact.dataset.column, [fact.previousElementSibling.textContent, fact.textContent, fact.title]]))""")
    assert set(said) == set(facts) - {"neuron", "site", "kind", "layer", "index"}
    for fact, (title, text, exact) in said.items():
        assert title == column(fact).title
        assert text == (on_page(written(fact, facts[fact])) or "–"), fact
        if isinstance(facts[fact], float):
            assert float(exact) == facts[fact], fact
    assert page.inner_text("h1").split("\n")[0].replace("★ striking", "").strip() == card.name
    assert ("★ striking" in page.inner_text("h1")) == facts["striking"]
    assert texts(page, "#headline") == [on_page(card.headline)]
    assert f"fires on {share(facts['firing_rate'])} of {facts['count']:,} tokens" in page.inner_text("main")


def _check_examples(page: Page, card: NeuronCard) -> None:
    said = page.evaluate("""() => [...document.querySelectorAll('.examples li')].map((example) => ({
        rank: Number(example.dataset.rank), value: example.querySelector('.value').textContent,
        text: example.querySelector('.text').textContent, where: example.querySelector('.where').textContent,
        peak: [...example.querySelectorAll('mark.peak')].map((token) => token.textContent),
        tokens: [...example.querySelectorAll('.text > *')].map((token) => [token.textContent, token.title,
            Number(token.style.getPropertyValue('--strength'))])}))""")
    assert len(said) == card.examples.height > 0
    for shown, row in zip(said, card.examples.iter_rows(named=True), strict=True):
        assert shown["rank"] == row["rank"] and shown["value"] == number(row["value"])
        assert shown["text"] == on_page("".join(row["tokens"]).removeprefix(" "))
        assert shown["peak"] == [on_page(row["tokens"][row["position"] - row["start"]].lstrip(" "))]
        kind = json.loads(row["labels"])["kind"]
        assert shown["where"] == f"example {row['example']} · position {row['position']} · kind: {kind}"
        strongest = max(value for value in row["values"] if not math.isnan(value))
        for (text, title, strength), token, value in zip(shown["tokens"], row["tokens"], row["values"], strict=True):
            assert text == on_page(token.lstrip(" "))
            assert title == ("not counted" if math.isnan(value) else number(value))
            share_of_peak = max(value / strongest, 0) if strongest > 0 and not math.isnan(value) else 0
            assert strength == pytest.approx(share_of_peak if share_of_peak >= 0.03 else 0, abs=0.001)


def _check_lists(page: Page, card: NeuronCard) -> None:
    rows = "rows => rows.map((row) => [...row.children].map((cell) => cell.textContent))"
    wanted = [
        [lone(row["token"]), share(row["share_of_firings"]), share(row["share_of_token"]),
         f"{row['fired']:,} of {row['occurrences']:,}"]
        for row in card.tokens.iter_rows(named=True)
    ]  # fmt: skip
    assert page.eval_on_selector_all(".triggers tbody tr", rows) == wanted
    wanted = [
        [
            row["value"],
            number(row["mean"]),
            share(row["firing_rate"]),
            share(row["strong_rate"]),
            number(row["count"]),
        ]
        for row in card.labels.iter_rows(named=True)
    ]
    assert page.eval_on_selector_all(".labels tbody tr", rows) == wanted
    for relation in ("layer", "next"):
        wanted = [
            [f"{row['other_site']}:{row['other_index']}", number(row["correlation"])]
            for row in card.neighbors.filter(relation=relation).iter_rows(named=True)
        ]
        assert page.eval_on_selector_all(f'[data-relation="{relation}"] li', rows) == wanted


def _check_histogram(page: Page, card: NeuronCard) -> None:
    drawn = page.evaluate("""() => [...document.querySelectorAll('.histogram .bin')].map((bin) => {
        const column = bin.querySelector('.column');
        const number = (name) => Number(column.getAttribute(name));
        return {count: Number(bin.dataset.count), title: bin.querySelector('title').textContent,
                strong: column.classList.contains('strong'),
                height: number('height'), x: number('x'), width: number('width')};})""")
    bins, threshold = card.histogram, card.facts["threshold"]
    assert [bin["count"] for bin in drawn] == bins["count"].to_list()
    assert sum(bin["count"] for bin in drawn) == card.facts["count"]
    for bin, (low, high, count) in zip(drawn, bins.iter_rows(), strict=True):
        assert bin["title"] == f"{number(low)} to {number(high)}: {count:,} token{'' if count == 1 else 's'}"
        assert bin["strong"] == (low >= threshold)
        assert (bin["height"] > 0) == (count > 0)
    by_count = sorted(drawn, key=lambda bin: bin["count"])
    assert [bin["height"] for bin in by_count] == sorted(bin["height"] for bin in drawn)
    # The mark stands in the bin that holds the threshold; a neuron that never comes near it has none.
    places = [place for place, (low, high, _) in enumerate(bins.iter_rows()) if low <= threshold < high]
    assert page.locator(".threshold").count() == len(places)
    for place in places:
        x = float(page.get_attribute(".threshold line", "x1") or "nan")
        assert drawn[place]["x"] - 1 <= x <= drawn[place]["x"] + drawn[place]["width"] + 1
        assert page.text_content(".threshold text") == f"strong above {number(threshold)}"
    page.click("text=The counts as numbers")
    rows = page.eval_on_selector_all(
        "figure tbody tr", "rows => rows.map((row) => [...row.children].map((cell) => cell.textContent))"
    )
    assert rows == [[number(low), number(high), f"{count:,}"] for low, high, count in bins.iter_rows() if count]
