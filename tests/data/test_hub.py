"""Data sets of Hugging Face `datasets`: by classes that behave as they do, and by the library itself where it is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from patchclamp.data import Chats, Texts, as_data
from patchclamp.errors import DataError

ROWS = [
    {"text": "A dog.", "lang": 0, "tokens": ["A", "dog", "."], "tags": [1, 0, 2], "body": "x"},
    {"text": "Ein Hund.", "lang": 1, "tokens": ["Ein", "Hund", "."], "tags": [1, 0, 2], "body": "y"},
    {"text": "Un chien.", "lang": 0, "tokens": ["Un", "chien", "."], "tags": [1, 0, 2], "body": "z"},
]


def refuses(message: str):
    return pytest.raises(DataError, match=re.escape(message))


class ClassLabel:
    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)

    def int2str(self, code: int) -> str:
        return self.names[code]


class ListOf:
    def __init__(self, feature: Any) -> None:
        self.feature = feature


FEATURES = {
    "text": "string",
    "lang": ClassLabel(["en", "de"]),
    "tokens": ListOf("string"),
    "tags": ListOf(ClassLabel(["NOUN", "DET", "PUNCT"])),
    "body": "string",
}


class Streaming:
    """As `datasets.IterableDataset`: no length, and perhaps no features; each pass may be told what to give."""

    def __init__(self, *passes: list[Any], features: Any = None) -> None:
        self.passes, self.read = passes, 0
        self.features = features
        self.column_names = None if features is None else list(features)

    def __iter__(self) -> Iterator[Any]:
        rows = self.passes[min(self.read, len(self.passes) - 1)]
        self.read += 1
        for row in rows:
            if isinstance(row, Exception):
                raise row
            yield row


class Whole(Streaming):
    """As `datasets.Dataset`: a length, and a choice of columns."""

    def __init__(self, rows: list[Any], features: Any = FEATURES) -> None:
        super().__init__(rows, features=features)
        self.chosen: list[list[str]] = []

    def __len__(self) -> int:
        return len(self.passes[0])

    def select_columns(self, columns: list[str]) -> Whole:
        self.chosen.append(columns)
        rows = [{name: row[name] for name in columns} for row in self.passes[0]]
        return Whole(rows, {name: self.features[name] for name in columns})


@pytest.mark.parametrize(
    "made", [lambda: Whole(ROWS), lambda: Streaming(ROWS), lambda: Streaming(ROWS, features=FEATURES)]
)
def test_texts_of_a_data_set(made: Any) -> None:
    dataset = made()
    texts = Texts(dataset, labels={"language": "lang"}, targets="body")
    names = ["en", "de", "en"] if dataset.features else ["0", "1", "0"]
    assert [each.text for each in texts] == [row["text"] for row in ROWS]
    assert [each.labels["language"] for each in texts] == names
    assert [each.target for each in texts] == ["x", "y", "z"]
    assert texts.labels == {"language": tuple(sorted(set(names)))}
    assert texts.name == "dataset"


def test_only_the_wanted_columns_are_read() -> None:
    dataset = Whole(ROWS)
    list(Texts(dataset, labels=["lang"]))
    assert dataset.chosen and all(columns == ["text", "lang"] for columns in dataset.chosen)


def test_length_is_that_of_the_data_set() -> None:
    assert len(Texts(Whole(ROWS))) == 3
    stream = Streaming(ROWS)
    texts = Texts(stream)
    assert stream.read == 0, "a stream is not touched before it is read"
    with pytest.raises(TypeError, match="no length"):
        len(texts)


def test_words_and_their_classes() -> None:
    texts = Texts(Whole(ROWS), words="tokens", token_labels={"pos": "tags"})
    first = next(iter(texts))
    assert first.text == "A dog ."
    assert [tuple(span) for span in first.token_labels["pos"]] == [(0, 1, "DET"), (2, 5, "NOUN"), (6, 7, "PUNCT")]
    assert texts.token_labels == {"pos": ("DET", "NOUN", "PUNCT", "(none)")}


def test_data_is_accepted_as_it_is() -> None:
    given = as_data(Streaming(ROWS))
    assert isinstance(given, Texts) and [each.text for each in given] == [row["text"] for row in ROWS]


def test_conversations_of_a_data_set() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    (talk,) = Chats(Streaming([{"messages": messages, "id": 7}]), labels=["id"])
    assert talk.messages == tuple(messages) and talk.labels == {"id": "7"}


@pytest.mark.parametrize("at", [0, 2])
def test_a_stream_that_breaks_off_says_where(at: int) -> None:
    rows: list[Any] = list(ROWS)
    rows.insert(at, ConnectionError("the line is dead"))
    with refuses(f"dataset ends early, at example {at}: ConnectionError: the line is dead") as caught:
        list(Texts(Streaming(rows)))
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_a_stream_that_cannot_even_begin() -> None:
    class Closed(Streaming):
        def __iter__(self) -> Iterator[Any]:
            raise OSError("no network")

    with refuses("dataset ends early, at example 0: OSError: no network"):
        list(Texts(Closed(ROWS)))


@pytest.mark.parametrize(
    ("second", "says"),
    [
        (ROWS[:2], "it ends after 2 of 3 examples"),
        ([*ROWS, ROWS[0]], "it has more than 3 examples"),
        ([ROWS[1], ROWS[0], ROWS[2]], "it gives other values of 'lang'"),
    ],
)
def test_a_second_pass_that_differs_is_noticed(second: list[Any], says: str) -> None:
    texts = Texts(Streaming(ROWS, second), labels=["lang"])
    assert texts.labels == {"lang": ("0", "1")}
    with refuses(f"dataset is not the same when it is read again: {says}"):
        list(texts)


def test_other_texts_in_a_second_pass_are_noticed() -> None:
    texts = Texts(Streaming(ROWS, [*ROWS[:2], {"text": "Another."}]))
    list(texts)
    with refuses("it gives other values of 'text'"):
        list(texts)


def test_a_pass_that_was_left_half_way_is_not_compared() -> None:
    texts = Texts(Streaming(ROWS))
    next(iter(texts))
    assert len(list(texts)) == len(list(texts)) == 3


def test_taking_some_of_a_stream_reads_no_more() -> None:
    rows: list[Any] = [*ROWS, ConnectionError("too far")]
    assert [each.text for each in Texts(Streaming(rows)).take(3)] == [row["text"] for row in ROWS]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Texts(Whole(ROWS), column="title"), "dataset has no column 'title'. It has: 'text', 'lang'"),
        (lambda: Texts(Streaming(ROWS, features=FEATURES), column="title"), "dataset has no column 'title'"),
        (lambda: list(Texts(Streaming(ROWS), column="title")), "example 0 of dataset has no column 'title'"),
        (lambda: Texts(Whole(ROWS), labels=["language"]), "dataset has no column 'language'"),
        (lambda: Texts(Whole([])), "no examples in dataset"),
        (lambda: list(Texts(Streaming([]))), "no examples in dataset"),
        (lambda: list(Texts(Streaming([7]))), "example 0 of dataset is not a dict of columns but int"),
        (lambda: Texts(Whole([{**ROWS[0], "lang": -1}]), ["lang"]), "column 'lang' has no value (-1)"),
        (
            lambda: Texts(Whole([{**ROWS[0], "lang": 5}]), ["lang"]),
            "column 'lang' is 5, and its class label has 2 names",
        ),
        (lambda: Texts(Whole([{**ROWS[0], "lang": None}]), ["lang"]), "label 'lang' has no value (None)"),
        (lambda: Texts(Whole([{**ROWS[0], "text": None}])), "example 0 of dataset: the text is None"),
    ],
)
def test_what_a_data_set_lacks_is_said(make: Any, says: str) -> None:
    with refuses(says):
        make()


def test_several_splits_are_no_data_set() -> None:
    class Splits(dict):
        column_names: dict[str, list[str]] = {"train": ["text"]}  # noqa: RUF012

    with refuses("a Splits holds several data sets (train, test): pass one of them"):
        Texts(Splits(train=Whole(ROWS), test=Whole(ROWS)))


@pytest.mark.parametrize("streaming", [False, True])
def test_the_library_itself(streaming: bool) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "lang": datasets.ClassLabel(names=["en", "de"])})
    rows = {"text": [row["text"] for row in ROWS], "lang": [row["lang"] for row in ROWS]}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    if streaming:
        dataset = dataset.to_iterable_dataset()
    texts = Texts(dataset, labels=["lang"])
    assert [each.text for each in texts] == rows["text"]
    assert [each.labels["lang"] for each in texts] == ["en", "de", "en"]
    assert texts.labels == {"lang": ("de", "en")}
