"""`Neurons`: choosing, combining, drawing controls, saving; and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import patchclamp as pc
from patchclamp.errors import DataError, StoreError, UnknownName
from patchclamp.neurons import Neuron

NAN = float("nan")


def table(**columns: Any) -> pc.Neurons:
    """Neurons `a:0`, `a:1`, ... with columns."""
    length = len(next(iter(columns.values())))
    return pc.Neurons.from_polars(pl.DataFrame({"site": ["a"] * length, "index": range(length), **columns}))


def indices(neurons: pc.Neurons) -> list[int]:
    return [neuron.index for neuron in neurons]


# Making and reading ---------------------------------------------------------------------------------


def test_the_ways_to_name_neurons() -> None:
    neurons = pc.Neurons({"mlp.3": [417, 9], "mlp.4": [0]})
    assert neurons.names == ["mlp.3:417", "mlp.3:9", "mlp.4:0"]
    assert len(neurons) == 3 and next(iter(neurons)) == Neuron("mlp.3", 417) == ("mlp.3", 417)
    assert neurons.sites == ["mlp.3", "mlp.4"] and neurons.columns == ["site", "index"]
    assert pc.Neurons(["mlp.3:417", "mlp.3:9", "mlp.4:0"]) == neurons
    assert pc.Neurons([("mlp.3", 417), Neuron("mlp.3", 9), "mlp.4:0"]) == neurons
    assert pc.Neurons(neurons) == neurons and pc.Neurons(neuron for neuron in neurons) == neurons
    assert pc.Neurons({"mlp.3": np.array([417, 9]), "mlp.4": 0}) == neurons
    assert pc.Neurons({"mlp.3": np.int64(3), "mlp.4": range(2)}).names == ["mlp.3:3", "mlp.4:0", "mlp.4:1"]
    assert pc.Neurons("mlp.3:417").names == ["mlp.3:417"]
    assert pc.Neurons({"mlp.3": np.array(5)}).names == ["mlp.3:5"]
    assert len(pc.Neurons()) == 0 and pc.Neurons().sites == []


def test_a_site_may_hold_colons_and_dots() -> None:
    neurons = pc.Neurons(["module:a.b.c:7", "decoder.cross_attn.3:1"])
    assert list(neurons) == [("module:a.b.c", 7), ("decoder.cross_attn.3", 1)]
    assert str(Neuron("module:a.b.c", 7)) == "module:a.b.c:7"


@pytest.mark.parametrize("wrong", ["mlp.3", "mlp.3:", ":4", "mlp.3:-1", "mlp.3:1.5", "mlp.3:²", ""])
def test_what_is_no_name(wrong: str) -> None:
    with pytest.raises(DataError, match=r"does not name a neuron: write site:index, as in mlp\.3:417"):
        pc.Neurons([wrong])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"a": [1.0]}, r"1\.0 is not the index of a neuron at a: indices are whole numbers"),
        ({"a": 3.5}, r"3\.5 is not the index of a neuron at a"),
        ({"a": [True]}, "True is not the index of a neuron at a"),
        ({"a": np.array([True, False])}, "True_ is not the index of a neuron at a"),
        ({"a": None}, "None is not the index of a neuron at a"),
        ({"a": "12"}, "'1' is not the index of a neuron at a"),
        ([("a", 1.7)], r"1\.7 is not the index of a neuron at a"),
        ({"a": [-1]}, "a:-1 is not a neuron: indices are whole numbers from 0 on"),
        ({"a": [3, 3]}, "a:3 is named twice; each neuron has one row"),
        (["a:3", ("a", 3)], "a:3 is named twice"),
        ([5], "5 does not name a neuron"),
        ([("a", 1, 2)], r"\('a', 1, 2\) does not name a neuron"),
        (5, "neurons are given as .*, not as 5"),
    ],
)
def test_what_is_no_table_of_neurons(wrong: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        pc.Neurons(wrong)


def test_from_polars_checks_and_puts_the_key_first() -> None:
    frame = pl.DataFrame({"score": [0.5, 0.1], "index": [2, 1], "site": ["a", "b"]})
    neurons = pc.Neurons.from_polars(frame)
    assert neurons.columns == ["site", "index", "score"] and neurons.names == ["a:2", "b:1"]
    assert neurons.to_polars().schema["index"] == pl.Int64
    for wrong, message in (
        (frame.drop("site"), "columns 'site' and 'index'; this one has"),
        (frame.with_columns(index=pl.lit(0.5)), "'index' holds whole numbers, not Float64"),
        (frame.with_columns(index=pl.lit(None, pl.Int64)), "is not a neuron"),
        (frame.with_columns(site=pl.lit(None, pl.String)), "is not a neuron"),
        (frame.with_columns(site=pl.lit("a"), index=pl.lit(1)), "a:1 is named twice"),
    ):
        with pytest.raises(DataError, match=message):
            pc.Neurons.from_polars(wrong)


def test_reading_columns_slices_and_membership() -> None:
    neurons = table(score=[0.1, 0.9, 0.5])
    assert neurons["score"].to_list() == [0.1, 0.9, 0.5] and indices(neurons[1:]) == [1, 2]
    assert isinstance(neurons[:0], pc.Neurons) and "a:1" in neurons and ("a", 2) in neurons
    assert "a:3" not in neurons and ("b", 1) not in neurons and 7 not in neurons
    with pytest.raises(UnknownName, match=r"no column is called 'scores'\. The nearest: score"):
        neurons["scores"]
    assert neurons.indices("a").dtype == np.int64 and neurons.indices("a").tolist() == [0, 1, 2]
    assert neurons.indices("b").tolist() == []
    assert repr(pc.Neurons({"a": range(9)})) == "Neurons(9: a:0, a:1, a:2, a:3, a:4, a:5, ...)"
    assert "score" in neurons._repr_html_()
    with pytest.raises(TypeError):
        hash(neurons)


def test_equal_means_the_same_rows_in_the_same_order() -> None:
    neurons = table(score=[0.1, NAN])
    assert neurons == table(score=[0.1, NAN]) and neurons != table(score=[0.1, 0.2])
    assert pc.Neurons(["a:0", "a:1"]) != pc.Neurons(["a:1", "a:0"]) and neurons != ["a:0", "a:1"]


def test_frames_that_leave_do_not_change_the_table() -> None:
    neurons = table(score=[0.1, 0.9])
    frame = neurons.to_polars()
    frame[0, "score"] = 7.0
    pandas = neurons.to_pandas()
    pandas.loc[0, "score"] = 7.0
    assert neurons["score"].to_list() == [0.1, 0.9] and list(pandas.columns) == ["site", "index", "score"]


# Choosing -------------------------------------------------------------------------------------------


def test_top_by_number_and_fraction() -> None:
    neurons = table(score=[0.1, 0.9, 0.5, 0.7], rank=[4, 3, 2, 1])
    assert indices(neurons.top(2)) == [1, 3]
    assert indices(neurons.top(0.5)) == [1, 3] and indices(neurons.top(0.26)) == [1, 3]
    assert indices(neurons.top(1.0)) == [1, 3, 2, 0] and indices(neurons.top(1)) == [1]
    assert indices(neurons.top(2, by="rank")) == [0, 1] and indices(neurons.top(2, by="index")) == [3, 2]
    assert indices(neurons.top(99)) == [1, 3, 2, 0] and indices(neurons.top(0)) == []
    assert indices(neurons.top(np.int64(2))) == [1, 3]  # type: ignore[arg-type]
    assert indices(neurons) == [0, 1, 2, 3]
    assert indices(pc.Neurons({"a": [5, 2, 9]}).top(2)) == [5, 2]  # without a score: the order of the table


def test_a_fraction_is_not_one_more_by_rounding() -> None:
    hundred = pc.Neurons({"a": range(100)})
    assert [len(hundred.top(percent / 100)) for percent in range(1, 101)] == list(range(1, 101))
    assert len(pc.Neurons({"a": range(3)}).top(0.01)) == 1


def test_ties_keep_their_order_and_missing_scores_come_last() -> None:
    neurons = table(score=[NAN, 0.5, None, 0.5, float("-inf"), 0.7, NAN])
    assert indices(neurons.top(7)) == [5, 1, 3, 4, 0, 2, 6]
    assert indices(neurons.top(2)) == [5, 1] and indices(neurons.top(3)) == [5, 1, 3]
    assert indices(table(score=[NAN, NAN]).top(1)) == [0]


@pytest.mark.parametrize("wrong", [0.0, -0.5, 1.5, 10.0, NAN, float("inf"), -1, "3", None, True])
def test_top_of_what(wrong: Any) -> None:
    with pytest.raises(DataError):
        table(score=[0.1, 0.2]).top(wrong)
    with pytest.raises(UnknownName, match=r"no column is called 'scor'\. The nearest: score"):
        table(score=[0.1]).top(1, by="scor")


def test_a_number_written_as_a_float_is_explained() -> None:
    with pytest.raises(DataError, match=r"10\.0 does not\. For a number of neurons write 10"):
        table(score=[0.1]).top(10.0)


def test_where_and_at() -> None:
    neurons = pc.Neurons.from_polars(
        pl.DataFrame({"site": ["b", "a", "b"], "index": [1, 2, 0], "score": [0.5, 0.9, NAN]})
    )
    assert neurons.where(pl.col("score") > 0.6).names == ["a:2", "b:0"]  # polars: NaN is larger than any number
    assert neurons.where(pl.col("score").is_between(0.4, 0.6)).names == ["b:1"]
    assert neurons.where((pl.col("site") == "b") & (pl.col("index") > 0)).names == ["b:1"]
    assert neurons.at("b").names == ["b:1", "b:0"] and len(neurons.at("c")) == 0
    assert neurons.at("b")["score"].to_list()[0] == 0.5
    with pytest.raises(UnknownName, match=r"no column is called 'scores'\. The nearest: score"):
        neurons.where(pl.col("scores") > 0)
    for wrong in ("score > 1", 3, pl.col("score"), pl.col("index") == "a"):
        with pytest.raises(DataError, match=r"where\(\) takes a condition such as pl\.col\('score'\) > 0\.5"):
            neurons.where(wrong)  # type: ignore[arg-type]


# Combining ------------------------------------------------------------------------------------------


def test_or_and_minus() -> None:
    left = pc.Neurons.from_polars(pl.DataFrame({"site": ["a", "b"], "index": [1, 1], "score": [0.1, 0.2]}))
    right = pc.Neurons.from_polars(pl.DataFrame({"site": ["b", "b"], "index": [1, 2], "score": [9, 8], "p": [1, 0]}))
    both = left | right
    assert both.names == ["a:1", "b:1", "b:2"] and both["score"].to_list() == [0.1, 0.2, 8.0]
    assert both["p"].to_list() == [None, None, 0]
    assert (left & right).names == ["b:1"] and (left & right)["score"].to_list() == [0.2]
    assert (right & left)["score"].to_list() == [9] and (left - right).names == ["a:1"]
    assert (right - left).names == ["b:2"] and len(left - left) == 0
    assert (left | pc.Neurons()) == left and (pc.Neurons() | left) == left
    assert (left & pc.Neurons()).names == [] and (left - pc.Neurons()) == left
    assert left.names == ["a:1", "b:1"] and right.names == ["b:1", "b:2"]


def test_the_left_table_gives_the_order() -> None:
    left, right = pc.Neurons({"a": [9, 2, 5, 7]}), pc.Neurons({"a": [7, 5, 1, 9]})
    assert indices(left & right) == [9, 5, 7] and indices(right & left) == [7, 5, 9]
    assert indices(left - pc.Neurons({"a": [2]})) == [9, 5, 7] and indices(left | right) == [9, 2, 5, 7, 1]


def test_only_tables_combine() -> None:
    neurons: Any = pc.Neurons(["a:1"])
    for wrong in (["a:1"], "a:1", None, {"a": [1]}):
        for act in (lambda x: neurons | x, lambda x: neurons & x, lambda x: neurons - x):
            with pytest.raises(TypeError, match="unsupported operand"):
                act(wrong)


# Drawing --------------------------------------------------------------------------------------------


def test_the_same_seed_draws_the_same_neurons() -> None:
    neurons = pc.Neurons({"a": range(50), "b": range(50)})
    drawn = neurons.sample(10, seed=3)
    assert drawn == neurons.sample(10, seed=3) and drawn != neurons.sample(10, seed=4)
    assert len(set(drawn.names)) == 10 and all(name in neurons for name in drawn.names)
    assert sorted(neurons.sample(100).names) == sorted(neurons.names) and len(neurons.sample(0)) == 0


def test_each_neuron_is_drawn_equally_often() -> None:
    neurons = pc.Neurons({"a": range(10)})
    counts = np.zeros(10)
    for seed in range(400):
        counts[indices(neurons.sample(3, seed=seed))] += 1
    assert counts.sum() == 1200 and abs(counts - 120).max() < 40  # four standard deviations


def test_a_control_is_disjoint_and_spread_over_the_sites_alike() -> None:
    pool = pc.Neurons({"a": range(40), "b": range(40), "c": range(40)})
    found = pc.Neurons({"b": [1, 2, 3], "a": [0], "d": []})
    control = pool.sample(seed=1, like=found)
    assert len(control) == 4 and len(control & found) == 0
    assert {site: len(control.at(site)) for site in control.sites} == {"b": 3, "a": 1}
    larger = pool.sample(20, seed=1, like=found)
    assert (len(larger.at("b")), len(larger.at("a"))) == (15, 5) and len(larger & found) == 0
    assert pool.sample(seed=1, like=found) == control != pool.sample(seed=2, like=found)
    assert len(pool.sample(seed=1, like=pc.Neurons())) == 0


@pytest.mark.parametrize("n", range(0, 23))
def test_uneven_shares_differ_by_less_than_one(n: int) -> None:
    pool = pc.Neurons({site: range(60) for site in "abc"})
    found = pc.Neurons({"a": range(3), "b": range(7), "c": range(2)})
    control = pool.sample(n, like=found)
    assert len(control) == n
    for site, count in (("a", 3), ("b", 7), ("c", 2)):
        assert abs(len(control.at(site)) - n * count / 12) < 1


def test_too_few_to_draw_from_names_the_site() -> None:
    pool = pc.Neurons({"a": range(5), "b": range(3)})
    with pytest.raises(DataError, match="cannot draw 2 neurons: site b, less those in like, has 1"):
        pool.sample(like=pc.Neurons({"b": [0, 1]}))
    with pytest.raises(DataError, match="cannot draw 1 neurons: site z, less those in like, has 0"):
        pool.sample(like=pc.Neurons({"z": [0]}))
    with pytest.raises(DataError, match="cannot draw 9 neurons: the table has 8"):
        pool.sample(9)
    with pytest.raises(DataError, match=r"sample\(\) needs a number of neurons, or like="):
        pool.sample()
    with pytest.raises(DataError, match="like= holds no neurons to match"):
        pool.sample(3, like=pc.Neurons())
    for wrong in (-1, 0.5, "3", True):
        with pytest.raises(DataError):
            pool.sample(wrong)  # type: ignore[arg-type]
        with pytest.raises(DataError):
            pool.sample(wrong, like=pc.Neurons({"a": [0]}))  # type: ignore[arg-type]


# Saving ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_saved_and_loaded_it_is_the_same(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"found{suffix}"
    neurons = pc.Neurons.from_polars(
        pl.DataFrame(
            {
                "site": ["mlp.3", "module:a,b", "7"],
                "index": [417, 9, 0],
                "score": [0.1 + 0.2, NAN, None],
                "word": ['"re, turn"\n', "α", "x"],
                "n": [1, 2, 3],
            }
        )
    )
    neurons.save(file)
    assert pc.Neurons.load(file) == neurons and [each.name for each in tmp_path.iterdir()] == [file.name]
    neurons.top(1).save(str(file))
    assert pc.Neurons.load(str(file)).names == ["mlp.3:417"]
    pc.Neurons().save(file)
    assert pc.Neurons.load(file) == pc.Neurons()


def test_a_csv_keeps_the_type_of_a_column_that_begins_empty(tmp_path: Path) -> None:
    neurons = table(score=[None] * 300 + [0.5] * 10)
    neurons.save(tmp_path / "found.csv")
    assert pc.Neurons.load(tmp_path / "found.csv") == neurons


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    neurons = pc.Neurons(["a:1"])
    with pytest.raises(StoreError, match=r"is a \.parquet or \.csv file, not 'found\.txt'"):
        neurons.save(tmp_path / "found.txt")
    with pytest.raises(StoreError, match=r"cannot write .*found\.csv: No such file or directory"):
        neurons.save(tmp_path / "nowhere" / "found.csv")
    lists = table(words=[["a", "b"]])
    with pytest.raises(StoreError, match=r"cannot write .*found\.csv: CSV format does not support nested data"):
        lists.save(tmp_path / "found.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(StoreError, match=r"cannot write .*folder\.csv"):
        neurons.save(tmp_path / "folder.csv")
    assert [each.name for each in tmp_path.iterdir()] == ["folder.csv"]


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"there is no file .*found\.csv"):
        pc.Neurons.load(tmp_path / "found.csv")
    with pytest.raises(StoreError, match="there is no file"):
        pc.Neurons.load(tmp_path)
    (tmp_path / "found.txt").write_text("site,index\na,1\n")
    with pytest.raises(StoreError, match=r"a \.parquet or \.csv file, not 'found\.txt'"):
        pc.Neurons.load(tmp_path / "found.txt")
    for name, content in (
        ("junk.parquet", b"junk"),
        ("empty.csv", b""),
        ("columns.csv", b"layer,unit\n1,2\n"),
        ("twice.csv", b"site,index\na,1\na,1\n"),
        ("words.csv", b"site,index\na,one\n"),
        ("ragged.csv", b"site,index\na,1,2,3\n"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(StoreError, match=rf"{name} is not a table of neurons: "):
            pc.Neurons.load(tmp_path / name)


def test_it_needs_no_torch() -> None:
    code = "import sys, patchclamp; patchclamp.Neurons(['a:1']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
