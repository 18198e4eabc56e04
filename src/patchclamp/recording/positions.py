"""Which positions of a text count: all, the last one, those of the answer, or what a function says."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from patchclamp.data import Chats, Example
from patchclamp.data.chats import RESPONSE, ROLE
from patchclamp.errors import DataError, unknown

Choice = Callable[[Example, list[str]], Any]

KINDS = ("all", "last", "response")


class Positions:
    """What `record` was told to count; padding never counts, nor do special tokens unless they were asked for.

    Args:
        positions: "all", "last", "response", or a function from an example and the strings of its tokens (special
            ones included) to a bool for each token, or to the indices of those that count.

    Raises:
        UnknownName: a name that is none of these.
        DataError: it is neither a name nor a function.
    """

    def __init__(self, positions: str | Choice) -> None:
        if isinstance(positions, str):
            if positions not in KINDS:
                raise unknown("choice of positions", positions, KINDS, "A function chooses any others.")
        elif not callable(positions):
            raise DataError(
                f"positions is 'all', 'last', 'response' or a function (example, tokens); not {positions!r:.60}"
            )
        self._positions = positions

    @property
    def kind(self) -> str:
        """The name, or "callable"."""
        return self._positions if isinstance(self._positions, str) else "callable"

    def parameters(self) -> str | dict[str, Any]:
        """As JSON: the name; of a function its own name and the hash of its source, where Python can show it."""
        if isinstance(self._positions, str):
            return self._positions
        function = self._positions
        named = function if hasattr(function, "__qualname__") else type(function)
        try:
            source = hashlib.sha256(inspect.getsource(named).encode()).hexdigest()
        except (OSError, TypeError):
            source = None
        return {"callable": f"{named.__module__}.{named.__qualname__}", "source_sha256": source}

    def check(self, data: Any) -> None:
        """Refuse data of which these positions cannot be said.

        Raises:
            DataError: there is no answer in the data.
        """
        if self.kind == "response" and not isinstance(data, Chats):
            raise DataError(
                "positions='response' counts the tokens of the assistant's turns, and only conversations have them: "
                "pc.Chats(...). For texts, positions may be a function (example, tokens)"
            )
        if self.kind == "response" and RESPONSE not in data.token_labels[ROLE]:
            roles = ", ".join(data.token_labels[ROLE][:-1])
            raise DataError(f"positions='response': no message of {data.name} is of the {RESPONSE}; there are {roles}")

    def chosen(
        self,
        example: Example,
        tokens: Callable[[], list[str]],
        eligible: np.ndarray,
        roles: np.ndarray | None,
        where: str,
    ) -> np.ndarray:
        """Which tokens of one text count.

        Args:
            example: the text.
            tokens: gives the strings of its tokens.
            eligible: `[tokens]` bool, those that could count.
            roles: `[tokens]` bool, those of the answer.
            where: the text in words.

        Returns:
            `[tokens]` bool.

        Raises:
            DataError: the function gives something else than bools or indices of the tokens.
        """
        if self.kind == "last":
            return last_of(eligible)
        if self.kind == "response":
            assert roles is not None
            return eligible & roles
        if self.kind == "callable":
            assert callable(self._positions)
            return eligible & _flags(self._positions(example, tokens()), len(eligible), where)
        return eligible


def last_of(flags: np.ndarray) -> np.ndarray:
    """Only the last that is set, if any. `[tokens]` bool."""
    found = np.zeros_like(flags)
    if flags.any():
        found[np.flatnonzero(flags)[-1]] = True
    return found


def _flags(given: Any, length: int, where: str) -> np.ndarray:
    """What the user's function gave, as a bool for each token."""
    if isinstance(given, (str, bytes)) or (not hasattr(given, "__iter__") and not hasattr(given, "__len__")):
        raise DataError(f"positions gave {given!r:.60} for {where}: expected a bool for each token, or indices")
    listed: Sequence[Any] = given.tolist() if hasattr(given, "tolist") else list(given)
    if not listed:
        return np.zeros(length, bool)
    bools = [isinstance(each, (bool, np.bool_)) for each in listed]
    if all(bools):
        if len(listed) != length:
            raise DataError(f"positions gave {len(listed)} bools for {where}, which has {length} tokens")
        return np.asarray(listed, bool)
    flags = np.zeros(length, bool)
    for each, is_bool in zip(listed, bools, strict=True):
        if is_bool or not hasattr(each, "__index__"):
            raise DataError(f"positions gave {each!r:.60} for {where}: expected a bool for each token, or indices")
        if not -length <= int(each) < length:
            raise DataError(f"positions gave the index {int(each)} for {where}, which has {length} tokens")
        flags[int(each)] = True
    return flags
