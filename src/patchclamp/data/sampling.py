"""Draw examples at random from data whose length need not be known."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import TypeVar

import numpy as np

from patchclamp.errors import DataError

T = TypeVar("T")


def reservoir(items: Iterable[T], n: int, seed: int, name: str) -> list[tuple[int, T]]:
    """`n` items with their indices, ascending; every set of `n` is equally likely. Holds `n` items at a time.

    Item i (from 0) takes the place of one of those held with probability n / (i + 1): algorithm R of
    J. S. Vitter, "Random sampling with a reservoir" (1985).

    Raises:
        DataError: there are fewer than `n` items, or the seed is not a whole number from 0 on.
    """
    draw = np.random.default_rng(whole_number("seed", seed, least=0))
    held: list[tuple[int, T]] = []
    index = -1
    for index, item in enumerate(items):
        if index < n:
            held.append((index, item))
        elif (place := int(draw.integers(index + 1))) < n:
            held[place] = (index, item)
    if len(held) < n:
        raise DataError(f"cannot draw {n:,} examples from {name}, which has {index + 1:,}")
    return sorted(held, key=lambda each: each[0])


def whole_number(name: str, number: object, least: int) -> int:
    """The number as an `int`.

    Raises:
        DataError: it is not a whole number from `least` on.
    """
    try:
        whole = operator.index(number)  # type: ignore[arg-type]
    except TypeError:
        raise DataError(f"{name} is a whole number from {least} on, not {number!r}") from None
    if isinstance(number, bool) or whole < least:
        raise DataError(f"{name} is a whole number from {least} on, not {number!r}")
    return whole
