"""What `patchclamp sites` shows: a row for each kind of site of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from patchclamp.model import Model


def table_of(model: Model) -> Table:
    """The kinds of a model's sites, as a table for the terminal."""
    table = Table(title=escape(f"{model.name}: {type(model.module).__name__}"), title_justify="left")
    for heading in ("sites", "number", "neurons each", "read", "written", "baked"):
        table.add_column(heading, no_wrap=heading != "sites")
    table.add_column("why not", overflow="fold")
    for kind in model.kinds():
        sizes = ", ".join("?" if size is None else f"{size:,}" for size in kind.sizes)
        answers = ["yes" if answer else "no" for answer in (kind.read, kind.written, kind.baked)]
        table.add_row(escape(kind.name), str(kind.number), sizes, *answers, escape(kind.why_not))
    return table
