"""Labels and texts of single examples: what is accepted, and the reasons why something is not.

Label values become `str`, so that `1` and `"1"` are one category. A missing value (None, NaN) is
refused rather than made a category of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from patchclamp.errors import DataError


class Unusable(Exception):
    """Why a value cannot be used; whoever knows its place turns it into a `DataError`."""


def text_of(value: object, what: str = "the text") -> str:
    """The value as a plain `str` that a tokenizer can read, or `Unusable`."""
    if not isinstance(value, str):
        hint = ". Tensors go into pc.Tensors" if hasattr(value, "shape") else ""
        if isinstance(value, (list, tuple)) and value:
            words = ". Texts in words are given as pc.Texts(words=[...])" if isinstance(value[0], str) else hint
            hint = ". Conversations go into pc.Chats" if isinstance(value[0], Mapping) else words
        raise Unusable(f"{what} is {_shown(value)}: expected str, got {type(value).__name__}{hint}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            broken = f"U+{ord(value[error.start]):04X} at character {error.start}"
            raise Unusable(f"{what} holds half of a surrogate pair, no character: {broken}") from None
    # Of a subclass (numpy.str_, an enum of str) only the characters count.
    return value if type(value) is str else str.__str__(value)


def label_of(value: object, label: str) -> str:
    """The value of `label` as a plain `str`, or `Unusable`."""
    if isinstance(value, str):
        return text_of(value, f"label {label!r}")
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "ndim", None) == 0:
        # A scalar of numpy or torch: str() of the latter would read "tensor(3)".
        value = item()
    if isinstance(value, (bytes, Mapping, list, tuple, set, frozenset)) or getattr(value, "ndim", 0):
        kind = type(value).__name__
        raise Unusable(f"label {label!r} is {_shown(value)}: expected one word or number, got {kind}")
    if _is_missing(value):
        raise Unusable(f"label {label!r} has no value ({value})")
    return str(value)


def label_list(label: object, values: object, owner: str) -> tuple[str, ...]:
    """One `str` per example from what the user gave for `label` of the data called `owner`.

    Raises:
        DataError: the name or the values are not usable; the message gives the label and the index.
    """
    label = label_name(label)
    if isinstance(values, (str, bytes, Mapping, set, frozenset)) or not isinstance(values, Iterable):
        raise DataError(
            f"label {label!r} of {owner} takes one value per example, in a list; "
            f"{_shown(values)} is of type {type(values).__name__}"
        )
    found: list[str] = []
    for index, value in enumerate(values):
        try:
            found.append(label_of(value, label))
        except Unusable as reason:
            raise DataError(f"example {index} of {owner}: {reason}") from None
    return tuple(found)


def label_name(label: object) -> str:
    """The name of a label, which is a `str` and not empty.

    Raises:
        DataError: it is something else.
    """
    if not isinstance(label, str) or not label:
        raise DataError(f"the name of a label is a str and not empty; {label!r} is not")
    return label


def check_length(what: str, given: int, examples: int, owner: str) -> None:
    """Compare the number of values given with the number of examples.

    Raises:
        DataError: they differ; the message says both.
    """
    if given != examples:
        raise DataError(f"{what} has {given:,} values, but there are {examples:,} examples in {owner}")


def categories(values: Mapping[str, Iterable[str]]) -> dict[str, tuple[str, ...]]:
    """Label name -> its distinct values, sorted."""
    return {label: tuple(sorted(set(each))) for label, each in values.items()}


def _is_missing(value: object) -> bool:
    if value is None:
        return True
    try:
        return bool(value != value)
    except (TypeError, ValueError):
        return True  # pandas.NA refuses to be compared


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:40] + "..."
