"""The race itself: that its figures are those of an oracle, of chance, and of a finder that is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest

import patchclamp as pc
from patchclamp.testbed import Bed, Method, benchmark, plant, random_finder

SMALL = Bed("small", {"architecture": "mlp", "neurons": 200, "examples": 120, "roles": ("selective",)})
MAX = (pc.Pooled("max", dtype="float32"),)


def ranked(recording: pc.Recording, labels: Any, place: Any) -> pc.Neurons:
    """A table in which `place(label, index)` is the score."""
    names = recording.labels[labels] if isinstance(labels, str) else sorted(set(labels))
    size = int(recording.sites[0].size or 0)
    columns = {f"score_{name}": [float(place(name, index)) for index in range(size)] for name in names}
    frame = pl.DataFrame({"site": ["mlp.0"] * size, "index": range(size), **columns})
    frame = frame.with_columns(pl.max_horizontal(*columns).alias("score"))
    return pc.Neurons.from_polars(frame.sort("score", descending=True))


def oracle(recording: pc.Recording, labels: Any, **_: Any) -> pc.Neurons:
    truth = {(row["label"], row["index"]) for row in _truth().iter_rows(named=True) if row["role"] == "selective"}
    return ranked(recording, labels, lambda label, index: (label, index) in truth)


def deceived(recording: pc.Recording, labels: Any, **_: Any) -> pc.Neurons:
    decoys = {(row["label"], row["index"]) for row in _truth().iter_rows(named=True) if row["decoy_of"] == "selective"}
    return ranked(recording, labels, lambda label, index: (label, index) in decoys)


def eager(recording: pc.Recording, labels: Any, null: str | None = None, **_: Any) -> pc.Neurons:
    found = oracle(recording, "language")
    return pc.Neurons.from_polars(found.to_polars().with_columns(pl.lit(0.01).alias("q"))) if null else found


def _truth() -> pl.DataFrame:
    return plant(seed=0, **SMALL.parameters).truth.to_polars()


def test_an_oracle_a_deceived_one_and_chance() -> None:
    methods = {
        "oracle": Method(oracle, MAX, null=False),
        "deceived": Method(deceived, MAX, null=False),
        "chance": Method(random_finder, MAX, null=False),
    }
    found = benchmark(methods, [SMALL], [0], progress=False).runs
    rows = {row["method"]: row for row in found.iter_rows(named=True)}
    assert (rows["oracle"]["average_precision"], rows["oracle"]["recall"], rows["oracle"]["decoys_above"]) == (1, 1, 0)
    assert rows["deceived"]["average_precision"] < 0.1
    assert rows["deceived"]["recall"] < 0.05 and rows["deceived"]["decoys_above"] == 1
    assert rows["chance"]["average_precision"] < 0.2
    assert rows["chance"]["false"] is None


def test_power_and_false_discoveries_are_counted() -> None:
    found = benchmark({"eager": Method(eager, MAX)}, [SMALL], [0], progress=False).runs.to_dicts()[0]
    assert (found["power"], found["false"]) == (1.0, 200)
    quiet = benchmark({"expertise": pc.find.label_finders()["expertise"]}, [SMALL], [0, 1], progress=False)
    assert quiet.runs["power"].to_numpy().mean() > 0.8 and quiet.runs["false"].sum() <= 2
    assert quiet.summary().to_dicts()[0]["false_alarms"] <= 0.5
    assert "1 methods, 2 runs" in repr(quiet)


def test_neurons_of_gates_are_those_of_the_mlp() -> None:
    bed = Bed("gated", {"architecture": "llama", "layers": 2, "neurons": 120, "examples": 80, "roles": ("selective",)})
    methods = {name: pc.find.label_finders()[name] for name in ("lape", "expertise")}
    found = benchmark(methods, [bed], [0], null=False, progress=False)
    assert (found.runs["average_precision"] > 0.5).all()


def test_who_cannot_answer_is_skipped_with_a_reason() -> None:
    def refuses(*_: Any, **__: Any) -> pc.Neurons:
        raise pc.errors.DataError("three categories are wanted")

    def short(recording: pc.Recording, labels: Any, **_: Any) -> pc.Neurons:
        return oracle(recording, labels)[:10]

    methods = {"refuses": Method(refuses, MAX, null=False), "short": Method(short, MAX, null=False)}
    found = benchmark(methods, [SMALL], [0], progress=False)
    assert len(found.runs) == 0
    assert "three categories" in found.skipped["why"][0] and "10 rows for 200 neurons" in found.skipped["why"][1]
    assert len(found.summary()) == 0


def test_the_same_seeds_give_the_same_race() -> None:
    methods = {name: pc.find.label_finders()[name] for name in ("sparse_probe", "contrast")}
    one, other = (benchmark(methods, [SMALL], [3], progress=False).runs.drop("seconds") for _ in range(2))
    assert one.equals(other)


def test_nothing_to_race_is_said() -> None:
    for methods, beds, seeds in (({}, [SMALL], [0]), ({"oracle": Method(oracle, MAX)}, [], [0])):
        with pytest.raises(pc.errors.DataError, match="at least one"):
            benchmark(methods, beds, seeds, progress=False)


def test_chance_is_chance() -> None:
    planted = plant("mlp", seed=0)
    recording = pc.record(planted.model, planted.data, "mlp.*", list(MAX), progress=False)
    found = [random_finder(recording, "language", seed=seed)["index"].to_numpy() for seed in (0, 0, 1)]
    assert (found[0] == found[1]).all() and (found[0] != found[2]).any()
    assert sorted(found[0]) == list(np.arange(576))
