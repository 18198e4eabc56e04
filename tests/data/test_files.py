"""`Texts` from `.txt`, `.jsonl` and `.parquet`: streamed, read again, and broken in every way."""

from __future__ import annotations

import json
import re
import tracemalloc
from pathlib import Path

import polars as pl
import pyarrow
import pytest

from patchclamp.data import Texts
from patchclamp.errors import DataError

ROWS = [
    {"text": "A dog.", "lang": "en", "year": 1999, "answer": "dog"},
    {"text": "Größe 日本 🧠", "lang": "de", "year": 2001, "answer": "Größe"},
    {"text": "Un chien.", "lang": "fr", "year": 1999, "answer": "chien"},
]
TEXTS = [row["text"] for row in ROWS]


def refuses(*words: object):
    """Expect a DataError whose message holds these words in this order."""
    return pytest.raises(DataError, match="(?s)" + ".*".join(re.escape(str(each)) for each in words))


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pl.DataFrame(rows).write_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        path.write_text("".join(row["text"] + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path, **arguments) -> list[str]:
    return [example.text for example in Texts(path, **arguments)]


# What it gives ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["corpus.txt", "corpus.jsonl", "corpus.parquet", "CORPUS.JSONL", "two.parts.txt"])
@pytest.mark.parametrize("kind", [str, Path])
def test_file_gives_its_texts_in_order_again_and_again(tmp_path: Path, name: str, kind: type) -> None:
    path = write(tmp_path / name.lower(), ROWS).rename(tmp_path / name)
    texts = Texts(kind(path))
    assert [example.text for example in texts] == TEXTS
    assert list(texts) == list(texts)
    assert (len(texts), texts.name, texts.labels) == (3, name, {})
    assert Texts(kind(path), name="mine").name == "mine"


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_two_passes_at_the_same_time_do_not_disturb_each_other(tmp_path: Path, suffix: str) -> None:
    texts = Texts(write(tmp_path / f"a{suffix}", ROWS))
    assert [(a.text, b.text) for a, b in zip(texts, texts, strict=True)] == [(text, text) for text in TEXTS]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_a_change_of_folder_does_not_lose_the_file(tmp_path: Path, monkeypatch, suffix: str) -> None:
    write(tmp_path / f"a{suffix}", ROWS)
    monkeypatch.chdir(tmp_path)
    texts = Texts(f"a{suffix}")
    monkeypatch.chdir("/")
    assert [example.text for example in texts] == TEXTS


def test_home_folder_is_found(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.txt", ROWS)
    assert [example.text for example in Texts("~/a.txt")] == TEXTS


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False], ids=["last newline", "no last newline"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_line_ends_and_marks(tmp_path: Path, suffix: str, mark: bytes, last: bool, end: str) -> None:
    path = write(tmp_path / f"a{suffix}", ROWS)
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_bytes(mark + (end.join(lines) + (end if last else "")).encode())
    assert read(path) == TEXTS
    assert len(Texts(path)) == 3


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_blank_lines_are_left_out(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", ROWS)
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n\n \t\r\n\u00a0\n" + "\n\n".join(lines) + "\n\n", encoding="utf-8")
    assert read(path) == TEXTS
    assert len(Texts(path)) == 3


def test_txt_keeps_the_line_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    lines = [
        "    indented = code",
        "trailing blanks  ",
        "a\u2028b\x0cc\x85d",
        "{not json",
        '"quoted"',
        "a\rb",
        "\u3000wide",
    ]
    path.write_bytes("\n".join(lines).encode())
    assert read(path) == lines


def test_jsonl_text_with_escapes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"text": "a\nb\u00e9 \ud83e\udde0"}' + "\n" + '{"text": "c\u2028d"}\n', encoding="utf-8")
    assert read(path) == ["a\nbé 🧠", "c\u2028d"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_another_column(tmp_path: Path, suffix: str) -> None:
    assert read(write(tmp_path / f"a{suffix}", ROWS), column="lang") == ["en", "de", "fr"]


# Labels and targets -------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["lang"], {"lang": ("de", "en", "fr")}),
        (("lang", "year"), {"lang": ("de", "en", "fr"), "year": ("1999", "2001")}),
        ("year", {"year": ("1999", "2001")}),
        ({"language": "lang"}, {"language": ("de", "en", "fr")}),
        ({"b": "year", "a": "year"}, {"b": ("1999", "2001"), "a": ("1999", "2001")}),
        ({"mine": [0, 1, 0], "language": "lang"}, {"mine": ("0", "1"), "language": ("de", "en", "fr")}),
        ({"language": "lang", "mine": [0, 1, 0]}, {"language": ("de", "en", "fr"), "mine": ("0", "1")}),
        ({"the text itself": "text"}, {"the text itself": tuple(sorted(TEXTS))}),
        ({}, {}),
        ([], {}),
    ],
)
def test_labels_in_all_forms(tmp_path: Path, suffix: str, labels, expected: dict) -> None:
    texts = Texts(write(tmp_path / f"a{suffix}", ROWS), labels=labels)
    assert texts.labels == expected
    assert list(texts.labels) == list(expected)
    examples = list(texts)
    assert [example.text for example in examples] == TEXTS
    for label, categories in expected.items():
        assert tuple(sorted({example.labels[label] for example in examples})) == categories
    assert all(list(example.labels) == list(expected) for example in examples)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_each_example_has_its_own_label(tmp_path: Path, suffix: str) -> None:
    texts = Texts(
        write(tmp_path / f"a{suffix}", ROWS),
        labels={"a": "lang", "year": "year", "again": "lang", "mine": list("xyz")},
    )
    assert [dict(example.labels) for example in texts] == [
        {"a": "en", "year": "1999", "again": "en", "mine": "x"},
        {"a": "de", "year": "2001", "again": "de", "mine": "y"},
        {"a": "fr", "year": "1999", "again": "fr", "mine": "z"},
    ]


def test_txt_takes_labels_and_targets_in_lists(tmp_path: Path) -> None:
    texts = Texts(write(tmp_path / "a.txt", ROWS), labels={"lang": ["en", "de", "fr"]}, targets=["1", "2", "3"])
    assert [(each.labels["lang"], each.target) for each in texts] == [("en", "1"), ("de", "2"), ("fr", "3")]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_targets_from_a_column_or_a_list(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", ROWS)
    assert [example.target for example in Texts(path, targets="answer")] == ["dog", "Größe", "chien"]
    assert [example.target for example in Texts(path, targets=["1", "2", "3"])] == ["1", "2", "3"]


def test_parquet_column_with_a_dot_and_categories(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    frame = pl.DataFrame({"a.b": ["x", "y"], "a": ["no", "no"], "kind": pl.Series(["u", "v"], dtype=pl.Categorical)})
    frame.write_parquet(path)
    texts = Texts(path, labels=["kind"], column="a.b")
    assert [(example.text, example.labels["kind"]) for example in texts] == [("x", "u"), ("y", "v")]


def test_parquet_of_many_batches_and_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    words = [f"text {number}" for number in range(5000)]
    pl.DataFrame({"text": words, "n": range(5000)}).write_parquet(path, row_group_size=700)
    texts = Texts(path, labels=["n"])
    assert [(each.text, each.labels["n"]) for each in texts] == [(f"text {n}", str(n)) for n in range(5000)]


# Streaming ----------------------------------------------------------------------------------------


def peak_of(action) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"big{suffix}"
    words = "word " * 200
    with path.open("w") as stream:
        for number in range(20_000):
            text = f"{number} {words}"
            stream.write((json.dumps({"text": text, "part": number % 7}) if suffix == ".jsonl" else text) + "\n")
    assert path.stat().st_size > 20_000_000
    labels = {"part": "part"} if suffix == ".jsonl" else None

    def work() -> None:
        texts = Texts(path, labels)
        assert sum(1 for _ in texts) == len(texts) == 20_000
        assert len(texts.labels.get("part", range(7))) == 7

    assert peak_of(work) < 500_000


def test_memory_does_not_grow_with_the_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "big.parquet"
    # Numbers, so that the column neither compresses away nor becomes a dictionary; one row group.
    words = [" ".join(str(number * 7919 + each) for each in range(150)) for number in range(20_000)]
    pl.DataFrame({"text": words}).write_parquet(path, compression="uncompressed", row_group_size=20_000)
    assert path.stat().st_size > 20_000_000
    before = pyarrow.total_allocated_bytes()
    highest = 0

    def work() -> None:
        nonlocal highest
        for _ in Texts(path):
            highest = max(highest, pyarrow.total_allocated_bytes() - before)

    assert peak_of(work) < 6_000_000
    assert highest < 10_000_000


def test_nothing_is_read_beyond_what_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n{broken\n')
    examples = iter(Texts(path))
    assert [next(examples).text, next(examples).text] == ["one", "two"]
    with refuses("line 3"):
        next(examples)


# What it refuses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_missing_file(tmp_path: Path, suffix: str) -> None:
    with refuses(tmp_path / f"none{suffix}", "no such file"):
        Texts(tmp_path / f"none{suffix}")
    with refuses("no such file", "pc.Texts([text])"):
        Texts(f"I read it in notes{suffix}")


def test_folder(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").mkdir()
    with refuses("a folder, not a file"):
        Texts(tmp_path / "a.parquet")


def test_name_that_no_file_can_have() -> None:
    with refuses("no such file"):
        Texts("a\0b.txt")
    with refuses("no such file"):
        Texts("word " * 2000 + ".txt")


@pytest.mark.parametrize(("name", "said"), [("a.csv", "'.csv'"), ("a.json", "'.json'"), ("a", "no suffix")])
def test_unknown_suffix(tmp_path: Path, name: str, said: str) -> None:
    path = tmp_path / name
    path.write_text("text\n")
    with refuses(path, said, ".txt, .jsonl, .parquet"):
        Texts(path)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@pytest.mark.parametrize("content", ["", "\n", " \n\r\n\t\n", "\ufeff", "\ufeff\n\n"])
def test_file_without_examples(tmp_path: Path, suffix: str, content: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content.encode())
    with refuses(f"no examples in a{suffix}"):
        Texts(path)
    with refuses(f"no examples in a{suffix}"):
        Texts(path, labels={"x": [1, 2]})


def test_parquet_without_rows(tmp_path: Path) -> None:
    pl.DataFrame({"text": []}, schema={"text": pl.String}).write_parquet(tmp_path / "a.parquet")
    with refuses("no examples in a.parquet"):
        Texts(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "unfinished', ["Unterminated string", "column 10", 'begins \'{"text": "unfinished\'']),
        ('{"text": "a",}', ["is not JSON: ", "column", "begins"]),
        ("plain words", ["is not JSON: Expecting value at column 1", "begins 'plain words'"]),
        ('{"text": "a"} {"text": "b"}', ["Extra data at column 15"]),
        ("[" * 100_000, ["is not JSON: ", "begins '[[[["]),
        ('{"text": ' + "1" * 5000 + "}", ["is not JSON: ", "begins"]),
        ('["a", "b"]', ["not a JSON object but list", 'write {"text": ...} on each line', '["a", "b"]']),
        ('"a"', ["not a JSON object but str"]),
        ("null", ["not a JSON object but NoneType"]),
    ],
)
def test_broken_line_is_named(tmp_path: Path, line: str, words: list[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "fine"}}\n\n{line}\n{{"text": "fine again"}}\n')
    texts = Texts(path)
    for _ in range(2):
        with refuses(path, "line 3", *words) as caught:
            list(texts)
        assert len(str(caught.value)) < 300 + len(str(path))
    with refuses(path, "line 3"):
        _ = Texts(path, labels={"x": "text"}).labels


def test_broken_first_line_is_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("text,label\nA dog.,en\n")
    with refuses(path, "line 1 is not JSON"):
        Texts(path)


def test_column_that_is_missing_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "x": 1}\n{"x": 2}\n{}\n')
    with refuses(path, "line 2 has no column 'text'. It has: 'x'"):
        list(Texts(path))
    path.write_text("{}\n")
    with refuses(path, "line 1 has no column 'text'. It has: none"):
        Texts(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    "arguments", [{"column": "body"}, {"labels": ["body"]}, {"labels": {"x": "body"}}, {"targets": "body"}]
)
def test_missing_column_lists_the_columns(tmp_path: Path, suffix: str, arguments) -> None:
    path = write(tmp_path / f"a{suffix}", ROWS)
    with refuses(path, "no column 'body'. It has: 'text', 'lang', 'year', 'answer'"):
        Texts(path, **arguments)


@pytest.mark.parametrize(("suffix", "place"), [(".jsonl", "line 2 (example 1): "), (".parquet", "row 1: ")])
def test_hole_in_a_column_is_named(tmp_path: Path, suffix: str, place: str) -> None:
    rows = [dict(row) for row in ROWS]
    for column in rows[1]:
        rows[1][column] = None
    path = write(tmp_path / f"a{suffix}", rows)
    with refuses(path, place, "the text is None: expected str, got NoneType"):
        list(Texts(path))
    rows[1]["text"] = "here"
    write(path, rows)
    assert read(path)[1] == "here"
    with refuses(path, place, "label 'language' has no value"):
        list(Texts(path, labels={"language": "lang"}))
    with refuses(path, place, "label 'language' has no value"):
        _ = Texts(path, labels={"language": "lang"}).labels
    with refuses(path, place, "the target is None"):
        list(Texts(path, targets="answer"))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_column_of_numbers_is_no_text(tmp_path: Path, suffix: str) -> None:
    with refuses("the text is 1999: expected str, got int"):
        Texts(write(tmp_path / f"a{suffix}", ROWS), column="year")


def test_half_a_surrogate_pair_in_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "half \\ud83e"}\n')
    with refuses(path, "line 2 (example 1)", "half of a surrogate pair"):
        list(Texts(path))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
