"""Labels of words or stretches of a text: whatever form they are given in, they become spans of characters.

The spans are matched with tokens where the tokenizer is known; here is only text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from patchclamp.data.labels import Unusable, label_of, text_of

UNLABELLED = "(none)"
"""The category of tokens that no label covers: special tokens, punctuation between labelled words."""


class Span(NamedTuple):
    """A labelled stretch of a text, in characters: from `start` up to, and without, `end`."""

    start: int
    end: int
    label: str


Words = Sequence[tuple[int, int]]


def joined_words(value: object) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The text that words make when a space is put between them, and the place of each; or `Unusable`."""
    if isinstance(value, (str, bytes, Mapping, set, frozenset)) or not isinstance(value, Iterable):
        raise Unusable(f"the words are of type {type(value).__name__}: expected a list of str")
    places: list[tuple[int, int]] = []
    words: list[str] = []
    at = 0
    for number, each in enumerate(value):
        word = text_of(each, f"word {number}")
        words.append(word)
        places.append((at, at + len(word)))
        at += len(word) + 1
    return " ".join(words), tuple(places)


def split_words(text: str) -> tuple[tuple[int, int], ...]:
    """The places of the words of a text, as `str.split()` finds them."""
    places: list[tuple[int, int]] = []
    at = 0
    for word in text.split():
        start = text.index(word, at)
        at = start + len(word)
        places.append((start, at))
    return tuple(places)


def spans_of(given: object, label: str, text: str, words: Words | None) -> tuple[Span, ...]:
    """The labelled spans of one text, in order of their place; `Unusable` where they do not fit it.

    Args:
        given: a label for each word, or spans `(start, end, label)`; an empty list has no spans.
        label: name of the label, for messages.
        text: the text.
        words: the places of its words, if it was given in words; else they are found by `str.split()`.
    """
    listed = _listed(given, label)
    if (spans := _as_spans(listed, label)) is not None and (spans or words is None):
        return _checked(spans, label, text)
    if words is None:
        words = split_words(text)
    if len(listed) != len(words):
        raise Unusable(f"token label {label!r} has {len(listed):,} labels for {len(words):,} words")
    found = [Span(*place, _named(value, label)) for place, value in zip(words, listed, strict=True)]
    return tuple(each for each in found if each.start < each.end)


def values_of(given: object, label: str) -> Iterable[str]:
    """The labels that occur in one example, whichever form they are given in, or `Unusable`."""
    listed = _listed(given, label)
    spans = _as_spans(listed, label)
    return (each.label for each in spans) if spans is not None else (_named(each, label) for each in listed)


def with_unlabelled(labels: Iterable[str], unlabelled: str = UNLABELLED) -> tuple[str, ...]:
    """The categories of a token label: those that occur, sorted, and last that of tokens without one."""
    return (*sorted(set(labels) - {unlabelled}), unlabelled)


def _listed(given: object, label: str) -> list[Any]:
    if isinstance(given, (str, bytes, Mapping, set, frozenset)) or not isinstance(given, Iterable):
        raise Unusable(
            f"token label {label!r} is of type {type(given).__name__}: "
            "expected a list with a label for each word, or with spans (start, end, label)"
        )
    return list(given)


def _as_spans(listed: Sequence[Any], label: str) -> list[Span] | None:
    """The list as spans; None if it holds labels."""
    of_spans = [isinstance(each, (tuple, list, Mapping)) for each in listed]
    if not all(of_spans):
        if any(of_spans):
            raise Unusable(f"token label {label!r} mixes labels and spans: {listed[of_spans.index(True)]!r:.60}")
        return None
    spans = []
    for each in listed:
        parts: list[Any] = (
            [each.get(key) for key in ("start", "end", "label")] if isinstance(each, Mapping) else list(each)
        )
        if len(parts) != 3 or not all(_is_whole(part) for part in parts[:2]):
            raise Unusable(f"token label {label!r}: {each!r:.60} is not a span (start, end, label)")
        spans.append(Span(int(parts[0]), int(parts[1]), _named(parts[2], label)))
    return spans


def _checked(spans: Sequence[Span], label: str, text: str) -> tuple[Span, ...]:
    ordered = sorted(spans)
    for before, each in zip([None, *ordered], ordered, strict=False):
        if not 0 <= each.start < each.end <= len(text):
            raise Unusable(
                f"token label {label!r}: the span {each.start}...{each.end} ({each.label}) "
                f"is not inside the text, which has {len(text):,} characters"
            )
        if before is not None and each.start < before.end:
            raise Unusable(
                f"token label {label!r}: the spans {before.start}...{before.end} ({before.label}) and "
                f"{each.start}...{each.end} ({each.label}) overlap: which label counts?"
            )
    return tuple(ordered)


def _named(value: object, label: str) -> str:
    return label_of(value, label) or UNLABELLED


def _is_whole(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)
