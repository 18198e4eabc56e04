"""The registry of published methods: which function implements which paper.

```python
@published(row="S093", title="...", authors="...", year=2024, url="https://...", part="detector")
def lape(recording, labels): ...
```

The list of methods, the gallery in the documentation and the coverage of truth tests are made from it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from patchclamp.errors import PatchclampError

_Method = TypeVar("_Method", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Published:
    """One published method and the public function or class that implements it.

    Attributes:
        row: its id in the list of methods, "S093".
        title: title of the paper.
        authors: its authors, as one would cite them.
        year: the year it appeared.
        url: where it can be read.
        part: which part of the paper this is ("detector"), where a paper has several; else None.
        function: what implements it.
    """

    row: str
    title: str
    authors: str
    year: int
    url: str
    part: str | None
    function: Callable[..., Any]

    @property
    def name(self) -> str:
        """Where to import it from: "patchclamp.find.lape.lape"."""
        return _full_name(self.function)

    @property
    def summary(self) -> str:
        """The first line of its docstring; "" where it has none."""
        return (self.function.__doc__ or "").strip().partition("\n")[0]


def published(
    row: str, title: str, authors: str, year: int, url: str, part: str | None = None
) -> Callable[[_Method], _Method]:
    """Enter the decorated public function or class into the registry; it comes back unchanged.

    Args:
        row: the method's id, an S and three digits: "S093".
        title: title of the paper.
        authors: its authors, as one would cite them.
        year: the year it appeared.
        url: where it can be read, beginning with http:// or https://.
        part: which part of the paper this is, where a paper has several.

    Raises:
        PatchclampError: the row, the year or the address is not one, a text is empty, or another
            function holds this row and part already.
    """
    _check(row, title, authors, year, url, part)

    def enter(function: _Method) -> _Method:
        entry = Published(row, title, authors, year, url, part, function)
        holder = _registry.get((row, part))
        # A module that is loaded again (a notebook's reload) defines the same function anew.
        if holder is not None and holder.name != entry.name:
            raise PatchclampError(
                f"{entry.name} cannot be published as {_said(row, part)}: {holder.name} is that already. "
                "Two parts of one paper each need a part= of their own."
            )
        _registry[row, part] = entry
        return function

    return enter


def methods() -> list[Published]:
    """List what is registered, by row and then part.

    A method is registered when its module is first imported: import the rooms to be listed before.
    """
    return sorted(_registry.values(), key=lambda entry: (entry.row, entry.part or ""))


_registry: dict[tuple[str, str | None], Published] = {}


def _check(row: str, title: str, authors: str, year: int, url: str, part: str | None) -> None:
    if not re.fullmatch(r"S\d{3}", row):
        raise PatchclampError(f"{row!r} is not the row of a method: a row is an S and three digits, as 'S093'")
    for what, text in (("title", title), ("authors", authors), ("part", part)):
        if text is not None and not text.strip():
            raise PatchclampError(f"the {what} of {_said(row, part)} is empty")
    if not 1900 <= year <= 2100:
        raise PatchclampError(f"the year of {_said(row, part)} is {year}: a paper has a year of four digits")
    if not re.match(r"https?://\S+$", url):
        raise PatchclampError(f"the url of {_said(row, part)} is {url!r}: it must begin with http:// or https://")


def _said(row: str, part: str | None) -> str:
    return row if part is None else f"{row}, part {part!r}"


def _full_name(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"
