"""Label values as numbers, and hashes of data: what every kind of corpus needs."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np

from patchclamp.errors import DataError


class Codes:
    """Label values as numbers, four bytes an example."""

    def __init__(self, labels: Mapping[str, tuple[str, ...]]) -> None:
        self._place = places(labels)
        self._codes = {name: array("i") for name in labels}

    def add(self, labels: Mapping[str, str], where: str = "an example") -> None:
        """Add an example.

        Raises:
            DataError: it has a value that the data did not show when the categories were collected.
        """
        for name, codes in self._codes.items():
            codes.append(code_of(self._place[name], labels[name], name, where))

    def arrays(self) -> dict[str, np.ndarray]:
        """Label -> `[examples]` int32."""
        return {name: np.asarray(each, np.int32) for name, each in self._codes.items()}


def places(labels: Mapping[str, tuple[str, ...]]) -> dict[str, dict[str, int]]:
    """Label -> category -> its code."""
    return {name: {category: code for code, category in enumerate(each)} for name, each in labels.items()}


def code_of(place: Mapping[str, int], value: str, label: str, where: str) -> int:
    """The code of a value of a label.

    Raises:
        DataError: it is a value that an earlier pass over the data did not show.
    """
    if value not in place:
        raise DataError(
            f"{where} has {value!r} for the label {label!r}, which no example had in the pass before: "
            "the data are not the same when they are read again"
        )
    return place[value]


def feed(digest: Any, *parts: str | None) -> None:
    """Hash texts, so that no two different lists of them give the same bytes."""
    for part in parts:
        data = b"" if part is None else part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + (b"\0" if part is None else b"\1") + data)
