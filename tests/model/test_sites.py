"""Each site is what it says: proofs on every family, against plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from tests.architectures import (
    ALL,
    BERT,
    BLOOM,
    GEMMA2,
    GPT2,
    HEADS,
    LAYERS,
    LLAMA,
    NEURONS,
    OPT,
    T5,
    T5_GATED,
    TRANSFORMERS,
    VIT,
    WIDTH,
    Architecture,
    Classifier,
    Place,
    bert,
)
from tests.raw import assert_same, plain_weights, watching
from torch import nn

import patchclamp as pc
from patchclamp.errors import ModelError, UnknownName

every = pytest.mark.parametrize("architecture", ALL, ids=str)
gated = pytest.mark.parametrize("architecture", [LLAMA, T5_GATED, GEMMA2], ids=str)
both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
both_sides = pytest.mark.parametrize("side", ["left", "right"])

NONLINEARITY = {
    "relu": torch.relu,
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu_new": lambda x: nn.functional.gelu(x, approximate="tanh"),
}


@cache
def loaded(architecture: Architecture, dtype: torch.dtype = torch.float32) -> pc.Model:
    """One model for all tests that leave it as it is."""
    return pc.load(architecture.build(dtype))


def projected(architecture: Architecture, *kinds: str) -> Iterator[tuple[str, Place]]:
    """The sites whose neurons enter an output projection (or of the kinds)."""
    for name, place in architecture.sites.items():
        kind = name.split(".")[-2]
        if kind in kinds or (not kinds and kind != "gate"):
            yield name, place


# What a neuron writes ------------------------------------------------------------------------------


@every
@both_types
@both_sides
def test_recorded_neurons_times_output_weights_are_what_the_projection_gives(
    architecture: Architecture, dtype: torch.dtype, side: str
) -> None:
    model, inputs = loaded(architecture, dtype), architecture.inputs(side, dtype)
    module, places = model.module, dict(projected(architecture))
    with watching(module, [place.module for place in places.values()]) as seen:
        recorded = model.activations(inputs, list(places))
    for name, place in places.items():
        _, written = seen[place.module]
        weights = model.output_weights(name)
        assert weights.shape == (place.size, written.shape[-1])
        assert recorded[name].shape == (*written.shape[:-1], place.size)
        bias = plain_weights(module, place.module)[1]
        assert_same(recorded[name] @ weights + bias, written)


@every
@both_types
@both_sides
def test_without_a_neuron_the_output_lacks_what_that_neuron_wrote(
    architecture: Architecture, dtype: torch.dtype, side: str
) -> None:
    model, inputs = loaded(architecture, dtype), architecture.inputs(side, dtype)
    module, places = model.module, dict(projected(architecture))
    with watching(module, [place.module for place in places.values()]) as seen:
        recorded = model.activations(inputs, list(places))
        before = {name: seen[place.module][1] for name, place in places.items()}
    for name, place in places.items():
        # One that has something to say, and the last one.
        talking = int(recorded[name].abs().flatten(0, -2).amax(0).argmax())
        assert recorded[name][..., talking].any()
        for neuron in {talking, place.size - 1}:
            with (
                watching(module, [place.module]) as seen,
                model.intervene(pc.ablate(pc.Neurons({name: [neuron]}))),
                torch.no_grad(),
            ):
                module(**inputs)
            change = seen[place.module][1] - before[name]
            expected = -recorded[name][..., neuron, None] * model.output_weights(name)[neuron]
            # In float32 the difference of two outputs is as exact as these are.
            scale = float(before[name].abs().max()) if dtype == torch.float32 else 1e-5
            torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("architecture", TRANSFORMERS, ids=str)
@both_types
def test_a_head_is_the_neurons_that_share_it(architecture: Architecture, dtype: torch.dtype) -> None:
    model, inputs = loaded(architecture, dtype), architecture.inputs(dtype=dtype)
    module = model.module
    for name, place in projected(architecture, "attn", "cross_attn"):
        site = model.site(name)
        assert site.heads == place.heads == HEADS
        assert [index for head in range(HEADS) for index in site.head(head)] == list(range(place.size))
        for head in (0, HEADS - 1):
            with watching(module, [place.module]) as seen:
                recorded = model.activations(inputs, name)
                before = seen[place.module][1]
                with model.intervene(pc.ablate(pc.Neurons({name: site.head(head)}))), torch.no_grad():
                    module(**inputs)
                after = seen[place.module][1]
            rows = list(site.head(head))
            assert_same(before - recorded[..., rows] @ model.output_weights(name)[rows], after)


@pytest.mark.parametrize(
    ("architecture", "values", "heads_per_value"),
    [
        (BERT, "encoder.layer.{}.attention.self.value", 1),
        (LLAMA, "model.layers.{}.self_attn.v_proj", 2),
        (OPT, "decoder.layers.{}.self_attn.v_proj", 1),
        (T5, "encoder.block.{}.layer.0.SelfAttention.v", 1),
        (VIT, "layers.{}.attention.v_proj", 1),
    ],
    ids=str,
)
def test_a_head_reads_its_own_values(architecture: Architecture, values: str, heads_per_value: int) -> None:
    # Independent of the output projection: without the values of head 1, the neurons of head 1 are silent.
    module, inputs = architecture.build(), architecture.inputs()
    model = pc.load(module)
    name = "encoder.attn.1" if architecture is T5 else "attn.1"
    site = model.site(name)
    before = model.activations(inputs, name)
    projection = module.get_submodule(values.format(1))
    width = len(site.head(0))
    with torch.no_grad():
        for parameter in projection.parameters():
            parameter[width : 2 * width] = 0
    after = model.activations(inputs, name)
    silent = [index for head in range(heads_per_value) for index in site.head(heads_per_value + head)]
    others = [index for index in range(before.shape[-1]) if index not in silent]
    assert before[..., silent].abs().max() > 0 and not after[..., silent].any()
    torch.testing.assert_close(after[..., others], before[..., others])


def test_heads_that_are_not_there() -> None:
    model = loaded(BERT)
    with pytest.raises(UnknownName, match=rf"attn\.0 has heads 0 to {HEADS - 1}, not {HEADS}"):
        model.site("attn.0").head(HEADS)
    with pytest.raises(UnknownName, match="not -1"):
        model.site("attn.0").head(-1)
    with pytest.raises(UnknownName, match=r"mlp\.0 has no attention heads"):
        model.site("mlp.0").head(0)


# What a neuron reads --------------------------------------------------------------------------------


@every
@both_types
def test_input_weights_give_what_the_nonlinearity_is_given(architecture: Architecture, dtype: torch.dtype) -> None:
    model, inputs = loaded(architecture, dtype), architecture.inputs("left", dtype)
    module = model.module
    places = {name: place for name, place in architecture.sites.items() if place.reads}
    paths = {path for place in places.values() for path in place.reads.values()}
    with watching(module, paths) as seen:
        recorded = model.activations(inputs, list(places))
    for name, place in places.items():
        weights = model.input_weights(name)
        assert list(weights) == list(place.reads)
        before = {}
        for role, path in place.reads.items():
            given, returned = seen[path]
            assert weights[role].shape == (place.size, given.shape[-1])
            before[role] = given @ weights[role].T + plain_weights(module, path)[1]
            assert_same(before[role], returned)
        if place.activation is None:
            continue
        expected = NONLINEARITY[place.activation](before["in" if "in" in before else "gate"])
        expected = expected * before["up"] if "up" in before else expected
        got = recorded[name]
        if architecture is BLOOM:  # whose constants have eight digits
            got, expected = got.float(), expected.float()
        assert_same(got, expected.view_as(got))


@gated
@both_types
def test_gate_times_up_is_what_enters_the_projection(architecture: Architecture, dtype: torch.dtype) -> None:
    model, inputs = loaded(architecture, dtype), architecture.inputs(dtype=dtype)
    for name, place in projected(architecture, "mlp"):
        with watching(model.module, [place.reads["up"], place.module]) as seen:
            gate = model.activations(inputs, name.replace("mlp", "gate"))
        assert_same(gate * seen[place.reads["up"]][1], seen[place.module][0])


def test_weights_are_the_models_own_and_carry_no_gradient() -> None:
    model = loaded(GPT2)
    weights, projection = model.output_weights("mlp.0"), model.module.get_submodule("transformer.h.0.mlp.c_proj")
    assert isinstance(projection.weight, nn.Parameter)
    assert weights.data_ptr() == projection.weight.data_ptr() and not weights.requires_grad
    assert not model.input_weights("mlp.0")["in"].requires_grad


def test_weights_that_a_kind_does_not_have() -> None:
    model = loaded(LLAMA)
    with pytest.raises(ModelError, match=r"gate\.1 .* no output projection of its own; see mlp\.1"):
        model.output_weights("gate.1")
    with pytest.raises(ModelError, match=r"resid_post\.0 is of kind 'resid_post'"):
        model.output_weights("resid_post.0")
    with pytest.raises(ModelError, match=r"attn\.0 is of kind 'attn': no projection feeds its neurons one by one"):
        model.input_weights("attn.0")
    with pytest.raises(UnknownName, match=r"no site is called 'mlp\.7'.*mlp\.1"):
        model.output_weights("mlp.7")


# What is listed -------------------------------------------------------------------------------------


@every
def test_a_site_says_where_it_is(architecture: Architecture) -> None:
    model = loaded(architecture)
    for name, place in architecture.sites.items():
        site = model.sites[name]
        assert (site.name, site.size, site.activation) == (name, place.size, place.activation)
        assert site.kind == name.split(".")[-2].replace("cross_attn", "attn")
        assert site.layer == int(name.rsplit(".", 1)[1])
        assert (site.module, dict(site.reads), site.heads) == (place.module, dict(place.reads), place.heads)
        assert site.writes == (None if site.kind == "gate" else place.module)
    others = ("resid_pre", "resid_mid", "resid_post", "pattern", "conv")
    listed = {name for name, site in model.sites.items() if site.kind not in others}
    assert listed == set(architecture.sites)


@pytest.mark.parametrize("architecture", TRANSFORMERS, ids=str)
def test_sites_come_in_the_order_of_the_forward_pass(architecture: Architecture) -> None:
    expected = []
    for prefix in architecture.blocks:
        for layer in range(LAYERS):
            kinds = ["resid_pre", "pattern", "attn", "cross_pattern", "cross_attn", "mixer"]
            kinds += ["resid_mid", "gate", "mlp", "resid_post"]
            there = [f"{prefix}{kind}.{layer}" for kind in kinds]
            expected += [
                name
                for name in there
                if name.replace("pattern", "attn") in architecture.sites
                or ("resid" in name and (architecture.middle or "mid" not in name))
            ]
    sites = {name: site for name, site in loaded(architecture).sites.items() if site.kind != "conv"}
    assert list(sites) == expected
    assert {site.size for site in sites.values() if site.kind.startswith("resid")} == {WIDTH}
    assert {site.stack for site in sites.values()} == {prefix.rstrip(".") for prefix in architecture.blocks}


@pytest.mark.parametrize("architecture", TRANSFORMERS, ids=str)
def test_the_norm_that_follows(architecture: Architecture) -> None:
    model = loaded(architecture)
    for prefix, block in architecture.blocks.items():
        for layer in range(LAYERS):
            for kind, position in (("attn", 0), ("mlp", 1)):
                if f"{prefix}{kind}" not in architecture.places:
                    continue
                expected = architecture.norms and f"{block.format(layer)}.{architecture.norms[position]}"
                assert model.site(f"{prefix}{kind}.{layer}").norm == expected


def test_explain_sites_says_what_is_listed_and_what_is_not() -> None:
    module = loaded(BERT).module
    lines = loaded(BERT).explain_sites().splitlines()
    assert f"mlp.*: {LAYERS} sites of {NEURONS} neurons, read at encoder.layer.0.output.dense" in lines
    assert any(line.startswith("gate.*: not listed: the MLP has no gate") for line in lines)
    assert lines[-1].startswith("Any module's output can be named by hand: module:")
    named = lines[-1].rpartition("module:")[2]
    assert named in dict(module.named_modules())
    lines = loaded(T5).explain_sites().splitlines()
    assert f"decoder.cross_attn.*: {LAYERS} sites of {3 * HEADS} neurons" in "\n".join(lines)
    assert any(line.startswith("encoder.gate.*: not listed") for line in lines)


@both_types
def test_an_mlp_computed_in_pieces_along_the_sequence_is_read_whole(dtype: torch.dtype) -> None:
    whole = loaded(BERT, dtype)
    pieces = bert(chunk_size_feed_forward=3).to(dtype).eval()
    pieces.load_state_dict(whole.module.state_dict())
    inputs = {name: each[:, :9] for name, each in BERT.inputs(dtype=dtype).items()}
    read = pc.load(pieces).activations(inputs, "mlp.1")
    assert read.shape == (4, 9, NEURONS)
    assert_same(read, whole.activations(inputs, "mlp.1").clone())


def test_a_module_that_one_pass_calls_for_several_layers_is_not_read() -> None:
    norm = nn.LayerNorm(4)
    model = pc.load(nn.Sequential(norm, nn.Linear(4, 4), norm))
    with pytest.raises(pc.errors.ModelError, match="calls the module 0 2 times: which call is meant"):
        model.activations(torch.randn(3, 4), "module:0")


def test_a_block_that_shows_something_else_than_its_neurons_is_not_read() -> None:
    class Narrowing(nn.Sequential):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            assert input.ndim == 2  # what made-up inputs are not
            return super().forward(input)[..., :2]

    model = pc.load(nn.Sequential(Narrowing(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3))))
    with pytest.raises(pc.errors.ModelError, match=r"resid_post\.0 has 3 neurons, and 0 shows a tensor \[7, 2\]"):
        model.activations(torch.randn(7, 3), "resid_post.0")


def test_modules_by_hand() -> None:
    module = Classifier()
    x = torch.randn(5, 6)
    site = pc.load(module).site("module:norm")
    assert (site.kind, site.layer, site.module) == ("module", None, "norm")
    read = pc.load(module).activations(x, "module:norm")
    torch.testing.assert_close(read.clone(), module.norm(torch.relu(module.first(x))).detach())
    assert pc.load(module).site("module:first").size == 10
