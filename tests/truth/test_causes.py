"""Finders of causes rank planted causes above decoys that fire where these fire; finders of correlates do not."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest

FILE = Path(__file__).resolve().parents[2] / "docs" / "cause_findings" / "race.py"


@pytest.fixture(scope="module")
def race() -> Any:
    spec = importlib.util.spec_from_file_location("cause_race", FILE)
    assert spec is not None and spec.loader is not None
    module = sys.modules["cause_race"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def summarised(result: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {(row["decoys"], row["finder"]): row["above"] for row in result["summary"].iter_rows(named=True)}


def test_only_finders_of_causes_tell_a_decoy_that_reads_what_the_cause_reads(race: Any) -> None:
    result = race.measure([0], count=1, layers=2, neurons=160, examples=120)
    above = summarised(result)
    for name in race.CAUSAL:
        assert above["as planted", name] == above["reading the same", name] == 0
    for name in race.CORRELATIONAL:
        assert above["reading the same", name] > 0.3
    # Decoys as they are planted fire less reliably: how well a neuron detects the task tells them.
    assert above["as planted", "expertise"] == 0
    frame = result["rows"]
    assert set(frame["role"]) == set(race.ROLES) and frame["pairs"].min() >= 2


@pytest.mark.slow
def test_three_seeds(race: Any) -> None:
    frame = race.measure((0, 1, 2))["rows"]
    errors = frame.filter(pl.col("causal"))["above"]
    assert errors.mean() < 0.05
    others = frame.filter(~pl.col("causal") & (pl.col("decoys") == "reading the same"))
    assert (others.group_by("finder").agg(pl.col("above").mean())["above"] > 0.4).all()
