"""Paths of neurons: a product of two units, one unit against integrated gradients, and what adds up."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

import patchclamp as pc
from patchclamp.errors import DataError, UnknownName
from patchclamp.find.neuron_path import BASELINES, neuron_path, path_baseline, path_effect

SITES = ["module:first", "module:second"]


class Gates(nn.Module):
    """Class c has the logit 4 u v - 2 of one unit of each layer; other units do nothing. The last class has 0."""

    def __init__(self, pairs: list[tuple[int, int]], size: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Identity(), nn.Identity()
        self.pairs, self.size = pairs, size
        self.spare = nn.Linear(1, 1)

    def forward(self, inputs: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        u, v = self.first(inputs[..., : self.size]), self.second(inputs[..., self.size :])
        if inputs.ndim == 3:
            # The token that is real and comes second.
            real = torch.ones(inputs.shape[:2]) if attention_mask is None else attention_mask
            place = ((real.cumsum(1) == 2) & real.bool()).long().argmax(1)
            u, v = u[torch.arange(len(u)), place], v[torch.arange(len(v)), place]
        logits = [4 * u[:, one] * v[:, other] - 2 for one, other in self.pairs]
        return torch.stack([*logits, torch.zeros_like(logits[0])], 1)


def gates(pairs: list[tuple[int, int]]) -> pc.Model:
    return pc.load(Gates(pairs), example=torch.ones(2, 16))


def inputs(inert: float, active: dict[int, float], examples: int = 3) -> torch.Tensor:
    given = torch.full((examples, 16), inert) + 0.1 * torch.arange(16) * inert
    for place, value in active.items():
        given[:, place] = value
    return given


# What is found --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["midpoint", "left"])
@pytest.mark.parametrize("score", ["own", "joint"])
def test_both_units_of_a_product_are_found_and_the_largest_activations_are_not(score: str, rule: str) -> None:
    model = gates([(3, 5)])
    given = inputs(0.8, {3: 1.0, 8 + 5: 1.0})
    found = neuron_path(model, given, 0, SITES, score=score, rule=rule)  # type: ignore[arg-type]
    assert found.units.tolist() == [[3, 5]] * 3
    assert (given[:, :8] > 1).any() and (given[:, 8:] > 1).any()
    largest = path_baseline(model, given, 0, SITES, method="activation")
    assert largest.units.tolist() == [[7, 7]] * 3
    without, others = (path_effect(model, given, each) for each in (found, largest))
    assert (without.change < -0.7).all() and (others.change == 0).all()
    assert without.right_before.all() and not without.right_after.any() and others.right_after.all()
    assert (path_effect(model, given, found, 2.0).change > 0.1).all()
    assert largest.jas.max() == 0 < found.jas.min()


def test_the_published_products_let_a_large_activation_win_without_any_effect() -> None:
    given = inputs(6.0, {3: 1.0, 8 + 5: 1.0})
    assert neuron_path(gates([(3, 5)]), given, 0, SITES).units.tolist() == [[3, 5]] * 3
    assert neuron_path(gates([(3, 5)]), given, 0, SITES, score="joint").units.tolist() == [[3, 7]] * 3


def test_the_published_score_is_the_product_of_two_sums() -> None:
    """With u = 1 and v = 1/2 the slopes are as v to u: (u + v)(v + u) against 2 u v."""
    given = inputs(0.0, {3: 1.0, 8 + 5: 0.5})
    own, joint = (neuron_path(gates([(3, 5)]), given, 0, SITES, score=each) for each in ("own", "joint"))  # type: ignore[arg-type]
    np.testing.assert_allclose(joint.jas[:, 1], 1.5**2 / (2 * 0.5) * own.jas[:, 1], rtol=1e-5)
    np.testing.assert_allclose(joint.jas[:, 0], own.jas[:, 0], rtol=1e-6)


def test_each_example_of_a_batch_has_its_own_class() -> None:
    model = gates([(3, 5), (1, 2)])
    given = inputs(0.5, {3: 1.0, 8 + 5: 1.0, 1: 1.0, 8 + 2: 1.0}, 4)
    classes = [0, 1, 1, 0]
    found = neuron_path(model, given, classes, SITES, batch=3)
    assert found.units.tolist() == [[3, 5], [1, 2], [1, 2], [3, 5]]
    for number, each in enumerate(classes):
        alone = neuron_path(model, given[[number]], each, SITES)
        np.testing.assert_allclose(alone.jas[0], found.jas[number])
        assert alone.units.tolist() == found.units[[number]].tolist()
    assert found.of_class(1).names == ["module:first:1", "module:second:2"]
    assert found.of_class(1)["share"].to_list() == [1.0, 1.0]
    assert found.neurons()["score"].to_list() == [0.5] * 4
    alike = found.class_similarity()
    assert alike.filter(pl.col("class") == pl.col("other"))["cosine"].to_list() == pytest.approx([1.0, 1.0])
    assert alike.filter(pl.col("class") != pl.col("other"))["cosine"].to_list() == [0.0, 0.0]


def test_one_path_for_a_class_is_the_best_in_the_mean() -> None:
    """Two gates give one logit: two examples in three open the one, but the other more when it is open."""

    class Either(Gates):
        def forward(self, inputs: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
            both = super().forward(inputs, attention_mask)[:, :2] + 2
            return torch.stack([both.sum(1) - 2, torch.zeros(len(both))], 1)

    model = pc.load(Either([(3, 5), (1, 2)]), example=torch.ones(2, 16))
    given = inputs(0.0, {}, 3)
    given[:2, [3, 13]] = 1.0
    given[2, [1, 10]] = 1.0
    assert neuron_path(model, given, 0, SITES).units.tolist() == [[3, 5], [3, 5], [1, 2]]
    assert neuron_path(model, given, 0, SITES, per_class=True).units.tolist() == [[3, 5]] * 3


# One unit, and what adds up ---------------------------------------------------------------------


def network(seed: int = 0) -> tuple[pc.Model, torch.Tensor]:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 12), nn.GELU(), nn.Linear(12, 4))
    for parameter in module.parameters():
        parameter.data *= 2
    return pc.load(module.eval()), torch.randn(5, 6)


@pytest.mark.parametrize("score", ["own", "joint"])
@pytest.mark.parametrize(("rule", "shift"), [("midpoint", 0.5), ("left", 0.0)])
def test_a_path_of_one_unit_has_its_integrated_gradient(score: str, rule: str, shift: float) -> None:
    model, given = network()
    found = neuron_path(model, given, 2, "mlp.0", steps=7, score=score, rule=rule)  # type: ignore[arg-type]
    module: Any = model.module
    for number in range(len(given)):
        hidden = module[:2](given[[number]]).detach()
        unit = int(found.units[number, 0])
        total = 0.0
        for step in range(7):
            point = hidden.clone()
            point[0, unit] *= (step + shift) / 7
            point.requires_grad_()
            module[2:](point).softmax(-1)[0, 2].backward()
            assert point.grad is not None
            total += float(point.grad[0, unit]) / 7
        assert found.jas[number, 0] == pytest.approx(total * float(hidden[0, unit]), abs=1e-5)


def test_the_score_adds_up_to_what_the_probability_loses_without_the_units() -> None:
    model, given = residual_network()
    module: Any = model.module
    classes = [0, 1, 2, 3, 0]
    fine, coarse, left = (
        neuron_path(model, given, classes, ["mlp.0", "mlp.2"], steps=each, rule=rule)  # type: ignore[arg-type]
        for each, rule in ((300, "midpoint"), (3, "midpoint"), (300, "left"))
    )
    with torch.no_grad():
        first = module.first[:2](given)
        second = module.second[:2](given + module.first[2](first))
        for stages in (1, 2):
            for number, each in enumerate(classes):
                held, changed = (first[number].clone(), second[number].clone()), []
                held[0][fine.units[number, 0]] = 0
                if stages == 2:
                    held[1][fine.units[number, 1]] = 0
                for one, other in ((first[number], second[number]), held):
                    state = given[number] + module.first[2](one)
                    # Only a layer that a unit is taken of is held; the second is not, for the first unit alone.
                    other = module.second[1](module.second[0](state)) if stages == 1 else other
                    changed.append(float(module.head(state + module.second[2](other)).softmax(-1)[each]))
                assert fine.jas[number, stages - 1] == pytest.approx(changed[0] - changed[1], abs=1e-5)
    assert np.abs(coarse.jas - fine.jas).max() > 1e-4
    assert np.abs(left.jas - fine.jas).max() > 1e-4


class Residual(nn.Module):
    """Two MLPs beside a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6)) for _ in range(2))
        self.head = nn.Linear(6, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        state = inputs + self.first(inputs)
        return self.head(state + self.second(state))


def residual_network() -> tuple[pc.Model, torch.Tensor]:
    torch.manual_seed(0)
    module = Residual().eval()
    for parameter in module.parameters():
        parameter.data *= 2
    given = torch.randn(5, 6)
    return pc.load(module, example=given), given


def test_units_that_the_class_does_not_depend_on_have_no_score() -> None:
    module = Gates([(3, 5)])
    found = neuron_path(pc.load(module, example=torch.ones(2, 16)), inputs(1.0, {3: 0.0, 13: 0.0}), 1, SITES)
    assert (found.jas == 0).all()


# Positions ----------------------------------------------------------------------------------------


def test_only_the_token_at_the_position_is_scaled_and_padding_is_no_token() -> None:
    model = gates([(3, 5)])
    given = inputs(0.5, {3: 1.0, 13: 1.0}, 6).reshape(2, 3, 16)
    assert neuron_path(model, given, 0, SITES, position=1).units.tolist() == [[3, 5]] * 2
    assert (neuron_path(model, given, 0, SITES, position=0).jas == 0).all()
    assert neuron_path(model, given, 0, SITES, position=-2).units.tolist() == [[3, 5]] * 2
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    padded = {"inputs": given, "attention_mask": mask}
    found = neuron_path(model, padded, 0, SITES, position=1)
    assert found.units.tolist() == [[3, 5]] * 2
    assert (path_effect(model, padded, found).change < -0.7).all()
    with pytest.raises(DataError, match="an example has 2 tokens, and no position 2"):
        neuron_path(model, padded, 0, SITES, position=2)


# Simpler paths ------------------------------------------------------------------------------------


def test_influence_follows_the_derivatives_backward() -> None:
    torch.manual_seed(0)
    module: Any = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        for each in module.parameters():
            each.zero_()
        module[0].bias.fill_(1.0)
        module[2].bias.fill_(1.0)
        module[2].weight[5, 3] = 1.0
        module[2].weight[4, 2] = 15.0
        module[4].weight[0, 5] = 1.0
        # Through unit 4 the class depends on unit 2 more than on unit 3, but on unit 4 itself less than on unit 5.
        module[4].weight[0, 4] = 0.1
    found = path_baseline(pc.load(module), torch.zeros(3, 4), 0, method="influence")
    assert found.units.tolist() == [[3, 5]] * 3


def test_the_single_units_are_those_of_largest_integrated_gradient() -> None:
    model, given = network()
    found = path_baseline(model, given, 2, method="single", steps=10)
    first = neuron_path(model, given, 2, steps=10)
    assert found.units[:, 0].tolist() == first.units[:, 0].tolist()
    alone = neuron_path(model, given, 2, "mlp.1", steps=10)
    assert found.units[:, 1].tolist() == alone.units[:, 0].tolist()


def test_the_same_seed_gives_the_same_random_path_and_the_module_is_left_as_it_was() -> None:
    model, given = network()
    module: Any = model.module.train()
    module[0].weight.requires_grad_(False)
    paths = [path_baseline(model, given, 0, method="random", seed=each).units.tolist() for each in (1, 1, 2)]
    assert paths[0] == paths[1] != paths[2]
    for method in BASELINES:
        path_baseline(model, given, 0, method=method, steps=2)
    path_effect(model, given, neuron_path(model, given, 0, steps=2))
    assert model.module.training
    assert [each.requires_grad for each in model.module.parameters()] == [False] + [True] * 5
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.module.modules())


