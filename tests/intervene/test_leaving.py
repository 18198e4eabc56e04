"""However an intervention ends, nothing of it is left; and one that had no effect is said."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest
import torch
from tests.architectures import ALL, BERT, NEURONS, TEXTS, Architecture, tokenizer
from tests.raw import call, hooks_of, watching
from torch import nn

import patchclamp as pc
from patchclamp.errors import SiteNotReached, UnknownName
from patchclamp.intervene import Intervention

every = pytest.mark.parametrize("architecture", ALL, ids=str)


def bodies() -> Iterator[tuple[str, Callable[[pc.Model, Intervention], None]]]:
    """Ways to leave an intervention."""

    def ended(model: pc.Model, change: Intervention) -> None:
        with model.intervene(change):
            call(model.module, BERT.inputs())

    def failed(model: pc.Model, change: Intervention) -> None:
        with pytest.raises(ZeroDivisionError), model.intervene(change):
            raise ZeroDivisionError

    def interrupted(model: pc.Model, change: Intervention) -> None:
        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        layer = model.module.get_submodule("encoder.layer.1")
        with layer.register_forward_hook(interrupt), pytest.raises(KeyboardInterrupt), model.intervene(change):
            call(model.module, BERT.inputs())

    def nested(model: pc.Model, change: Intervention) -> None:
        with pytest.raises(ZeroDivisionError), model.intervene(change), model.intervene(change):
            raise ZeroDivisionError

    def one_by_one(model: pc.Model, change: Intervention) -> Generator[Any]:
        with model.intervene(change):
            for text in TEXTS:
                yield model(text)

    def closed(model: pc.Model, change: Intervention) -> None:
        generator = one_by_one(model, change)
        next(generator)
        generator.close()

    def forgotten(model: pc.Model, change: Intervention) -> None:
        for _ in one_by_one(model, change):
            break

    def crossed(model: pc.Model, change: Intervention) -> None:
        first, second = one_by_one(model, change), one_by_one(model, pc.scale(change.neurons, 2.0))
        assert next(first) is not None and next(second) is not None
        first.close()
        next(second)
        second.close()

    def wrong(model: pc.Model, change: Intervention) -> None:
        with pytest.raises(UnknownName), model.intervene(change, pc.ablate(pc.Neurons({"mlp.9": [0]}))):
            raise AssertionError("the block must not begin")

    def too_late(model: pc.Model, change: Intervention) -> None:
        outside = pc.ablate(pc.Neurons({"module:embeddings": [999]}))
        with (
            pytest.raises(UnknownName, match=r"module:embeddings:999 does not exist"),
            model.intervene(change, outside),
        ):
            call(model.module, BERT.inputs())

    for each in (ended, failed, interrupted, nested, closed, forgotten, crossed, wrong, too_late):
        yield each.__name__, each


@pytest.mark.parametrize("body", [each for _, each in bodies()], ids=[name for name, _ in bodies()])
def test_however_it_ends_nothing_is_left(body: Callable[[pc.Model, Intervention], None]) -> None:
    module = BERT.build()
    model = pc.load(module, tokenizer=tokenizer())
    mine: list[int] = []
    module.get_submodule("encoder.layer.0.output.dense").register_forward_pre_hook(lambda *_: mine.append(1))
    before, hooks = call(module, BERT.inputs()), hooks_of(module)
    weights = model.weights_sha256()
    body(model, pc.clamp(pc.Neurons({name: [0, 3] for name in model.sites}), 3.0))
    mine.clear()
    assert torch.equal(call(module, BERT.inputs()), before)
    assert hooks_of(module) == hooks and sum(hooks.values()) == 1 and mine
    assert model.weights_sha256() == weights


@every
def test_afterwards_the_output_is_bit_identical(architecture: Architecture) -> None:
    module = architecture.build()
    model, inputs = pc.load(module), architecture.inputs()
    before, hooks = call(module, inputs), hooks_of(module)
    with model.intervene(pc.clamp(pc.Neurons({name: [0, 2] for name in model.sites}), 2.0)):
        assert sum(hooks_of(module).values()) > len(model.sites)
        assert not torch.equal(call(module, inputs), before)
    assert torch.equal(call(module, inputs), before) and hooks_of(module) == hooks


# What is said ------------------------------------------------------------------------------------------


def test_an_intervention_that_had_no_effect_is_an_error_at_the_end() -> None:
    class Shortcut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    module = Shortcut()
    model, neurons = pc.load(module), pc.Neurons({"mlp.0": [1], "mlp.1": [1]})
    message = r"no effect at mlp\.1: in 2 forward passes its module \(third\) was never called"
    with pytest.raises(SiteNotReached, match=message), model.intervene(pc.ablate(neurons)):
        module(torch.ones(2, 4))
        module(torch.ones(2, 4))
    assert not any(hooks_of(module).values())
    with model.intervene(pc.ablate(neurons)):
        pass  # nothing was run, so nothing was missed
    with pytest.raises(ZeroDivisionError), model.intervene(pc.ablate(neurons)):  # not hidden by ours
        module(torch.ones(2, 4))
        raise ZeroDivisionError


def test_wrong_sites_and_neurons() -> None:
    model = pc.load(BERT.build())
    for table, message in (
        ({"mlp.7": [0]}, r"no site is called 'mlp\.7'\. The nearest: mlp\.[01]"),
        ({"mlp.*": [0]}, r"no site is called 'mlp\.\*'"),
        ({"mlp.1": [0, NEURONS]}, rf"mlp\.1:{NEURONS} does not exist: mlp\.1 has neurons 0 to {NEURONS - 1}"),
        ({"module:nothing": [0]}, "no module is called 'nothing'"),
    ):
        with pytest.raises(UnknownName, match=message), model.intervene(pc.ablate(pc.Neurons(table))):
            raise AssertionError("the block must not begin")


def test_a_call_of_a_part_is_changed_too() -> None:
    # `with` acts on the modules themselves, so a block called by itself is changed as well.
    model = pc.load(BERT.build())
    path = "encoder.layer.0.output.dense"
    block: Any = model.module.get_submodule("encoder.layer.0")
    x = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = block(x)
        with model.intervene(pc.clamp(pc.Neurons({"mlp.0": [0]}), 9.0)), watching(model.module, [path]) as seen:
            after = block(x)
    assert (before if isinstance(before, torch.Tensor) else before[0]).shape == x.shape and after is not before
    assert seen[path][1].shape == x.shape and not torch.equal(torch.as_tensor(after[0]), torch.as_tensor(before[0]))
