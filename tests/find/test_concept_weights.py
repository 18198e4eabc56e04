"""Concept weights: one spurious weight of a regression, what shrinking does, and what is left behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import patchclamp as pc
from patchclamp.errors import DataError, ModelError, UnknownName
from patchclamp.find.concept_weights import concept_weights
from patchclamp.weights import Weights

ROW, COLUMN, WIDTH = 2, 5, 8
PLACE = ROW * WIDTH + COLUMN


def regression() -> tuple[nn.Linear, Any, torch.Tensor]:
    """y = W x, whose weight (2, 5) should be 0 and is 1; the loss, and the true weights."""
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(4, WIDTH, generator=generator)
    true[ROW, COLUMN] = 0
    module = nn.Linear(WIDTH, 4, bias=False)
    with torch.no_grad():
        module.weight.copy_(true)
        module.weight[ROW, COLUMN] = 1

    def loss(module: nn.Module, generator: torch.Generator) -> torch.Tensor:
        inputs = torch.randn(512, WIDTH, generator=generator)
        return ((module(inputs) - inputs @ true.T) ** 2).mean()

    return module, loss, true


def test_the_spurious_weight_and_no_other() -> None:
    module, loss, true = regression()
    before = module.weight.detach().clone()
    found = concept_weights(module, loss, "weight", threshold=0.1)
    assert found == Weights({"weight": [PLACE]})
    assert torch.equal(module.weight, before)
    assert torch.equal(found.zeroed(module).weight, true)  # type: ignore[arg-type]
    with torch.no_grad():
        assert float(loss(found.zeroed(module), torch.Generator().manual_seed(1))) == 0
    wrapped = concept_weights(pc.load(module, example=torch.zeros(1, WIDTH)), loss, "weight")
    assert wrapped == found == concept_weights(module, loss, ["*"], steps=1, shrink=0.0)


def test_the_score_is_what_shrinking_does_to_the_loss() -> None:
    """First order: the loss at (1 - eps) times the weight, beside the threshold that just lets the weight through."""
    module, _, true = regression()
    inputs = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    module.double()

    def loss(module: nn.Module, _: torch.Generator | None = None) -> torch.Tensor:
        return ((module(inputs) - inputs @ true.double().T) ** 2).mean()

    eps = 1e-3
    with torch.no_grad():
        plain = float(loss(module))
        module.weight[ROW, COLUMN] = 1 - eps
        change = (plain - float(loss(module))) / eps
        module.weight[ROW, COLUMN] = 1
    how: Any = {"steps": 1, "relative": False}
    assert concept_weights(module, loss, "weight", threshold=0.99 * change, **how) == Weights({"weight": [PLACE]})
    with pytest.raises(ModelError, match="no weight is above"):
        concept_weights(module, loss, "weight", threshold=1.01 * change, **how)


def test_shrinking_lets_the_others_have_their_turn() -> None:
    """The small weight stands in the way only once the large one has shrunk."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.large, self.small = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([0.2]))
            self.idle = nn.Parameter(torch.tensor([1.0]))

    def loss(module: Any, _: torch.Generator) -> torch.Tensor:
        # The small one helps as long as the large one is large.
        return (module.large**2 + 5 * module.small * (0.7 - module.large.detach())).sum() + 0 * module.idle.sum()

    how: Any = {"relative": False, "threshold": 0.3, "steps": 60}
    assert list(concept_weights(Two(), loss, "*", shrink=0.0, **how)) == ["large"]
    assert list(concept_weights(Two(), loss, "*", shrink=0.05, **how)) == ["large", "small"]


def test_chance_is_the_seeds() -> None:
    module, _, true = regression()

    def noisy(module: nn.Module, generator: torch.Generator) -> torch.Tensor:
        inputs = torch.randn(3, WIDTH, generator=generator)
        return ((module(inputs) - inputs @ true.T + torch.randn(3, 4, generator=generator)) ** 2).mean()

    one, again, other = (concept_weights(module, noisy, "weight", steps=2, seed=seed) for seed in (0, 0, 1))
    assert one == again != other
    # Noise averages out: with many steps only the planted weight is left.
    assert concept_weights(module, noisy, "weight", steps=400, threshold=0.3) == Weights({"weight": [PLACE]})


def test_the_module_is_left_as_it_was() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    module[2].bias.requires_grad_(False)  # type: ignore[union-attr, operator]
    kept = {name: each.detach().clone() for name, each in module.named_parameters()}
    calls: list[int] = []

    def loss(module: nn.Module, generator: torch.Generator) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return (module(torch.randn(20, 3, generator=generator)) ** 2).mean()

    with pytest.raises(KeyboardInterrupt):
        concept_weights(module, loss, "*weight", shrink=0.5)
    assert all(torch.equal(each, kept[name]) for name, each in module.named_parameters())
    assert [name for name, each in module.named_parameters() if not each.requires_grad] == ["2.bias"]
    assert all(each.grad is None for each in module.parameters())


def test_bad_input_is_said() -> None:
    module, loss, _ = regression()
    with pytest.raises(UnknownName, match="to_k"):
        concept_weights(module, loss)
    for given, error, match in [
        ({"steps": 0}, DataError, "at least 1 step"),
        ({"shrink": 1.0}, DataError, "shrink"),
        ({"threshold": 0.0}, DataError, "threshold"),
        ({"threshold": 1.5}, DataError, "below 1"),
        ({"loss": lambda module, _: module.weight.sum() * np.nan}, DataError, "the loss is nan at step 0"),
        ({"loss": lambda module, _: module.weight}, DataError, r"one number, not \[4, 8\]"),
        ({"loss": lambda module, _: 3.0}, DataError, "one number, not float"),
        ({"loss": lambda *_: torch.tensor(1.0)}, ModelError, "depends on none"),
        ({"loss": lambda *_: torch.ones(1, requires_grad=True).sum()}, ModelError, "depends on none"),
        ({"loss": lambda module, _: -(module.weight**2).sum()}, ModelError, "none stands in the way"),
        ({"loss": lambda module, _: module.weight.abs().log().sum()}, ModelError, "all 32 weights"),
    ]:
        with pytest.raises(error, match=match):
            concept_weights(module, **{"loss": loss, "parameters": "weight", **given})  # type: ignore[arg-type]
