"""Every Python block of the pages runs, from top to bottom, in an empty folder."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from patchclamp.cli.methods import built

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "page",
    [
        "docs/tutorial.md",
        "docs/labels.md",
        "docs/testbed.md",
        "docs/proof.md",
        pytest.param("docs/index.md", marks=pytest.mark.slow),
        pytest.param("README.md", marks=pytest.mark.slow),
    ],
)
def test_page_runs_from_top_to_bottom(page: str, tmp_path: Path, monkeypatch, minilm) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert blocks
    names: dict[str, object] = {"__name__": "docs"}
    for block in blocks:
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize(
    ("page", "at_least"),
    [("data", 5), ("images", 4), ("models", 9), ("long-runs", 1), ("pairs", 1), ("interventions", 9)],
)
def test_page_prints_what_it_says(page: str, at_least: int, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    source = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```\n(?:\n?```text\n(.*?)^```)?", source, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= at_least
    assert source.count("```text\n") == sum(bool(printed) for _, printed in blocks)  # none stands apart from its code
    names: dict[str, object] = {"__name__": "docs"}
    for block, printed in blocks:
        exec(compile(block, page, "exec"), names)
        assert capsys.readouterr().out == printed


def test_the_gallery_is_what_the_registry_says() -> None:
    script = importlib.util.spec_from_file_location("make_methods", ROOT / "docs" / "make_methods.py")
    assert script is not None and script.loader is not None
    made = importlib.util.module_from_spec(script)
    script.loader.exec_module(made)
    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == made.page()


def test_every_published_method_has_a_test() -> None:
    tests = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    for method in built():
        assert re.search(rf"\b{method.function.__name__}\b", tests), method.name


def test_pages_name_only_files_that_exist() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} points to {target}"
