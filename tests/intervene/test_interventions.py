"""Interventions: equal to edited weights, seen by every call, and gone without a trace afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pytest
import torch
from tests.architectures import (
    ALL,
    BERT,
    GPT2,
    LLAMA,
    MAMBA,
    SEQUENTIAL,
    T5,
    T5_GATED,
    TEXTS,
    TRANSFORMERS,
    Architecture,
    ids_of,
    tokenizer,
)
from tests.raw import assert_same, call
from torch import nn

import patchclamp as pc
from patchclamp.errors import DataError
from patchclamp.intervene import Intervention

every = pytest.mark.parametrize("architecture", ALL, ids=str)
transformers = pytest.mark.parametrize("architecture", TRANSFORMERS, ids=str)


@cache
def loaded(architecture: Architecture) -> pc.Model:
    """One model for all tests that leave it as it is."""
    return pc.load(architecture.build(), tokenizer=tokenizer())


def run(architecture: Architecture, *interventions: Intervention) -> torch.Tensor:
    """What the user's own call of the module gives under interventions."""
    model = loaded(architecture)
    with model.intervene(*interventions) as inside, torch.no_grad():
        assert inside is model
        return call(model.module, architecture.inputs("left"))


def some_neurons(architecture: Architecture) -> pc.Neurons:
    """Two neurons at every site that has an output projection, with a column of means."""
    sites = [name for name in architecture.sites if ".gate." not in f".{name}"]
    frame = pl.DataFrame({"site": [name for name in sites for _ in range(2)], "index": [1, 4] * len(sites)})
    return pc.Neurons.from_polars(frame.with_columns(mean=pl.int_range(pl.len()) * 0.3 - 0.8))


def edited(architecture: Architecture, neurons: pc.Neurons, factor: float, values: Sequence[float]) -> nn.Module:
    """The network with weights that do the same: `factor` times what the neuron writes, plus a constant."""
    module = architecture.build()
    for (site, index), value in zip(neurons, values, strict=True):
        projection: Any = module.get_submodule(architecture.sites[site].module)
        with torch.no_grad():
            rows = projection.weight.T if isinstance(projection, nn.Linear) else projection.weight
            written = rows[index].clone()
            if projection.bias is None:
                projection.bias = nn.Parameter(torch.zeros_like(written))
            projection.bias.add_(value * written)
            rows[index] = factor * written
    return module


class Case(NamedTuple):
    """An intervention and what it does: `factor * activation + value`."""

    name: str
    make: Callable[[pc.Neurons], Intervention]
    factor: float
    values: Callable[[pc.Neurons], Sequence[float]]


CASES = [
    Case("ablate", pc.ablate, 0.0, lambda neurons: [0.0] * len(neurons)),
    Case("mean", lambda neurons: pc.ablate(neurons, to="mean"), 0.0, lambda neurons: neurons["mean"].to_list()),
    Case("clamp", lambda neurons: pc.clamp(neurons, 1.7), 0.0, lambda neurons: [1.7] * len(neurons)),
    Case(
        "clamp-each",
        lambda neurons: pc.clamp(neurons, [0.1 * number for number in range(len(neurons))]),
        0.0,
        lambda neurons: [0.1 * number for number in range(len(neurons))],
    ),
    Case("scale", lambda neurons: pc.scale(neurons, -2.5), -2.5, lambda neurons: [0.0] * len(neurons)),
]


# What they do -----------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_users_own_call_gives_what_edited_weights_give(architecture: Architecture, case: Case) -> None:
    neurons = some_neurons(architecture)
    expected = call(edited(architecture, neurons, case.factor, case.values(neurons)), architecture.inputs("left"))
    got = run(architecture, case.make(neurons))
    assert_same(got, expected.detach())
    assert not torch.allclose(got, run(architecture), rtol=1e-3)


