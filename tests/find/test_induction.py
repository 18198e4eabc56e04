"""Induction and previous-token heads: a network set by hand, a held pattern, and a uniform one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import patchclamp as pc
from patchclamp.find.induction import induction_strength, previous_token_strength
from patchclamp.testbed.in_context import (
    LABELS,
    LENGTH,
    CausalAttention,
    InContextNetwork,
    InContextTask,
    pattern_site,
)

TASK = InContextTask(classes=6, features=32, noise=0.02)
PREVIOUS, INDUCTION = 1, 2  # which head, of three
PARTS = {"shown": 32, "label": 5, "position": 5, "before": 32, "copied": 5, "rest": 41}
STARTS = dict(zip(PARTS, torch.tensor([0, *PARTS.values()]).cumsum(0).tolist(), strict=False))
HEAD, WIDTH = 40, 120


def part(name: str) -> slice:
    return slice(STARTS[name], STARTS[name] + PARTS[name])


class SetByHand(nn.Module):
    """The first layer writes down what the token before showed; the second looks for what is shown now among it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (CausalAttention(WIDTH, 3, rotary=False) for _ in range(2))
        with torch.no_grad():
            for each in self.parameters():
                each.zero_()
            rows = slice(PREVIOUS * HEAD, (PREVIOUS + 1) * HEAD)
            # Position p asks for position p - 1.
            self.first.query.weight[rows, part("position")][1:5, 1:] = 300 * torch.eye(4)
            self.first.key.weight[rows, part("position")][1:5, :4] = torch.eye(4)
            self.first.value.weight[rows, part("shown")][:32] = torch.eye(32)
            self.first.output.weight[part("before"), rows][:, :32] = torch.eye(32)
            rows = slice(INDUCTION * HEAD, (INDUCTION + 1) * HEAD)
            self.second.query.weight[rows, part("shown")][:32] = 100 * torch.eye(32)
            self.second.key.weight[rows, part("before")][:32] = torch.eye(32)
            # Only labels are looked at: the first token, which has none before it, saw itself.
            self.second.query.weight[rows, part("position")][32] = 1e4
            self.second.key.weight[rows, part("label")][32] = 1
            self.second.value.weight[rows, part("label")][:5] = torch.eye(5)
            self.second.output.weight[part("copied"), rows][:, :5] = torch.eye(5)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        states = torch.zeros(len(inputs), LENGTH, WIDTH)
        states[..., : TASK.width] = inputs
        states[..., part("position")] = torch.eye(LENGTH)
        for attention in (self.first, self.second):
            states = states + attention(states)
        return states[:, -1, part("copied")]


def site(layer: int) -> pc.Site:
    module = ("first", "second")[layer]
    return pc.Site(f"pattern.{layer}", "pattern", layer, 3, module=module, axis=1, through="attention", tensor="output")


def test_heads_set_by_hand_have_strength_1_and_solve_the_task() -> None:
    network = SetByHand()
    batch = TASK.batch(500, torch.Generator().manual_seed(0))
    assert (network(batch.inputs).argmax(1) == batch.target).all()
    found = induction_strength(network, batch.inputs, batch.right, batch.wrong, sites=site(1))
    assert found.names[0] == f"pattern.1:{INDUCTION}"
    assert found["score"][0] == pytest.approx(1, abs=1e-6) and found["right"][0] == pytest.approx(1, abs=1e-6)
    # The others have no queries and keys: they look at all five tokens alike.
    assert found["score"][1:].to_list() == pytest.approx([0, 0], abs=1e-6)
    assert found["wrong"][1:].to_list() == pytest.approx([0.2, 0.2], abs=1e-6)
    before = previous_token_strength(network, batch.inputs, LABELS, sites=[site(0), site(1)])
    assert before.names[0] == f"pattern.0:{PREVIOUS}" and before["score"][0] == pytest.approx(1, abs=1e-6)
    alike = (1 / 2 + 1 / 4) / 2  # the second token sees two, the fourth four
    uniform = dict(zip(before.names, before["score"], strict=True))["pattern.0:0"]
    assert uniform == pytest.approx(alike, abs=1e-6)


def test_the_wrong_answer_has_strength_minus_1() -> None:
    network = SetByHand()
    batch = TASK.batch(100, torch.Generator().manual_seed(0))
    found = induction_strength(network, batch.inputs, batch.wrong, batch.right, query=4, sites=site(1))
    assert found.names[-1] == f"pattern.1:{INDUCTION}" and found["score"][-1] == pytest.approx(-1, abs=1e-6)
    several = induction_strength(
        network, batch.inputs, batch.right, torch.stack([batch.wrong, batch.right], 1), sites=site(1)
    )
    assert several["score"][0] == pytest.approx(0.5, abs=1e-6)
    alone = induction_strength(network, batch.inputs, batch.right, sites=site(1))
    assert alone["score"][0] == pytest.approx(1, abs=1e-6) and alone["wrong"].to_list() == [0, 0, 0]


def test_an_untrained_network_has_no_such_heads() -> None:
    torch.manual_seed(0)
    network = InContextNetwork(TASK, width=32, heads=4)
    batch = TASK.batch(400, torch.Generator().manual_seed(0))
    found = induction_strength(network, batch.inputs, batch.right, batch.wrong, sites=pattern_site(network, 1))
    assert found["score"].abs().max() < 0.05
    assert induction_strength(network, batch.inputs, batch.right, batch.wrong, sites=pattern_site(network, 1)) == found


def test_padding_is_left_out() -> None:
    torch.manual_seed(0)
    module = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=1, n_head=2)).eval()
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    both = previous_token_strength(module, {"input_ids": ids, "attention_mask": mask})
    one = previous_token_strength(module, {"input_ids": ids[:1]})
    two = previous_token_strength(module, {"input_ids": ids[1:, :2]})
    score = {name: (3 * a + b) / 4 for name, a, b in zip(one.names, one["score"], two["score"], strict=True)}
    assert one.names == two.names
    assert dict(zip(both.names, both["score"], strict=True)) == pytest.approx(score, abs=1e-6)


def test_wrong_positions_are_said() -> None:
    network, batch = SetByHand(), TASK.batch(4, torch.Generator().manual_seed(0))
    for right, match in [([1, 3], "2 examples; there are 4"), (7, "not there"), ([0.5] * 4, "whole numbers")]:
        with pytest.raises(pc.errors.DataError, match=match):
            induction_strength(network, batch.inputs, right, sites=site(1))  # type: ignore[arg-type]
    with pytest.raises(pc.errors.DataError, match="no token before position 0"):
        previous_token_strength(network, batch.inputs, [0], sites=site(1))
    with pytest.raises(pc.errors.DataError, match="is no pattern"):
        previous_token_strength(network, batch.inputs, sites="module:first.query")
