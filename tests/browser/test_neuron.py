"""The page of a neuron in Chromium: what it says equals the Parquet files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.atlas_fixture import HOSTILE
from tests.browser.checks import check_neuron
from tests.browser.reading import on_page, open_neuron

from patchclamp.atlas import Atlas

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser
# The planted ones, with hostile tokens at their peak; a silent one; two that nobody planted.
NEURONS = ["mlp.0:7", "mlp.0:11", "mlp.0:12", "mlp.0:13", "mlp.0:14", "mlp.1:3", "mlp.0:0", "mlp.1:60"]


@pytest.mark.parametrize("name", NEURONS)
def test_the_page_says_what_the_tables_hold(page: Page, atlas: Atlas, name: str) -> None:
    check_neuron(page, atlas.neuron(name))


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
    assert not page.evaluate(r"/[\u202a-\u202e\u2066-\u2069\u0000-\u0008\u001b]/.test(document.body.textContent)")


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
