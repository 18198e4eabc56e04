"""How the page looks: contrast, narrow screens, names for those who do not see it, written numbers."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

import pytest
from tests.browser.reading import open_neuron, open_table

from patchclamp.atlas.words import number, share

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser

# The contrast of each piece of text with what lies behind it, by the formula of WCAG 2.
_CONTRAST = r"""() => {
  const numbers = (color) => {
    const found = color.match(/[\d.]+(e-?\d+)?/g).map(Number);
    const scale = color.startsWith('color(') ? 255 : 1;
    return [found[0] * scale, found[1] * scale, found[2] * scale, found[3] ?? 1];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const behind = (node) => {
    const layers = [];
    for (let each = node; each; each = each.parentElement) {
      layers.push(numbers(getComputedStyle(each).backgroundColor));
    }
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const luminance = (color) => {
    const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = color.slice(0, 3).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !element.checkVisibility()) continue;
    if (element.closest('noscript, option, :disabled')) continue;
    const below = behind(element);
    const style = getComputedStyle(element);
    const ink = over(numbers(element instanceof SVGElement ? style.fill : style.color), below);
    const [light, dark] = [luminance(ink), luminance(below)].sort((a, b) => b - a);
    const where = element.tagName + '.' + element.className;
    found.push([(light + 0.05) / (dark + 0.05), walker.currentNode.textContent.trim().slice(0, 40), where]);
  }
  return found.sort((a, b) => a[0] - b[0]);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_lies_behind_it(page: Page, scheme: str) -> None:
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    for show in (
        lambda: open_table(page, "?all=true"),
        lambda: open_neuron(page, "mlp.0:7"),
        lambda: open_neuron(page, "mlp.0:14"),
    ):
        show()
        pieces = page.evaluate(_CONTRAST)
        assert len(pieces) > 100
        assert pieces[0][0] >= 4.5, pieces[:3]


def test_dark_is_dark_and_light_is_light(page: Page) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        open_table(page)
        color = page.evaluate("getComputedStyle(document.body).backgroundColor")
        grounds.append(sum(int(part) for part in color.removeprefix("rgb(").removesuffix(")").split(",")))
    assert grounds[0] > 600 and grounds[1] < 150


@pytest.mark.parametrize("width", [320, 390, 768, 1920])
def test_the_page_is_never_wider_than_the_screen(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    for show in (lambda: open_table(page), lambda: open_neuron(page, "mlp.0:12")):
        show()
        assert page.evaluate("document.scrollingElement.scrollWidth") <= width


def test_everything_that_is_used_has_a_name(page: Page) -> None:
    open_table(page)
    for role, name in (
        ("searchbox", "Word, token or name"), ("combobox", "Site"), ("checkbox", "striking only"),
        ("checkbox", "all columns"), ("button", "Score"), ("button", "Next page"), ("table", "Neurons"),
        ("region", "Table of neurons"),
    ):  # fmt: skip
        assert page.get_by_role(role, name=name).count() == 1, name  # type: ignore[arg-type]
    assert page.locator("h1").count() == 1 and page.get_attribute("html", "lang") == "en"
    open_neuron(page, "mlp.0:7")
    assert page.locator("h1").count() == 1
    assert page.get_by_role("img", name="Histogram of").count() == 1


def test_the_first_tab_skips_to_the_content(page: Page) -> None:
    open_table(page)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('main') !== null")


def test_numbers_are_written_as_in_the_terminal(page: Page) -> None:
    """The page has its own rules for writing numbers, in JavaScript: the same ones."""
    draw = random.Random(0)
    values = [draw.choice((-1, 1)) * 10 ** draw.uniform(-12, 17) for _ in range(3000)]
    values += [draw.random() for _ in range(500)] + [place / 8 for place in range(-4000, 12000, 7)]
    values += [
        0.0,
        0.00009999,
        0.0001,
        0.00010001,
        999.94,
        999.95,
        999.96,
        1e15,
        999999999999999.0,
        0.1,
        12.125,
        1000.5,
    ]
    open_table(page)
    said = page.evaluate(
        """async (values) => {
            const words = await import('/static/words.js');
            return values.map((value) => [words.number(value), words.share(value)]);
        }""",
        values,
    )
    for value, (as_number, as_share) in zip(values, said, strict=True):
        # A JavaScript number has no type: a whole one is written as a whole number.
        assert as_number == number(int(value) if value == math.floor(value) else value), value
        assert as_share == share(value), value
