"""Untrusted text made fit to show: one line, nothing invisible, nothing that steers a terminal."""

from __future__ import annotations

import re

# Beside control characters: marks that reorder or hide text, and line ends of Unicode's own.
# Zero-width joiners stay: emoji and several scripts are written with them.
_STEERING = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]"
)
_NAMES = {"\n": "⏎", "\t": "⇥", "\r": "␍"}


def visible(text: str) -> str:
    r"""The text on one line, with control and direction characters written out.

    Example:
        >>> visible("a\nb\x1b[31m")
        'a⏎b\\x1b[31m'
    """
    return _STEERING.sub(lambda match: _NAMES.get(match[0]) or _code(match[0]), text)


def visible_token(token: str) -> str:
    """A token on its own, in a list: as `visible`, with the spaces at its edges drawn.

    The space before a word is part of its token, and tells " back" from the "back" in "feedback".

    Example:
        >>> visible_token(" back"), visible_token("back"), visible_token("")
        ('␣back', 'back', '(empty)')
    """
    return re.sub("^ +| +$", lambda spaces: "␣" * len(spaces[0]), visible(token)) or "(empty)"


def _code(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"
