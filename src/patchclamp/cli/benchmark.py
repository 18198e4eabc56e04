"""What `patchclamp benchmark` does: a race of the library's finders, and its tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import polars as pl
from rich.markup import escape
from rich.table import Table

from patchclamp.errors import DataError, unknown
from patchclamp.find import label_finders
from patchclamp.recording import Pooled
from patchclamp.testbed import BEDS, Bed, Method, Race, benchmark, random_finder


def contenders() -> dict[str, Method]:
    """All finders for a label, and chance."""
    return {**label_finders(), "chance": Method(random_finder, (Pooled("max", dtype="float32"),), null=False)}


def race(
    beds: Sequence[str], methods: Sequence[str], difficulty: float, seeds: Sequence[int], permutations: int, null: bool
) -> Race:
    """Race methods by name on beds by name; none named means all.

    Raises:
        UnknownName: no such bed or method.
        DataError: a difficulty that is none.
    """
    known = {each.name: each for each in BEDS}
    finders = contenders()
    for what, given, there in (("bed", beds, known), ("method", methods, finders)):
        for each in given:
            if each not in there:
                raise unknown(what, each, there)
    made = [Bed(each, {**known[each].parameters, "difficulty": difficulty}) for each in beds or known]
    chosen = {each: finders[each] for each in methods or finders}
    return benchmark(chosen, made, seeds, permutations=permutations, null=null)


def tables_of(found: Race) -> Iterator[Table]:
    """One table for each bed and question, the best method first."""
    for (bed, role), rows in found.summary().group_by("bed", "role", maintain_order=True):
        table = Table(title=escape(f"{bed}: neurons planted as {role}"), title_justify="left")
        table.add_column("method", no_wrap=True)
        for heading in COLUMNS.values():
            table.add_column(heading, justify="right")
        for row in rows.iter_rows(named=True):
            table.add_row(escape(row["method"]), *(said(row, name) for name in COLUMNS))
        yield table


COLUMNS = {
    "average_precision": "average precision",
    "lowest": "lowest",
    "recall": "recall",
    "decoys_above": "decoys above",
    "power": "power",
    "false_alarms": "false alarms",
    "seconds": "seconds",
}


def said(row: dict, name: str) -> str:
    """One figure of a summary, as it is printed."""
    value = row[name]
    if value is None:
        return "-"
    return f"{value:.3f}" if name in ("average_precision", "lowest", "seconds") else f"{value:.2f}"


def writable(path: str) -> Path:
    """Where runs are to be written, looked at before the race is run.

    Raises:
        DataError: neither .csv nor .parquet, or a folder that is not there.
    """
    file = Path(path)
    if file.suffix not in (".csv", ".parquet"):
        raise DataError(f"the runs are written to a .csv or .parquet file, not to {path}")
    if not file.parent.is_dir():
        raise DataError(f"{path} cannot be written: there is no folder {file.parent}")
    return file


def write(found: Race, file: Path) -> None:
    """All runs into a file.

    Raises:
        DataError: it cannot be written.
    """
    frame: pl.DataFrame = found.runs
    try:
        frame.write_csv(file) if file.suffix == ".csv" else frame.write_parquet(file)
    except OSError as error:
        raise DataError(f"{file} cannot be written: {error}") from error
