"""What the columns of an atlas mean, and how its numbers are written, in plain words.

The terminal card, the notebook and the explorer's page all read from here, so that a column has
one title and one explanation everywhere. The page's `format.js` writes numbers by the same rules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import ROUND_HALF_UP, Context, Decimal
from typing import Any, NamedTuple


class Column(NamedTuple):
    """A column of the table of neurons: its title, how its values are written, what they mean."""

    title: str
    kind: str  # "text", "whole", "number", "share" (written in percent) or "flag"
    meaning: str


COLUMNS: dict[str, Column] = {
    "neuron": Column("Neuron", "text", "The site, a colon, and the index there."),
    "family": Column(
        "Word family", "text", "The words on which its strong firings gather: forms of one word, or of a few."
    ),
    "score": Column(
        "Score",
        "number",
        "Purity times coverage, each corrected for chance: 1 if it fires strongly there, always and only.",
    ),
    "purity": Column("Purity", "share", "Share of its strong firings that are on the word family."),
    "coverage": Column("Coverage", "share", "Share of the family's occurrences on which it fires strongly."),
    "striking": Column("Striking", "flag", "Its score is high, on a family of words that occurs often."),
    "top_token": Column("Top token", "text", "The token that has most of its strong firings."),
    "top_token_purity": Column("Top token purity", "share", "Share of its strong firings that are on the top token."),
    "top_token_coverage": Column(
        "Top token coverage", "share", "Share of the top token's occurrences on which it fires strongly."
    ),
    "firing_rate": Column("Firing rate", "share", "Share of the tokens on which its activation is above 0."),
    "strong_rate": Column(
        "Strong rate", "share", "Share of the tokens on which its activation is above the threshold."
    ),
    "threshold": Column("Threshold", "number", "What counts as strong: half of its maximum in a calibration sample."),
    "label": Column("Label", "text", "The label of the data by which its strong firings differ most."),
    "label_value": Column("Prefers", "text", "The category of that label in which it fires strongly more often."),
    "label_contrast": Column(
        "Label contrast",
        "share",
        "Share of that category's tokens on which it fires strongly, less the share in all other categories.",
    ),
    "mean": Column("Mean", "number", "Mean activation over all tokens counted."),
    "std": Column("Deviation", "number", "Standard deviation of its activation."),
    "min": Column("Minimum", "number", "Smallest activation seen."),
    "q01": Column("Quantile 1%", "number", "1 of 100 activations lies below."),
    "q05": Column("Quantile 5%", "number", "5 of 100 activations lie below."),
    "q25": Column("Quantile 25%", "number", "A quarter of its activations lies below."),
    "q50": Column("Median", "number", "Half of its activations lie below."),
    "q75": Column("Quantile 75%", "number", "Three quarters of its activations lie below."),
    "q95": Column("Quantile 95%", "number", "95 of 100 activations lie below."),
    "q99": Column("Quantile 99%", "number", "99 of 100 activations lie below."),
    "max": Column("Maximum", "number", "Largest activation seen."),
    "count": Column("Tokens", "whole", "Tokens counted; padding and special tokens are not."),
    "site": Column("Site", "text", "The place in the model where the neuron lives."),
    "kind": Column("Kind", "text", "The kind of site."),
    "layer": Column("Layer", "whole", "The layer of the site, counted from 0."),
    "index": Column("Index", "whole", "Which coordinate of the site's tensor it is, counted from 0."),
}


def column(name: str, is_text: bool = False) -> Column:
    """The words for a column; one that later versions or users add speaks for itself."""
    return COLUMNS.get(name) or Column(name.replace("_", " ").capitalize(), "text" if is_text else "number", "")


def number(value: float | int | None) -> str:
    """A number for reading: 4 significant digits, thousands grouped, "" for none.

    Example:
        >>> number(0.123456), number(12345.6), number(0.0000123), number(float("nan"))
        ('0.1235', '12,346', '1.23e-5', '')
    """
    if value is None or value != value:
        return ""
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if (isinstance(value, int) or abs(value) >= 999.95) and abs(value) < 1e15:
        return f"{Decimal(value).to_integral_value(ROUND_HALF_UP):,f}"
    rounded = Context(prec=4, rounding=ROUND_HALF_UP).create_decimal(value)
    if rounded == 0:
        return "0"
    if Decimal("0.0001") <= abs(rounded) < 1000:
        return _shorn(f"{rounded:f}")
    exponent = rounded.adjusted()
    return f"{_shorn(f'{rounded.scaleb(-exponent):f}')}e{exponent}"


def share(value: float | None) -> str:
    """A share as percent with 3 significant digits, "" for none.

    Example:
        >>> share(0.5), share(0.12345), share(1.0), share(0.000012)
        ('50%', '12.3%', '100%', '0.0012%')
    """
    if value is None or value != value:
        return ""
    if math.isinf(value):
        return number(value)
    rounded = Context(prec=3, rounding=ROUND_HALF_UP).create_decimal(value * 100)
    return (_shorn(f"{rounded:f}") if rounded else "0") + "%"


def written(name: str, value: Any) -> str:
    """A value of the table of neurons as the card and the page write it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    return share(value) if column(name).kind == "share" else number(value)


def headline(facts: Mapping[str, Any]) -> str:
    """One sentence on what a neuron fires on, from its row in the table of neurons."""
    if not facts.get("count"):
        return "No token reached it."
    if facts.get("max") is not None and facts["max"] <= 0:
        return f"Never above 0 in {number(facts['count'])} tokens."
    words, purity, coverage = facts.get("family"), facts.get("purity"), facts.get("coverage")
    if not words:
        words, purity, coverage = (
            facts.get("top_token"), facts.get("top_token_purity"), facts.get("top_token_coverage")
        )  # fmt: skip
    if not words or not purity or purity != purity:
        return f"Fires on {share(facts.get('firing_rate'))} of the tokens, on no word in particular."
    return (
        f"{share(purity)} of its strong firings are on “{' '.join(words.split())}”; "
        f"it fires strongly on {share(coverage) or '0%'} of the occurrences."
    )


def _shorn(digits: str) -> str:
    return digits.rstrip("0").rstrip(".") if "." in digits else digits
