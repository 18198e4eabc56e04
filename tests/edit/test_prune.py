"""Neurons that are taken out: the smaller network computes what the large one does with them ablated.

It loads with transformers alone, and what cannot be made smaller is refused with the reason.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_model
from tests.architectures import (
    BERT,
    BLOOM,
    CLASSIFIER,
    CLIP,
    GEMMA2,
    GPT2,
    LLAMA,
    NEOX,
    OPT,
    SEQUENTIAL,
    T5,
    T5_GATED,
    TEXTS,
    VIT,
    Architecture,
    deepseek,
    mixtral,
    qwen2_moe,
    tokenizer,
)
from tests.model.test_blocks import convolutions, gpt_oss, phi3
from tests.raw import assert_same, call
from torch import nn

import patchclamp as pc
from patchclamp.edit.bake import bake
from patchclamp.edit.prune import PrunedModel, prune
from patchclamp.errors import DataError, ModelError, UnknownName

FAMILIES = [BERT, GPT2, LLAMA, OPT, T5, T5_GATED, GEMMA2, NEOX, VIT, CLIP]
FAMILIES += [replace(LLAMA, name="phi3", new=phi3)]
EXPERTS = [replace(LLAMA, name=new.__name__, new=new) for new in (mixtral, qwen2_moe, gpt_oss)]
SETTING = {"gpt2": "n_inner", "opt": "ffn_dim", "t5": "d_ff", "t5-gated": "d_ff", "qwen2_moe": "moe_intermediate_size"}


def some(model: pc.Model, sites: str, count: int) -> pc.Neurons:
    """As many of each site, others in each."""
    chosen = {}
    for number, site in enumerate(model.select(sites)):
        drawn = np.random.default_rng(number).choice(site.size or 0, count, replace=False)
        chosen[site.name] = drawn.tolist()
    return pc.Neurons(chosen)


@torch.no_grad()
def ablated(model: pc.Model, neurons: pc.Neurons, inputs: dict[str, Any]) -> torch.Tensor:
    with model.evaluating(), model.intervene(pc.ablate(neurons)):
        return call(model.module, inputs)


@torch.no_grad()
def output(module: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    return call(module, inputs)


def loaded(made: PrunedModel, folder: Path) -> nn.Module:
    """From the saved folder, by transformers alone."""
    made.save(folder)
    module, told = type(made.module).from_pretrained(folder, output_loading_info=True)  # type: ignore[attr-defined]
    assert not any(told[each] for each in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    return module.eval()


def numbers(module: nn.Module) -> dict[str, dict[str, int]]:
    """The whole numbers that modules hold: widths among them."""
    return {
        path: {name: value for name, value in vars(each).items() if type(value) is int}
        for path, each in module.named_modules()
    }


def parameters(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())


# The same, and smaller --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "sites", "count"), [(f, "mlp.*", 5) for f in FAMILIES] + [(f, "expert.*", 4) for f in EXPERTS], ids=str
)
def test_the_smaller_network_is_the_network_with_the_neurons_ablated(
    family: Architecture, sites: str, count: int, tmp_path: Path
) -> None:
    module = family.build()
    model, inputs = pc.load(module), family.inputs()
    before, was, size = model.weights_sha256(), output(module, inputs), parameters(module)
    neurons = some(model, sites, count)
    made = prune(model, neurons)
    expected = ablated(model, neurons, inputs)
    assert not torch.equal(expected, was)
    assert_same(output(made.module, inputs), expected)
    again = loaded(made, tmp_path / "smaller")
    assert_same(output(again, inputs), expected)
    assert numbers(again) == numbers(made.module) != numbers(module)
    # The model itself is as it was, its configuration too.
    assert model.weights_sha256() == before
    assert_same(output(module, inputs), was)
    assert made.site(neurons.sites[0]).size == (model.site(neurons.sites[0]).size or 0) - count
    (step,) = made.provenance["interventions"]
    assert step["details"]["parameters_before"] == size
    assert step["details"]["parameters_after"] == parameters(made.module) < size
    assert f"{size:,} parameters became {parameters(made.module):,}" in step["words"]
    assert step["neurons"] == {site: neurons.indices(site).tolist() for site in neurons.sites}
    settings = made.provenance["config"]
    assert set(each.rpartition(".")[2] for each in settings) == {SETTING.get(family.name, "intermediate_size")}
    back = made.revert()
    assert back.weights_sha256() == before and type(back) is pc.Model
    assert numbers(back.module) == numbers(module)
    assert_same(output(back.module, inputs), was)


@pytest.mark.parametrize("family", [GPT2, LLAMA, SEQUENTIAL], ids=str)
def test_the_smaller_network_is_used_like_any_other(family: Architecture) -> None:
    """Its neurons are those that were kept, in order; it is recorded, ablated, pruned and taken back again."""
    model, inputs = pc.load(family.build()), family.inputs()
    first = some(model, "mlp.*", 3)
    made = prune(model, first)
    for site in first.sites:
        gone = set(first.indices(site).tolist())
        assert made.kept[site].tolist() == [each for each in range(model.site(site).size or 0) if each not in gone]
        # In a chain of linear layers what one neuron writes are the next neurons.
        written = made.kept["mlp.1"] if family is SEQUENTIAL and site == "mlp.0" else slice(None)
        rows = model.output_weights(site)[made.kept[site]][:, written]
        torch.testing.assert_close(made.output_weights(site), rows)
    again = pc.Neurons({site: [0, 2] for site in first.sites})
    both = pc.Neurons({site: [*first.indices(site), *made.kept[site][[0, 2]]] for site in first.sites})
    twice = prune(made, again)
    assert_same(output(twice.module, inputs), ablated(model, both, inputs))
    assert_same(ablated(made, again, inputs), ablated(model, both, inputs))
    assert len(twice.provenance["interventions"]) == 2
    # Both are taken back at once: what the first kept has the shapes of the large network.
    assert twice.revert().weights_sha256() == model.weights_sha256()
    baked = bake(made, pc.ablate(again))
    assert_same(output(baked.module, inputs), output(twice.module, inputs))
    assert baked.revert().weights_sha256() == made.weights_sha256()
    assert baked.revert().revert().weights_sha256() == model.weights_sha256()  # type: ignore[attr-defined]


def test_a_model_that_was_edited_before() -> None:
    model, inputs = pc.load(GPT2.build()), GPT2.inputs()
    scaled, gone = pc.Neurons({"mlp.0": [1, 2], "mlp.1": [7]}), pc.Neurons({"mlp.0": [2, 9], "mlp.1": [3, 4]})
    edited = bake(model, pc.scale(scaled, 3.0))
    made = prune(edited, gone)
    with model.intervene(pc.scale(scaled, 3.0), pc.ablate(gone)):
        assert_same(output(made.module, inputs), output(model.module, inputs))
    assert [each["words"].split()[0] for each in made.provenance["interventions"]][-1] == "Took"
    assert len(made.provenance["interventions"]) == 2
    assert made.provenance["weights_sha256_before"] == model.weights_sha256()
    assert made.revert().weights_sha256() == model.weights_sha256()


def test_what_was_taken_out_is_told(tmp_path: Path) -> None:
    module = LLAMA.build()
    model = pc.load(module)
    neurons = pc.Neurons({"mlp.0": [3, 5], "mlp.1": [0, 23]})
    made = prune(model, neurons)
    frame = made.diff()
    down = frame.filter(parameter="model.layers.0.mlp.down_proj.weight").row(0, named=True)
    weight = module.get_parameter("model.layers.0.mlp.down_proj.weight").detach()
    assert (down["shape_before"], down["shape"], down["numbers"]) == ("[16, 24]", "[16, 22]", 16 * 22)
    assert down["changed"] == 2 * 16 and not down["added"]
    assert down["largest_change"] == pytest.approx(float(weight[:, [3, 5]].abs().max()))
    assert frame["changed"].sum() == parameters(module) - parameters(made.module) == 2 * 2 * 3 * 16
    by_neuron = made.diff("neuron")
    assert len(by_neuron) == 4 * 3 and set(by_neuron["changed"]) == {16}
    row = by_neuron.filter(site="mlp.0", index=5, parameter="model.layers.0.mlp.down_proj.weight").row(0, named=True)
    assert row["largest_change"] == pytest.approx(float(weight[:, 5].abs().max()))
    with pytest.raises(DataError, match="not 'rows'"):
        made.diff("rows")  # type: ignore[arg-type]
    made.save(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "Took out 4 neurons" in card and "intermediate_size" in card and "[16, 22]" in card


def test_a_saved_decoder_generates_alike(tmp_path: Path) -> None:
    model = pc.load(LLAMA.build(), tokenizer=tokenizer())
    made = prune(model, some(model, "mlp.*", 6))
    made.save(tmp_path / "saved")
    again = pc.load(tmp_path / "saved")
    for text in TEXTS:
        assert again.generate(text, max_new_tokens=6) == made.generate(text, max_new_tokens=6)


def test_gradient_flags_types_and_mode_are_kept() -> None:
    module = GPT2.build(torch.bfloat16).train()
    for parameter in module.transformer.h[0].parameters():  # type: ignore[union-attr,index,operator]
        parameter.requires_grad = False
    made = prune(pc.load(module), pc.Neurons({"mlp.0": [1], "mlp.1": [1]}))
    assert {n: (p.requires_grad, p.dtype) for n, p in made.module.named_parameters()} == {
        n: (p.requires_grad, p.dtype) for n, p in module.named_parameters()
    }
    assert made.module.training and module.training


# Plain networks ---------------------------------------------------------------------------------------------


def test_plain_networks_may_be_uneven(tmp_path: Path) -> None:
    model, inputs = pc.load(SEQUENTIAL.build()), SEQUENTIAL.inputs()
    neurons = pc.Neurons({"mlp.0": [0, 3, 9], "mlp.1": [5]})
    made = prune(model, neurons)
    assert_same(output(made.module, inputs), ablated(model, neurons, inputs))
    first, second, last = (made.module[place] for place in (0, 2, 4))  # type: ignore[index]
    assert (first.out_features, second.in_features, second.out_features, last.in_features) == (7, 7, 7, 7)
    made.save(tmp_path / "saved")
    again = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 7), nn.GELU("tanh"), nn.Linear(7, 3))
    load_model(again, tmp_path / "saved" / "model.safetensors")
    assert_same(output(again, inputs), output(made.module, inputs))


def test_a_nonlinearity_that_is_not_zero_at_zero_does_not_matter() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 2)).eval()
    model, inputs = pc.load(module), {"input": torch.randn(5, 4)}
    neurons = pc.Neurons({"mlp.0": [0, 4]})
    assert_same(output(prune(model, neurons).module, inputs), ablated(model, neurons, inputs))


def test_channels_of_a_sequential_network() -> None:
    """A convolution with its batch norm, one before a pooling, and the linear layer after it."""
    module = convolutions()
    model, inputs = pc.load(module), {"input": torch.randn(3, 3, 12, 12)}
    names = [site.name for site in model.select("conv.*")]
    # After the nonlinearity a batch norm would make something of a zero; here it comes before.
    able = [name for name in names if not next(b for b in model.blocks if name in b.sites).why_inexact(name)]
    assert len(able) == 2
    neurons = pc.Neurons({able[0]: [1, 4], able[1]: [0, 2, 6]})
    made = prune(model, neurons)
    assert_same(output(made.module, inputs), ablated(model, neurons, inputs))
    smaller: Any = made.module
    assert (smaller[0].out_channels, smaller[1].num_features, smaller[4][0].in_channels) == (3, 3, 3)
    assert (smaller[4][0].out_channels, smaller[7].in_features) == (4, 4)
    assert made.revert().weights_sha256() == model.weights_sha256()
    back: Any = made.revert().module
    assert (back[0].out_channels, back[1].num_features, back[7].in_features) == (5, 5, 7)


# Uneven widths -----------------------------------------------------------------------------------------------


def test_uneven_layers_are_refused_with_their_widths() -> None:
    model = pc.load(GPT2.build())
    neurons = pc.Neurons({"mlp.0": [0, 1, 2, 3], "mlp.1": [5]})
    with pytest.raises(ModelError, match=r"\(mlp.0: 20, mlp.1: 23\), and GPT2Config has one n_inner for all"):
        prune(model, neurons)
    with pytest.raises(ModelError, match=r"\(mlp.0: 22, mlp.1: 24\)"):
        prune(model, pc.Neurons({"mlp.0": [0, 1]}))
    # Those of an encoder and of a decoder are one in T5, and two in CLIP.
    of_t5 = pc.load(T5.build())
    with pytest.raises(ModelError, match=r"encoder.mlp.0: 22, encoder.mlp.1: 22, decoder.mlp.0: 24.*d_ff"):
        prune(of_t5, pc.Neurons({"encoder.mlp.0": [0, 1], "encoder.mlp.1": [2, 3]}))
    of_clip = pc.load(CLIP.build())
    neurons = pc.Neurons({"text.mlp.0": [0, 1], "text.mlp.1": [2, 3]})
    made = prune(of_clip, neurons)
    assert made.provenance["config"] == {"text_config.intermediate_size": [24, 22]}
    assert_same(output(made.module, CLIP.inputs()), ablated(of_clip, neurons, CLIP.inputs()))


@pytest.mark.parametrize(
    "family", [GPT2, LLAMA, replace(LLAMA, name="phi3", new=phi3), EXPERTS[0], EXPERTS[2]], ids=str
)
def test_uneven_layers_are_filled_up_with_zeros(family: Architecture, tmp_path: Path) -> None:
    model, inputs = pc.load(family.build()), family.inputs()
    kind = "expert" if "expert.0.0" in model.sites else "mlp"
    sites = [site.name for site in model.select(f"{kind}.*")]
    chosen = {site: range(2, 2 + 5 + number) for number, site in enumerate(sites)}
    if kind == "expert":
        chosen = {site: range(1, 1 + 5 + number % 3) for number, site in enumerate(sites)}
    neurons = pc.Neurons(chosen)
    made = prune(model, neurons, uneven="pad")
    expected = ablated(model, neurons, inputs)
    assert_same(output(made.module, inputs), expected)
    assert_same(output(loaded(made, tmp_path / "smaller"), inputs), expected)
    size = model.site(sites[0]).size or 0
    # Rows of stacked experts begin every 16 bytes.
    width = size - 4 if kind == "expert" else size - 5
    assert {made.site(site).size for site in sites} == {width}
    (step,) = made.provenance["interventions"]
    zeroed = step["details"]["zeroed"]
    assert {site: len(zeroed.get(site, ())) for site in sites} == {
        site: len(chosen[site]) - (size - width) for site in sites
    }
    assert f"{sum(map(len, zeroed.values()))} of them are still there with weights of zero" in step["words"]
    for site, indices in zeroed.items():
        places = np.searchsorted(made.kept[site], indices)
        assert not made.output_weights(site)[places].any()
    assert made.diff("neuron").select("site", "index").unique().height == len(neurons)
    assert made.revert().weights_sha256() == model.weights_sha256()


def test_padding_that_would_save_nothing_is_refused() -> None:
    model = pc.load(GPT2.build())
    with pytest.raises(ModelError, match=r"nothing would become smaller: mlp.1 keeps 24 of 24 .* pc.edit.bake"):
        prune(model, pc.Neurons({"mlp.0": [0, 1]}), uneven="pad")


def test_experts_whose_rows_would_not_be_aligned_are_refused() -> None:
    model = pc.load(EXPERTS[0].build())
    odd = pc.Neurons({site.name: [0, 1, 2, 3, 4] for site in model.select("expert.*")})
    with pytest.raises(ModelError, match=r"experts would keep 19 neurons.*a multiple of 4.*to keep 20"):
        prune(model, odd)


# What is refused ---------------------------------------------------------------------------------------------


def untouched(model: pc.Model, act: Callable[[], object], error: type[Exception], match: str) -> None:
    before, config = model.weights_sha256(), copy.deepcopy(getattr(model.module, "config", None))
    with pytest.raises(error, match=match):
        act()
    assert model.weights_sha256() == before
    assert config is None or config.to_dict() == model.module.config.to_dict()  # type: ignore[union-attr,operator]


def test_other_kinds_are_refused_with_the_reason() -> None:
    model = pc.load(LLAMA.build())
    for site, match in [
        ("gate.0", "name the neurons of mlp.0"),
        ("attn.0", "heads are not taken out here"),
        ("resid_post.0", "of kind 'resid_post'"),
    ]:
        untouched(
            model, lambda site=site: prune(model, pc.Neurons({site: [0]})), ModelError, f"out of {site}: .*{match}"
        )
    classifier = pc.load(CLASSIFIER.build())
    untouched(
        classifier, lambda: prune(classifier, pc.Neurons({"mlp.0": [1]})), ModelError, r"norm \(LayerNorm\) works"
    )
    grouped = pc.load(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    )
    names = [site.name for site in grouped.select("conv.*")]
    assert len(names) == 3
    for name, match in zip(
        names, ["it has groups", "has as many channels in each", "no other layer than 4"], strict=True
    ):
        untouched(grouped, lambda name=name: prune(grouped, pc.Neurons({name: [0]})), ModelError, match)


def test_a_configuration_without_a_setting_is_said() -> None:
    bloom = pc.load(BLOOM.build())
    neurons = some(bloom, "mlp.*", 4)
    untouched(bloom, lambda: prune(bloom, neurons), ModelError, "no setting of BloomConfig says how many neurons")
    # The routed experts and the shared one of DeepSeek have one setting.
    of_deepseek = pc.load(deepseek())
    neurons = some(of_deepseek, "expert.*", 4)
    untouched(of_deepseek, lambda: prune(of_deepseek, neurons), ModelError, r"mlp.1: 12\).*one moe_intermediate_size")
    neurons = pc.Neurons({**{site.name: range(4) for site in of_deepseek.select("expert.*")}, "mlp.1": range(4)})
    made = prune(of_deepseek, neurons)
    assert_same(output(made.module, LLAMA.inputs()), ablated(of_deepseek, neurons, LLAMA.inputs()))


def test_tied_weights_are_refused() -> None:
    module: Any = LLAMA.build()
    module.model.layers[1].mlp.down_proj.weight = module.model.layers[0].mlp.down_proj.weight
    model = pc.load(module)
    with pytest.raises(ModelError, match="is one tensor with"):
        prune(model, some(model, "mlp.*", 2))


def test_bad_input_is_said() -> None:
    model = pc.load(GPT2.build())
    for act, error, match in [
        (lambda: prune(model, pc.Neurons()), DataError, "no neurons"),
        (lambda: prune(model, ["mlp.0:1"]), DataError, "takes Neurons"),  # type: ignore[arg-type]
        (lambda: prune(model, pc.Neurons({"mlp.9": [0]})), UnknownName, "no site is called 'mlp.9'"),
        (lambda: prune(model, pc.Neurons({"mlp.0": [24]})), UnknownName, "mlp.0:24 does not exist"),
        (lambda: prune(model, pc.Neurons({"mlp.0": range(24), "mlp.1": [0]})), ModelError, "all 24 neurons of mlp.0"),
        (lambda: prune(model, pc.Neurons({"mlp.0": [0]}), uneven="fill"), UnknownName, "'fill'"),  # type: ignore[arg-type]
    ]:
        untouched(model, act, error, match)


def test_an_intervention_at_work_is_not_copied() -> None:
    model = pc.load(SEQUENTIAL.build())
    neurons = pc.Neurons({"mlp.0": [0]})
    with model.intervene(pc.ablate(neurons)), pytest.raises(ModelError, match="outside of the with block"):
        prune(model, neurons)
