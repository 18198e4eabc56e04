"""Interventions written into weights: by hand on GPT-2, in any order, refused where they have no exact form, undone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from tests.architectures import BERT, CLASSIFIER, GPT2, LAYERS, LLAMA, MISTRAL, NEOX, tokenizer
from tests.model.test_table import outputs, same
from tests.raw import hooks_of
from tests.zoo import TextEncoder, by_title, drawn, texts
from transformers import GptOssConfig, GptOssForCausalLM, GraniteConfig, GraniteForCausalLM

import patchclamp as pc
from patchclamp.directions import Directions
from patchclamp.edit import EditedModel, bake
from patchclamp.intervene import steer

INPUTS = texts("right")
SITE = "mlp.1"
WEIGHT, BIAS = "transformer.h.1.mlp.c_proj.weight", "transformer.h.1.mlp.c_proj.bias"


def gpt2(**options: Any) -> pc.Model:
    return pc.load(GPT2.build(), tokenizer=tokenizer(), **options)


def weights(model: pc.Model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in after if name not in before or not torch.equal(before[name], after[name])}


def assert_baked(model: pc.Model, *interventions: Any, inputs: dict | None = None, effect: bool = True) -> EditedModel:
    """The edited copy computes what the model does while intervened on, and that is something else than before."""
    inputs = INPUTS if inputs is None else inputs
    untouched = outputs(model.module, inputs)
    edited = bake(model, *interventions)
    with model.intervene(*interventions):
        expected = outputs(model.module, inputs)
    assert same(outputs(edited.module, inputs), expected)
    assert same(expected, untouched) != effect
    return edited


# By hand --------------------------------------------------------------------------------------------


def test_a_factor_multiplies_rows_and_a_value_is_a_bias() -> None:
    model, neurons = gpt2(), pc.Neurons({SITE: [5, 2]})
    before = weights(model)
    silenced, louder, held = (
        weights(bake(model, each))
        for each in (pc.ablate(neurons), pc.scale(neurons, -3.0), pc.clamp(neurons, [0.5, -2.0]))
    )
    rows = before[WEIGHT][[5, 2]]
    assert changed(before, silenced) == changed(before, louder) == {WEIGHT}
    assert changed(before, held) == {WEIGHT, BIAS}
    assert not silenced[WEIGHT][[5, 2]].any() and not held[WEIGHT][[5, 2]].any()
    assert torch.equal(louder[WEIGHT][[5, 2]], -3 * rows)
    torch.testing.assert_close(held[BIAS], before[BIAS] + 0.5 * rows[0] - 2 * rows[1])
    others = [row for row in range(24) if row not in (5, 2)]
    assert all(torch.equal(each[WEIGHT][others], before[WEIGHT][others]) for each in (silenced, louder, held))


@pytest.mark.parametrize("architecture", [GPT2, LLAMA, NEOX], ids=str)
def test_interventions_on_top_of_one_another_in_any_order(architecture: Any) -> None:
    """Random lists of interventions on the same few neurons, at sites one above the other."""
    model = pc.load(architecture.build())
    names = [each for each in model.sites if each.startswith(("mlp", "attn"))]
    generator = np.random.default_rng(0)
    for _ in range(6):
        listed = []
        for _ in range(int(generator.integers(2, 6))):
            neurons = pc.Neurons({names[generator.integers(len(names))]: generator.choice(6, 3, replace=False)})
            ways: list[Callable[[], Any]] = [
                lambda neurons=neurons: pc.ablate(neurons),
                lambda neurons=neurons: pc.clamp(neurons, generator.normal(size=3).tolist()),
                lambda neurons=neurons: pc.scale(neurons, float(generator.normal())),
            ]
            listed.append(ways[generator.integers(3)]())
        assert_baked(model, *listed)


def test_gate_and_product_read_by_the_same_weights() -> None:
    """Live, the gate comes before the product, whatever the order of the interventions."""
    model, neurons = pc.load(LLAMA.build()), [1, 3, 6]
    gate, product = pc.scale(pc.Neurons({"gate.0": neurons}), 0.5), pc.Neurons({"mlp.0": neurons})
    for other in (pc.scale(product, 3.0), pc.clamp(product, 0.4), pc.ablate(product)):
        assert_baked(model, gate, other)
        assert_baked(model, other, gate)


def test_the_mean_over_a_recording() -> None:
    model = gpt2()
    recording = pc.record(model, ["the cat sat on a mat", "two dogs ran home"], sites=SITE, progress=False)
    edited = assert_baked(model, pc.ablate(pc.Neurons({SITE: [0, 7]}), "mean", recording=recording))
    assert changed(weights(model), weights(edited)) == {WEIGHT, BIAS}


def test_a_neuron_by_its_name_in_transformerlens() -> None:
    model = gpt2()
    one, other = (
        bake(model, pc.ablate(pc.Neurons({name: [3]}))).weights_sha256() for name in (SITE, "blocks.1.mlp.hook_post")
    )
    assert one == other != model.weights_sha256()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_types(dtype: torch.dtype) -> None:
    model, neurons = pc.load(GPT2.build(dtype)), pc.Neurons({SITE: [1, 2], "attn.0": [3]})
    edited = bake(model, pc.clamp(neurons, 0.7))
    with model.intervene(pc.clamp(neurons, 0.7)):
        (expected,) = outputs(model.module, INPUTS)
    (got,) = outputs(edited.module, INPUTS)
    assert got.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 0.05
    assert float((got.double() - expected.double()).abs().max()) < tolerance * float(expected.double().abs().max())


# Biases ---------------------------------------------------------------------------------------------


def test_a_flag_gives_a_bias_to_all_layers_and_those_of_others_are_zero() -> None:
    model = pc.load(LLAMA.build())
    edited = assert_baked(model, pc.clamp(pc.Neurons({"mlp.0": [1, 2]}), 0.8))
    config, own = cast(Any, edited.module).config, cast(Any, model.module).config
    assert config.mlp_bias and not own.mlp_bias and not config.attention_bias
    before, after = weights(model), weights(edited)
    added = set(after) - set(before)
    projections = ("gate_proj", "up_proj", "down_proj")
    assert added == {f"model.layers.{layer}.mlp.{name}.bias" for layer in range(LAYERS) for name in projections}
    assert {name for name in added if after[name].any()} == {"model.layers.0.mlp.down_proj.bias"}
    # A second edit needs no flag, and both flags can be on.
    assert_baked(edited, pc.clamp(pc.Neurons({"mlp.1": [0], "attn.1": [2]}), -0.6))


def test_experts_with_biases() -> None:
    config: dict[str, Any] = {
        "vocab_size": 30,
        "hidden_size": 16,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    model = pc.load(drawn(lambda: GptOssForCausalLM(GptOssConfig(**config)))())
    sites = [name for name in model.sites if name.startswith("expert")]
    assert len(sites) == 8
    neurons = pc.Neurons({name: [1, 5] for name in sites})
    edited = assert_baked(model, pc.clamp(neurons, 0.7), pc.scale(pc.Neurons({sites[0]: [1, 2]}), 2.0))
    assert len(edited.diff()) == 4  # down_proj and its bias, in two layers


@pytest.mark.parametrize("architecture", [GPT2, NEOX, LLAMA], ids=str)
@pytest.mark.parametrize("site", ["resid_post.0", "resid_post.1", "resid_pre.1", "resid_mid.0", "mlp.1", "attn.0"])
def test_directions_are_biases(architecture: Any, site: str) -> None:
    if architecture is NEOX and site.startswith("resid_mid"):
        return  # attention and MLP side by side: there is no such place
    model = pc.load(architecture.build())
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(2, model.site(site).size or 0))
    edited = assert_baked(model, steer(Directions({site: vectors}), 0.5), steer(Directions({site: vectors[0]}), -1.0))
    assert edited.diff()["parameter"].str.ends_with("bias").all()
    # Beside another intervention that writes into the same bias.
    assert_baked(model, steer(Directions({site: vectors}), 0.5), pc.clamp(pc.Neurons({"mlp.1": [3]}), 2.0))


def test_directions_that_arrive_changed_are_refused() -> None:
    """Granite multiplies what it adds to the residual stream; BERT normalises the sum."""
    own = cast(Any, LLAMA.build()).config
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    small: dict[str, Any] = {name: getattr(own, name) for name in (*sizes, "pad_token_id")}
    small["residual_multiplier"] = 0.5
    granite = pc.load(drawn(lambda: GraniteForCausalLM(GraniteConfig(**small)))())
    for model in (granite, pc.load(BERT.build())):
        with pytest.raises(pc.errors.ModelError, match="arrives changed"):
            bake(model, steer(Directions({"resid_post.0": np.ones(16)})))
    assert_baked(granite, pc.clamp(pc.Neurons({"mlp.0": [1]}), 0.7))  # inside of the MLP it does not matter


# Refused --------------------------------------------------------------------------------------------

ONE = pc.Neurons({SITE: [3]})


@pytest.mark.parametrize(
    ("intervention", "reason"),
    [
        (pc.ablate(ONE, positions=[0]), "some positions"),
        (pc.scale(ONE, 2.0, examples=[0]), "some positions or examples"),
        (pc.ablate(ONE, "resample", source={SITE: torch.zeros(3, 24)}), "resampling"),
        (pc.patch(ONE, torch.zeros(5, 24)), "another run"),
        (pc.ablate(pc.Neurons({"resid_post.0": [1]})), "every block after"),
        (pc.scale(pc.Neurons({"pattern.0": [1]}), 0.5), "weigh the values"),
        (pc.ablate(pc.Neurons({"module:transformer.h.0": [1]})), "not known"),
        (steer(Directions({"resid_post.0": np.ones(16)}), relative=True), "length of the activations"),
        (steer(Directions({"resid_post.0": np.ones(16)}), how="project_out"), "depends on the activations"),
        (steer(Directions({"resid_pre.0": np.ones(16)})), "no output projection"),
    ],
)
def test_what_has_no_exact_form_is_refused_with_the_reason(intervention: Any, reason: str) -> None:
    with pytest.raises(pc.errors.ModelError, match=reason):
        bake(gpt2(), intervention)


def test_values_without_a_bias_are_refused_with_every_reason() -> None:
    model = pc.load(MISTRAL.build())
    with pytest.raises(pc.errors.ModelError) as raised:
        bake(model, pc.clamp(pc.Neurons({"mlp.0": [1], "attn.1": [2], "gate.0": [0]}), 1.0))
    for said in ("mlp.0: model.layers.0.mlp.down_proj has no bias", "MistralConfig", "attn.1: ", "gate.0: the gate"):
        assert said in str(raised.value)
    # What is zero in the end needs none, whatever was held before.
    assert_baked(model, pc.clamp(pc.Neurons({"mlp.0": [1]}), 1.0), pc.ablate(pc.Neurons({"mlp.0": [1]})))


def test_constant_channels_are_refused_and_so_are_factors_that_do_not_pass() -> None:
    model = pc.load(by_title("CNN in plain torch").build())
    inputs = by_title("CNN in plain torch").inputs("right")
    site = next(name for name in model.sites if name.startswith("conv"))
    channels = pc.Neurons({site: [1, 2]})
    assert_baked(model, pc.scale(channels, 2.5), inputs=inputs)
    for intervention, reason in ((pc.clamp(channels, 1.0), "edges"), (pc.scale(channels, -1.0), "factor of -1")):
        with pytest.raises(pc.errors.ModelError, match=reason):
            bake(model, intervention)


def test_tied_weights_are_refused_by_name() -> None:
    module: Any = LLAMA.build()
    first, second = (layer.mlp.down_proj for layer in module.model.layers)
    second.weight = first.weight
    with pytest.raises(pc.errors.ModelError, match=r"one tensor with model\.layers\.1\.mlp\.down_proj\.weight"):
        bake(pc.load(module), pc.ablate(pc.Neurons({"mlp.0": [1]})))
    biases: Any = GPT2.build()
    biases.transformer.h[0].mlp.c_proj.bias = biases.transformer.h[1].mlp.c_proj.bias
    model = pc.load(biases)
    with pytest.raises(pc.errors.ModelError, match=r"one tensor with transformer\.h\.1\.mlp\.c_proj\.bias"):
        bake(model, pc.clamp(pc.Neurons({"mlp.0": [1]}), 1.0))
    assert_baked(model, pc.ablate(pc.Neurons({"mlp.0": [1, 2]})))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_quantised_weights_are_refused() -> None:
    if not hasattr(torch.ao.quantization, "quantize_dynamic"):
        pytest.skip("this torch has no quantize_dynamic")
    packed = torch.ao.quantization.quantize_dynamic(CLASSIFIER.build(), {"second"}, dtype=torch.qint8)  # type: ignore
    with pytest.raises(pc.errors.ModelError, match="quantised"):
        bake(pc.load(packed), pc.ablate(pc.Neurons({"mlp.0": [1]})))


def test_neurons_that_are_not_there() -> None:
    model = gpt2()
    with pytest.raises(pc.errors.UnknownName, match=r"mlp\.1"):
        bake(model, pc.ablate(pc.Neurons({"mlp.11": [1]})))
    with pytest.raises(pc.errors.UnknownName, match="neurons 0 to 23"):
        bake(model, pc.ablate(pc.Neurons({SITE: [24]})))
    for nothing in ([], [pc.ablate(pc.Neurons())], [pc.Neurons({SITE: [1]})]):
        with pytest.raises(pc.errors.DataError):
            bake(model, *nothing)


def test_a_model_that_has_changed_since_is_refused() -> None:
    model = gpt2()
    found_in = model.weights_sha256()
    bake(model, pc.ablate(ONE), weights_sha256=found_in)
    with torch.no_grad():
        model.output_weights("mlp.0")[0, 0] += 1
    with pytest.raises(pc.errors.DataError, match=found_in):
        bake(model, pc.ablate(ONE), weights_sha256=found_in)


def test_inside_of_an_intervention_it_is_refused() -> None:
    model = gpt2()
    with model.intervene(pc.ablate(ONE)), pytest.raises(pc.errors.ModelError, match="at work"):
        bake(model, pc.ablate(ONE))


# The model before, and after --------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [GPT2, LLAMA], ids=str)
def test_the_model_stays_as_it_is_and_comes_back_to_the_bit(architecture: Any, tmp_path: Any) -> None:
    module = architecture.build()
    module.train()
    frozen = next(iter(module.parameters())).requires_grad_(False)
    model = pc.load(module, tokenizer=tokenizer())
    before, config, sha = weights(model), copy.deepcopy(vars(module.config)), model.weights_sha256()
    intervention = pc.clamp(pc.Neurons({SITE: [1, 4], "attn.0": [2]}), 0.5)
    edited = bake(model, intervention)
    edited.save(tmp_path / "edited")
    reverted = edited.revert()
    assert model.module is module and module.training and not frozen.requires_grad
    assert not changed(before, weights(model)) and model.weights_sha256() == sha
    assert {name: value for name, value in vars(module.config).items() if value != config.get(name)} == {}
    assert hooks_of(module) == hooks_of(architecture.build())
    # The copy shares nothing, and keeps what it was like.
    mine = {parameter.data_ptr() for parameter in module.parameters()}
    assert not mine & {parameter.data_ptr() for parameter in edited.module.parameters()}
    assert edited.module.training and not next(iter(edited.module.parameters())).requires_grad
    assert reverted.weights_sha256() == sha == edited.provenance["weights_sha256_before"]
    assert list(reverted.module.state_dict()) == list(before) and not changed(before, weights(reverted))
    assert type(reverted) is pc.Model and reverted.name == model.name
    assert cast(Any, reverted.module).config.to_dict() == module.config.to_dict()
    assert edited.weights_sha256() == edited.provenance["weights_sha256_after"] != sha


def test_edits_are_taken_back_one_by_one() -> None:
    model = pc.load(LLAMA.build())
    once = bake(model, pc.clamp(pc.Neurons({"mlp.0": [1, 2]}), 0.5))
    twice = bake(once, pc.scale(pc.Neurons({"mlp.0": [2, 3]}), 2.0), pc.clamp(pc.Neurons({"mlp.0": [7]}), 1.0))
    back = twice.revert()
    assert isinstance(back, EditedModel) and back.weights_sha256() == once.weights_sha256()
    assert back.diff().equals(once.diff()) and twice.diff().height == once.diff().height
    assert back.revert().weights_sha256() == model.weights_sha256()
    assert [each["details"]["kind"] for each in twice.provenance["interventions"]] == ["clamp", "scale", "clamp"]
    assert twice.provenance["weights_sha256_before"] == model.weights_sha256()
    with torch.no_grad():
        twice.output_weights("mlp.1")[0, 0] += 1
    with pytest.raises(pc.errors.ModelError, match="changed since"):
        twice.revert()


def test_the_difference_is_what_state_dicts_say() -> None:
    model = pc.load(LLAMA.build())
    first = bake(model, pc.clamp(pc.Neurons({"mlp.0": [1, 9]}), 0.5), pc.scale(pc.Neurons({"attn.1": [4]}), 3.0))
    edited = bake(first, pc.scale(pc.Neurons({"mlp.0": [1, 3]}), 0.5))
    before, after = weights(model), weights(edited)
    frame = edited.diff()
    assert set(frame["parameter"]) == changed(before, after)
    for row in frame.iter_rows(named=True):
        old, new = before.get(row["parameter"]), after[row["parameter"]]
        assert row["added"] == (old is None) and row["numbers"] == new.numel() and row["shape"] == str(list(new.shape))
        if old is not None:
            assert row["changed"] == int((old != new).sum())
            assert row["largest_change"] == pytest.approx(float((old - new).abs().max()))
    neurons = edited.diff(by="neuron")
    name = "model.layers.0.mlp.down_proj"
    rows = {(row["site"], row["index"], row["parameter"]): row for row in neurons.iter_rows(named=True)}
    expected = {("mlp.0", index, f"{name}.weight") for index in (1, 3, 9)} | {
        ("mlp.0", index, f"{name}.bias") for index in (1, 9)
    }
    assert set(rows) == expected | {("attn.1", 4, "model.layers.1.self_attn.o_proj.weight")}
    column = before[f"{name}.weight"][:, 9]
    assert rows["mlp.0", 9, f"{name}.weight"]["largest_change"] == pytest.approx(float(column.abs().max()))
    assert rows["mlp.0", 9, f"{name}.bias"]["largest_change"] == pytest.approx(0.5 * float(column.abs().max()))
    assert rows["mlp.0", 3, f"{name}.weight"]["changed"] == 16
    with pytest.raises(pc.errors.DataError, match="layer"):
        edited.diff(by="layer")  # type: ignore[arg-type]


def test_an_edited_model_is_a_model() -> None:
    model = gpt2()
    edited = bake(model, pc.clamp(ONE, 0.5))
    text = "the cat sat on a mat"
    with model.intervene(pc.clamp(ONE, 0.5)):
        expected = model.logits(text)
    torch.testing.assert_close(edited.logits(text), expected, rtol=1e-4, atol=1e-5)
    assert "edited" in repr(edited) and list(edited.sites) == list(model.sites)
    recording = pc.record(edited, [text], sites="mlp.*", progress=False)
    assert recording.sites
    with edited.intervene(pc.ablate(pc.Neurons({"mlp.0": [1]}))):
        assert not torch.allclose(edited.logits(text), expected)
    # The example that a plain network was loaded with stays known.
    plain = pc.load(TextEncoder().eval(), example=dict(INPUTS))
    assert_baked(bake(plain, pc.scale(pc.Neurons({"mlp.0": [1]}), 2.0)), pc.ablate(pc.Neurons({"mlp.1": [1, 2, 3]})))
