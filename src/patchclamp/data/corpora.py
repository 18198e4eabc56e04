"""Corpora that need no download: the English and the code that every Python carries.

The standard library's sources are parsed, never imported. The texts change with the Python
version, so a corpus says it in its name; give it, and the hash of the data, with every figure.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import math
import operator
import os
import platform
import re
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from patchclamp.data.labels import Unusable, text_of
from patchclamp.data.texts import Texts
from patchclamp.errors import DataError, unknown

KINDS = ("topics", "docstring", "code")

_SHORTEST = 20
_CODE_LINES = 12
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
_SKIPPED |= {"idlelib", "lib2to3", "tkinter", "turtledemo", "ensurepip", "pydoc_data"}
_BLANK_LINES = re.compile(r"\n\s*\n")


def python_docs(limit: int | None = None, kinds: Iterable[str] = KINDS, seed: int | None = None) -> Texts:
    """Paragraphs of English and pieces of code that the running Python carries, labelled `kind`.

    - `topics`: paragraphs of the language reference that `help()` shows;
    - `docstring`: paragraphs of the docstrings of the standard library's modules, classes and functions;
    - `code`: functions of the standard library without their docstrings, in pieces of at most 12 lines.

    Each text has at least 20 characters and a letter, and occurs once. The order is a shuffle fixed by the
    texts themselves (sorted by their SHA-256), the same for every run of a Python version, so that the
    first n examples are a fair sample of all: each kind is there in its proportion.

    Args:
        limit: how many examples at most, from the start of the order; None gives all.
        kinds: which kinds to take; the others are left out of the same order.
        seed: another order, fixed by this number; `limit` then takes another sample.

    Returns:
        Texts, held in memory, with the label `kind`; its name says the Python version.

    Raises:
        UnknownName: a kind that does not exist.
        DataError: `limit` or `seed` is not a suitable number, or this Python comes without its sources.
    """
    chosen = _checked_kinds(kinds)
    limit = _whole("limit", limit, least=1)
    seed = _whole("seed", seed)
    picked = [(text, kind) for text, kind in _ordered(seed) if kind in chosen]
    for kind in chosen:
        if not any(each == kind for _, each in picked):
            raise DataError(
                f"this Python carries no {kind!r} texts ({_standard_library()}): it was installed without "
                "its sources; leave that kind out with kinds=, or use another Python"
            )
    picked = picked[:limit]
    return Texts(
        [text for text, _ in picked],
        labels={"kind": [kind for _, kind in picked]},
        name=f"python_docs (Python {platform.python_version()})",
    )


def _checked_kinds(kinds: Iterable[str]) -> tuple[str, ...]:
    chosen = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    for kind in chosen:
        if kind not in KINDS:
            raise unknown("kind of python_docs", kind, KINDS)
    if not chosen:
        raise DataError(f"kinds= is empty: choose from {', '.join(KINDS)}")
    return chosen


def _whole(name: str, number: int | None, least: int | None = None) -> int | None:
    if number is None:
        return None
    try:
        whole = operator.index(number)
    except TypeError:
        raise DataError(f"{name}= is a whole number or None, not {number!r}") from None
    if isinstance(number, bool) or (least is not None and whole < least):
        start = "" if least is None else f" from {least} on"
        raise DataError(f"{name}= is a whole number{start}, not {number!r}")
    return whole


def _ordered(seed: int | None) -> list[tuple[str, str]]:
    salt = b"" if seed is None else f"{seed}:".encode()
    return sorted(_everything(), key=lambda each: hashlib.sha256(salt + each[0].encode()).digest())


@functools.cache
def _everything() -> tuple[tuple[str, str], ...]:
    """(text, kind) of every example once, in the order of the kinds, files and lines."""
    docstrings: list[str] = []
    code: list[str] = []
    # Parsing old sources warns of their invalid escapes, which are no business of the user's.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in _source_files():
            for text, kind in _read(path):
                (code if kind == "code" else docstrings).append(text)
    found: dict[str, str] = {}
    for kind, texts in zip(KINDS, (_topics(), docstrings, code), strict=True):
        for text in texts:
            text = textwrap.dedent(text).strip()
            if _is_fit(text):
                found.setdefault(text, kind)
    return tuple(found.items())


def _is_fit(text: str) -> bool:
    if len(text) < _SHORTEST or not any(character.isalpha() for character in text):
        return False
    try:
        return text_of(text) == text
    except Unusable:
        return False


def _topics() -> Iterator[str]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    for key in sorted(topics):
        yield from _BLANK_LINES.split(topics[key])


def _standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _source_files() -> list[Path]:
    root = _standard_library()
    files: list[Path] = []
    for folder, inside, names in os.walk(root):
        inside[:] = [each for each in inside if each not in _SKIPPED and not each.startswith("config-")]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files, key=lambda file: file.relative_to(root).parts)


def _read(path: Path) -> Iterator[tuple[str, str]]:
    """(text, kind) of the paragraphs of docstrings and the pieces of functions of one file."""
    try:
        with tokenize.open(path) as stream:
            source = stream.read()
        tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    # Not splitlines(): the parser does not take a form feed for the end of a line.
    lines = source.split("\n")
    for node, nested in _definitions(tree):
        docstring = ast.get_docstring(node)
        if docstring:
            for paragraph in _BLANK_LINES.split(docstring):
                yield paragraph, "docstring"
        if not nested and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for piece in _pieces(node, lines):
                yield piece, "code"


_Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_BLOCKS = (
    *(ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef, ast.With, ast.AsyncWith, ast.Try, ast.TryStar),
    *(ast.ExceptHandler, ast.If, ast.For, ast.AsyncFor, ast.While, ast.Match, ast.match_case),
)


def _definitions(node: ast.AST, nested: bool = False) -> Iterator[tuple[_Definition, bool]]:
    """Every module, class and function from `node` down, and whether it lies inside a function."""
    if isinstance(node, _Definition):
        yield node, nested
        nested = nested or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    # Only blocks hold definitions; to walk through every expression would take most of the time.
    for field in ("body", "handlers", "orelse", "finalbody", "cases"):
        for each in getattr(node, field, ()):
            if isinstance(each, _BLOCKS):
                yield from _definitions(each, nested)


def _pieces(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> Iterator[str]:
    """The lines of a function without docstrings, in pieces whose lengths differ by one line at most."""
    hidden: set[int] = set()
    for node, _ in _definitions(function):
        first = node.body[0]
        if ast.get_docstring(node, clean=False) is not None and first.lineno > getattr(node, "lineno", 0):
            hidden.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    if len(function.body) == 1 and function.body[0].lineno in hidden:
        return  # nothing but a docstring: a signature alone is no code worth reading
    start = min([function.lineno, *(each.lineno for each in function.decorator_list)])
    end = function.end_lineno or function.lineno
    kept = [lines[number - 1] for number in range(start, end + 1) if number not in hidden]
    count = math.ceil(len(kept) / _CODE_LINES)
    for piece in range(count):
        yield "\n".join(kept[piece * len(kept) // count : (piece + 1) * len(kept) // count])
