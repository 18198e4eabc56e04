"""Clamps in a training loop: what is held is held at every step, learns nothing, and changes what the rest learns."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import patchclamp as pc
from patchclamp.model.hooks import reading
from patchclamp.testbed.in_context import (
    LABELS,
    InContextNetwork,
    InContextTask,
    induction_pattern,
    pattern_site,
    previous_token_pattern,
    value_site,
)
from patchclamp.testbed.tensor_problem import PARTS, TensorProblem
from patchclamp.train import Clamp, clamped, preserved

TASK = InContextTask(classes=8, features=16)


def small(seed: int = 0) -> InContextNetwork:
    torch.manual_seed(seed)
    return InContextNetwork(TASK, width=32, heads=4)


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=2, n_head=2)).train()


def losses(held: tuple[str, ...], steps: int = 1_000) -> np.ndarray:
    """Of the tensor problem by gradient descent, with these parts at their targets."""
    problem = TensorProblem()
    optimiser = torch.optim.SGD(problem.parameters(), lr=4.0)
    found = []
    with clamped(problem, *(Clamp(problem.site(part), problem.targets[part]) for part in held)):
        for _ in range(steps):
            loss = problem()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            found.append(loss.item())
    return np.asarray(found)


def half_time(curve: np.ndarray) -> int:
    """The first step at which half of the first loss is gone."""
    return int((curve < curve[0] / 2).argmax())


# The tensor problem ---------------------------------------------------------------------------------


def test_each_part_that_is_held_shortens_the_plateau() -> None:
    nothing, one, two = losses(()), losses(("c",), 500), losses(("b", "c"), 50)
    assert nothing[-1] < 1e-3 * nothing[0]
    assert half_time(nothing) > 3 * half_time(one) > 9 * half_time(two) > 0


def test_with_two_parts_held_the_loss_is_exactly_exponential() -> None:
    curve = losses(("b", "c"), 20)
    slope = np.diff(np.log(curve))
    assert np.ptp(slope) < 1e-2 * abs(slope.mean())
    # By hand: |b*|^2 |c*|^2 / 1000 = 0.1 is the curvature of the loss in a.
    assert slope.mean() == pytest.approx(2 * math.log(1 - 4 * 0.1), rel=1e-6)
    free = np.diff(np.log(losses(("c",), 60)))
    assert np.ptp(free) > 0.5 * abs(free.mean())


# What is held ---------------------------------------------------------------------------------------


def test_a_pattern_is_the_one_set_at_every_step_and_its_weights_get_no_gradient() -> None:
    network = small()
    made = torch.Generator().manual_seed(0)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
    site, wanted = pattern_site(network, 0), previous_token_pattern()
    with clamped(network, Clamp(site, wanted, neurons=[1])), reading(network, [site]) as captured:
        before: Any = network.blocks[0]
        before = before.attention.query.weight.detach().clone()
        for _ in range(5):
            batch = TASK.batch(16, made)
            optimiser.zero_grad()
            nn.functional.cross_entropy(network(batch.inputs), batch.target).backward()
            optimiser.step()
            pattern = captured[site.name].pop().tensor
            assert torch.equal(pattern[..., 1], wanted.expand(16, 5, 5))
            assert not torch.isclose(pattern[:, 1:, :, 0], wanted[1:]).all()
            attention: Any = network.blocks[0]
            for projection in (attention.attention.query, attention.attention.key):
                gradient = projection.weight.grad.reshape(4, 8, 32)
                assert (gradient[1] == 0).all() and (gradient[[0, 2, 3]] != 0).any((1, 2)).all()
            assert (attention.attention.value.weight.grad.reshape(4, 8, 32)[1] != 0).any()
    after: Any = network.blocks[0]
    assert torch.equal(after.attention.query.weight[8:16], before[8:16])
    assert not torch.equal(after.attention.query.weight[:8], before[:8])
    # Nothing is left behind.
    with reading(network, [site]) as captured:
        network(TASK.batch(4, made).inputs)
    assert not torch.isclose(captured[site.name][0].tensor[:, 1:, :, 1], wanted[1:]).all()


def test_neurons_by_name_are_held_while_a_gpt2_learns() -> None:
    module = gpt2()
    neurons = pc.Neurons({"mlp.0": [3, 5], "mlp.1": [0]})
    ids = torch.arange(12).reshape(2, 6)
    with clamped(module, Clamp(neurons, 0.25)), reading(module, pc.load(module).select("mlp.*")) as captured:
        module(input_ids=ids, labels=ids).loss.backward()
    assert module.training
    assert (captured["mlp.0"][0].tensor[..., [3, 5]] == 0.25).all()
    assert (captured["mlp.1"][0].tensor[..., 0] == 0.25).all() and (captured["mlp.1"][0].tensor[..., 1] != 0.25).all()
    read = module.transformer.h[0].mlp.c_fc.weight.grad
    assert (read[:, [3, 5]] == 0).all() and (read[:, 4] != 0).any()
    # What a held neuron writes is learned all the same.
    assert (module.transformer.h[0].mlp.c_proj.weight.grad[3] != 0).any()


def test_a_function_sees_each_call_and_gradients_flow_through_it() -> None:
    network, made = small(), torch.Generator().manual_seed(0)
    batch = TASK.batch(8, made)
    mixed = torch.tensor(0.5, requires_grad=True)
    site = pattern_site(network, 1)
    held = Clamp(site, lambda now: now.lerp(induction_pattern(batch)[:, None], mixed), neurons=[0, 2])
    for _ in range(2):
        batch = TASK.batch(8, made)
        with reading(network, [site]) as captured:
            network(batch.inputs)
            with clamped(network, held), reading(network, [site]) as changed:
                nn.functional.cross_entropy(network(batch.inputs), batch.target).backward()
        plain, pattern = captured[site.name][0].tensor, changed[site.name][0].tensor
        half = (plain[..., [0, 2]] + induction_pattern(batch)[..., None]) / 2
        torch.testing.assert_close(pattern[..., [0, 2]], half)
        assert torch.equal(pattern[..., [1, 3]], plain[..., [1, 3]])
    assert mixed.grad is not None and mixed.grad != 0


def test_only_the_positions_that_are_named_are_held() -> None:
    network = small()
    inputs = TASK.batch(3, torch.Generator().manual_seed(0)).inputs
    site = pattern_site(network, 0)

    def pattern(*clamps: Clamp) -> torch.Tensor:
        with clamped(network, *clamps), reading(network, [site]) as captured:
            network(inputs)
        return captured[site.name][0].tensor.detach()

    plain = pattern()
    held = pattern(Clamp(site, previous_token_pattern(), positions=LABELS))
    assert torch.equal(held[:, LABELS[1], :, 0], previous_token_pattern()[LABELS[1]].expand(3, 5))
    assert torch.equal(held[:, [0, 2, 4]], plain[:, [0, 2, 4]])
    last = pattern(Clamp(site, 0.0, positions=[-1], neurons=[1]))
    assert (last[:, -1, :, 1] == 0).all() and torch.equal(last[:, :-1], plain[:, :-1])


def test_shapes_of_tensors_for_patterns() -> None:
    network = small()
    inputs = TASK.batch(3, torch.Generator().manual_seed(0)).inputs
    site = pattern_site(network, 0)
    each = torch.softmax(torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(1)), -1)
    for value, wanted in [
        (each, each),
        (each[:, :1], each[:, :1].expand(3, 4, 5, 5)),
        (each[0], each[:1].expand(3, 4, 5, 5)),
        (each[0, 0], each[:1, :1].expand(3, 4, 5, 5)),
    ]:
        with clamped(network, Clamp(site, value)), reading(network, [site]) as captured:
            network(inputs)
        assert torch.equal(captured[site.name][0].tensor.movedim(-1, 1), wanted)


def test_what_is_preserved_keeps_one_way_of_an_ablation() -> None:
    """A network that is ablated, with later patterns or values as they were, is the sum worked out by hand."""
    network = small()
    inputs = TASK.batch(6, torch.Generator().manual_seed(0)).inputs
    head = Clamp(pattern_site(network, 0), 0.0, neurons=[2])
    second, values = pattern_site(network, 1), value_site(1)

    def seen(*clamps: Clamp) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.no_grad(), clamped(network, *clamps), reading(network, [second, values]) as captured:
            logits = network(inputs)
        return captured[second.name][0].tensor, captured[values.name][0].tensor, logits

    plain, ablated = seen(), seen(head)
    through_values = seen(head, *preserved(network, inputs, second))
    through_pattern = seen(head, *preserved(network, inputs, values))
    assert not torch.allclose(ablated[0], plain[0], atol=1e-5) and not torch.allclose(ablated[1], plain[1], atol=1e-5)
    assert torch.equal(through_values[0], plain[0]) and torch.equal(through_values[1], ablated[1])
    assert torch.equal(through_pattern[0], ablated[0]) and torch.equal(through_pattern[1], plain[1])
    assert not torch.allclose(through_values[2], through_pattern[2], atol=1e-5)
    # With both held, the last layer adds what it did; only the residual stream lacks the head.
    both = seen(head, *preserved(network, inputs, [second, values]))
    assert not torch.allclose(both[2], plain[2], atol=1e-5)


def test_another_network_can_be_grafted() -> None:
    one, other = small(0), small(1)
    inputs = TASK.batch(6, torch.Generator().manual_seed(0)).inputs
    place = pc.Site.custom("blocks.0")
    with torch.no_grad(), clamped(one, *preserved(other, inputs, place)):
        grafted = one(inputs)
    with torch.no_grad():
        wanted = one.unembedding(one.norm(one.blocks[1](other.blocks[0](other.embedding(inputs)))[:, -1]))
    assert torch.equal(grafted, wanted)


def test_a_previous_token_head_that_is_held_brings_learning_forward() -> None:
    """The phase change of the paper, small: by 20 % at least; docs/cause_findings has it with three seeds."""

    def steps(context: Callable[[InContextNetwork], Any]) -> int:
        network = small()
        made, held_out = torch.Generator().manual_seed(0), TASK.batch(400, torch.Generator().manual_seed(9))
        optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
        with context(network):
            for step in range(2_000):
                batch = TASK.batch(32, made)
                optimiser.zero_grad()
                nn.functional.cross_entropy(network(batch.inputs), batch.target).backward()
                optimiser.step()
                if step % 10 == 0:
                    with torch.no_grad():
                        right = network(held_out.inputs).argmax(1) == held_out.target
                    if right.float().mean() > 0.75:
                        return step
        return 2_000

    free = steps(lambda network: nullcontext())
    held = steps(
        lambda network: clamped(network, Clamp(pattern_site(network, 0), previous_token_pattern(), neurons=[0]))
    )
    assert 0 < held <= 0.8 * free < 1_600


# Bad input ------------------------------------------------------------------------------------------


def test_what_cannot_be_held_is_said() -> None:
    network = small()
    inputs = TASK.batch(3, torch.Generator().manual_seed(0)).inputs
    site = pattern_site(network, 0)
    for make, match in [
        (lambda: Clamp(site, math.nan), "finite numbers"),
        (lambda: Clamp(site, torch.ones(2, dtype=torch.int64)), "finite numbers"),
        (lambda: Clamp(site, cast(Any, "high")), "a number, a tensor or a function"),
        (lambda: Clamp(site, 0.0, neurons=[0, 0]), "twice"),
        (lambda: Clamp(site, 0.0, neurons=[-1]), "below 0"),
        (lambda: Clamp(site, 0.0, neurons=cast(Any, [0.5])), "whole numbers"),
        (lambda: Clamp(site, 0.0, neurons=[]), "holds nothing"),
        (lambda: Clamp(pc.Neurons({"mlp.0": [1]}), 0.0, neurons=[1]), "says which already"),
    ]:
        with pytest.raises(pc.errors.DataError, match=match):
            make()
    for clamps, error, match in [
        ([Clamp(site, 0.0, neurons=[4])], pc.errors.UnknownName, "pattern.0:4 does not exist: there are 4 heads"),
        ([Clamp(site, 0.0), Clamp(site, 0.1, neurons=[2])], pc.errors.DataError, "two clamps hold the same"),
        ([Clamp(site, torch.zeros(4, 4))], pc.errors.DataError, "sequences of another layout"),
        ([Clamp(site, lambda now: now[:, :, :4])], pc.errors.DataError, "sequences of another layout"),
        ([Clamp(site, cast(Any, lambda now: 3))], pc.errors.DataError, "returned int"),
        ([Clamp(site, 0.0, positions=[5])], pc.errors.DataError, "no position 5"),
        ([Clamp("pattern.0", 0.0)], pc.errors.UnknownName, "pattern.0"),
    ]:
        with pytest.raises(error, match=match), clamped(network, *clamps):
            network(inputs)
    # Heads and positions that do not meet are two clamps, not one.
    with clamped(network, Clamp(site, 0.0, neurons=[1]), Clamp(site, 0.1, neurons=[2], positions=[0])):
        network(inputs)
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in network.modules())


def test_a_site_that_is_never_reached_is_said() -> None:
    network = nn.ModuleDict({"used": nn.Linear(3, 3), "unused": nn.Linear(3, 3)})
    network.forward = lambda values: network["used"](values)  # type: ignore[method-assign]
    with pytest.raises(pc.errors.SiteNotReached, match="module:unused"), clamped(network, Clamp("module:unused", 0.0)):
        network(torch.ones(2, 3))


def test_parts_of_the_problem_are_all_needed() -> None:
    problem = TensorProblem()
    with clamped(problem, *(Clamp(problem.site(part), problem.targets[part]) for part in PARTS)):
        assert problem().item() == pytest.approx(0, abs=1e-20)
