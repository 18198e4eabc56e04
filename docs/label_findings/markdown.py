"""Tables in the text of a page."""

from __future__ import annotations

from collections.abc import Sequence


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells that are text already, below their names."""
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(each)} |" for each in lines)
