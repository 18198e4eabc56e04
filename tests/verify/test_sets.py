"""Sufficiency, necessity and leaderboards on a network whose causes are known."""

from __future__ import annotations

import pytest
import torch
from tests.verify.beds import Planted, examples

import patchclamp as pc
from patchclamp.errors import DataError

CAUSES, DECOYS = pc.Neurons({"mlp.0": range(4)}), pc.Neurons({"mlp.0": range(4, 8)})


def test_causes_are_sufficient_and_necessary() -> None:
    model, data = pc.load(Planted(0)), examples(0)
    lost = pc.verify.necessity(model, CAUSES, "class_score", data)
    assert lost.verdict == "supported" and lost.effect < 0
    kept = pc.verify.sufficiency(model, CAUSES, "class_score", data, to="zero")
    assert kept.verdict == "supported" and kept.effect == pytest.approx(-lost.effect, rel=1e-4)
    # In a network of one layer what a set brings back and what its loss takes away are the same.
    silent = pc.verify.sufficiency(model, DECOYS, "class_score", data, to="zero")
    assert silent.verdict == "not supported" and silent.effect == 0 and silent.recipe["recovered"] == 0


def test_all_kept_brings_all_back() -> None:
    model, data = pc.load(Planted(0)), examples(0)
    most = model.neurons("mlp.0") - pc.Neurons({"mlp.0": range(30, 330)})
    found = pc.verify.sufficiency(model, most, "class_score", data, controls=5, to="mean")
    assert found.verdict == "not resolvable"
    every = pc.Neurons({"mlp.0": range(8)})
    among = pc.verify.sufficiency(model, every, "class_score", data, controls=5, among=every | CAUSES, to="zero")
    assert among.recipe["recovered"] == pytest.approx(1.0)
    with pytest.raises(DataError, match=r"mlp\.0:4 is not among the neurons that are silenced"):
        pc.verify.sufficiency(model, every, "class_score", data, among=CAUSES)


def test_a_leaderboard_counts_that_there_are_several() -> None:
    model, data = pc.load(Planted(0)), examples(0)
    sets = {"causes": CAUSES, "decoys": DECOYS}
    board = pc.verify.leaderboard(model, sets, "class_score", data)
    assert board.table["set"].to_list() == ["causes", "decoys"] and board.level == 0.005
    assert board.table["verdict"].to_list() == ["supported", "not supported"]
    assert all(len(each.controls) == 200 for each in board.evidence.values())
    few = pc.verify.leaderboard(model, sets, "class_score", data, controls=100)
    assert few.table["verdict"].to_list() == ["not resolvable"] * 2 and few.evidence["causes"].needed == 200
    with pytest.raises(DataError, match="at least one set"):
        pc.verify.leaderboard(model, {}, "class_score", data)


def test_like_sets_share_their_controls() -> None:
    network = Planted(0)
    with torch.no_grad():  # two sets of twins
        for one, other in ((20, 220), (21, 221)):
            for weight in (network.inner.weight, network.inner.bias):
                weight[other] = weight[one]
            network.outer.weight[:, one] = network.outer.weight[:, other]
    model, data = pc.load(network), examples(0)
    sets = {"one": pc.Neurons({"mlp.0": [20, 21]}), "other": pc.Neurons({"mlp.0": [220, 221]}), "causes": CAUSES}
    board = pc.verify.leaderboard(model, sets, "class_score", data)
    one, other = board.evidence["one"], board.evidence["other"]
    assert (one.controls == other.controls).all() and len(one.controls) == 300
    assert board.passes == pytest.approx(1 + 3 + 300 + 300)


@pytest.mark.slow
def test_a_leaderboard_of_chance_supports_hardly_ever() -> None:
    false = 0
    for seed in range(30):
        model, data = pc.load(Planted(seed, inert=0.0)), examples(seed)
        sets = {str(n): model.neurons("mlp.0")[8:].sample(4, seed=100 * seed + n) for n in range(3)}
        board = pc.verify.leaderboard(model, sets, "class_score", data, seed=seed)
        false += "supported" in board.table["verdict"].to_list()
    print(f"leaderboards of random sets with a supported one: {false} of 30")
    assert false <= 3
