"""The audit of S007: a behaviour on one neuron is fragile, one on many is not; trained networks show it too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import patchclamp as pc
from patchclamp.errors import DataError


def carried_by(number: int) -> nn.Sequential:
    """The second class is said where the first feature is large, by so many of 400 neurons."""
    made = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 400), nn.ReLU(), nn.Linear(400, 2)).eval()
    inner, outer = net[0], net[2]
    assert isinstance(inner, nn.Linear) and isinstance(outer, nn.Linear)
    with torch.no_grad():
        inner.weight.copy_(torch.randn(400, 4, generator=made))
        outer.weight.copy_(0.002 * torch.randn(2, 400, generator=made))
        inner.bias.zero_()
        outer.bias.copy_(torch.tensor([0.5, 0.0]))
        inner.weight[:number] = torch.tensor([1.0, 0, 0, 0])
        outer.weight[:, :number] = 0
        outer.weight[1, :number] = 1 / number
    return net


def data(count: int = 60) -> tuple[torch.Tensor, list[int]]:
    values = 0.1 * torch.randn(count, 4, generator=torch.Generator().manual_seed(1))
    values[:, 0] = 2.0
    return values, [1] * count


def test_few_neurons_are_fragile_and_many_are_not() -> None:
    ranked = pc.Neurons({"mlp.0": range(200)})
    few = pc.verify.ablation_fragility(pc.load(carried_by(1)), ranked, "accuracy", data())
    many = pc.verify.ablation_fragility(pc.load(carried_by(100)), ranked, "accuracy", data())
    assert few.neurons == 1 and few.fraction == pytest.approx(1 / 400) and few.clean == 1
    # Of 100 that carry it in equal parts, a loss of three quarters puts 2.0 below the other class's 0.5.
    assert many.neurons == 128 and many.fraction > 5 * few.fraction
    assert np.isnan(few.random_fraction) and "halves the behaviour" in few.sentence
    assert "no random set" in few.sentence


def test_a_behaviour_that_stays_is_said_to_stay() -> None:
    found = pc.verify.ablation_fragility(pc.load(carried_by(1)), pc.Neurons({"mlp.0": [7, 8]}), "accuracy", data())
    assert found.neurons is None and np.isnan(found.fraction)
    assert found.sentence.startswith("Silencing up to 2 of 400 neurons leaves more than half")


def test_guards_are_measured_beside_it() -> None:
    found = pc.verify.ablation_fragility(
        pc.load(carried_by(1)),
        pc.Neurons({"mlp.0": [0, 5]}),
        "accuracy",
        data(),
        guards={"others": ("accuracy", (torch.zeros(10, 4), [0] * 10))},
    )
    assert found.curve["others"].to_list() == [1.0, 1.0] and found.curve["others_clean"].to_list() == [1.0, 1.0]


def test_bad_input() -> None:
    model = pc.load(carried_by(1))
    with pytest.raises(DataError, match="the behaviour is not there"):
        pc.verify.ablation_fragility(model, pc.Neurons({"mlp.0": [0]}), "accuracy", (data()[0], [0] * 60))
    with pytest.raises(DataError, match="sizes lie between 1 and the 1 candidates"):
        pc.verify.ablation_fragility(model, pc.Neurons({"mlp.0": [0]}), "accuracy", data(), sizes=[2])
    with pytest.raises(DataError, match="set of neurons is empty"):
        pc.verify.ablation_fragility(model, pc.Neurons(), "accuracy", data())


def trained(spread: bool) -> tuple[nn.Sequential, Any]:
    """A network that learns to refuse (class 1) where any of four trigger features is on, beside three other classes.

    One is pressed to use few neurons, the other loses half of them at random at each step.
    """
    torch.manual_seed(0)
    made = torch.Generator().manual_seed(2)
    net = nn.Sequential(nn.Linear(12, 1024), nn.ReLU(), nn.Dropout(0.5 if spread else 0.0), nn.Linear(1024, 4))
    values = (torch.rand(2000, 12, generator=made) < 0.15).float()
    values[:, :4] = 0
    refused = torch.rand(2000, generator=made) < 0.5
    values[refused, torch.randint(4, (int(refused.sum()),), generator=made)] = 1
    classes = torch.where(refused, 1, 2 * (values[:, 4] + values[:, 5] > 0).long() + (values[:, 6] > 0).long() * 3)
    classes = classes.clamp(max=3)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(300):
        logits = net(values)
        hidden = net[1](net[0](values))
        loss = nn.functional.cross_entropy(logits, classes)
        if not spread:
            loss = loss + 3e-3 * hidden.abs().mean(0).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval(), (values[refused], [1] * int(refused.sum()))


@pytest.mark.slow
def test_a_bottleneck_is_more_fragile_than_dropout() -> None:
    fractions = []
    for spread in (False, True):
        net, refused = trained(spread)
        model = pc.load(net)
        # The detector: what writes to the refusal, weighted by how active it is on what is refused.
        activity = model.activations(refused[0], "mlp.0").mean(0)
        score = activity * (model.output_weights("mlp.0")[:, 1] - model.output_weights("mlp.0").mean(1))
        ranked = pc.Neurons({"mlp.0": score.argsort(descending=True).tolist()})
        found = pc.verify.ablation_fragility(
            model, ranked, "accuracy", refused, sizes=[*range(1, 17), *range(24, 1025, 40)], seeds=2
        )
        print(found.sentence)
        fractions.append(found.fraction)
    assert fractions[0] < 0.01 and fractions[1] >= 5 * fractions[0]