@pytest.mark.parametrize("architecture", [LLAMA, T5_GATED], ids=str)
def test_a_gate_is_changed_before_the_product(architecture: Architecture) -> None:
    # Neither network has biases here: without its row of the gate a neuron is silent.
    gates = [name for name in architecture.sites if name.startswith("gate.") or ".gate." in name]
    neurons = pc.Neurons({name: [2, 5] for name in gates})
    for intervention, role, factor in ((pc.ablate(neurons), "gate", 0.0), (pc.scale(neurons, 3.0), "up", 3.0)):
        module = architecture.build()
        for name in gates:
            path = architecture.sites[name.replace("gate", "mlp")].reads[role]
            with torch.no_grad():
                module.get_submodule(path).weight[[2, 5]] *= factor  # type: ignore[operator,index]
        assert_same(run(architecture, intervention), call(module, architecture.inputs("left")).detach())


@every
def test_reading_inside_shows_the_changed_activation(architecture: Architecture) -> None:
    model, inputs = loaded(architecture), architecture.inputs()
    name = list(architecture.sites)[-1]
    before = model.activations(inputs, name)
    with model.intervene(pc.clamp(pc.Neurons({name: [3, 1]}), [2.0, -1.0])):
        inside = model.activations(inputs, name)
    assert (inside[..., 3] == 2).all() and (inside[..., 1] == -1).all()
    others = [index for index in range(inside.shape[-1]) if index not in (1, 3)]
    assert torch.equal(inside[..., others], before[..., others])


def test_they_act_in_order_and_nest() -> None:
    neurons = pc.Neurons({"mlp.1": [3]})
    clamp, scale = pc.clamp(neurons, 2.0), pc.scale(neurons, 3.0)
    model = loaded(BERT)

    def seen() -> float:
        values = model.activations("the cat", "mlp.1")[:, 3].unique()
        return float(values) if len(values) == 1 else float("nan")

    with model.intervene(clamp, scale):
        assert seen() == 6
    with model.intervene(scale, clamp):
        assert seen() == 2
    with model.intervene(clamp):
        with model.intervene(scale):
            assert seen() == 6
            with model.intervene(pc.ablate(neurons)):
                assert seen() == 0
            assert seen() == 6
        assert seen() == 2
    with model.intervene(clamp, pc.clamp(pc.Neurons({"mlp.1": [4]}), 5.0)):
        assert seen() == 2 and (model.activations("the cat", "mlp.1")[:, 4] == 5).all()
    assert seen() != 2


def test_nothing_to_do_changes_nothing() -> None:
    plain = run(BERT)
    assert torch.equal(run(BERT, pc.ablate(pc.Neurons())), plain)
    assert torch.equal(run(BERT, pc.scale(pc.Neurons({"mlp.0": [1]}), 1.0)), plain)


@pytest.mark.parametrize("make", [pc.ablate, lambda n: pc.clamp(n, 1.0), lambda n: pc.scale(n, 0)], ids=str)
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_activation_does_not_survive(make: Callable[[pc.Neurons], Intervention], broken: float) -> None:
    module = SEQUENTIAL.build()
    module.get_submodule("0").bias.data[4] = broken  # type: ignore[union-attr,operator]
    model, inputs = pc.load(module), SEQUENTIAL.inputs()
    assert not call(module, inputs).isfinite().all()
    with model.intervene(make(pc.Neurons({"mlp.0": [4]}))):
        assert call(module, inputs).isfinite().all()


def test_means_of_a_recording() -> None:
    model = loaded(BERT)
    recording = pc.record(model, TEXTS, sites="mlp.*", summaries=[pc.Moments()], progress=False)
    neurons = pc.Neurons({"mlp.1": [7, 2], "mlp.0": [0]})
    means = [float(recording[site].moments.mean[index]) for site, index in neurons]
    rows = torch.cat(model.activations(TEXTS, "mlp.1"))
    assert means[0] == pytest.approx(float(rows[:, 7].mean()), abs=1e-5)
    got = run(BERT, pc.ablate(neurons, to="mean", recording=recording))
    assert torch.equal(got, run(BERT, pc.clamp(neurons, means)))


