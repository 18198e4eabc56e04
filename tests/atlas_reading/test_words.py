"""How numbers and untrusted text are written."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchclamp.atlas.shown import visible, visible_token
from patchclamp.atlas.words import headline, number, share


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0.0, "0"), (-0.0, "0"), (1.0, "1"), (0.5, "0.5"), (0.123456, "0.1235"), (-0.123456, "-0.1235"),
        (12.125, "12.13"), (-12.125, "-12.13"), (999.94, "999.9"), (999.96, "1,000"),
        (1234567.5, "1,234,568"), (5, "5"), (123456, "123,456"), (0.0001, "0.0001"),
        (0.00009999999, "0.0001"), (0.00001234567, "1.235e-5"),
        (1e30, "1e30"), (math.inf, "∞"), (-math.inf, "-∞"), (math.nan, ""), (None, ""),
    ],
)  # fmt: skip
def test_number(value: float | None, written: str) -> None:
    assert number(value) == written


@pytest.mark.parametrize(
    ("value", "written"),
    [(0.0, "0%"), (1.0, "100%"), (0.5, "50%"), (0.12345, "12.3%"), (0.99951, "100%"),
     (0.00001234, "0.00123%"), (None, ""), (math.nan, "")],
)  # fmt: skip
def test_share(value: float | None, written: str) -> None:
    assert share(value) == written


@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_a_written_number_is_the_number_to_four_digits(value: float) -> None:
    read = float(number(value).replace(",", ""))
    assert read == pytest.approx(value, rel=5.1e-4, abs=1e-300)


@given(st.text())
def test_what_is_shown_steers_nothing(text: str) -> None:
    shown = visible(text)
    assert not any(ord(character) < 0x20 or 0x7F <= ord(character) < 0xA0 for character in shown)
    assert not any(0x202A <= ord(character) <= 0x202E for character in shown)
    assert visible_token(text)


def test_plain_text_is_shown_as_it_is() -> None:
    for text in ("return", "naïve café", "שלום", "👩‍🔬", "<b>", "[red]x[/red]"):
        assert visible(text) == text
    assert visible_token("  the x ") == "␣␣the x␣" and visible_token("  ") == "␣␣" and visible_token("") == "(empty)"
    assert visible_token("\n") == "⏎"


def test_headlines() -> None:
    facts = {"count": 100, "max": 2.0, "firing_rate": 0.25, "family": "a, an", "purity": 0.9, "coverage": 0.8}
    assert headline(facts) == "90% of its strong firings are on “a, an”; it fires strongly on 80% of the occurrences."
    token = {
        "family": "",
        "purity": None,
        "coverage": None,
        "top_token": " the",
        "top_token_purity": 0.4,
        "top_token_coverage": 0.1,
    }
    assert (
        headline(facts | token)
        == "40% of its strong firings are on “the”; it fires strongly on 10% of the occurrences."
    )
    nothing = {"top_token": "", "top_token_purity": math.nan}
    assert headline(facts | token | nothing) == "Fires on 25% of the tokens, on no word in particular."
    assert headline(facts | {"max": -0.1}) == "Never above 0 in 100 tokens."
    assert headline({"count": 0}) == "No token reached it."
