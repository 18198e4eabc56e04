"""`corpora.python_docs`: asserts what holds for every Python version, on the real standard library."""

from __future__ import annotations

import hashlib
import heapq
import inspect
import os
import platform
import re
import string
import subprocess
import sys
import sysconfig
import textwrap
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from patchclamp.data import Texts, corpora
from patchclamp.errors import DataError, UnknownName


@pytest.fixture(scope="module")
def everything() -> Texts:
    return corpora.python_docs()


def pairs(texts: Texts) -> list[tuple[str, str]]:
    return [(example.text, example.labels["kind"]) for example in texts]


def test_there_are_enough_examples_of_each_kind(everything: Texts) -> None:
    counts = Counter(kind for _, kind in pairs(everything))
    assert len(everything) >= 20_000
    assert set(counts) == {"topics", "docstring", "code"}
    assert min(counts.values()) >= 1_000
    assert everything.labels == {"kind": ("code", "docstring", "topics")}


def test_name_says_the_version(everything: Texts) -> None:
    assert everything.name == f"python_docs (Python {platform.python_version()})"


def test_every_example_is_fit(everything: Texts) -> None:
    texts = [text for text, _ in pairs(everything)]
    assert len(set(texts)) == len(texts), "no example twice"
    for text in texts:
        assert len(text) >= 20
        assert any(character.isalpha() for character in text)
        assert text == text.strip()
        text.encode("utf-8")


def test_code_is_cut_into_pieces_of_a_paragraph(everything: Texts) -> None:
    lengths = [text.count("\n") + 1 for text, kind in pairs(everything) if kind == "code"]
    assert max(lengths) <= 12
    assert sum(lengths) / len(lengths) > 3


def test_paragraphs_hold_no_blank_line(everything: Texts) -> None:
    prose = [text for text, kind in pairs(everything) if kind != "code"]
    assert not any(re.search(r"\n[ \t]*\n", text) for text in prose)


def test_known_texts_are_there_under_their_kind(everything: Texts) -> None:
    # Found in the running Python by other ways than corpora takes.
    kind_of = dict(pairs(everything))
    paragraphs = [each for topic in topics.values() for each in topic.split("\n\n")]
    words = [each.strip() for each in paragraphs if len(each) > 60 and "\n " not in f"\n{each}" and "e" in each]
    assert len(words) > 500
    assert {kind_of[each] for each in words} == {"topics"}
    docstrings = [inspect.getdoc(each) or "" for each in (string.capwords, textwrap.dedent, heapq.merge)]
    assert {kind_of[each.split("\n\n")[0].strip()] for each in docstrings} == {"docstring"}
    functions = [each for each in vars(string.Formatter).values() if inspect.isfunction(each) and not each.__doc__]
    sources = [textwrap.dedent(inspect.getsource(each)).strip() for each in functions]
    short = [each for each in sources if each.count("\n") < 12]
    assert len(short) > 3
    assert {kind_of[each] for each in short} == {"code"}


def test_docstrings_are_no_code(everything: Texts) -> None:
    code = {line.strip() for text, kind in pairs(everything) if kind == "code" for line in text.split("\n")}
    functions = [string.capwords, textwrap.dedent, heapq.merge, heapq.nlargest, inspect.getdoc]
    lines = [line.strip() for each in functions for line in inspect.getdoc(each).split("\n")]  # type: ignore[union-attr]
    long = [line for line in lines if len(line) > 40]
    assert len(long) > 10
    assert not code & set(long)


def digest(texts: Texts) -> str:
    return hashlib.sha256(repr(pairs(texts)).encode()).hexdigest()


