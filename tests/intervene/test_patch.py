"""`patch`: activations of another run, put where a plain hook would put them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from tests.architectures import GPT2, HEADS, LAYERS, LLAMA, SEQUENTIAL, T5, VIT, Architecture, tokenizer
from tests.raw import call, watching

import patchclamp as pc
from patchclamp.errors import DataError, UnknownName

CLEAN, OTHER = "the cat sat on a mat", "two dogs ran home and they"
BATCH = [CLEAN, "they sat in all day long"]


@cache
def loaded(architecture: Architecture) -> pc.Model:
    """One model for all tests: each leaves it as it is."""
    return pc.load(architecture.build(), tokenizer=tokenizer())


@torch.no_grad()
def run(model: pc.Model, text: Any, *interventions: Any) -> torch.Tensor:
    """The network's output under interventions."""
    with model.intervene(*interventions):
        return call(model.module, model.inputs(text))


@torch.no_grad()
def by_hand(model: pc.Model, text: Any, changes: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]) -> torch.Tensor:
    """The network's output where plain hooks change what some modules are given."""

    def hook(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., tuple]:
        return lambda _module, args: (change(args[0].clone()), *args[1:])

    modules = {path: model.module.get_submodule(path) for path in changes}
    handles = [modules[path].register_forward_pre_hook(hook(change)) for path, change in changes.items()]
    try:
        return call(model.module, model.inputs(text))
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def given_to(model: pc.Model, text: Any, path: str) -> torch.Tensor:
    """What a module is given, by plain PyTorch: `[batch, tokens, ...]`."""
    with watching(model.module, [path]) as seen:
        call(model.module, model.inputs(text))
    return seen[path][0]


def placed(there: torch.Tensor, where: Any, new: torch.Tensor) -> torch.Tensor:
    """A tensor in which a part was replaced."""
    there[where] = new
    return there


# What it does -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [GPT2, LLAMA], ids=str)
@pytest.mark.parametrize("kind", ["mlp", "attn"])
def test_a_whole_site_of_another_text(architecture: Architecture, kind: str) -> None:
    model = loaded(architecture)
    names = [f"{kind}.{layer}" for layer in range(LAYERS)]
    paths = [architecture.sites[name].module for name in names]
    others = [given_to(model, OTHER, path) for path in paths]
    sources = model.activations(OTHER, names)
    expected = by_hand(model, CLEAN, {paths[0]: lambda _: others[0]})
    got = run(model, CLEAN, pc.patch(names[0], sources[names[0]]))
    assert torch.equal(got, expected) and not torch.allclose(got, run(model, CLEAN), rtol=1e-3)
    expected = by_hand(model, CLEAN, {path: lambda _, new=new: new for path, new in zip(paths, others, strict=True)})
    assert torch.equal(run(model, CLEAN, pc.patch(names, sources)), expected)


def test_the_last_residual_stream_makes_the_output_of_the_other_text() -> None:
    for architecture in (GPT2, LLAMA):
        model = loaded(architecture)
        site = model.site(f"resid_post.{LAYERS - 1}")
        got = run(model, CLEAN, pc.patch(site, model.activations(OTHER, site)))
        assert torch.equal(got, run(model, OTHER))


@pytest.mark.parametrize("positions", [[0], [2, -1], range(1, 4), (), np.array([5, 0])], ids=str)
def test_only_the_positions_are_replaced(positions: Any) -> None:
    model = loaded(GPT2)
    path = GPT2.sites["mlp.0"].module
    other, rows = given_to(model, OTHER, path), list(positions)
    expected = by_hand(model, CLEAN, {path: lambda there: placed(there, (slice(None), rows), other[:, rows])})
    got = run(model, CLEAN, pc.patch("mlp.0", model.activations(OTHER, "mlp.0"), positions))
    assert torch.equal(got, expected)
    assert torch.equal(got, run(model, CLEAN)) == (not rows)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "columns"])
@pytest.mark.parametrize("positions", [None, [1, -2]], ids=str)
def test_only_the_neurons_are_replaced(whole: bool, positions: list[int] | None) -> None:
    model, neurons = loaded(LLAMA), pc.Neurons({"mlp.1": [7, 2, 20], "attn.0": [3]})
    source = model.activations(OTHER, ["mlp.*", "attn.*"])
    if not whole:
        source = {name: source[name][:, neurons.indices(name).tolist()] for name in neurons.sites}
    rows = list(range(6)) if positions is None else positions
    changes = {}
    for name in neurons.sites:
        path = LLAMA.sites[name].module
        where = (slice(None), torch.tensor(rows)[:, None], torch.tensor(neurons.indices(name).tolist()))
        new = given_to(model, OTHER, path)[where]
        changes[path] = lambda there, where=where, new=new: placed(there, where, new)
    got = run(model, CLEAN, pc.patch(neurons, source, positions))
    assert torch.equal(got, by_hand(model, CLEAN, changes))
    assert not torch.allclose(got, run(model, CLEAN), rtol=1e-3)


