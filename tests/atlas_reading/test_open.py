"""Opening an atlas: what is there is read as it was written; what is wrong is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from patchclamp.atlas import TABLES, Atlas
from patchclamp.errors import DamagedStore, DataError, StoreError, UnknownName
from patchclamp.neurons import Neuron
from patchclamp.storage import write_manifest


@pytest.fixture
def copy(atlas_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(atlas_folder, tmp_path / "copy"))


def test_the_neurons_are_the_table_in_its_order(atlas: Atlas, atlas_folder: Path) -> None:
    written = pl.read_parquet(atlas_folder / "neurons.parquet")
    read = atlas.neurons.to_polars()
    assert read.select(written.columns).equals(written)
    assert len(atlas) == written.height == 192


def test_a_card_holds_the_rows_of_its_neuron(atlas: Atlas, atlas_folder: Path) -> None:
    card = atlas.neuron("mlp.0:7")
    here = (pl.col("site") == "mlp.0") & (pl.col("index") == 7)
    assert card.facts == pl.read_parquet(atlas_folder / "neurons.parquet").filter(here).row(0, named=True)
    for table in ("examples", "tokens", "labels"):
        assert getattr(card, table).equals(pl.read_parquet(atlas_folder / f"{table}.parquet").filter(here)), table
    neighbors = pl.read_parquet(atlas_folder / "neighbors.parquet").filter(here)
    assert card.neighbors.equals(neighbors.sort("relation", "rank"))
    bins = pl.read_parquet(atlas_folder / "histograms.parquet").filter(here).row(0, named=True)
    assert card.histogram["low"].to_list() == bins["edges"][:-1]
    assert card.histogram["high"].to_list() == bins["edges"][1:]
    assert card.histogram["count"].to_list() == bins["counts"]
    assert card.histogram["count"].sum() == card.facts["count"]


def test_a_neuron_is_found_by_name_and_by_value(atlas: Atlas) -> None:
    assert atlas.neuron(Neuron("mlp.1", 3)).name == atlas.neuron("mlp.1:3").name == "mlp.1:3"


def test_a_silent_neuron_has_a_card_too(atlas: Atlas) -> None:
    card = atlas.neuron("mlp.1:3")
    assert card.facts["max"] == 0 and card.tokens.is_empty() and card.neighbors.is_empty()
    assert card.headline == f"Never above 0 in {card.facts['count']:,} tokens."


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("mlp.0:96", UnknownName, ("mlp.0:96", "96, from 0 to 95", "mlp.0:95")),
        ("mlp.7:1", UnknownName, ("mlp.7", "mlp.1, mlp.0")),
        ("mlp.0", DataError, ("mlp.0", "site:index")),
        ("mlp.0:-1", DataError, ("mlp.0:-1",)),
        ("../../etc/passwd", DataError, ("passwd",)),
    ],
)
def test_an_unknown_neuron_is_named_with_the_nearest(
    atlas: Atlas, name: str, error: type[Exception], says: tuple[str, ...]
) -> None:
    with pytest.raises(error) as caught:
        atlas.neuron(name)
    for words in says:
        assert words in str(caught.value)


def test_striking_neurons_come_best_first(atlas: Atlas) -> None:
    frame = atlas.neurons.to_polars().filter("striking")
    assert 0 < frame.height < len(atlas)
    assert atlas.striking["score"].to_list() == sorted(frame["score"].to_list(), reverse=True)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        Atlas.open(tmp_path / "none")
    with pytest.raises(StoreError, match="is not a patchclamp atlas"):
        Atlas.open(tmp_path)


@pytest.mark.parametrize("table", TABLES)
def test_a_changed_table_is_named(copy: Path, table: str) -> None:
    file = copy / f"{table}.parquet"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedStore, match=rf"{table}\.parquet is damaged"):
        Atlas.open(copy)


@pytest.mark.parametrize("table", TABLES)
def test_a_missing_table_is_named(copy: Path, table: str) -> None:
    (copy / f"{table}.parquet").unlink()
    with pytest.raises(DamagedStore, match=rf"{table}\.parquet is missing"):
        Atlas.open(copy)


def test_a_table_that_the_manifest_forgot_is_named(copy: Path) -> None:
    (copy / "tokens.parquet").unlink()
    _accept(copy)
    with pytest.raises(DamagedStore, match=r"manifest\.json is damaged: it does not list tokens\.parquet"):
        Atlas.open(copy)


def test_a_table_without_a_column_is_named(copy: Path) -> None:
    pl.read_parquet(copy / "tokens.parquet").drop("fired").write_parquet(copy / "tokens.parquet")
    _accept(copy)
    with pytest.raises(DamagedStore, match=r"tokens\.parquet.*'fired'"):
        Atlas.open(copy)


def test_a_table_that_is_no_parquet_is_named(copy: Path) -> None:
    (copy / "labels.parquet").write_bytes(b"PAR1 not really PAR1")
    _accept(copy)
    with pytest.raises(DamagedStore, match=r"labels\.parquet cannot be read"):
        Atlas.open(copy)


def test_a_histogram_that_does_not_add_up_is_named(copy: Path) -> None:
    histograms = pl.read_parquet(copy / "histograms.parquet")
    histograms.with_columns(pl.col("counts").list.head(2)).write_parquet(copy / "histograms.parquet")
    _accept(copy)
    with pytest.raises(DamagedStore, match=r"histograms\.parquet is damaged"):
        Atlas.open(copy).neuron("mlp.0:7")


def test_a_table_that_vanishes_later_is_named(copy: Path) -> None:
    atlas = Atlas.open(copy)
    (copy / "examples.parquet").unlink()
    with pytest.raises(DamagedStore, match=r"examples\.parquet cannot be read"):
        atlas.neuron("mlp.0:7")


def test_a_folder_may_have_an_odd_name(atlas_folder: Path, tmp_path: Path) -> None:
    odd = Path(shutil.copytree(atlas_folder, tmp_path / "it's [1] *?{a,b}"))
    atlas = Atlas.open(odd)
    assert atlas.neuron("mlp.0:7").examples.height > 0
    assert atlas.sql("select count(*) as n from neurons")["n"].to_list() == [192]


def test_figures_of_the_fixture_are_what_its_network_does(atlas: Atlas) -> None:
    """The planted neurons answer to what they were made for: the fixture is not invented rows."""
    assert atlas.neuron("mlp.0:7").facts["family"] == "return, returns"
    assert atlas.neuron("mlp.0:11").facts["top_token"] == " <script>alert(1)</script>"
    assert atlas.neuron("mlp.0:11").facts["purity"] > 0.9
    for name in ("mlp.0:7", "mlp.1:60"):
        card = atlas.neuron(name)
        values = card.examples["value"].to_numpy()
        assert np.all(np.diff(values) <= 0) and values[0] == pytest.approx(card.facts["max"])
        for row in card.examples.iter_rows(named=True):
            assert row["values"][row["position"] - row["start"]] == pytest.approx(row["value"])


def _accept(folder: Path) -> None:
    """Write the manifest anew, so that the checksums are those of the files as they are."""
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").unlink()
    known = ("format", "format_version", "files", "created", "patchclamp")
    write_manifest(folder, "atlas", {key: value for key, value in content.items() if key not in known})