@pytest.mark.parametrize("count", [0, 2, 4])
def test_lists_of_the_wrong_length_are_refused_at_once(tmp_path: Path, suffix: str, count: int) -> None:
    path = write(tmp_path / f"a{suffix}", ROWS)
    with refuses(f"label 'x' has {count} values, but there are 3 examples in a{suffix}"):
        Texts(path, labels={"x": ["v"] * count})
    with refuses(f"targets has {count} values, but there are 3 examples in a{suffix}"):
        Texts(path, targets=["v"] * count)


def test_file_that_grows_after_its_labels_were_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", ROWS)
    texts = Texts(path, labels={"x": [1, 2, 3]})
    with path.open("a") as stream:
        stream.write("one more\n")
    with refuses(path, "line 4", "label 'x' has 3 values, but there are at least 4 examples"):
        list(texts)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_file_that_vanishes_between_two_passes(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", ROWS)
    texts = Texts(path)
    path.unlink()
    with refuses(path):
        list(texts)


def test_txt_has_no_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", ROWS)
    with refuses("a.txt has no columns to take labels from"):
        Texts(path, labels=["lang"])
    with refuses("label 'x' of a.txt takes one value per example"):
        Texts(path, labels={"x": "lang"})
    with refuses("targets of a.txt are a list"):
        Texts(path, targets="answer")
    with refuses("a.txt has no columns, so column='body' means nothing"):
        Texts(path, column="body")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_bytes_that_are_not_utf8_are_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b'{"text": "fine"}\n{"text": "Gr\xf6\xdfe"}\n')
    with refuses(path, "line 2 is not UTF-8: byte 0xf6 at position 12"):
        list(Texts(path))
    path.write_bytes('{"text": "fine"}\n'.encode("utf-16"))
    with refuses("line 1 is not UTF-8 (it looks like UTF-16)"):
        Texts(path)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all, but long enough to be read"])
def test_file_that_is_no_parquet(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    with refuses(path, "cannot be read as Parquet"):
        Texts(path)


def test_damaged_parquet_never_gives_a_part_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pl.DataFrame({"text": [f"text {number}" for number in range(9000)]}).write_parquet(path, row_group_size=3000)
    texts = Texts(path)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = b"\xff" * 2000
    path.write_bytes(content)
    with refuses(path, "damaged"):
        list(texts)