def test_every_example_of_a_batch() -> None:
    model = loaded(GPT2)
    path = GPT2.sites["mlp.1"].module
    other, two = given_to(model, OTHER, path), given_to(model, BATCH[::-1], path)
    alike = by_hand(model, BATCH, {path: lambda there: other.expand_as(there).contiguous()})
    for source in (other[0], other, other.expand(2, -1, -1)):
        assert torch.equal(run(model, BATCH, pc.patch("mlp.1", source)), alike)
    assert torch.equal(run(model, BATCH, pc.patch("mlp.1", two)), by_hand(model, BATCH, {path: lambda _: two}))


def test_what_is_no_text() -> None:
    model, inputs = loaded(SEQUENTIAL), SEQUENTIAL.inputs()
    site = model.activations(inputs["input"].flip(0), "mlp.0")
    with model.intervene(pc.patch("mlp.0", site)), torch.no_grad():
        assert torch.equal(call(model.module, inputs), call(model.module, {"input": inputs["input"].flip(0)}))
    with (
        pytest.raises(DataError, match=r"mlp\.0 has no positions to choose from: its tensor here is \[5, 10\]"),
        model.intervene(pc.patch("mlp.0", site, [0])),
    ):
        call(model.module, inputs)


def test_what_comes_in_another_type() -> None:
    model = loaded(GPT2)
    source = model.activations(OTHER, "mlp.0")
    expected = run(model, CLEAN, pc.patch("mlp.0", source))
    numbers: Any = source.double().numpy()
    for given in (source.double(), numbers, source.clone().requires_grad_()):
        assert torch.equal(run(model, CLEAN, pc.patch("mlp.0", given)), expected)


def test_the_decoder_of_two_stacks() -> None:
    model = loaded(T5)
    site, path = "decoder.mlp.0", T5.sites["decoder.mlp.0"].module
    other = given_to(model, OTHER, path)
    expected = by_hand(model, CLEAN, {path: lambda _: other})
    assert torch.equal(run(model, CLEAN, pc.patch(site, model.activations(OTHER, site))), expected)


def test_gradients_do_not_pass_what_is_replaced() -> None:
    model = loaded(GPT2)
    before = model.module.get_submodule("transformer.h.0.mlp.c_fc").weight
    with model.intervene(pc.patch("mlp.0", model.activations(OTHER, "mlp.0"), [0, 1, 2, 3, 4])):
        loss = call(model.module, model.inputs(CLEAN))[0].square().sum()
        some = torch.autograd.grad(loss, before)[0]  # type: ignore[arg-type]
    with model.intervene(pc.patch("mlp.0", model.activations(OTHER, "mlp.0"))):
        loss = call(model.module, model.inputs(CLEAN))[0].square().sum()
        none = torch.autograd.grad(loss, before)[0]  # type: ignore[arg-type]
    assert some.any() and not none.any()


# Attention probabilities ------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [GPT2, VIT], ids=str)
@pytest.mark.parametrize("positions", [None, [1, -1]], ids=str)
def test_a_pattern_has_its_heads_first(architecture: Architecture, positions: list[int] | None) -> None:
    model = loaded(architecture)
    inputs = model.inputs(BATCH) if architecture is GPT2 else architecture.inputs()
    plain = model.activations(inputs, "pattern.0").clone()
    size = plain.shape[-1]
    torch.manual_seed(0)
    other = torch.rand(HEADS, size, size).softmax(-1)
    rows = list(range(size)) if positions is None else positions

    def patched(where: str | pc.Neurons, source: Any) -> torch.Tensor:
        with model.intervene(pc.patch(where, source, positions)):
            return model.activations(inputs, "pattern.0").clone()

    expected = plain.clone()
    expected[:, :, rows] = other[:, rows]
    for source in (other, other.expand_as(plain), {"pattern.0": other, "pattern.9": torch.ones(1)}):
        assert torch.equal(patched("pattern.0", source), expected)
    expected[:, [1, 2]] = plain[:, [1, 2]]
    for source in (other, other[[3, 0]]):
        assert torch.equal(patched(pc.Neurons({"pattern.0": [3, 0]}), source), expected)
    shapes = rf"are \[4, {size}, 2\], but there it computes \[., 4, {size}, {size}\]: .* in \[4, {size}, {size}\]"
    with pytest.raises(DataError, match=f"to put at pattern.0 {shapes} for every example"):
        patched("pattern.0", other[..., :2])


def test_the_pattern_of_another_text() -> None:
    model = loaded(LLAMA)
    source = model.activations(OTHER, "pattern.*")
    with model.intervene(pc.patch(list(source), source)):
        inside = model.activations(CLEAN, "pattern.*")
    assert len(source) == LAYERS and source["pattern.0"].shape == (HEADS, 6, 6)
    assert all(torch.equal(inside[name].clone(), source[name].clone()) for name in source)
    assert not torch.allclose(run(model, CLEAN, pc.patch(list(source), source)), run(model, CLEAN), rtol=1e-3)


# As a value -------------------------------------------------------------------------------------------


