"""S074's three properties on a network in which each task has neurons of its own, one serves two and one hinders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import patchclamp as pc
from patchclamp.errors import DataError

TASKS = ("a", "b", "c")


def network() -> nn.Sequential:
    """Feature k makes its own four neurons fire, which write to output k; b's last also serves a, c's hinders b."""
    made = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 200), nn.ReLU(), nn.Linear(200, 3)).eval()
    inner, outer = net[0], net[2]
    assert isinstance(inner, nn.Linear) and isinstance(outer, nn.Linear)
    with torch.no_grad():
        inner.weight.copy_(torch.rand(200, 3, generator=made))
        inner.bias.zero_()
        outer.weight.copy_(0.001 * torch.randn(3, 200, generator=made))
        outer.bias.zero_()
        for task in range(3):
            rows = slice(4 * task, 4 * task + 4)
            inner.weight[rows] = 0
            inner.weight[rows, task] = 1
            outer.weight[:, rows] = 0
            outer.weight[task, rows] = torch.tensor([0.4, 0.3, 0.2, 0.1])
        inner.weight[7, 0] = 1.0
        outer.weight[0, 7] = 0.2  # b's last neuron also fires for a and writes a
        inner.weight[11, 1] = 1.0
        outer.weight[1, 11] = -0.2  # c's last neuron fires for b and takes from b
    return net


def data(task: int, count: int = 30) -> tuple[torch.Tensor, list[int]]:
    values = torch.zeros(count, 3)
    values[:, task] = torch.linspace(1, 2, count)
    return values, [task] * count


SETS = {name: pc.Neurons({"mlp.0": range(4 * place, 4 * place + 4)}) for place, name in enumerate(TASKS)}


def test_the_three_properties() -> None:
    model = pc.load(network())
    tasks = {name: data(place) for place, name in enumerate(TASKS)}
    found = pc.verify.transfer_matrix(model, SETS, tasks, "class_score", sizes=[1, 2, 3, 4])
    # By hand, in shares of what each score is: a has 1.2, b 0.8, c 1.
    wanted = [[-1 / 1.2, 0, 0], [-0.2 / 1.2, -1 / 0.8, 0], [0, 0.2 / 0.8, -1]]
    assert found.change == pytest.approx(np.asarray(wanted), abs=0.02)
    assert all(found.change[row].argmin() == row for row in range(3))
    assert (np.abs(found.random) < 0.02).all()
    assert found.cumulativity == pytest.approx({"a": 1, "b": 1, "c": 1})
    own = found.curve.filter((found.curve["set"] == "a") & (found.curve["task"] == "a"))
    assert own["change"].to_numpy() == pytest.approx(-np.asarray([0.4, 0.7, 0.9, 1.0]) / 1.2, abs=0.02)
    assert [tuple(row[:2]) for row in found.versatility.filter(found.versatility["change"] < -0.05).rows()] == [
        ("b", "a")
    ]
    interference = found.interference.filter(found.interference["change"] > 0.05)
    assert [tuple(row[:2]) for row in interference.rows()] == [("c", "b")]
    assert found.low[2, 1] > 0 and np.array_equal(found.jaccard, np.eye(3))


def test_overlap_is_reported() -> None:
    model = pc.load(network())
    sets = {"a": SETS["a"], "b": SETS["a"][:2] | SETS["b"][:2]}
    found = pc.verify.transfer_matrix(model, sets, {"a": data(0), "b": data(1)}, "class_score")
    assert found.jaccard[0, 1] == pytest.approx(2 / 6)
    assert "Jaccard" not in repr(found) and found.tasks == ["a", "b"]


def test_random_sets_are_the_same_for_the_same_seed() -> None:
    model = pc.load(network())
    one, two, other = (
        pc.verify.transfer_matrix(model, SETS, {"a": data(0)}, "class_score", seed=seed).random for seed in (1, 1, 2)
    )
    assert np.array_equal(one, two) and not np.array_equal(one, other)


def test_bad_input() -> None:
    model = pc.load(network())
    for sets, tasks, sizes, message in (
        ({}, {"a": data(0)}, None, "at least one set and one task"),
        ({"a": pc.Neurons()}, {"a": data(0)}, None, "set of neurons is empty"),
        (SETS, {"a": (torch.zeros(4, 3), [0] * 4)}, None, "is 0 without interventions"),
        (SETS, {"a": data(0)}, [5], "sizes lie between 1 and the 4 neurons of 'a'"),
    ):
        with pytest.raises(DataError, match=message):
            pc.verify.transfer_matrix(model, sets, tasks, "class_score", sizes=sizes)
