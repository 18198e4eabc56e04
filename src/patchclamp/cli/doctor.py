"""`patchclamp doctor`: what was found in a store, in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from patchclamp.storage.doctor import examine

_MOST = 50


def show(folder: str) -> bool:
    """Print what was found; gives whether the store is whole."""
    found = examine(folder)
    console = Console()
    kind = found.kind or "store"
    if not found.damaged:
        console.print(f"{escape(str(found.path))}: the {kind} is whole, all {found.files:,} files are what was written")
    else:
        many = f"{len(found.damaged):,} of {found.files:,} files" if found.files else "its manifest"
        console.print(f"{escape(str(found.path))}: the {kind} is damaged: {many}")
        table = Table("file", "what", "what is lost")
        for each in found.damaged[:_MOST]:
            table.add_row(escape(each.file), escape(each.what), escape(each.lost))
        console.print(table)
        if len(found.damaged) > _MOST:
            console.print(f"and {len(found.damaged) - _MOST:,} more")
        if found.whole:
            console.print("What can still be read: " + escape(", ".join(found.whole)))
    for name in found.strangers[:_MOST]:
        console.print(f"{escape(name)} is no part of it: no manifest lists this file")
    if found.unfinished is not None:
        console.print(f"{escape(str(found.unfinished))} holds a recording that did not end: record again to go on")
    return not found.damaged
