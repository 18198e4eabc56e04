"""SQL over the tables of an atlas, by DuckDB, with every door to other files shut."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import polars as pl

from patchclamp.errors import DamagedStore, DataError


def ask(files: Mapping[str, Path], query: str) -> pl.DataFrame:
    """Run one SELECT over Parquet files that the query knows by the names of `files`.

    DuckDB itself opens no file at all: each table is handed to it as an Arrow data set, which can be
    read and never written, and its own access to files, extensions and settings is switched off for
    good before the query is seen. (Its `allowed_paths` would not do: what they allow to read they
    allow to overwrite.) A new connection serves each query, so no query sees what another left.

    Raises:
        DataError: the query is not one SELECT, or DuckDB refuses it.
        DamagedStore: a table cannot be read.
    """
    import duckdb
    import pyarrow
    import pyarrow.dataset

    connection = duckdb.connect(":memory:")
    try:
        for name, file in files.items():
            try:
                connection.register(name, pyarrow.dataset.dataset(str(file), format="parquet"))
            except (OSError, pyarrow.ArrowException) as error:
                raise DamagedStore(f"{file} cannot be read: {error}") from error
        connection.execute("SET temp_directory = ''")
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        _check_is_one_select(connection, query)
        relation = connection.sql(query)
        if relation is None:
            raise DataError("the query gives no rows: an atlas answers one SELECT")
        return _with_whole_sums(relation.pl())
    except (duckdb.Error, pyarrow.ArrowException) as error:
        raise DataError(f"DuckDB refuses the query: {error}") from error
    finally:
        connection.close()


def _with_whole_sums(frame: pl.DataFrame) -> pl.DataFrame:
    """DuckDB adds whole numbers into ones of 128 bits, which arrive as decimals; most fit into 64."""
    for name, dtype in frame.schema.items():
        if isinstance(dtype, pl.Decimal) and dtype.scale == 0:
            with contextlib.suppress(pl.exceptions.PolarsError):
                frame = frame.with_columns(pl.col(name).cast(pl.Int64))
    return frame


def _check_is_one_select(connection, query: str) -> None:
    """Refuse what would be lost with the connection, so that nobody believes an UPDATE was kept."""
    import duckdb

    kinds = duckdb.StatementType
    statements = connection.extract_statements(query)
    if len(statements) != 1:
        raise DataError(f"an atlas answers one SELECT at a time; here are {len(statements)} statements")
    # A PIVOT counts as MULTI: DuckDB rewrites it into several statements of its own.
    if statements[0].type not in (kinds.SELECT, kinds.EXPLAIN, kinds.MULTI):
        raise DataError(f"an atlas is read-only: it answers one SELECT, not {statements[0].type.name}")
