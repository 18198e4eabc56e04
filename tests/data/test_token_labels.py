"""Labels of words and spans: the forms they are given in, and every one that does not fit its text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from patchclamp.data import Span, Texts
from patchclamp.errors import DataError

WORDS = [["The", "cat", "sat"], ["Dogs", "bark"]]
TEXTS = [" ".join(each) for each in WORDS]
LABELS = [["DET", "NOUN", "VERB"], ["NOUN", "VERB"]]
SPANS = [[Span(0, 3, "DET"), Span(4, 7, "NOUN"), Span(8, 11, "VERB")], [Span(0, 4, "NOUN"), Span(5, 9, "VERB")]]


def refuses(message: str):
    return pytest.raises(DataError, match=re.escape(message))


def spans(texts: Texts, label: str = "pos") -> list[list[Span]]:
    return [list(each.token_labels[label]) for each in texts]


@pytest.mark.parametrize(
    "given",
    [
        LABELS,
        [np.asarray(each) for each in LABELS],
        [tuple(each) for each in LABELS],
        SPANS,
        [[list(span) for span in each] for each in SPANS],
        [[span._asdict() for span in each] for each in SPANS],
        [list(reversed(each)) for each in SPANS],
    ],
)
def test_every_form_gives_the_same_spans(given: Any) -> None:
    texts = Texts(TEXTS, token_labels={"pos": given})
    assert spans(texts) == SPANS
    assert texts.token_labels == {"pos": ("DET", "NOUN", "VERB", "(none)")}
    assert texts.labels == {}


def test_words_are_joined_with_spaces() -> None:
    texts = Texts(words=WORDS, token_labels={"pos": LABELS}, labels={"kind": ["a", "b"]})
    assert [each.text for each in texts] == TEXTS
    assert spans(texts) == SPANS
    words = [["New York", "", "is"]]
    (found,) = spans(Texts(words=words, token_labels={"pos": [["N", "E", "V"]]}))
    assert found == [Span(0, 8, "N"), Span(10, 12, "V")], "an empty word has no token to label"


def test_words_of_a_text_are_those_of_split() -> None:
    (found,) = spans(Texts(["  a\tlist\u2003of\n lists "], token_labels={"pos": [["A", "B", "C", "D"]]}))
    assert found == [Span(2, 3, "A"), Span(4, 8, "B"), Span(9, 11, "C"), Span(13, 18, "D")]


def test_no_spans_and_empty_labels() -> None:
    texts = Texts(TEXTS, token_labels={"name": [[], [(0, 4, "")]]})
    assert spans(texts, "name") == [[], [Span(0, 4, "(none)")]]
    assert texts.token_labels == {"name": ("(none)",)}


def test_a_later_change_of_the_lists_changes_nothing() -> None:
    words, labels = [list(each) for each in WORDS], [list(each) for each in LABELS]
    texts = Texts(words=words, token_labels={"pos": labels})
    words[0][0], labels[0][0] = "Xs", "X"
    words.append(["more"])
    assert spans(texts) == SPANS and len(texts) == 2


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_columns_of_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"corpus{suffix}"
    rows = [{"text": t, "words": w, "upos": k} for t, w, k in zip(TEXTS, WORDS, LABELS, strict=True)]
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pl.DataFrame(rows).write_parquet(path)
    for texts in (Texts(path, token_labels={"pos": "upos"}), Texts(path, words="words", token_labels={"pos": "upos"})):
        assert spans(texts) == SPANS
        assert texts.token_labels == {"pos": ("DET", "NOUN", "VERB", "(none)")}
    assert spans(Texts(path, token_labels=["upos"]), "upos") == SPANS


def test_a_fault_in_a_file_is_said_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "a b", "pos": ["X", "Y"]}\n{"text": "a b", "pos": ["X"]}\n')
    texts = Texts(path, token_labels=["pos"])
    with refuses("line 2 (example 1): token label 'pos' has 1 labels for 2 words"):
        list(texts)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([["D", "N"], ["N", "V"]], "text 0 of texts: token label 'pos' has 2 labels for 3 words"),
        ([["D", "N", "V", "X"], ["N", "V"]], "has 4 labels for 3 words"),
        (
            [[(0, 3, "D")], [(5, 10, "V")]],
            "text 1 of texts: token label 'pos': the span 5...10 (V) is not inside the text",
        ),
        ([[(0, 3, "D")], [(5, 10, "V")]], "which has 9 characters"),
        ([[(-1, 3, "D")], []], "the span -1...3 (D) is not inside"),
        ([[(3, 3, "D")], []], "the span 3...3 (D) is not inside"),
        ([[(0, 5, "D"), (4, 7, "N")], []], "the spans 0...5 (D) and 4...7 (N) overlap"),
        ([[(0, 3)], []], "(0, 3) is not a span (start, end, label)"),
        ([[(0.5, 3, "D")], []], "is not a span (start, end, label)"),
        ([[(0, 3, None)], []], "label 'pos' has no value (None)"),
        ([[{"begin": 0, "end": 3, "label": "D"}], []], "is not a span (start, end, label)"),
        ([[(0, 3, "D"), "N", "V"], []], "token label 'pos' mixes labels and spans"),
        ([["D", None, "V"], ["N", "V"]], "label 'pos' has no value (None)"),
        (["DNV", ["N", "V"]], "token label 'pos' is of type str"),
        ([7, ["N", "V"]], "token label 'pos' is of type int"),
        ([LABELS[0]], "token label 'pos' has 1 values, but there are 2 examples in texts"),
        ("DNV", "token label 'pos' of texts takes one list per example"),
        ({"a": 1}, "token label 'pos' of texts takes one list per example"),
    ],
)
def test_labels_that_do_not_fit(given: Any, says: str) -> None:
    with refuses(says):
        Texts(TEXTS, token_labels={"pos": given})


NO_WORD: Any = [["a", 7]]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Texts(TEXTS, words=WORDS), "give texts or words=, not both"),
        (lambda: Texts(words="tokens"), "words='tokens' is the name of a column"),
        (lambda: Texts(TEXTS, words="tokens"), "texts has no columns, so words='tokens' means nothing"),
        (lambda: Texts(words=["a list", "of texts"]), "text 0 of texts: the words are of type str"),
        (lambda: Texts(words=NO_WORD), "text 0 of texts: word 1 is 7: expected str, got int"),
        (lambda: Texts(words=[["a", "b"]], token_labels={"pos": [[]]}), "has 0 labels for 2 words"),
        (lambda: Texts(TEXTS, token_labels=["pos"]), "texts has no columns to take labels from"),
        (lambda: Texts(TEXTS, {"pos": [1, 2]}, token_labels={"pos": LABELS}), "'pos' as a label and as a token label"),
        (lambda: Texts(WORDS), "Texts in words are given as pc.Texts(words=[...])"),
        (lambda: Texts(), "cannot read texts from NoneType"),
    ],
)
def test_words_and_labels_that_cannot_be(make: Any, says: str) -> None:
    with refuses(says):
        make()
