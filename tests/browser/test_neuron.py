"""The page of a neuron in Chromium: what it says equals the Parquet files."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import pytest
from tests.atlas_fixture import HOSTILE
from tests.browser.reading import on_page, open_neuron, texts

from patchclamp.atlas import Atlas, NeuronCard
from patchclamp.atlas.words import column, number, share, written

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser
# The planted ones, with hostile tokens at their peak; a silent one; two that nobody planted.
NEURONS = ["mlp.0:7", "mlp.0:11", "mlp.0:12", "mlp.0:13", "mlp.0:14", "mlp.1:3", "mlp.0:0", "mlp.1:60"]


@pytest.mark.parametrize("name", NEURONS)
def test_the_page_says_what_the_tables_hold(page: Page, atlas: Atlas, name: str) -> None:
    open_neuron(page, name)
    card = atlas.neuron(name)
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
        for (text, title, strength), token, value in zip(
            shown["tokens"], row["tokens"], row["values"], strict=True
        ):
            assert text == on_page(token.lstrip(" "))
            assert title == ("not counted" if math.isnan(value) else number(value))
            share_of_peak = max(value / strongest, 0) if strongest > 0 and not math.isnan(value) else 0
            assert strength == pytest.approx(share_of_peak if share_of_peak >= 0.03 else 0, abs=0.001)


def _check_lists(page: Page, card: NeuronCard) -> None:
    rows = "rows => rows.map((row) => [...row.children].map((cell) => cell.textContent))"
    wanted = [
        [on_page(row["token"].strip(" ")), share(row["share_of_firings"]), share(row["share_of_token"]),
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
    # The mark stands in the bin that holds the threshold.
    place = next(place for place, (low, high, _) in enumerate(bins.iter_rows()) if low <= threshold < high)
    x = float(page.get_attribute(".threshold line", "x1") or "nan")
    assert drawn[place]["x"] - 1 <= x <= drawn[place]["x"] + drawn[place]["width"] + 1
    assert page.text_content(".threshold text") == f"strong above {number(threshold)}"
    page.click("text=The counts as numbers")
    rows = page.eval_on_selector_all(
        "figure tbody tr", "rows => rows.map((row) => [...row.children].map((cell) => cell.textContent))"
    )
    assert rows == [
        [number(low), number(high), f"{count:,}"] for low, high, count in bins.iter_rows() if count
    ]


def test_no_text_of_the_corpus_becomes_part_of_the_page(page: Page, atlas: Atlas) -> None:
    seen = ""
    for name in NEURONS:
        open_neuron(page, name)
        seen += page.text_content("main") or ""
        foreign = "main :is(script, img, iframe, object, embed, style, link, b, form, svg a)"
        assert page.locator(foreign).count() == 0
        assert page.locator("script").count() == 1
        assert page.locator("[onerror], [onload], [onclick], a[href^='javascript']").count() == 0
    for text in HOSTILE:
        assert on_page(text) in seen, text
    assert page.evaluate("document.title").startswith(NEURONS[-1])


def test_a_mark_that_turns_text_around_is_written_out(page: Page) -> None:
    open_neuron(page, "mlp.0:7")
    assert r"\u202egnitirw" in (page.text_content("main") or "")
    assert not page.evaluate(
        r"/[\u202a-\u202e\u2066-\u2069\u0000-\u0008\u001b]/.test(document.body.textContent)"
    )


def test_links_lead_to_the_neurons_they_name(page: Page, atlas: Atlas) -> None:
    open_neuron(page, "mlp.0:7")
    page.click("text=mlp.0:8 ›")
    page.wait_for_selector("h1:has-text('mlp.0:8')")
    page.click("text=‹ mlp.0:7")
    page.wait_for_selector("h1:has-text('mlp.0:7')")
    first = atlas.neuron("mlp.0:7").neighbors.filter(relation="next").row(0, named=True)
    name = f"{first['other_site']}:{first['other_index']}"
    page.click(f'[data-relation="next"] >> text="{name}"')
    page.wait_for_selector(f"h1:has-text('{name}')")
    assert page.url.endswith(f"/neuron/{name}")


def test_an_unknown_neuron_is_answered_in_words(page: Page) -> None:
    page.goto("/neuron/mlp.0:9999")
    assert "The nearest: mlp.0:95" in page.inner_text("[role=alert]")
    page.goto("/neuron/%3Cimg src=x onerror=alert(1)%3E")
    assert "<img src=x onerror=alert(1)>" in page.inner_text("[role=alert]")
    page.goto("/neuron/%E0%A4%A")
    assert page.inner_text("[role=alert]")
    page.faults[:] = [fault for fault in page.faults if "status of 404" not in fault]  # type: ignore[attr-defined]
