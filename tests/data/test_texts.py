"""`Texts` from lists and other iterables: what it gives, and every input that it refuses."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch

from patchclamp.data import Example, Texts
from patchclamp.errors import DataError, PatchclampError

WORDS = ["A dog.", "Ein Hund.", "Un chien."]


def refuses(message: str):
    """Expect a DataError whose message holds these words (as they stand, not as a pattern)."""
    return pytest.raises(DataError, match=re.escape(message))


class Shelf:
    """An iterable that is neither a list nor an iterator, and counts how often it was read."""

    def __init__(self, texts: list) -> None:
        self.texts = texts
        self.passes = 0

    def __iter__(self) -> Iterator[str]:
        self.passes += 1
        return iter(self.texts)


class SizedShelf(Shelf):
    def __len__(self) -> int:
        return len(self.texts)


# What it gives ------------------------------------------------------------------------------------


def test_list_gives_its_texts_in_order_again_and_again() -> None:
    texts = Texts(WORDS)
    assert [example.text for example in texts] == WORDS
    assert list(texts) == [Example(text, {}) for text in WORDS]
    assert (len(texts), texts.name, texts.labels) == (3, "texts", {})
    assert next(iter(texts)).target is None


def test_two_passes_at_the_same_time_do_not_disturb_each_other() -> None:
    texts = Texts(WORDS)
    assert [(a.text, b.text) for a, b in zip(texts, texts, strict=True)] == [(text, text) for text in WORDS]


def test_a_later_change_of_the_list_changes_nothing() -> None:
    words, values = list(WORDS), ["en", "de", "fr"]
    texts = Texts(words, labels={"language": values})
    words.append("more")
    values[0] = "xx"
    assert [example.labels["language"] for example in texts] == ["en", "de", "fr"]
    assert len(texts) == 3


def test_unicode_comes_back_unchanged() -> None:
    words = ["Größe", "日本語", "🧠 neuron", "e\u0301", "line\u2028separator", "", "tab\tand\nnewline"]
    assert [example.text for example in Texts(words)] == words


def test_reading_does_not_change_what_labels_and_length_say() -> None:
    texts = Texts(WORDS, {"language": ["en", "de", "fr"]}, name="three")
    before = (texts.labels, len(texts), repr(texts))
    list(texts)
    assert (texts.labels, len(texts), repr(texts)) == before
    assert repr(texts) == "Texts('three', labels: language)"


@pytest.mark.parametrize(
    "column",
    [tuple(WORDS), np.array(WORDS), np.array(WORDS, dtype=object), pd.Series(WORDS), pl.Series(WORDS)],
    ids=["tuple", "numpy", "numpy objects", "pandas", "polars"],
)
def test_columns_of_other_libraries_are_texts(column) -> None:
    texts = Texts(column)
    assert [example.text for example in texts] == WORDS
    assert all(type(example.text) is str for example in texts)
    assert len(texts) == 3


def test_subclass_of_str_counts_by_its_characters() -> None:
    class Loud(str):
        def __str__(self) -> str:
            return self.upper()

    (example,) = Texts([Loud("A dog.")], labels={"word": [Loud("A dog.")]})
    assert (example.text, example.labels) == ("A dog.", {"word": "A dog."})
    assert type(example.text) is str


def test_iterable_is_read_anew_by_each_pass() -> None:
    shelf = Shelf(WORDS)
    texts = Texts(shelf, labels={"language": ["en", "de", "fr"]})
    assert shelf.passes == 0, "making Texts reads nothing of an iterable whose length is unknown"
    assert list(texts) == list(texts)
    assert shelf.passes == 2
    with pytest.raises(TypeError, match="no length"):
        len(texts)
    assert len(Texts(SizedShelf(WORDS))) == 3


def test_generator_is_read_once() -> None:
    texts = Texts((word for word in WORDS), labels={"language": ["en", "de", "fr"]})
    with pytest.raises(TypeError, match="no length"):
        len(texts)
    assert texts, "asking for truth must not ask for the length"
    assert texts.labels == {"language": ("de", "en", "fr")}, "and does not read the generator"
    assert [(each.text, each.labels["language"]) for each in texts] == list(zip(WORDS, ["en", "de", "fr"], strict=True))
    with refuses("read once already, and a generator cannot be read again"):
        iter(texts)


def test_generator_read_in_part_is_spent_too() -> None:
    texts = Texts(iter(WORDS))
    assert next(iter(texts)).text == "A dog."
    with refuses("texts was read once already"):
        list(texts)


def test_error_inside_a_generator_reaches_the_user() -> None:
    def failing() -> Iterator[str]:
        yield "one"
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        list(Texts(failing()))


# Labels and targets -------------------------------------------------------------------------------


def test_labels_in_the_order_given_categories_sorted() -> None:
    texts = Texts(WORDS, labels={"language": ["en", "de", "en"], "animal": ["dog"] * 3})
    assert list(texts.labels) == ["language", "animal"]
    assert texts.labels == {"language": ("de", "en"), "animal": ("dog",)}
    assert [dict(example.labels) for example in texts] == [
        {"language": "en", "animal": "dog"},
        {"language": "de", "animal": "dog"},
        {"language": "en", "animal": "dog"},
    ]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2, 1], ("1", "2", "1")),
        ([True, False, True], ("True", "False", "True")),
        ([1, "1", np.int64(1)], ("1", "1", "1")),
        (("a", "b", "a"), ("a", "b", "a")),
        (np.array([3, 4, 3]), ("3", "4", "3")),
        (np.array(["x", "y", "x"]), ("x", "y", "x")),
        (torch.tensor([3, 4, 3]), ("3", "4", "3")),
        (pd.Series(["x", "y", "x"], index=[7, 8, 9]), ("x", "y", "x")),
        (pd.Categorical(["x", "y", "x"]), ("x", "y", "x")),
        (pl.Series([0.5, 1.0, 0.5]), ("0.5", "1.0", "0.5")),
        ((value for value in "aba"), ("a", "b", "a")),
        (["", "b", "c"], ("", "b", "c")),
    ],
)
def test_label_values_become_str(values, expected) -> None:
    texts = Texts(WORDS, labels={"x": values})
    assert tuple(example.labels["x"] for example in texts) == expected
    assert texts.labels == {"x": tuple(sorted(set(expected)))}
    assert all(type(example.labels["x"]) is str for example in texts)


def test_the_labels_given_out_are_a_copy() -> None:
    texts = Texts(WORDS, labels={"x": [1, 2, 3]})
    texts.labels.clear()
    assert texts.labels == {"x": ("1", "2", "3")}


def test_targets_one_per_example() -> None:
    texts = Texts(WORDS, targets=["dog", "Hund", "chien"])
    assert [example.target for example in texts] == ["dog", "Hund", "chien"]


@pytest.mark.parametrize("missing", [None, float("nan"), np.nan, pd.NA, pd.NaT, np.datetime64("NaT")])
def test_label_without_a_value_is_named(missing) -> None:
    with refuses("example 1 of texts: label 'language' has no value"):
        Texts(WORDS, labels={"language": ["en", missing, "fr"]})


@pytest.mark.parametrize("value", [["en"], {"en"}, ("en",), {"a": 1}, b"en", np.array([1, 2])])
def test_label_that_is_a_container_is_refused(value) -> None:
    with refuses("example 2 of texts: label 'language' is"):
        Texts(WORDS, labels={"language": ["en", "de", value]})


@pytest.mark.parametrize("count", [0, 1, 2, 4, 7])
def test_labels_of_the_wrong_length(count: int) -> None:
    with refuses(f"label 'language' has {count} values, but there are 3 examples in pets"):
        Texts(WORDS, labels={"fine": [1, 2, 3], "language": ["en"] * count}, name="pets")


@pytest.mark.parametrize("count", [2, 4])
def test_targets_of_the_wrong_length(count: int) -> None:
    with refuses(f"targets has {count} values, but there are 3 examples in texts"):
        Texts(WORDS, targets=["x"] * count)


@pytest.mark.parametrize("source", [Shelf, SizedShelf, iter])
def test_labels_of_the_wrong_length_of_an_iterable(source) -> None:
    # Where the length is not known beforehand it is compared at the end: never a result in part.
    with refuses("label 'x' has 2 values, but there are"):
        list(Texts(source(WORDS), labels={"x": [1, 2]}))
    with refuses("label 'x' has 4 values, but there are 3 examples in texts"):
        list(Texts(source(WORDS), labels={"x": [1, 2, 3, 4]}))
    with refuses("targets has 4 values, but there are 3 examples in texts"):
        list(Texts(source(WORDS), targets=["x"] * 4))


def test_sized_iterable_is_checked_at_once() -> None:
    with refuses("label 'x' has 2 values"):
        Texts(SizedShelf(WORDS), labels={"x": [1, 2]})


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["en", "de", "fr"], "texts has no columns to take labels from"),
        ("language", "texts has no columns to take labels from"),
        (5, "texts has no columns to take labels from"),
        ({"language": "en"}, "takes one value per example, in a list; 'en' is of type str"),
        ({"language": 3}, "takes one value per example, in a list; 3 is of type int"),
        ({"language": {"en", "de", "fr"}}, "is of type set"),
        ({"language": {"en": 1}}, "is of type dict"),
        ({"language": None}, "is of type NoneType"),
        ({"": [1, 2, 3]}, "the name of a label is a str and not empty"),
        ({3: [1, 2, 3]}, "the name of a label is a str and not empty; 3 is not"),
    ],
)
def test_labels_of_the_wrong_form(labels, message: str) -> None:
    with refuses(message):
        Texts(WORDS, labels=labels)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("Hund", "targets of texts are a list with one text per example, not one str"),
        ({"a", "b", "c"}, "not set"),
        (7, "not int"),
        (["a", None, "c"], "example 1 of texts: the target is None: expected str, got NoneType"),
    ],
)
def test_targets_of_the_wrong_form(targets, message: str) -> None:
    with refuses(message):
        Texts(WORDS, targets=targets)


# What it refuses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", [[], (), np.array([], dtype=str), pl.Series([], dtype=pl.String), SizedShelf([])])
def test_no_examples_is_said_at_once(empty) -> None:
    with refuses("no examples in nothing"):
        Texts(empty, name="nothing")


@pytest.mark.parametrize("empty", [Shelf([]), iter([]), (word for word in ())])
def test_no_examples_is_said_when_it_shows(empty) -> None:
    texts = Texts(empty)
    with refuses("no examples in texts"):
        list(texts)


@pytest.mark.parametrize(
    ("bad", "kind"),
    [(None, "NoneType"), (3, "int"), (b"x", "bytes"), (["a"], "list"), (float("nan"), "float")],
)
def test_text_that_is_no_str_is_named(bad, kind: str) -> None:
    with refuses("text 2 of texts: the text is") as caught:
        Texts(["a", "b", bad, "d"])
    assert f"expected str, got {kind}" in str(caught.value)
    with refuses(f"expected str, got {kind}"):
        list(Texts(Shelf(["a", "b", bad])))


def test_column_with_a_hole_is_refused_at_once() -> None:
    for column in (pd.Series(["a", None, "c"]), pl.Series(["a", None, "c"])):
        with refuses("text 1 of texts"):
            Texts(column)


def test_tensors_are_shown_the_way() -> None:
    with refuses("Tensors go into pc.Tensors"):
        Texts([torch.zeros(2)])  # type: ignore[list-item]


def test_half_a_surrogate_pair_is_refused() -> None:
    # A tokenizer would die of it with a message that does not name the text.
    with refuses("text 1 of texts: the text holds half of a surrogate pair, no character: U+D83E at character 2"):
        Texts(["fine", "a \ud83e brain"])
    with refuses("example 0 of texts: label 'x' holds half"):
        Texts(["fine"], labels={"x": ["\ud83e"]})


@pytest.mark.parametrize("text", ["one sentence", "", "corpus.csv", "corpus.json", "a.txt and b.txt both"])
def test_one_str_is_no_corpus(text: str) -> None:
    with refuses("For a single text write pc.Texts([text])") as caught:
        Texts(text)
    assert all(suffix in str(caught.value) for suffix in (".txt", ".jsonl", ".parquet"))


def test_a_long_str_is_not_repeated_in_full() -> None:
    with refuses("pc.Texts([text])") as caught:
        Texts("word " * 10_000)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "cannot read texts from NoneType"),
        (7, "cannot read texts from int"),
        (b"bytes", "bytes are not text"),
        ({"a", "b"}, "a set has no order"),
        ({"text": WORDS}, "a dict is a table, not texts"),
        (pd.DataFrame({"text": WORDS}), "a DataFrame is a table, not texts"),
        (pl.DataFrame({"text": WORDS}), "a DataFrame is a table, not texts"),
        (Texts(WORDS), "this is pc.Texts already"),
    ],
)
def test_source_of_the_wrong_kind(source, message: str) -> None:
    with refuses(message):
        Texts(source)


def test_open_file_is_refused(tmp_path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one\n")
    with file.open() as stream, refuses("pass the path of a file, not the open file"):
        Texts(stream)


def test_column_means_nothing_for_a_list() -> None:
    with refuses("texts has no columns, so column='body' means nothing"):
        Texts(WORDS, column="body")


def test_errors_are_patchclamp_errors_and_value_errors() -> None:
    with pytest.raises(ValueError) as caught:
        Texts([])
    assert isinstance(caught.value, PatchclampError)