@transformers
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_stays_half(architecture: Architecture, dtype: torch.dtype) -> None:
    module = architecture.build(dtype)
    model, inputs = pc.load(module), architecture.inputs(dtype=dtype)
    sites = list(model.sites)
    neurons = pc.Neurons({name: [1, 3] for name in sites})
    for intervention in (pc.ablate(neurons), pc.clamp(neurons, 0.3), pc.scale(neurons, 0.5)):
        with model.intervene(intervention), torch.no_grad():
            assert call(module, inputs).dtype == (torch.float32 if architecture is MAMBA else dtype)
            # Mamba keeps its residual stream in float32.
            kept = {each.dtype for name, each in model.activations(inputs, sites).items() if "resid" not in name}
            streams = {each.dtype for name, each in model.activations(inputs, sites).items() if "resid" in name}
            assert kept == {dtype} and (architecture is MAMBA or streams == {dtype})


@transformers
def test_gradients_flow_as_through_edited_weights(architecture: Architecture) -> None:
    neurons = some_neurons(architecture)
    inputs = architecture.inputs()
    model = pc.load(architecture.build())
    other = edited(architecture, neurons, 0.5, [0.0] * len(neurons))
    with model.intervene(pc.scale(neurons, 0.5)):
        call(model.module, inputs).square().sum().backward()
    call(other, inputs).square().sum().backward()
    compared = 0
    projections = {place.module for place in architecture.sites.values()}
    theirs = {path: each.grad for path, each in other.named_parameters()}
    for path, mine in model.module.named_parameters():
        expected = theirs[path]
        if path.rpartition(".")[0] in projections or expected is None:
            continue
        assert mine.grad is not None
        assert_same(mine.grad, expected)
        compared += 1
    assert compared > 10


@transformers
@pytest.mark.parametrize("kind", ["resid_pre", "resid_mid", "resid_post"])
def test_gradients_flow_through_the_residual_stream(architecture: Architecture, kind: str) -> None:
    module = architecture.build()
    inputs = architecture.inputs()
    model = pc.load(module)
    if kind == "resid_mid" and not architecture.middle:
        assert kind not in {site.kind for site in model.sites.values()}
        return
    names = [site.name for site in model.select(f"{kind}.0")]
    table: Any = next(each for each in module.parameters() if each.ndim >= 2)
    gradients = []
    for factor in (1.0, 0.0):
        with model.intervene(pc.scale(pc.Neurons({name: range(16) for name in names}), factor)):
            gradients.append(torch.autograd.grad(call(module, inputs).square().sum(), table)[0])
    plain = torch.autograd.grad(call(module, inputs).square().sum(), table)[0]
    assert_same(gradients[0], plain)
    assert plain.any() and not torch.allclose(gradients[1], plain)


def test_a_silent_neuron_learns_nothing() -> None:
    model = pc.load(BERT.build())
    with model.intervene(pc.ablate(pc.Neurons({"mlp.0": [5]}))):
        call(model.module, BERT.inputs()).square().sum().backward()
    gradient = model.module.get_submodule("encoder.layer.0.intermediate.dense").weight.grad
    assert isinstance(gradient, torch.Tensor)
    assert not gradient[5].any() and gradient[4].any()


# Generating --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [GPT2, LLAMA, T5], ids=str)
@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no-cache"])
def test_generating_under_an_intervention(architecture: Architecture, cached: bool) -> None:
    neurons = some_neurons(architecture)
    ids = torch.tensor([ids_of("the cat sat on")])
    options: dict[str, Any] = {
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "do_sample": False,
        "use_cache": cached,
        "output_scores": True,
        "return_dict_in_generate": True,
    }

    def scores(module: Any) -> torch.Tensor:
        return torch.stack(module.generate(ids, attention_mask=torch.ones_like(ids), **options).scores)

    model = loaded(architecture)
    plain = scores(model.module)
    with model.intervene(pc.clamp(neurons, 1.7)):
        inside = scores(model.module)
    expected = scores(edited(architecture, neurons, 0.0, [1.7] * len(neurons)))
    assert_same(inside.nan_to_num(neginf=0.0), expected.nan_to_num(neginf=0.0))
    assert not torch.allclose(inside[0], plain[0], rtol=1e-3)
    assert torch.equal(scores(model.module), plain)


