"""The examples of docs/images.md and of the docstring run, and print what the page says."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import patchclamp.data.images

PAGE = Path(__file__).parents[2] / "docs" / "images.md"


def test_page_runs_from_top_to_bottom(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    page = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert sum(language == "python" for language, _ in blocks) >= 4
    names: dict[str, object] = {"__name__": "docs"}
    printed = ""
    for language, block in blocks:
        if language == "python":
            assert not printed, f"the page does not show what is printed: {printed}"
            exec(compile(block, str(PAGE), "exec"), names)
            printed = capsys.readouterr().out
        elif language == "text":
            assert printed == block
            printed = ""
    assert not printed


def test_examples_of_the_docstring() -> None:
    outcome = doctest.testmod(patchclamp.data.images)
    assert outcome.attempted > 0 and outcome.failed == 0
