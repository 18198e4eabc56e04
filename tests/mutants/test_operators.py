"""Each operator changes what it says, at one place, and nothing else."""

from __future__ import annotations

import pytest
from tests.mutants.operators import (
    OPERATORS,
    GateUpSwapped,
    LabelShift,
    LayerPlusOne,
    LogBase,
    MeanForSum,
    Operator,
    PaddingCounted,
    PositionOffByOne,
    Sign,
    WeightsSwapped,
    WrongAxis,
    mutated,
    places,
)


def made(operator: type[Operator], source: str) -> list[str]:
    return [mutated(operator, source, place) for place in range(len(places(operator, source)))]


@pytest.mark.parametrize(
    ("operator", "source", "mutants"),
    [
        (Sign, "a + b", ["a - b"]),
        (Sign, "x -= b", ["x += b"]),
        (Sign, "-a * -1", ["a * -1"]),
        (Sign, "a[b > 0].argmax(1)", ["a[b > 0].argmin(1)", "a[b < 0].argmax(1)"]),
        (Sign, "[1] + b", []),
        (LabelShift, "which[given.codes, 1]", ["which[np.roll(given.codes, 1), 1]"]),
        (LabelShift, "len(codes) if given.codes is None else codes.size", []),
        (LabelShift, "found[:, of.scored]", ["found[:, of.scored[-1:] + of.scored[:-1]]"]),
        (PositionOffByOne, "x[:-1]", ["x[:0]"]),
        (PositionOffByOne, "x[k:]", ["x[k + 1:]"]),
        (PositionOffByOne, "x[0] + x.shape[0]", ["x[1] + x.shape[0]"]),
        (PositionOffByOne, "np.arange(n)", ["np.arange(1, n + 1)"]),
        (PositionOffByOne, "[f() for _ in range(n)]", []),
        (PaddingCounted, "x[~np.isnan(x)]", ["x[~(np.isnan(x) & False)]"]),
        (PaddingCounted, "np.nanmean(x, axis=0)", ["np.mean(x, axis=0)"]),
        (PaddingCounted, "np.nan_to_num(x - y)", ["x - y"]),
        (PaddingCounted, "x[there]", ["x[there | True]"]),
        (WrongAxis, "x.sum(1)", ["x.sum(0)"]),
        (WrongAxis, "np.stack(x, 1)", ["np.stack(x, 0)"]),
        (WrongAxis, "np.concatenate(x, axis=0)", ["np.concatenate(x, axis=1)"]),
        (WrongAxis, "np.sum(x, axis=-1)", ["np.sum(x, axis=0)"]),
        (WrongAxis, "x.T[:, None]", ["x.T[None, :]", "x[:, None]"]),
        (WrongAxis, "x.shape[1]", ["x.shape[0]"]),
        (WrongAxis, "np.max(1)", []),
        (LayerPlusOne, "site.layer", ["site.layer + 1"]),
        (GateUpSwapped, "reads['gate']", ["reads['up']"]),
        (WeightsSwapped, "model.input_weights(site)", ["model.output_weights(site)"]),
        (MeanForSum, "x.mean(1) / x.sum()", ["x.sum(1) / x.sum()", "x.mean(1) / x.mean()"]),
        (LogBase, "np.log(x)", ["np.log2(x)"]),
        (LogBase, "np.log1p(x)", ["np.log1p(x) / 0.6931"]),
    ],
)
def test_what_each_operator_does(operator: type[Operator], source: str, mutants: list[str]) -> None:
    assert made(operator, source) == mutants


def test_what_changes_no_number_is_left_alone() -> None:
    source = (
        'def f(x: a + b=1) -> c + d:\n    """g.sum()"""\n    assert x > 0\n    warn(x.sum())\n'
        "    raise DataError(f'{x - 1}' + x.sum())"
    )
    assert not any(places(operator, source) for operator in OPERATORS)


def test_a_place_knows_its_function_and_line() -> None:
    (place,) = places(Sign, "def outer():\n    def inner():\n        return a + b\n")
    assert (place.function, place.line, place.change) == ("inner", 3, "a + b -> a - b")


@pytest.mark.parametrize("operator", OPERATORS)
def test_without_a_place_nothing_changes(operator: type[Operator]) -> None:
    assert mutated(operator, "f(a + b, x.T)", 99) == "f(a + b, x.T)"
