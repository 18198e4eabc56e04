"""Do finders find what was planted? Each on the role that it is published for, at the default difficulty."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace

import polars as pl
import pytest

from patchclamp.cli.benchmark import contenders
from patchclamp.testbed import BEDS, EASY_BEDS, Bed, benchmark

# `make test-all` runs five seeds of every bed, with nulls.
pytestmark = pytest.mark.timeout(1200)
LONG = bool(os.environ.get("PATCHCLAMP_TEST_ALL"))
SEEDS = range(5) if LONG else range(1)
# Where each finder is at home. Those that choose few of many neurons that say the same (L1, adaptive, exact, hinge) are
# not asked for all of them; `lape_ternary` and `coverage` rank by more than selectivity: docs/leaderboard.md has them.
OWN = [
    ("lape", "gpt2", "selective"),
    ("lape", "llama", "selective"),
    ("domains", "gpt2", "selective"),
    ("expertise", "gpt2", "relation"),
    ("expertise", "llama", "relation"),
    ("activation_profiles", "gpt2", "selective"),
    ("activation_profiles", "mlp", "selective"),
    ("sparse_probe", "gpt2", "selective"),
    ("sparse_probe, f", "gpt2", "relation"),
    ("sparse_probe, mutual_information", "gpt2", "relation"),
    ("probe_neurons", "gpt2", "safety"),
]


def race(methods: Iterable[str], beds: Sequence[Bed], null: bool, role: str) -> pl.DataFrame:
    known = {name: contenders()[name] for name in methods}
    known |= {name: replace(contenders()[name], null=False) for name in BASELINES}
    found = benchmark(known, beds, SEEDS, roles=[role], permutations=39, null=null, progress=False)
    print(found.summary())
    return found.summary()


@pytest.fixture(scope="module")
def default() -> pl.DataFrame:
    asked = sorted({(bed, role) for _, bed, role in OWN})
    parts = []
    for name, role in asked:
        methods = [method for method, bed, of in OWN if (bed, of) == (name, role)]
        beds = [bed for bed in BEDS if bed.name == name]
        parts.append(race(methods, beds, LONG, role))
    return pl.concat(parts, how="vertical_relaxed")


BASELINES = ("contrast", "chance")


@pytest.mark.parametrize(("method", "bed", "role"), OWN)
def test_what_was_planted_comes_first(method: str, bed: str, role: str, default: pl.DataFrame) -> None:
    row = default.row(
        by_predicate=(pl.col("method") == method) & (pl.col("bed") == bed) & (pl.col("role") == role), named=True
    )
    assert row["average_precision"] >= 0.95
    assert row["decoys_above"] < 0.05
    if LONG:
        assert row["power"] >= 0.8
        assert row["false_alarms"] <= 0.4


def test_plain_baselines_fail(default: pl.DataFrame) -> None:
    here = default.filter(pl.col("method").is_in(BASELINES))
    assert set(here["bed"]) == {bed.name for bed in BEDS}
    assert (here.filter(pl.col("method") == "contrast")["average_precision"] < 0.8).all()
    assert (here.filter(pl.col("method") == "chance")["average_precision"] < 0.1).all()


@pytest.mark.slow
def test_a_difference_of_means_finds_what_is_easy() -> None:
    found = race([], EASY_BEDS, False, "selective").filter(pl.col("method") == "contrast")
    assert len(found) == len(EASY_BEDS)
    assert (found["average_precision"] >= 0.95).all()