def test_it_is_a_value() -> None:
    model = loaded(GPT2)
    source = model.activations(OTHER, "mlp.0").clone()
    made, same = pc.patch("mlp.0", source, [1]), pc.patch("mlp.0", {"mlp.0": source.clone()}, (1,))
    assert made == same and made != pc.patch("mlp.0", source) and made != pc.patch("mlp.1", source, [1])
    assert made != pc.patch("mlp.0", source + 1, [1]) and made != pc.patch(pc.Neurons({"mlp.0": [1]}), source, [1])
    assert made != pc.patch("mlp.0", source[:2], [1]) and made != "mlp.0"
    expected = run(model, CLEAN, made)
    source.zero_()
    assert made == same and torch.equal(run(model, CLEAN, made), expected)
    assert torch.equal(run(model, CLEAN, pc.patch([], {})), run(model, CLEAN))


def test_it_acts_in_order_with_the_others() -> None:
    model = loaded(GPT2)
    source = model.activations(OTHER, "mlp.0")
    patched, silent = pc.patch("mlp.0", source), pc.ablate(pc.Neurons({"mlp.0": [3]}))
    with model.intervene(patched, silent):
        seen = model.activations(CLEAN, "mlp.0")
    assert not seen[:, 3].any() and torch.equal(seen[:, 4:], source[:, 4:])
    with model.intervene(silent, patched):
        assert torch.equal(model.activations(CLEAN, "mlp.0").clone(), source.clone())


# Errors -----------------------------------------------------------------------------------------------


def test_what_does_not_fit() -> None:
    model = loaded(GPT2)
    source = model.activations(OTHER, "mlp.0")
    words = (
        r"the activations to put at mlp\.0 are \[5, 24\], but there it computes \[1, 6, 24\]: give them in this shape"
    )
    for given, message in (
        (source[:5], words),
        (source[:, :3], r"are \[6, 3\], but"),
        (source[0], r"are \[24\], but .* or in \[6, 24\] for every example alike"),
        (source.expand(2, -1, -1), r"are \[2, 6, 24\], but"),
    ):
        with pytest.raises(DataError, match=message):
            run(model, CLEAN, pc.patch("mlp.0", given))
    neurons = pc.Neurons({"mlp.0": [4, 5]})
    with pytest.raises(DataError, match=r"are \[6, 3\], but"):
        run(model, CLEAN, pc.patch(neurons, source[:, :3]))
    for position in (6, -7):
        with pytest.raises(DataError, match=rf"there is no position {position} at mlp\.0; there are 6"):
            run(model, CLEAN, pc.patch("mlp.0", source, [0, position]))
    assert torch.equal(run(model, CLEAN), run(loaded(GPT2), CLEAN))


def test_what_is_not_there() -> None:
    model = loaded(GPT2)
    source = model.activations(OTHER, "mlp.0")
    with pytest.raises(UnknownName, match=r"no site is called 'mlp\.7'\. The nearest: mlp\.[01], mlp\.[01]"):
        pc.patch("mlp.7", source).edits(model)
    with pytest.raises(UnknownName, match=r"mlp\.0:24 does not exist: mlp\.0 has neurons 0 to 23"):
        pc.patch(pc.Neurons({"mlp.0": [24]}), source).edits(model)
    with pytest.raises(UnknownName, match=r"no site of the source is called 'mlp\.1'\. The nearest: mlp\.0"):
        pc.patch(["mlp.0", "mlp.1"], {"mlp.0": source})
    custom = f"module:{GPT2.sites['mlp.0'].module}"
    with pytest.raises(UnknownName, match=r"h\.0\.mlp\.c_proj:30 does not exist"):
        run(model, CLEAN, pc.patch(pc.Neurons({custom: [30]}), source))


def test_what_it_does_not_take() -> None:
    source = torch.zeros(2, 24)
    for made, message in (
        (lambda: pc.patch(["mlp.0", "mlp.1"], source), "one tensor for one site, not for 2: give a mapping"),
        (lambda: pc.patch(["mlp.0", "mlp.0"], {"mlp.0": source}), r"is given a site twice: mlp\.0"),
        (lambda: pc.patch([3], source), "patch.. takes Neurons or sites, .* not 3"),  # type: ignore[list-item]
        (lambda: pc.patch(3, source), "patch.. takes Neurons or sites, .* not 3"),  # type: ignore[arg-type]
        (lambda: pc.patch("mlp.0", "zero"), r"takes a tensor for mlp\.0, not str"),  # type: ignore[arg-type]
        (lambda: pc.patch("mlp.0", source.long()), r"takes activations for mlp\.0, not a tensor of torch\.int64"),
        (lambda: pc.patch("mlp.0", source / 0), r"to put at mlp\.0 hold a NaN or an infinity"),
        (lambda: pc.patch("mlp.0", source, 3), r"positions=\.\.\.\) is a list of token indices, not 3"),  # type: ignore[arg-type]
        (lambda: pc.patch("mlp.0", source, [1.0]), r"is a list of token indices, not \[1\.0\]"),  # type: ignore[list-item]
        (lambda: pc.patch("mlp.0", source, "last"), "is .prompt., .generated. or token indices, not 'last'"),  # type: ignore[arg-type]
        (lambda: pc.patch("mlp.0", source, [True]), r"is a list of token indices, not \[True\]"),
    ):
        with pytest.raises(DataError, match=message):
            made()
