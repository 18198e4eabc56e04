"""The table in Chromium: sorting, filtering and paging change its rows to what polars says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl
import pytest
from tests.browser.reading import cell, names, open_table, rows, settled, texts

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser
ROWS = 50


@pytest.fixture
def table(atlas_folder: Path) -> pl.DataFrame:
    return pl.read_parquet(atlas_folder / "neurons.parquet")


def _sorted(table: pl.DataFrame, column: str, descending: bool) -> list[str]:
    key = pl.col(column)
    if column == "neuron":
        key = pl.int_range(pl.len())
    elif table.schema[column] == pl.String and column != "site":
        key = pl.when(key != "").then(key.str.to_lowercase())
    return table.sort(key, descending=descending, nulls_last=True, maintain_order=True)["neuron"].to_list()


def test_the_first_view_is_the_best_by_score(page: Page, table: pl.DataFrame) -> None:
    open_table(page)
    assert names(page) == _sorted(table, "score", True)[:ROWS]
    assert page.inner_text(".count") == "1–50 of 192 neurons"
    assert page.title() == "tiny <b>network</b> · patchclamp"


def test_every_cell_says_what_the_parquet_file_holds(page: Page, table: pl.DataFrame) -> None:
    open_table(page, "?all=true&sort=neuron&descending=false")
    found = rows(page)
    assert set(found[0]) == set(table.columns)
    for page_number in range(1, 5):
        wanted = [
            {name: cell(name, value, row) for name, value in row.items()}
            for row in table.slice((page_number - 1) * ROWS, ROWS).iter_rows(named=True)
        ]
        assert rows(page) == wanted
        if page_number < 4:
            page.click("text=Next ›")
            page.wait_for_selector(f"text=page {page_number + 1} of 4")
    assert page.inner_text(".count") == "151–192 of 192 neurons"
    assert page.is_disabled("text=Next ›") and page.is_enabled("text=‹ Previous")


def test_every_header_sorts_one_way_and_the_other(page: Page, table: pl.DataFrame) -> None:
    open_table(page)
    for column in page.eval_on_selector_all(
        ".neurons thead button", "found => found.map((each) => each.dataset.column)"
    ):
        for _ in range(2):
            page.click(f'button[data-column="{column}"]')
            settled(page)
            head = page.locator("th", has=page.locator(f'button[data-column="{column}"]'))
            order = head.get_attribute("aria-sort")
            assert order in ("ascending", "descending")
            assert names(page) == _sorted(table, column, order == "descending")[:ROWS], (column, order)
        assert page.locator(".neurons thead th:not([aria-sort='none'])").count() == 1
    # Numbers start with the largest, words with the first.
    page.click('button[data-column="max"]')
    settled(page)
    assert page.locator('thead th:has([data-column="max"])').get_attribute("aria-sort") == "descending"


def test_text_site_and_striking_filter(page: Page, table: pl.DataFrame) -> None:
    open_table(page)
    page.fill("#search", "return")
    held = table.filter(
        pl.concat_str("neuron", "family", "top_token", "label_value", separator="\n").str.contains("return")
    )
    page.wait_for_selector(f"text=1–{held.height} of {held.height} neurons")
    assert set(names(page)) == set(held["neuron"]) and 0 < held.height < ROWS
    page.select_option("#site", "mlp.1")
    settled(page)
    assert set(names(page)) == set(held.filter(site="mlp.1")["neuron"])
    page.fill("#search", "")
    page.check("#striking")
    chosen = set(table.filter("striking", site="mlp.1")["neuron"])
    page.wait_for_selector(f"text=1–{len(chosen)} of {len(chosen)} neurons")
    assert names(page) == [name for name in _sorted(table, "score", True) if name in chosen]


def test_nothing_found_says_so(page: Page) -> None:
    open_table(page, "?search=xylophone")
    assert texts(page, ".neurons tbody td") == ["No neuron is like that."]
    assert page.inner_text(".count") == "0 neurons"


def test_what_is_typed_is_text(page: Page) -> None:
    open_table(page)
    page.fill("#search", '<img src=x onerror="alert(1)">')
    page.wait_for_selector("text=No neuron is like that.")
    open_table(page, "?search=" + "%3Cscript%3Ealert(1)%3C/script%3E")
    assert page.input_value("#search") == "<script>alert(1)</script>"
    assert "mlp.0:11" in names(page)


def test_the_address_keeps_the_view(page: Page, table: pl.DataFrame) -> None:
    open_table(page)
    page.click('button[data-column="firing_rate"]')
    settled(page)
    page.click("text=Next ›")
    page.wait_for_selector("text=page 2 of 4")
    page.reload()
    page.wait_for_selector("text=page 2 of 4")
    settled(page)
    assert names(page) == _sorted(table, "firing_rate", True)[ROWS : 2 * ROWS]
    page.click(".neurons tbody th a >> nth=0")
    page.wait_for_selector("#headline")
    page.click("text=‹ All neurons")
    page.wait_for_selector("text=page 2 of 4")
    settled(page)
    assert names(page) == _sorted(table, "firing_rate", True)[ROWS : 2 * ROWS]


def test_a_wrong_address_is_answered_in_words(page: Page) -> None:
    page.goto("/?sort=scor")
    assert "score" in page.inner_text("[role=alert]")
    # Chromium itself reports the refused request; nothing else may be wrong.
    page.faults[:] = [fault for fault in page.faults if "status of 400" not in fault]  # type: ignore[attr-defined]


def test_a_page_beyond_the_last_is_the_last(page: Page) -> None:
    open_table(page, "?page=99")
    page.wait_for_selector("text=page 4 of 4")


def test_the_keyboard_sorts_and_keeps_its_place(page: Page, table: pl.DataFrame) -> None:
    open_table(page)
    page.focus('button[data-column="purity"]')
    page.keyboard.press("Enter")
    page.wait_for_selector('th[aria-sort="descending"] button[data-column="purity"]')
    settled(page)
    assert page.evaluate("document.activeElement.dataset.column") == "purity"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Space")
    page.wait_for_selector('th[aria-sort="ascending"] button[data-column="purity"]')
    settled(page)
    assert names(page) == _sorted(table, "purity", False)[:ROWS]


def test_the_facts_above_the_table(page: Page, table: pl.DataFrame) -> None:
    open_table(page)
    intro = page.inner_text(".intro")
    assert "tiny <b>network</b>" in intro
    assert f"192 neurons at 2 sites, recorded on {table['count'][0]:,} tokens of 240 examples of random words." in intro
    assert f"{table['striking'].sum()} of them are striking" in intro
    page.click("text=About this recording")
    about = page.inner_text(".about")
    assert "0" * 64 in about and "1" * 64 in about and "gelu" in about and "code, prose" in about


def test_a_server_that_is_gone_is_said(page: Page) -> None:
    open_table(page)
    page.context.set_offline(True)
    page.click('button[data-column="purity"]')
    page.wait_for_selector("text=Is “patchclamp explore” still running?")
    page.context.set_offline(False)
    page.faults[:] = [fault for fault in page.faults if "ERR_INTERNET_DISCONNECTED" not in fault]  # type: ignore[attr-defined]
