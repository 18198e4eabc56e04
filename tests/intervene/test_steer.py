"""`steer`: what is added, and what is taken out, beside vectors added and projected by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from tests.architectures import BERT, GPT2, LLAMA, VIT, Architecture, tokenizer
from tests.intervene.by_hand import changing, chosen
from tests.raw import assert_same, call
from tests.zoo import by_title
from torch import nn

import patchclamp as pc
from patchclamp.errors import DataError, UnknownName

VECTORS = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)


@cache
def loaded(architecture: Architecture) -> pc.Model:
    return pc.load(architecture.build(), tokenizer=tokenizer())


def projected(vectors: np.ndarray, strength: float = 1.0) -> Callable[[torch.Tensor], torch.Tensor]:
    """Takes the component in the span out, by least squares: `x - strength * V (V^+ x)`."""
    span = vectors.astype(np.float64).T
    projector = torch.from_numpy(span @ np.linalg.pinv(span, rcond=1e-5))

    def edit(tensor: torch.Tensor) -> torch.Tensor:
        return (tensor.double() - strength * tensor.double() @ projector).to(tensor.dtype)

    return edit


def added(vector: np.ndarray) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor + torch.from_numpy(vector).to(tensor.dtype)


def longer(vector: np.ndarray, strength: float) -> Callable[[torch.Tensor], torch.Tensor]:
    unit = torch.from_numpy(vector / np.linalg.norm(vector))
    return lambda tensor: tensor + strength * tensor.square().sum(-1, keepdim=True).sqrt() * unit


WAYS: list[tuple[str, dict[str, Any], Callable[[torch.Tensor], torch.Tensor]]] = [
    ("add", {}, added(VECTORS.sum(0))),
    ("strength", {"strength": -2.5}, added(-2.5 * VECTORS.sum(0))),
    ("relative", {"strength": 0.3, "relative": True}, longer(VECTORS.sum(0), 0.3)),
    ("project", {"how": "project_out"}, projected(VECTORS)),
    ("mirror", {"how": "project_out", "strength": 2.0}, projected(VECTORS, 2.0)),
]
ways = pytest.mark.parametrize(("options", "edit"), [way[1:] for way in WAYS], ids=[way[0] for way in WAYS])


@torch.no_grad()
def run(model: pc.Model, inputs: dict[str, Any], *changes: Any) -> torch.Tensor:
    with model.intervene(*changes):
        return call(model.module, inputs)


@ways
@pytest.mark.parametrize("architecture", [GPT2, LLAMA, BERT], ids=str)
@pytest.mark.parametrize("where", [{}, {"positions": [0, -1]}, {"examples": [2]}], ids=str)
def test_what_a_stream_becomes(architecture: Architecture, options: Any, edit: Any, where: dict[str, Any]) -> None:
    model, inputs = loaded(architecture), architecture.inputs("left")
    mask = inputs["attention_mask"].bool()
    rows = chosen(mask, **where) if where else torch.ones_like(mask)
    for name in ("resid_post.0", "resid_mid.1"):
        got = run(model, inputs, pc.steer(pc.Directions({name: VECTORS}), **options, **where))
        with torch.no_grad(), changing(model.module, {model.site(name): edit}, lambda _: rows):
            expected = call(model.module, inputs)
        assert_same(got[mask], expected[mask])
        assert not torch.allclose(got[mask], run(model, inputs)[mask], rtol=1e-3)


def test_adding_is_what_a_bias_does() -> None:
    model, inputs = loaded(GPT2), GPT2.inputs("left")
    edited: Any = copy.deepcopy(model.module)
    with torch.no_grad():
        edited.transformer.h[1].mlp.c_proj.bias += 1.5 * torch.from_numpy(VECTORS[:2].sum(0))
    directions = pc.Directions({"resid_post.1": VECTORS}, ["a", "b", "c"])
    assert_same(run(model, inputs, pc.steer(directions.only("b", "a"), 1.5)), call(edited, inputs).detach())


def test_projecting_out_is_what_a_projected_weight_does() -> None:
    # What the MLP of the last block reads no longer has the directions in it.
    model, inputs = loaded(LLAMA), LLAMA.inputs("right")
    vectors = np.random.default_rng(1).normal(size=(2, 24)).astype(np.float32)
    edited: Any = copy.deepcopy(model.module)
    with torch.no_grad():
        weight = edited.model.layers[1].mlp.down_proj.weight
        weight.copy_(projected(vectors)(weight))
    got = run(model, inputs, pc.steer(pc.Directions({"mlp.1": vectors}), how="project_out"))
    assert_same(got, call(edited, inputs).detach())


@pytest.mark.parametrize(
    "vectors",
    [
        np.stack([VECTORS[0], VECTORS[0]]),
        np.stack([VECTORS[0], -3.0 * VECTORS[0], 0.0 * VECTORS[0]]),
        np.stack([VECTORS[0], VECTORS[1], VECTORS[0] + 0.5 * VECTORS[1]]),
        np.random.default_rng(2).normal(size=(20, 16)).astype(np.float32),
    ],
    ids=["twice", "opposite", "a sum", "more than the width"],
)
def test_directions_that_overlap_are_taken_out_once(vectors: np.ndarray) -> None:
    model, inputs = loaded(GPT2), GPT2.inputs("right")
    change = pc.steer(pc.Directions({"resid_post.0": vectors}), how="project_out")
    before = model.activations(inputs, "resid_post.0").clone()
    with model.intervene(change):
        inside = model.activations(inputs, "resid_post.0").clone()
    torch.testing.assert_close(inside, projected(vectors)(before), rtol=1e-4, atol=1e-5)
    rank = np.linalg.matrix_rank(vectors, tol=1e-4)
    removed = (before - inside).flatten(0, 1).double()
    assert torch.linalg.matrix_rank(removed, tol=1e-4) == rank


def test_every_kind_of_site() -> None:
    cases = [("Mixtral", "expert.1.2", 24), ("nn.LSTM", "recurrent.recurrent.1", 6), ("GPT-2", "pattern.0", 4)]
    cases += [("ConvNeXt", "stages_1.resid_post.1", 12), ("T5", "decoder.cross_attn.0", 12)]
    for title, name, size in cases:
        model, inputs = pc.load(by_title(title).build()), by_title(title).inputs("right")
        vector = np.linspace(-1.0, 1.0, size)
        before, axis = model.activations(inputs, name).clone(), -3 if name.startswith("pattern") else -1
        with model.intervene(pc.steer(pc.Directions({name: vector}), 0.5)):
            inside = model.activations(inputs, name).clone()
        difference = (inside - before).movedim(axis, -1)
        if name.startswith("recurrent"):
            continue  # a state that feeds back; test_where_recurrent.py says it for time steps
        torch.testing.assert_close(difference, difference.new_tensor(0.5 * vector).expand_as(difference))
    network = nn.LSTM(3, 4, batch_first=True)
    model, x = pc.load(network), torch.randn(2, 5, 3)
    cell = nn.LSTMCell(3, 4)
    cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh = network.all_weights[0]
    state, found = (torch.zeros(2, 4), torch.zeros(2, 4)), []
    for time in range(5):
        hidden, memory = cell(x[:, time], state)
        state = hidden + torch.tensor([0.5, 0.0, -1.0, 0.0]), memory
        found.append(state[0])
    with model.intervene(pc.steer(pc.Directions({"recurrent.0": [0.5, 0.0, -1.0, 0.0]}))):
        assert_same(network(x)[0].detach(), torch.stack(found, 1).detach())


@ways
def test_gradients_are_those_of_the_vectors_added_by_hand(options: Any, edit: Any) -> None:
    model, inputs = pc.load(GPT2.build()), GPT2.inputs("left")
    mask, name = inputs["attention_mask"].bool(), "resid_post.0"
    table: Any = model.module.get_submodule("transformer.wte")
    with model.intervene(pc.steer(pc.Directions({name: VECTORS}), **options, positions=[0])):
        got = torch.autograd.grad(call(model.module, inputs)[mask].square().sum(), table.weight)[0]
    with changing(model.module, {model.site(name): edit}, lambda _: chosen(mask, [0])):
        expected = torch.autograd.grad(call(model.module, inputs)[mask].square().sum(), table.weight)[0]
    assert_same(got, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_type_stays(dtype: torch.dtype) -> None:
    model = pc.load(VIT.build(dtype))
    inputs = VIT.inputs(dtype=dtype)
    before = model.activations(inputs, "resid_post.0").clone()
    for options, edit in ((way[1], way[2]) for way in WAYS):
        with model.intervene(pc.steer(pc.Directions({"resid_post.0": VECTORS}), **options)):
            inside = model.activations(inputs, "resid_post.0").clone()
        assert inside.dtype == dtype
        tolerance = 1e-6 if dtype == torch.float64 else 32 * torch.finfo(dtype).eps
        torch.testing.assert_close(inside.double(), edit(before.double()), rtol=tolerance, atol=4 * tolerance)


def test_it_is_a_value() -> None:
    directions = pc.Directions({"resid_post.0": VECTORS})
    made = pc.steer(directions, 2.0, positions=[1])
    assert made == pc.steer(pc.Directions({"resid_post.0": VECTORS.copy()}), 2, positions=(1,)) == copy.deepcopy(made)
    for other in (
        pc.steer(directions, 2.5, positions=[1]),
        pc.steer(directions, 2.0),
        pc.steer(directions, 2.0, positions=[1], how="project_out"),
        pc.steer(directions, 2.0, positions=[1], relative=True),
        pc.steer(pc.Directions({"resid_post.1": VECTORS}), 2.0, positions=[1]),
        "steer",
    ):
        assert made != other


def test_controls_are_as_long_and_the_same_for_a_seed() -> None:
    made = pc.steer(pc.Directions({"a": VECTORS, "b": 3 * VECTORS}, ["x", "y", "z"]), 1.5, positions=[0])
    first, same, other = (made.at_random(np.random.default_rng(seed)) for seed in (4, 4, 5))
    assert first == same != other and (first.strength, first.where) == (made.strength, made.where)
    for site in ("a", "b"):
        lengths = np.linalg.norm(made.directions[site], axis=1)
        np.testing.assert_allclose(np.linalg.norm(first.directions[site], axis=1), lengths, rtol=1e-5)
        cosines = (first.directions[site] * made.directions[site]).sum(1) / lengths**2
        assert (np.abs(cosines) < 0.95).all()


def test_what_it_does_not_take() -> None:
    directions = pc.Directions({"resid_post.0": VECTORS})
    for make, message in (
        (lambda: pc.steer({"resid_post.0": VECTORS}), r"steer takes pc\.Directions\(.*, not dict"),  # type: ignore[arg-type]
        (lambda: pc.steer(directions, float("nan")), "takes a finite strength, not nan"),
        (lambda: pc.steer(directions, "2"), "takes a finite strength, not '2'"),  # type: ignore[arg-type]
        (lambda: pc.steer(directions, True), "takes a finite strength, not True"),
        (lambda: pc.steer(directions, how="remove"), r'is "add" or "project_out", not \'remove\''),  # type: ignore[arg-type]
        (lambda: pc.steer(directions, relative=True, how="project_out"), r"relative=True\) is for how=\"add\""),
        (
            lambda: pc.steer(pc.Directions({"mlp.0": [[1.0, 2.0], [-1.0, -2.0]]}), relative=True),
            r"the directions at mlp\.0 add up to length 0",
        ),
    ):
        with pytest.raises(DataError, match=message):
            make()
    model = loaded(GPT2)
    for made, kind, message in (
        (pc.steer(pc.Directions({"resid.0": VECTORS})), UnknownName, "no site is called 'resid.0'"),
        (pc.steer(pc.Directions({"mlp.0": VECTORS})), DataError, r"mlp\.0 has 24 neurons; the directions .* have 16"),
        (
            pc.steer(pc.Directions({"module:transformer.h.0.mlp.act": VECTORS})),
            DataError,
            r"act has 24 neurons; the directions there have 16",
        ),
        (
            pc.steer(pc.Directions({"resid_post.0": VECTORS, "blocks.0.hook_resid_post": VECTORS})),
            DataError,
            r"steer\(\) is given directions twice at resid_post\.0, once as blocks\.0\.hook_resid_post",
        ),
    ):
        with pytest.raises(kind, match=message):
            run(model, GPT2.inputs(), made)
    alias = pc.steer(pc.Directions({"blocks.0.hook_resid_post": VECTORS}))
    assert torch.equal(run(model, GPT2.inputs(), alias), run(model, GPT2.inputs(), pc.steer(directions)))
