"""Texts with labels in words, and what they do when they are run one at a time: what tests of text data share."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from tests.recording import tiny
from tests.recording.tiny import CASES, Rows, alone

import patchclamp as pc
from patchclamp.errors import DataError

TEXTS = tiny.texts(15)
SIDES = ["left", "right"]


def refuses(message: str, error: type[Exception] = DataError):
    """Expect an error whose message holds these words (as they stand)."""
    return pytest.raises(error, match=re.escape(message))


def model_of(name: str, side: str = "right", **options: Any) -> pc.Model:
    case = CASES[name]
    return pc.load(case.build(), tokenizer=tiny.tokenizer(case.template, side=side, **options))


def rows_alone(name: str, given: Sequence[str], **options: Any) -> dict[str, Rows]:
    case = CASES[name]
    return alone(case.build(), case.sites, tiny.tokenizer(case.template), given, **options)


def assert_moments(recording: pc.Recording, expected: dict[str, Rows], chosen: Callable[[Rows], np.ndarray]) -> None:
    """Means and counts of the sites are those of the chosen rows of texts run alone."""
    for site, rows in expected.items():
        kept = chosen(rows)
        assert 0 < kept.sum() <= len(kept)
        assert recording[site].moments.count == kept.sum()
        np.testing.assert_allclose(recording[site].moments.mean, rows.values[kept].mean(0), rtol=1e-4, atol=1e-5)


def texts_in_words(number: int = 14, seed: int = 3) -> tuple[list[list[str]], list[list[int]], list[list[str]]]:
    """Words of one or two tokens ("list," is two), how many tokens each has, and a label for each word."""
    draw = np.random.default_rng(seed)
    words, tokens, labels = [], [], []
    for _ in range(number):
        count = int(draw.integers(1, 8))
        plain = [str(draw.choice(tiny.WORDS[:30])) for _ in range(count)]
        marks = [bool(draw.integers(2)) for _ in range(count)]
        words.append([f"{word}{',' if mark else ''}" for word, mark in zip(plain, marks, strict=True)])
        tokens.append([1 + mark for mark in marks])
        labels.append([str(draw.choice(["DET", "NOUN", "VERB"])) for _ in range(count)])
    return words, tokens, labels


def in_form(form: str, words: list[list[str]], labels: list[list[str]]) -> pc.Texts:
    """The same texts and labels in each of the forms that `Texts` takes."""
    texts = [" ".join(each) for each in words]
    if form == "words":
        return pc.Texts(words=words, token_labels={"pos": labels})
    if form == "split":
        return pc.Texts(texts, token_labels={"pos": labels})
    spans = []
    for each, of_text in zip(words, labels, strict=True):
        starts = np.cumsum([0, *(len(word) + 1 for word in each)])
        spans.append([(int(s), int(s) + len(w), k) for s, w, k in zip(starts, each, of_text, strict=False)])
    return pc.Texts(texts, token_labels={"pos": spans})


def label_of_rows(rows: Rows, tokens: list[list[int]], labels: list[list[str]], before: int) -> np.ndarray:
    """The label of each row, counted out by hand: `before` special tokens, then each word's label for its tokens."""
    found = []
    for example, position in zip(rows.example, rows.position, strict=True):
        of_tokens = np.repeat(labels[example], tokens[example])
        place = position - before
        found.append(of_tokens[place] if 0 <= place < len(of_tokens) else "(none)")
    return np.asarray(found)
