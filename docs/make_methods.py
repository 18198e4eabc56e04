"""Write docs/methods.md, the gallery of published methods, from the registry.

    .venv/bin/python docs/make_methods.py

A test says when the page is not what this would write.
"""

from __future__ import annotations

from pathlib import Path

from patchclamp.cli.methods import built, public_name

PAGE = Path(__file__).resolve().parent / "methods.md"
HEAD = """# Published methods

Every method that is built, by its row in the list of what has been published on neurons; `patchclamp methods` prints
the same. This page is written by `docs/make_methods.py` from the registry.

| row | method | what it does | paper |
|---|---|---|---|
"""


def page() -> str:
    """The text of the page."""
    lines = []
    for each in built():
        part = f" ({each.part})" if each.part else ""
        paper = f"[{_plain(each.title)}]({each.url}), {each.authors}, {each.year}{part}"
        lines.append(f"| {each.row} | [`{public_name(each)}`](api.md#{each.name}) | {_plain(each.summary)} | {paper} |")
    return HEAD + "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written: {PAGE.name}")