def test_the_helper_generates_under_an_intervention() -> None:
    model = loaded(GPT2)
    silent = pc.ablate(model.neurons(["mlp.*", "attn.*"]))
    plain = model.generate("the cat", max_new_tokens=8)
    with model.intervene(silent):
        changed = model.generate("the cat", max_new_tokens=8)
    assert changed != plain and model.generate("the cat", max_new_tokens=8) == plain


# As values ---------------------------------------------------------------------------------------------


def test_what_they_do_not_take() -> None:
    neurons = pc.Neurons({"mlp.0": [1, 2]})
    for make in (pc.ablate, lambda n: pc.clamp(n, 1.0), lambda n: pc.scale(n, 1.0)):
        with pytest.raises(DataError, match=r"takes Neurons, as in pc\.Neurons.*, not dict"):
            make({"mlp.0": [1]})  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r'ablate\(to=\.\.\.\) is "zero", "mean" or "resample", not \'median\''):
        pc.ablate(neurons, to="median")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r'ablate\(to="mean"\) needs the means: give recording='):
        pc.ablate(neurons, to="mean")
    unknown = pc.Neurons.from_polars(neurons.to_polars().with_columns(mean=pl.Series([1.0, None])))
    with pytest.raises(DataError, match=r"the mean of a neuron of mlp\.0 is not known"):
        pc.ablate(unknown, to="mean")
    with pytest.raises(DataError, match=r"one value, or one per neuron \(2\); there are 3"):
        pc.clamp(neurons, [1.0, 2.0, 3.0])
    for value in (float("nan"), float("inf"), [0.0, float("nan")], None):
        with pytest.raises(DataError, match="finite"):
            pc.clamp(neurons, value)  # type: ignore[arg-type]
    for value in ("a", [[1], [2, 3]], 1j):
        with pytest.raises(DataError, match=r"clamp\(\) takes one number, or one per neuron, not"):
            pc.clamp(neurons, value)  # type: ignore[arg-type]
    for factor in (float("nan"), float("inf"), "2", None, True, [1.0]):
        with pytest.raises(DataError, match=r"scale\(\) takes a finite number, not"):
            pc.scale(neurons, factor)  # type: ignore[arg-type]


def test_numbers_of_numpy_are_numbers() -> None:
    neurons = pc.Neurons({"mlp.0": [1, 2]})
    assert pc.scale(neurons, np.float32(0.5)) == pc.scale(neurons, 0.5)  # type: ignore[arg-type]
    assert pc.scale(neurons, np.int64(2)) == pc.scale(neurons, 2)  # type: ignore[arg-type]
    assert pc.clamp(neurons, np.array([1, 2])) == pc.clamp(neurons, [1.0, 2.0])  # type: ignore[arg-type]


def test_interventions_are_values() -> None:
    neurons = pc.Neurons({"mlp.0": [1, 2]})
    change = pc.clamp(neurons, [1.0, 2.0])
    assert change == pc.clamp(neurons, [1.0, 2.0]) == copy.deepcopy(change)
    assert change != pc.clamp(neurons, [1.0, 3.0]) and change != pc.ablate(neurons) and change != "clamp"
    assert pc.ablate(neurons) != pc.scale(neurons, 0) and "clamp" in repr(change) and "mlp.0:1" in repr(change)
    with pytest.raises(AttributeError):
        change.factor = 2.0  # type: ignore[misc]
    # One value serves any number of models, and holds none of them.
    for architecture in (BERT, GPT2):
        model = loaded(architecture)
        with model.intervene(change):
            assert (model.activations("the cat", "mlp.0")[:, 2] == 2).all()
