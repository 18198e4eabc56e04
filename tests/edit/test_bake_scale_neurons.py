"""Re-weighting of IRCAN: a unit that copies the context is made to win against one that remembers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import patchclamp as pc
from patchclamp.edit import bake, scale_neurons
from patchclamp.published import methods


class Conflict(nn.Module):
    """One unit copies the answer of the context with gain 1, one recalls with gain 2; the rest is noise."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(4, 8), nn.Linear(8, 2)
        with torch.no_grad():
            for each in (self.into, self.out):
                each.weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
                each.bias.zero_()
            self.into.weight[3], self.into.weight[5] = torch.eye(4)[0], torch.eye(4)[1]
            self.out.weight[:, 3], self.out.weight[:, 5] = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., 4]: context, memory, two more -> the score of the context's answer and of memory's."""
        return self.out(torch.relu(self.into(x)))


def test_a_neuron_that_copies_the_context_is_made_to_win() -> None:
    model = pc.load(Conflict())
    x = torch.tensor([1.0, 1.0, 0.3, -0.2])

    def follows_context(edited: pc.Model) -> bool:
        with torch.no_grad():
            return bool(edited.module(x).argmax() == 0)

    context, memory = pc.Neurons({"mlp.0": [3]}), pc.Neurons({"mlp.0": [5]})
    assert not follows_context(model) and follows_context(scale_neurons(model, context, 3.0))
    assert not follows_context(scale_neurons(model, memory, 3.0)) and not follows_context(model)
    assert not follows_context(scale_neurons(model, pc.Neurons({"mlp.0": [1]}), 3.0))
    entry = next(each for each in methods() if each.row == "S105" and each.part == "re-weighting")
    assert entry.function is scale_neurons
    for wrong in (float("nan"), "3"):
        with pytest.raises(pc.errors.DataError):
            scale_neurons(model, context, wrong)  # type: ignore[arg-type]


def test_it_is_scale_written_into_the_weights() -> None:
    model, neurons = pc.load(Conflict()), pc.Neurons({"mlp.0": [3, 6]})
    assert scale_neurons(model, neurons, 2.5).weights_sha256() == bake(model, pc.scale(neurons, 2.5)).weights_sha256()
    assert scale_neurons(model, neurons, 2.5).revert().weights_sha256() == model.weights_sha256()