def test_order_is_the_same_in_another_process(everything: Texts) -> None:
    program = (
        "import hashlib\nfrom patchclamp.data import corpora\n"
        "pairs = [(e.text, e.labels['kind']) for e in corpora.python_docs()]\n"
        "print(hashlib.sha256(repr(pairs).encode()).hexdigest())\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    found = subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True)
    assert found.stdout.strip() == digest(everything)


def test_limit_takes_the_first_and_is_a_fair_sample(everything: Texts) -> None:
    part = pairs(corpora.python_docs(limit=3000))
    assert part == pairs(everything)[:3000]
    whole = Counter(kind for _, kind in pairs(everything))
    counts = Counter(kind for _, kind in part)
    for kind, count in whole.items():
        share = count / len(everything)
        # Six standard errors: a shuffle that is not one misses this by far.
        assert abs(counts[kind] / 3000 - share) < 6 * (share * (1 - share) / 3000) ** 0.5
    assert len(corpora.python_docs(limit=1)) == 1
    assert len(corpora.python_docs(limit=10**9)) == len(everything)


def test_seed_is_another_order_of_the_same(everything: Texts) -> None:
    one, again, two = (pairs(corpora.python_docs(seed=seed)) for seed in (1, 1, 2))
    assert one == again
    assert one != two
    assert one != pairs(everything)
    assert sorted(one) == sorted(two) == sorted(pairs(everything))
    assert pairs(corpora.python_docs(limit=50, seed=1)) == one[:50]


@pytest.mark.parametrize("kinds", [("topics",), ("code", "docstring"), ["docstring"], "topics"])
def test_kinds_leave_the_others_out_of_the_same_order(everything: Texts, kinds) -> None:
    chosen = corpora.python_docs(kinds=kinds)
    wanted = {kinds} if isinstance(kinds, str) else set(kinds)
    assert pairs(chosen) == [(text, kind) for text, kind in pairs(everything) if kind in wanted]
    assert chosen.labels == {"kind": tuple(sorted(wanted))}


def test_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"'docstrings'.*nearest: docstring"):
        corpora.python_docs(kinds=("topics", "docstrings"))
    with pytest.raises(UnknownName, match="topics, docstring, code"):
        corpora.python_docs(kinds=["xyz"])
    with pytest.raises(DataError, match="kinds= is empty: choose from topics, docstring, code"):
        corpora.python_docs(kinds=())


@pytest.mark.parametrize("limit", [0, -1, 2.5, "10", True])
def test_bad_limit(limit) -> None:
    with pytest.raises(DataError, match=r"limit= is a whole number"):
        corpora.python_docs(limit=limit)


@pytest.mark.parametrize("seed", [0.5, "a", True])
def test_bad_seed(seed) -> None:
    with pytest.raises(DataError, match=r"seed= is a whole number"):
        corpora.python_docs(seed=seed)


# The reader, on a small library of its own --------------------------------------------------------

MODULE = '''"""The module says what it is for.

    An indented second paragraph of it.
"""
import patchclamp_test_must_not_import_this

def outer(argument_one, argument_two):
    """Outer docstring paragraph.

    Second paragraph of outer.
    """
    def inner(argument):
        "Inner docstring of one line."
        return argument + 1
    return inner(argument_one) * argument_two

class Thing:
    """A thing with methods and a docstring."""
    if True:
        @property
        async def method_of_thing(self):
            return await self.something_else()
    def only_a_docstring_here(self):
        """Nothing but this docstring."""

try:
    raise ValueError
except ValueError:
    def function_in_handler(value):
        return value * 1234567
else:
    match len("a"):
        case 1:
            async def function_in_case(value):
                return value * 1234567
finally:
    for number in range(3):
        while number:
            with open("a"):
                def function_in_loops(value):
                    return value * 1234567
'''


@pytest.fixture
def library(tmp_path: Path, monkeypatch):
    def make(files: dict[str, str | bytes]) -> list[tuple[str, str]]:
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        monkeypatch.setattr(corpora, "_standard_library", lambda: tmp_path)
        monkeypatch.setattr(corpora, "_topics", lambda: iter(["A paragraph of a topic, long enough."]))
        monkeypatch.setattr(corpora, "_everything", corpora._everything.__wrapped__)
        return list(corpora._everything())

    return make


def test_reader_finds_docstrings_and_functions(library) -> None:
    assert library({"a.py": MODULE}) == [
        ("A paragraph of a topic, long enough.", "topics"),
        ("The module says what it is for.", "docstring"),
        ("An indented second paragraph of it.", "docstring"),
        ("Outer docstring paragraph.", "docstring"),
        ("Second paragraph of outer.", "docstring"),
        ("Inner docstring of one line.", "docstring"),
        ("A thing with methods and a docstring.", "docstring"),
        ("Nothing but this docstring.", "docstring"),
        (
            "def outer(argument_one, argument_two):\n    def inner(argument):\n        return argument + 1\n"
            "    return inner(argument_one) * argument_two",
            "code",
        ),
        ("@property\nasync def method_of_thing(self):\n    return await self.something_else()", "code"),
        ("def function_in_handler(value):\n    return value * 1234567", "code"),
        ("async def function_in_case(value):\n    return value * 1234567", "code"),
        ("def function_in_loops(value):\n    return value * 1234567", "code"),
    ]


