"""What `patchclamp methods` shows: every published method that is built."""

from __future__ import annotations

import importlib

from rich.markup import escape
from rich.table import Table

from patchclamp.published import Published, methods

ROOMS = ("decompose", "edit", "find", "steer", "train", "verify")


def built() -> list[Published]:
    """All of them, by row: the rooms that hold methods are imported for it."""
    for room in ROOMS:
        importlib.import_module(f"patchclamp.{room}")
    return methods()


def table_of() -> Table:
    """The registry as a table for the terminal."""
    table = Table(title="Published methods", title_justify="left")
    for heading in ("row", "method"):
        table.add_column(heading, no_wrap=True)
    table.add_column("what it does", overflow="fold")
    table.add_column("paper", overflow="fold")
    for each in built():
        paper = f"{each.authors}, {each.year}: {each.title}" + (f" ({each.part})" if each.part else "")
        table.add_row(each.row, escape(public_name(each)), escape(each.summary), escape(paper))
    return table


def public_name(method: Published) -> str:
    """As it is called: `pc.find.lape`."""
    room, name = method.name.split(".")[1], method.name.rsplit(".", 1)[-1]
    return f"pc.{room}.{name}"
