"""Class directions free of context, and who writes them: synthetic streams, and sums that must come out exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import patchclamp as pc
from patchclamp.directions import Directions
from patchclamp.find.direction_contribution import (
    class_directions,
    direction_contribution,
    grouped_differences,
    head_contribution,
    last_tokens,
)

CLASSES = ["anger", "joy", "sorrow"]


def gpt2() -> pc.Model:
    torch.manual_seed(0)
    module = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=8, n_embd=16, n_layer=2, n_head=2, n_inner=24))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return pc.load(module.train())


def llama() -> pc.Model:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return pc.load(LlamaForCausalLM(config))


def examples(groups: int = 12, length: int = 5) -> tuple[dict[str, torch.Tensor], list[str], list[int]]:
    """Groups share all tokens but the last, which is the class."""
    made = torch.Generator().manual_seed(0)
    shared = torch.randint(3, 30, (groups, 1, length - 1), generator=made).expand(-1, 3, -1)
    ids = torch.cat([shared, torch.arange(3).repeat(groups, 1)[..., None]], -1).flatten(0, 1)
    return {"input_ids": ids}, CLASSES * groups, np.repeat(np.arange(groups), 3).tolist()


# Directions -----------------------------------------------------------------------------------------


def synthetic(seed: int) -> tuple[np.ndarray, np.ndarray, list[str], list[int]]:
    """Streams of scenario (length 10), class (length 1) and noise; and the class vectors less their mean."""
    made = np.random.default_rng(seed)
    truth = np.linalg.qr(made.standard_normal((64, 3)))[0].T
    scenario = made.standard_normal((60, 64))
    scenario *= 10 / np.linalg.norm(scenario, axis=1, keepdims=True)
    values = scenario[:, None] + truth + 0.05 * made.standard_normal((60, 3, 64))
    return values.reshape(-1, 64), truth - truth.mean(0), CLASSES * 60, np.repeat(np.arange(60), 3).tolist()


def cosines(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    return (found * wanted).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)


def test_centring_inside_groups_takes_the_scenario_away() -> None:
    values, wanted, classes, groups = synthetic(0)
    found = grouped_differences({"resid_post.0": values}, classes, groups)
    assert found.names == CLASSES
    assert (cosines(found["resid_post.0"], wanted) > 0.99).all()
    np.testing.assert_allclose(found["resid_post.0"].sum(0), 0, atol=1e-6)
    # The order of examples does not matter.
    dealt = np.random.default_rng(1).permutation(len(classes))
    again = grouped_differences(
        {"resid_post.0": values[dealt]}, [classes[each] for each in dealt], [groups[each] for each in dealt]
    )
    np.testing.assert_allclose(again["resid_post.0"], found["resid_post.0"], atol=1e-6)
    # Without groups, in a design in which classes come with other scenarios, the scenario is what is found.
    kept = np.asarray([(groups[each] % 3) == CLASSES.index(classes[each]) for each in range(len(classes))])
    plain = np.stack([values[kept & (np.asarray(classes) == name)].mean(0) for name in CLASSES])
    assert (cosines(plain - plain.mean(0), wanted) < 0.7).all()


def test_groups_that_lack_a_class_are_left_out() -> None:
    values, _, classes, groups = synthetic(0)
    values[0] += 1e6  # the first group would spoil all
    with pytest.warns(UserWarning, match="1 of 60 groups do not have each class once"):
        found = grouped_differences({"resid_post.0": values[1:]}, classes[1:], groups[1:])
    rest = grouped_differences({"resid_post.0": values[3:]}, classes[3:], groups[3:])
    np.testing.assert_allclose(found["resid_post.0"], rest["resid_post.0"], atol=1e-6)


def test_directions_of_a_model_are_those_of_its_last_tokens() -> None:
    model = gpt2()
    inputs, classes, groups = examples()
    found = class_directions(model, inputs, classes, groups)
    assert found.sites == ["resid_mid.0", "resid_post.0", "resid_mid.1", "resid_post.1"]
    stream = model.activations(inputs["input_ids"], "resid_post.1")[:, -1].double().numpy().reshape(12, 3, 16)
    centred = stream - stream.mean(1, keepdims=True)
    np.testing.assert_allclose(found["resid_post.1"], centred.mean(0), atol=1e-5)
    padded = {
        "input_ids": torch.cat([inputs["input_ids"], torch.full((36, 2), 9)], 1),
        "attention_mask": torch.cat([torch.ones(36, 5), torch.zeros(36, 2)], 1).long(),
    }
    again = class_directions(model, padded, classes, groups)
    np.testing.assert_allclose(again["resid_post.1"], found["resid_post.1"], atol=1e-5)
    assert model.module.training


# Who writes them ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [gpt2, llama])
def test_contributions_sum_to_what_the_mlp_writes_along_the_direction(make: Any) -> None:
    model = make()
    inputs, classes, groups = examples()
    directions = class_directions(model, inputs, classes, groups)
    found = direction_contribution(model, inputs, classes, directions)
    frame = found.to_polars()
    with torch.no_grad():
        for layer in (0, 1):
            entering = model.activations(inputs["input_ids"], f"mlp.{layer}")[:, -1].double()
            written = (entering @ model.output_weights(f"mlp.{layer}").double()).numpy()
            for name, unit in zip(CLASSES, directions.unit()[f"resid_post.{layer}"], strict=True):
                of_class = written[[each == name for each in classes]].mean(0)
                total = frame.filter(site=f"mlp.{layer}")[f"score_{name}"].sum()
                assert total == pytest.approx(float(of_class @ unit), rel=1e-5, abs=1e-7)
    assert frame["score"].is_sorted(descending=True) and len(found) == 48
    best = frame.row(0, named=True)
    assert best["score"] == max(best[f"score_{name}"] for name in CLASSES) == best[f"score_{best['label']}"]


@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_head_contributes_what_is_missing_without_it(make: Any) -> None:
    """As the paper measures it: the head's slice before the output projection at zero, and the stream read again."""
    model = make()
    inputs, classes, groups = examples()
    directions = class_directions(model, inputs, classes, groups)
    found = head_contribution(model, inputs, classes, directions)
    units = directions.unit()
    sites = [model.site("resid_mid.0"), model.site("resid_mid.1")]
    plain = last_tokens(model, inputs, sites)
    for layer in (0, 1):
        for head in range(model.site(f"attn.{layer}").heads or 0):
            neurons = found.where((pl.col("site") == f"attn.{layer}") & (pl.col("head") == head))
            assert sorted(neurons["index"]) == list(model.site(f"attn.{layer}").head(head))
            with model.intervene(pc.ablate(neurons)):
                without = last_tokens(model, inputs, sites[layer : layer + 1])
            stream = f"resid_mid.{layer}"
            for name, unit in zip(CLASSES, units[stream], strict=True):
                rows = [each == name for each in classes]
                drop = ((plain[stream] - without[stream]) @ unit)[rows].mean()
                assert neurons[f"score_{name}"][0] == pytest.approx(drop, abs=1e-5)
                assert neurons[f"score_{name}"].n_unique() == 1
    assert found["score"].is_sorted(descending=True)
    assert (
        found["head"].to_numpy().reshape(-1, len(found) // (2 * (model.site("attn.0").heads or 1))).std(1) == 0
    ).all()


def test_a_planted_neuron_comes_first() -> None:
    """A neuron that fires on the last token of one class alone and writes along one axis."""
    model = gpt2()
    module: Any = model.module
    inputs, classes, groups = examples()
    axis = torch.zeros(16)
    axis[7] = 4.0
    site = model.site("mlp.0")
    with torch.no_grad():
        module.transformer.h[0].mlp.c_proj.weight[11] = axis
    fires = torch.tensor([3.0 * (each == "joy") for each in classes])

    def edit(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed[..., 11] = fires[: len(tensor), None]
        return changed

    class Planted:
        def edits(self, model: pc.Model) -> dict[str, Any]:
            return {site.name: edit}

    with model.intervene(Planted()):
        directions = class_directions(model, inputs, classes, groups)
        found = direction_contribution(model, inputs, classes, directions, "mlp.0")
    assert found.names[0] == "mlp.0:11" and found["label"][0] == "joy"
    assert directions.unit()["resid_post.0"][1, 7] > 0.9


def test_bad_input_is_said() -> None:
    model = gpt2()
    inputs, classes, groups = examples()
    directions = class_directions(model, inputs, classes, groups)
    nothing = Directions({"resid_post.0": np.zeros((3, 16))}, CLASSES)
    error, model_error = pc.errors.DataError, pc.errors.ModelError
    for make, kind, match in [
        (lambda: class_directions(model, inputs, ["a"] * 36, groups), error, "one class, a"),
        (lambda: class_directions(model, inputs, classes, groups[1:]), error, "36 classes and 35 groups"),
        (lambda: class_directions(model, inputs, classes, list(range(36))), error, "0 of 36 groups have each class"),
        (lambda: class_directions(model, inputs, classes[:27], groups[:27]), error, "9 of 9 groups"),
        (lambda: class_directions(model, inputs, classes, groups, "pattern.0"), error, "not .examples, tokens"),
        (lambda: class_directions(model, [], classes, groups), error, "there are none"),
        (lambda: direction_contribution(model, inputs, classes, nothing, "mlp.0"), error, "length 0"),
        (lambda: direction_contribution(model, inputs, classes[1:], directions), error, "36 examples and 35 classes"),
        (
            lambda: direction_contribution(model, inputs, classes, nothing, "mlp.1"),
            model_error,
            "writes into resid_post",
        ),
        (lambda: direction_contribution(model, inputs, ["calm"] * 36, directions), pc.errors.UnknownName, "calm"),
        (lambda: head_contribution(model, inputs, classes, directions, "mlp.0"), model_error, "heads of mlp.0"),
    ]:
        with pytest.raises(kind, match=match):
            make()
