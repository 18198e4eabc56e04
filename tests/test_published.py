"""The registry of published methods."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from patchclamp import published as registry
from patchclamp.errors import PatchclampError
from patchclamp.published import Published, methods, published

PAPER = {
    "title": "Neurons that fire",
    "authors": "A. Author and B. Author",
    "year": 2024,
    "url": "https://example.org/paper",
}


@pytest.fixture(autouse=True)
def empty_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registry", {})


def silent(recording: object) -> None:
    """Find neurons that never fire.

    More words.
    """


def loud(recording: object) -> None:
    pass


def test_the_function_comes_back_unchanged_and_is_listed():
    assert published(row="S093", **PAPER)(silent) is silent
    (entry,) = methods()
    assert entry == Published(row="S093", part=None, function=silent, **PAPER)
    assert entry.name == f"{__name__}.silent"
    assert entry.summary == "Find neurons that never fire."


def test_without_a_docstring_the_summary_is_empty():
    published(row="S001", **PAPER)(loud)
    assert methods()[0].summary == ""


def test_a_class_can_be_published():
    @published(row="S147", **PAPER)
    class Dictionary:
        """Learn a dictionary."""

    assert methods()[0].function is Dictionary


def test_methods_are_sorted_by_row_then_part():
    published(row="S093", part="hook", **PAPER)(silent)
    published(row="S100", **PAPER)(silent)
    published(row="S093", part="detector", **PAPER)(loud)
    published(row="S007", **PAPER)(silent)
    listed = [(entry.row, entry.part) for entry in methods()]
    assert listed == [("S007", None), ("S093", "detector"), ("S093", "hook"), ("S100", None)]


def test_an_entry_cannot_be_changed():
    published(row="S093", **PAPER)(silent)
    with pytest.raises(dataclasses.FrozenInstanceError):
        methods()[0].year = 1999  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("part", [None, "detector"])
def test_the_same_row_and_part_twice_names_both_functions(part: str | None):
    published(row="S093", part=part, **PAPER)(silent)
    with pytest.raises(PatchclampError) as error:
        published(row="S093", part=part, **PAPER)(loud)
    assert "S093" in str(error.value)
    assert "silent" in str(error.value)
    assert "loud" in str(error.value)
    assert part is None or part in str(error.value)
    assert [entry.function for entry in methods()] == [silent]


def test_a_module_loaded_again_replaces_its_entry():
    published(row="S093", **PAPER)(silent)

    def again(recording: object) -> None: ...

    again.__module__, again.__qualname__ = silent.__module__, silent.__qualname__
    published(row="S093", **PAPER)(again)
    assert [entry.function for entry in methods()] == [again]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"row": "93"}, "'93'"),
        ({"row": "S0934"}, "'S0934'"),
        ({"title": " "}, "title of S093"),
        ({"authors": ""}, "authors of S093"),
        ({"part": ""}, "part of S093"),
        ({"year": 24}, "24"),
        ({"url": "example.org"}, "'example.org'"),
    ],
)
def test_what_is_not_a_reference_is_refused(wrong: dict[str, object], said: str):
    arguments: dict[str, object] = {"row": "S093", **PAPER, **wrong}
    with pytest.raises(PatchclampError, match=said):
        published(**arguments)  # pyright: ignore[reportArgumentType]
    assert methods() == []


def test_it_imports_nothing_heavy():
    code = (
        "import sys, patchclamp.published; "
        "print([name for name in ('torch', 'transformers', 'numpy', 'polars') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
