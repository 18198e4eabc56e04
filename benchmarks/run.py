"""Run every benchmark and write its figures into docs/performance.md."""

from __future__ import annotations

from pathlib import Path

import cluster
import correlation
import label_finders
import memory
import record_cost
import unembedding
from machine import described

import attribution

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"

INTRODUCTION = """# Performance

Speed is measured as a ratio, side by side in one run, never as a time alone. This page is written by
`make bench`; no figure on it is typed by hand.

"""


def main() -> None:
    """Measure, print, write: after each section, so that a run that is stopped leaves what it has."""
    sections = [described()]
    for each in (record_cost, memory, unembedding, correlation, label_finders, attribution, cluster):
        sections.append(each.main())
        PAGE.write_text(INTRODUCTION + "\n\n".join(sections) + "\n", encoding="utf-8")
    print(f"\nwritten: {PAGE.relative_to(Path.cwd()) if PAGE.is_relative_to(Path.cwd()) else PAGE}")


if __name__ == "__main__":
    main()
