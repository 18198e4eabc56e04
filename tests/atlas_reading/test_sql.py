"""`Atlas.sql`: answers equal polars; no other file can be read, and none can be written."""

from __future__ import annotations

import hashlib
from pathlib import Path

import polars as pl
import pytest

from patchclamp.atlas import TABLES, Atlas
from patchclamp.errors import DamagedStore, DataError


def test_the_six_tables_are_the_files(atlas: Atlas, atlas_folder: Path) -> None:
    for table in TABLES:
        written = pl.read_parquet(atlas_folder / f"{table}.parquet")
        assert atlas.sql(f"select * from {table}").equals(written), table


def test_an_answer_equals_that_of_polars(atlas: Atlas) -> None:
    found = atlas.sql("""
        select n.site, count(*) as n, sum(t.fired) as fired from neurons n join tokens t using (site, index)
        where n.striking group by all order by all
    """)
    joined = atlas.table("neurons").filter("striking").join(atlas.table("tokens"), on=["site", "index"])
    wanted = joined.group_by("site").agg(n=pl.len().cast(pl.Int64), fired=pl.col("fired").sum()).sort("site").collect()
    assert found.equals(wanted)


def test_other_forms_of_a_question(atlas: Atlas) -> None:
    assert atlas.sql("from neurons limit 3").height == 3
    assert atlas.sql("with a as (select 1 as x) select * from a")["x"].to_list() == [1]
    assert "threshold" in atlas.sql("describe neurons")["column_name"].to_list()
    assert atlas.sql("pivot neurons on striking using count(*) group by site").height == 2


@pytest.mark.parametrize(
    "query",
    [
        "select * from read_csv('/etc/passwd')",
        "select * from '/etc/passwd'",
        "select * from read_text('/etc/hostname')",
        "select * from read_blob('/etc/hostname')",
        "select * from glob('/etc/*')",
        "select * from read_parquet('{folder}/neurons.parquet')",
        "select * from read_json('{folder}/manifest.json')",
        "select * from query('copy neurons to ''{folder}/q.csv''')",
        "copy neurons to '{folder}/out.csv'",
        "copy (select 1) to '{folder}/neurons.parquet' (format parquet, use_tmp_file false)",
        "explain analyze copy (select 1) to '{folder}/neurons.parquet' (format parquet, use_tmp_file false)",
        "export database '{folder}/exported'",
        "attach '{folder}/x.db'",
        "install httpfs",
        "load httpfs",
        "set enable_external_access = true",
        "reset enable_external_access",
        "set lock_configuration = false",
        "select 1; select * from read_csv('/etc/passwd')",
        "select getenv('HOME')",
        "create table kept as select 1",
        "drop view neurons",
        "insert into neurons select * from neurons",
        "update neurons set score = 1",
        "delete from neurons",
        "pragma database_list",
        "select * from local_variable_of_this_test",
        "select * from no_such_table",
        "select * frm neurons",
        "",
    ],
)
def test_refused(atlas: Atlas, atlas_folder: Path, query: str) -> None:
    local_variable_of_this_test = pl.DataFrame({"secret": [1]})  # noqa: F841 DuckDB would find it by its name
    before = _state(atlas_folder)
    with pytest.raises(DataError):
        atlas.sql(query.format(folder=atlas_folder))
    assert _state(atlas_folder) == before
    assert atlas.sql("select count(*) as n from neurons")["n"].to_list() == [192]


def test_doors_are_shut_even_if_the_check_of_the_statement_were_passed(
    atlas: Atlas, atlas_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two locks: the kind of statement, and DuckDB's own. Here the first is taken away."""
    monkeypatch.setattr("patchclamp.atlas.sql._check_is_one_select", lambda connection, query: None)
    before = _state(atlas_folder)
    for query in (
        f"copy (select 1) to '{atlas_folder}/neurons.parquet' (format parquet, use_tmp_file false)",
        f"attach '{atlas_folder}/x.db'",
        "set enable_external_access = true",
        "install httpfs",
        "select * from read_csv('/etc/passwd')",
    ):
        with pytest.raises(DataError):
            atlas.sql(query)
    assert _state(atlas_folder) == before


def test_a_refusal_says_why(atlas: Atlas) -> None:
    with pytest.raises(DataError, match=r"read-only.*COPY"):
        atlas.sql("copy neurons to 'x.csv'")
    with pytest.raises(DataError, match="2 statements"):
        atlas.sql("select 1; select 2")
    with pytest.raises(DataError, match=r"scor.*\n.*score"):
        atlas.sql("select scor from neurons")


def test_a_vanished_table_is_named(atlas_folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(atlas_folder, tmp_path / "copy"))
    atlas = Atlas.open(copy)
    (copy / "labels.parquet").unlink()
    with pytest.raises(DamagedStore, match=r"labels\.parquet"):
        atlas.sql("select * from labels")


def _state(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
