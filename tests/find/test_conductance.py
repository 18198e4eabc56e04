"""Conductance as a finder: closed form, saturation, what adds up, and that ablating says the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.architectures import GPT2, TEXTS, padded, tokenizer
from torch import nn

import patchclamp as pc
from patchclamp import attribution
from patchclamp.errors import DataError
from patchclamp.find.conductance import conductance

FIRST = attribution.class_logit(0)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Capped(nn.Module):
    """F = min(y_0, 1) + 0.5 y_1: the first neuron does most, and saturates; the third is loud and does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.y = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.y(x)
        return (hidden[:, :1].clamp(max=1.0) + 0.1 * hidden[:, 1:2]) * torch.ones(1, 2)


def test_the_closed_form_of_neurons_that_fire() -> None:
    module = nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 2, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(drawn(5, 4).abs())  # type: ignore[union-attr, operator]
    inputs = drawn(9, 4, seed=1).abs()
    first: Any = module[0]
    last: Any = module[2]
    expected = (last.weight[0] * (inputs @ first.weight.T)).detach().double().mean(0)
    found = conductance(pc.load(module), inputs, FIRST, "mlp.0", steps=1)
    assert found.columns == ["site", "index", "score", "magnitude", "incomplete", "complete"]
    torch.testing.assert_close(torch.tensor(found["score"].to_list()), expected.sort(descending=True).values.float())
    assert found["index"].to_list() == expected.argsort(descending=True).tolist()
    assert found["complete"].all() and found["incomplete"].max() < 1e-5


def test_a_saturated_neuron_comes_first() -> None:
    model, inputs = pc.load(Capped(), example=torch.zeros(1, 3)), torch.tensor([[4.0, 1.0, 9.0], [3.0, 2.0, 9.0]])
    gradient = attribution.attribute(model, inputs, FIRST, "module:y").neurons()
    assert gradient.names[0] == "module:y:1" and gradient["score"].to_list() == pytest.approx([0.15, 0, 0])
    found = conductance(model, inputs, FIRST, "module:y", steps=40)
    assert found["index"].to_list() == [0, 1, 2]
    assert found["score"].to_list() == pytest.approx([1.0, 0.15, 0.0], abs=4 / 40)


def test_signs_cancel_out_unless_magnitudes_are_asked_for() -> None:
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Identity(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(torch.eye(2))  # type: ignore[union-attr, operator]
        module[2].weight.fill_(1.0)  # type: ignore[union-attr, operator]
    inputs = torch.tensor([[3.0, 1.0], [-3.0, 0.5]])
    signed = conductance(pc.load(module), inputs, FIRST, "module:0")
    assert signed["index"].to_list() == [1, 0] and signed["magnitude"].to_list() == pytest.approx([0.75, 3.0])
    absolute = conductance(pc.load(module), inputs, FIRST, "module:0", absolute=True)
    assert absolute["index"].to_list() == [0, 1] and absolute["mean"].to_list() == pytest.approx([0.0, 0.75], abs=1e-6)


def test_a_site_that_is_passed_by_is_not_complete() -> None:
    model = pc.load(GPT2.build(), tokenizer=tokenizer())
    found = conductance(model, TEXTS, attribution.logit(5), ["resid_pre.0", "mlp.0"], steps=400)
    by_site = dict(zip(found["site"], found["complete"], strict=True))
    assert by_site == {"resid_pre.0": True, "mlp.0": False}


def test_batches_data_and_padding_make_no_difference() -> None:
    model = pc.load(GPT2.build(), tokenizer=tokenizer())
    target = attribution.logit([5, 9, 3, 12])
    whole = conductance(model, TEXTS, target, "mlp.*", steps=4, batch=64)
    for data in (pc.Texts(TEXTS), padded()):
        again = conductance(model, data, target, "mlp.*", steps=4, batch=2)
        both = whole.to_polars().join(again.to_polars(), on=["site", "index"])
        assert (both["score"] - both["score_right"]).abs().max() < 1e-5  # type: ignore[operator]
    tensors = pc.load(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    inputs, baseline = drawn(5, 3), drawn(5, 3, seed=1)
    one = conductance(tensors, pc.Tensors(inputs), FIRST, baseline=baseline, batch=2)
    two = conductance(tensors, inputs, FIRST, baseline=baseline, batch=500)
    assert one.names == two.names and one["score"].to_list() == pytest.approx(two["score"].to_list(), abs=1e-6)


def test_ablating_what_comes_first_costs_most() -> None:
    digits = pc.testbed.trained("digits")
    data: Any = digits.data
    inputs = data.values[[place for place, each in enumerate(data) if each.labels["digit"] == "3"][:60]]
    module = digits.model.module
    found = conductance(digits.model, inputs, attribution.class_logit(3), "mlp.0", steps=10)

    def logit(neurons: pc.Neurons) -> float:
        with digits.model.intervene(pc.ablate(neurons)), torch.no_grad():
            return float(module(inputs)[:, 3].mean())

    drawn_at_random = [logit(found.sample(8, seed=seed)) for seed in range(10)]
    loudest = digits.model.activations(inputs, "mlp.0").mean(0).topk(8).indices.tolist()
    assert logit(found.top(8)) < min(*drawn_at_random, logit(pc.Neurons({"mlp.0": loudest}))) - 1


def test_bad_input_is_said() -> None:
    model = pc.load(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    inputs = drawn(5, 3)
    for given, match in [
        ({"steps": 0}, "at least 1 step"),
        ({"baseline": inputs[2]}, "example 2 is equal to the baseline"),
        ({"batch": 0}, "batch is how many"),
        ({"target": attribution.class_logit([0, 1])}, "each of 2 examples, and there are 5"),
    ]:
        with pytest.raises(DataError, match=match):
            conductance(model, inputs, **{"target": FIRST, **given})
    with pytest.raises(DataError, match="not finite"):
        conductance(model, inputs * float("inf"), FIRST)
    with pytest.raises(DataError, match="no examples"):
        conductance(model, inputs[:0], FIRST)


def test_training_mode_changes_nothing() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 2))
    model, inputs = pc.load(module.eval()), drawn(5, 3)
    calm = conductance(model, inputs, FIRST, "module:1")
    module.train()
    assert conductance(model, inputs, FIRST, "module:1") == calm and module.training