def test_reader_skips_folders_and_files_that_it_cannot_read(library, tmp_path: Path) -> None:
    good = '"""The only docstring to be found."""\ndef function(argument):\n    return argument * 12345\n'
    skipped = [
        "test",
        "tests",
        "site-packages",
        "dist-packages",
        "idlelib",
        "lib2to3",
        "tkinter",
        "turtledemo",
    ]
    skipped += ["ensurepip", "pydoc_data", "config-3.11-x86_64", "deep/er/test", "__pycache__"]
    files: dict[str, str | bytes] = {f"{folder}/a.py": MODULE for folder in skipped}
    files |= {
        "syntax.py": "def broken(:\n",
        "latin.py": b'"""A docstring in Latin-1 without saying so: \xe9"""\n',
        "cookie.py": b"# -*- coding: no-such-coding -*-\n",
        "zeros.py": b'"""A docstring, then a zero byte."""\n\0',
        "later.py": b"one = 1\ntwo = 2\n'\xe9 is no UTF-8'\n",
        "notes.txt": "not Python",
        "good.py": good,
    }
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere.py")
    found = [(text, kind) for text, kind in library(files) if kind != "topics"]
    assert found == [
        ("The only docstring to be found.", "docstring"),
        ("def function(argument):\n    return argument * 12345", "code"),
    ]


def test_reader_knows_encodings_form_feeds_and_windows_lines(library) -> None:
    found = library(
        {
            "a.py": b'# -*- coding: latin-1 -*-\n"""A docstring with an accent: caf\xe9."""\n',
            "b.py": b'\xef\xbb\xbf"""A docstring after a mark."""\r\n\x0c\r\n'
            b"def windows(argument):\r\n    return argument\r\n",
        }
    )
    assert [text for text, _ in found[1:]] == [
        "A docstring with an accent: café.",
        "A docstring after a mark.",
        "def windows(argument):\n    return argument",
    ]


@pytest.mark.filterwarnings("error")
def test_reader_keeps_the_warnings_of_old_sources_to_itself(library) -> None:
    source = '"""A docstring before an invalid escape."""\nescape = "\\d"\n'
    with pytest.raises(SyntaxError, match="invalid escape"):
        compile(source, "a.py", "exec")
    assert len(library({"a.py": source})) == 2


def test_reader_drops_what_is_unfit_and_what_came_before(library) -> None:
    found = library(
        {
            "a.py": '"""A paragraph of a topic, long enough.\n\ntoo short\n\n1234567890 1234567890 !\n\n'
            'A half pair: \\ud83e, no text.\n\nThe same paragraph twice.\n"""\n',
            "b.py": '"""The same paragraph twice."""\n',
        }
    )
    assert found == [
        ("A paragraph of a topic, long enough.", "topics"),
        ("The same paragraph twice.", "docstring"),
    ]


@pytest.mark.parametrize("lines", [1, 11, 12, 13, 24, 25, 100])
def test_pieces_are_even_and_lose_no_line(library, lines: int) -> None:
    body = "".join(f"    statement_number_{number} = argument\n" for number in range(lines))
    found = [text for text, kind in library({"a.py": f"def function_with_body(argument):\n{body}"}) if kind == "code"]
    written = [line.strip() for piece in found for line in piece.split("\n")]
    assert written == ["def function_with_body(argument):", *body.replace("    ", "").split("\n")[:-1]]
    lengths = [piece.count("\n") + 1 for piece in found]
    assert max(lengths) <= 12 and len(lengths) == -(-(lines + 1) // 12)
    assert max(lengths) - min(lengths) <= 1


def test_python_without_its_sources_is_said(library) -> None:
    library({})
    assert len(corpora.python_docs(kinds=["topics"])) == 1
    with pytest.raises(DataError, match=r"carries no 'docstring' texts .*without its sources"):
        corpora.python_docs()


def test_the_standard_library_is_that_of_the_running_python() -> None:
    assert corpora._standard_library() == Path(sysconfig.get_path("stdlib"))
    assert not any("site-packages" in path.parts for path in corpora._source_files())
