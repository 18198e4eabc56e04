"""Read the explorer's page as a person would: what its cells, examples and lists say."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from patchclamp.atlas.shown import visible
from patchclamp.atlas.words import written

if TYPE_CHECKING:
    from playwright.sync_api import Page


def open_table(page: Page, query: str = "") -> None:
    page.goto(f"/{query}")
    page.wait_for_selector(".neurons:not([aria-busy]) tbody tr")


def open_neuron(page: Page, name: str) -> None:
    page.goto(f"/neuron/{name}")
    page.wait_for_selector("#headline")


def settled(page: Page) -> None:
    """Wait until the table has drawn what was asked of it last."""
    page.wait_for_selector(".neurons:not([aria-busy])")


def rows(page: Page) -> list[dict[str, str]]:
    """The rows of the table: column -> the text of the cell."""
    return page.evaluate("""() => [...document.querySelectorAll('.neurons tbody tr')].map((row) =>
        Object.fromEntries([...row.querySelectorAll('[data-column]')].map((cell) =>
            [cell.dataset.column, cell.textContent])))""")


def names(page: Page) -> list[str]:
    """The names of the neurons in the table, in order."""
    return page.eval_on_selector_all(".neurons tbody th a", "links => links.map((link) => link.textContent)")


def cell(column: str, value: Any, row: dict[str, Any]) -> str:
    """What the table says of a value."""
    if column == "neuron":
        return value + ("★" if row["striking"] else "")
    if column in ("family", "top_token"):
        return lone(value) if value else ""
    return on_page(written(column, value))


def on_page(text: str) -> str:
    """A text of the corpus as the page writes it: only line breaks and tabs keep their own form."""
    return "".join(part if part in "\n\t" else visible(part) for part in re.split(r"([\n\t])", text))


def texts(page: Page, selector: str) -> list[str]:
    return page.eval_on_selector_all(selector, "found => found.map((each) => each.textContent)")


def lone(token: str) -> str:
    """A token in a list of tokens, as the page writes it: the spaces at its edges are drawn."""
    word = token.strip(" \n\t")
    before, after = token.split(word, 1) if word else (token, "")
    drawn = [edge.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") for edge in (before, after)]
    return drawn[0] + on_page(word) + drawn[1] or "(empty)"