# Bad input ----------------------------------------------------------------------------------------


def test_bad_input_is_said() -> None:
    model, given = network()
    with pytest.raises(DataError, match="an integral wants 2 steps or more, not 1"):
        neuron_path(model, given, 0, steps=1)
    with pytest.raises(DataError, match="one for each of 5 examples"):
        neuron_path(model, given, [0, 1])
    with pytest.raises(DataError, match="one for each of 5 examples"):
        neuron_path(model, given, 0.5)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no token or class 4; there are 4"):
        neuron_path(model, given, 4)
    with pytest.raises(DataError, match='score is "own" or "joint"'):
        neuron_path(model, given, 0, score="sum")  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match=r"mlp\.7"):
        neuron_path(model, given, 0, "mlp.7")
    with pytest.raises(UnknownName, match=r"no baseline of paths is called 'activations'\. The nearest: activation"):
        path_baseline(model, given, 0, method="activations")
    found = neuron_path(model, given, 0)
    with pytest.raises(UnknownName, match="no class of the paths is called '1'"):
        found.of_class(1)
    with pytest.raises(DataError, match="examples 0 to 4, not 5"):
        found.example(5)
    with pytest.raises(DataError, match="one for each of 3 examples"):
        path_effect(model, given[:3], found)
    with pytest.raises(UnknownName):
        neuron_path(pc.load(nn.Linear(3, 2), example=torch.ones(1, 3)), torch.ones(1, 3), 0)
