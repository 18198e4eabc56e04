"""Random interventions, nested and left in any way: afterwards the network is what it was, to the bit."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.raw import hooks_of
from tests.zoo import by_title
from torch import nn

import patchclamp as pc
from patchclamp.errors import DataError
from patchclamp.intervene import SideBySide

QUICK, MORE = (
    ["GPT-2", "Mixtral", "T5", "nn.LSTM", "ConvNeXt"],
    ["Llama", "OPT", "nn.TransformerEncoder", "Mamba", "ViT"],
)
TITLES = [*QUICK, *(pytest.param(title, marks=pytest.mark.slow) for title in MORE)]


@cache
def loaded(title: str) -> tuple[pc.Model, dict[str, Any], dict[str, torch.Tensor]]:
    """A network, what it is called with (an even number of examples), and its activations on something else."""
    case = by_title(title)
    model = pc.load(case.build())
    inputs = {name: value[: len(value) // 2 * 2] for name, value in case.inputs("right").items()}
    with torch.no_grad():
        source = model.activations(inputs, [site for site in model.sites.values() if site.kind != "pattern"])
    return model, inputs, {name: value.clone() + 0.25 for name, value in source.items()}


def output_of(model: pc.Model, inputs: dict[str, Any]) -> torch.Tensor:
    output = model.module(**inputs)
    return output if isinstance(output, torch.Tensor) else output[0]


def state_of(module: nn.Module) -> list[Any]:
    """Everything that could be left behind, module by module."""
    found: list[Any] = [hooks_of(module), torch.backends.mha.get_fastpath_enabled()]
    for path, each in module.named_modules():
        own = {name: id(value) for name, value in vars(each).items() if not isinstance(value, (dict, set, list))}
        found.append((path, type(each), sorted(vars(each)), own, each.training))
        config = getattr(each, "config", None)
        if config is not None:
            found.append((type(config), config._attn_implementation, getattr(config, "_experts_implementation", None)))
    found += [(path, id(each), each.requires_grad) for path, each in module.named_parameters()]
    return found


@st.composite
def interventions(draw: st.DrawFn, title: str, depth: int = 0) -> Any:
    """One of any kind, at any site, at any positions and examples, also at some that are not there."""
    model, _, source = loaded(title)
    site = draw(st.sampled_from([each for each in model.sites.values() if not each.fixed]))
    size = site.size or source[site.name].shape[-1]
    neurons = pc.Neurons({site.name: draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=3, unique=True))})
    where = {
        "positions": draw(
            st.none() | st.sampled_from(["prompt", "generated"]) | st.lists(st.integers(-2, 3), min_size=1, max_size=3)
        ),
        "examples": draw(st.none() | st.lists(st.integers(0, 4), max_size=2)),
    }
    kinds = ["ablate", "clamp", "scale", "add", "project"]
    kinds += ["resample", "patch"] if site.name in source and site.kind != "expert" else []
    kind = draw(st.sampled_from(kinds + (["side by side"] if depth == 0 else [])))
    if kind == "ablate":
        return pc.ablate(neurons, **where)
    if kind == "clamp":
        return pc.clamp(neurons, draw(st.floats(-3, 3)), **where)
    if kind == "scale":
        return pc.scale(neurons, draw(st.floats(-3, 3)), **where)
    if kind == "resample":
        return pc.ablate(neurons, "resample", source=source, seed=draw(st.integers(0, 9)), **where)
    if kind == "patch":
        return pc.patch(draw(st.sampled_from([neurons, site.name])), source, **where)
    if kind == "side by side":
        return SideBySide([draw(interventions(title, 1)), draw(st.none() | interventions(title, 1))])
    vector = np.random.default_rng(draw(st.integers(0, 9))).normal(size=(2, size))
    how: Any = "add" if kind == "add" else "project_out"
    return pc.steer(pc.Directions({site.name: vector}), draw(st.floats(-2, 2)), how=how, **where)


class Broken(Exception):
    """Raised by the test in the middle of a forward pass, or of a block."""


class Session:
    """Blocks that are open, and what is done inside them. A call that is refused, or breaks, is only passed over."""

    def __init__(self, title: str) -> None:
        self.model, self.inputs, _ = loaded(title)
        self.blocks: list[Any] = []

    def run(self, draw: Any) -> None:
        with suppress(DataError):
            output_of(self.model, self.inputs)

    def backward(self, draw: Any) -> None:
        with suppress(DataError):
            output_of(self.model, self.inputs).square().sum().backward()
        self.model.module.zero_grad(set_to_none=True)

    def read(self, draw: Any) -> None:
        with suppress(DataError):
            self.model.activations(self.inputs, draw(st.sampled_from(list(self.model.sites))))

    def broken(self, draw: Any) -> None:
        """A forward pass that ends in the middle."""

        def fail(*_: Any) -> None:
            raise Broken

        path = draw(st.sampled_from([path for path, _ in self.model.module.named_modules()]))
        with suppress(Broken, DataError), self.model.module.get_submodule(path).register_forward_pre_hook(fail):
            output_of(self.model, self.inputs)

    def opened(self, draw: Any, changes: list[Any]) -> None:
        block = self.model.intervene(*changes)
        block.__enter__()
        self.blocks.append(block)

    def generator(self, draw: Any, changes: list[Any]) -> None:
        """A generator that is left half way: its block ends when somebody closes it, or forgets it."""

        def generate() -> Generator[None]:
            with self.model.intervene(*changes):
                while True:
                    yield
                    self.run(draw)

        left = generate()
        next(left)
        next(left)
        self.blocks.append(left)

    def ended(self, draw: Any) -> None:
        """Any of the open blocks, in any order."""
        if not self.blocks:
            return
        block = self.blocks.pop(draw(st.integers(0, len(self.blocks) - 1)))
        if isinstance(block, Generator):
            block.close()
        elif draw(st.booleans()):
            block.__exit__(None, None, None)
        else:
            error = Broken()
            assert not block.__exit__(Broken, error, None)

    def give_up(self) -> None:
        """End what is open when hypothesis, or a failure, stops the test: the network is shared."""
        for block in self.blocks:
            block.close() if isinstance(block, Generator) else block.__exit__(None, None, None)


STEPS = ["run", "run", "backward", "read", "broken", "opened", "opened", "generator", "ended"]


@pytest.mark.parametrize("title", TITLES)
@given(data=st.data())
def test_nothing_is_left_whatever_was_done(title: str, data: st.DataObject) -> None:
    model, inputs, _ = loaded(title)
    with torch.no_grad():
        before = output_of(model, inputs).clone()
    state, weights = state_of(model.module), model.weights_sha256()
    session = Session(title)
    try:
        for step in data.draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=7)):
            if step in ("opened", "generator"):
                getattr(session, step)(data.draw, data.draw(st.lists(interventions(title), min_size=1, max_size=2)))
            else:
                getattr(session, step)(data.draw)
        while session.blocks:
            session.ended(data.draw)
    finally:
        session.give_up()
    assert state_of(model.module) == state
    with torch.no_grad():
        assert torch.equal(output_of(model, inputs), before)
    assert model.weights_sha256() == weights


@pytest.mark.parametrize(
    ("title", "sites"), [("Mixtral", ["attn.0", "expert.1.2", "pattern.1"]), ("nn.LSTM", ["recurrent.recurrent.0"])]
)
@pytest.mark.parametrize("order", [[0, 1, 2], [1, 0, 2], [0, 2, 1], [1, 2, 0]], ids=str)
def test_what_is_still_open_goes_on(title: str, sites: list[str], order: list[int]) -> None:
    model, inputs, _ = loaded(title)
    expected = pc.load(by_title(title).build())
    for site in sites:
        changes = [pc.clamp(pc.Neurons({site: [neuron]}), 0.5 + neuron) for neuron in range(3)]
        blocks = [model.intervene(change) for change in changes]
        with torch.no_grad():
            for block in blocks:
                block.__enter__()
            open_still = [0, 1, 2]
            for number in order:
                blocks[number].__exit__(None, None, None)
                open_still.remove(number)
                got = output_of(model, inputs)
                with expected.intervene(*(changes[each] for each in open_still)):
                    torch.testing.assert_close(got, output_of(expected, inputs))


def test_the_session_sees_what_would_be_left() -> None:
    """The state that the property compares tells a hook, an attribute and a configuration from none."""
    model = pc.load(by_title("Mixtral").build())
    module: Any = model.module
    seen = state_of(module)
    changes = [
        pc.clamp(pc.Neurons({site: [0]}), 1.0) for site in ("mlp.0", "expert.0.1", "pattern.1") if site in model.sites
    ]
    for change in changes:
        with model.intervene(change):
            assert state_of(module) != seen
    module.left = 1
    assert state_of(module) != seen
    del module.left
    module.eval().model.layers[0].train()
    assert state_of(module) != seen
    module.eval()
    assert state_of(module) == seen
