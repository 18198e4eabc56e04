"""Selecting sites by name, glob and list, and what is said where there are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.architectures import BERT, LAYERS, NEURONS, T5_GATED, WIDTH, tokenizer
from tests.raw import watching
from torch import nn

import patchclamp as pc
from patchclamp.errors import DataError, ModelError, UnknownName


@pytest.fixture(scope="module")
def model() -> pc.Model:
    return pc.load(BERT.build(), tokenizer=tokenizer(special=True))


def names(sites: Any) -> list[str]:
    return [site.name for site in sites]


def test_select_by_name_glob_range_and_list(model: pc.Model) -> None:
    assert names(model.select("mlp.1")) == ["mlp.1"]
    assert names(model.select("mlp.*")) == ["mlp.0", "mlp.1"]
    assert names(model.select("mlp.[1-4]")) == ["mlp.1"]
    assert names(model.select("resid_*.0")) == ["resid_pre.0", "resid_mid.0", "resid_post.0"]
    assert names(model.select("*.1")) == ["resid_pre.1", "pattern.1", "attn.1", "resid_mid.1", "mlp.1", "resid_post.1"]
    assert model.select([]) == []


def test_selected_sites_come_once_and_in_the_order_of_the_model(model: pc.Model) -> None:
    chosen = model.select(["mlp.1", model.sites["attn.0"], "mlp.*", "attn.0"])
    assert names(chosen) == ["attn.0", "mlp.0", "mlp.1"]
    assert names(model.select(["module:embeddings", "mlp.0"])) == ["mlp.0", "module:embeddings"]


def test_globs_match_every_stack() -> None:
    model = pc.load(T5_GATED.build())
    assert names(model.select("mlp.*")) == ["encoder.mlp.0", "encoder.mlp.1", "decoder.mlp.0", "decoder.mlp.1"]
    assert names(model.select("gate.1")) == ["encoder.gate.1", "decoder.gate.1"]
    assert names(model.select("attn.*")) == [f"{stack}.attn.{n}" for stack in ("encoder", "decoder") for n in range(2)]
    assert names(model.select("cross_attn.*")) == ["decoder.cross_attn.0", "decoder.cross_attn.1"]
    assert names(model.select("encoder.mlp.*")) == ["encoder.mlp.0", "encoder.mlp.1"]


def test_mlp_1_is_not_mlp_10() -> None:
    block = [nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)) for _ in range(12)]
    model = pc.load(nn.ModuleList(block))
    assert names(model.select("mlp.1")) == ["mlp.1"]
    assert names(model.select("mlp.1*")) == ["mlp.1", "mlp.10", "mlp.11"]
    assert names(model.select("mlp.*"))[2] == "mlp.2"


@pytest.mark.parametrize("wrong", ["mpl.1", "mlp.7", "mlp", "attention.1", "mlp.[5-9]", ["mlp.0", "mlp.9"]])
def test_an_unknown_name_lists_the_nearest(model: pc.Model, wrong: Any) -> None:
    with pytest.raises(UnknownName, match=r"no site is called '.*'\. The nearest: .*\.[01]"):
        model.select(wrong)


def test_what_is_no_name(model: pc.Model) -> None:
    for wrong in (3, [3], None, [["mlp.0"]]):
        with pytest.raises(DataError, match=r"a site is named by a text such as 'mlp\.3' or 'mlp\.\*', not by"):
            model.select(wrong)  # type: ignore[arg-type]


def test_a_module_by_hand(model: pc.Model) -> None:
    site = model.site("module:encoder.layer.1.output.dense")
    assert (site.kind, site.size) == ("module", WIDTH)
    with watching(model.module, ["encoder.layer.1.output.dense"]) as seen:
        read = model.activations("the cat", site.name)
    assert torch.equal(read, seen["encoder.layer.1.output.dense"][1][0])
    assert model.site("module:embeddings").size is None
    with pytest.raises(UnknownName, match=r"no module is called 'encoder\.layer\.1\.output\.dens'\. The nearest: enc"):
        model.select("module:encoder.layer.1.output.dens")


@pytest.mark.parametrize("module", [nn.Linear(3, 4), nn.Sequential(nn.Embedding(3, 3), nn.ReLU()), nn.Identity()])
def test_an_unsupported_model_says_what_was_looked_for_and_how_to_name_a_site(module: nn.Module) -> None:
    model = pc.load(module)
    assert not model.sites and "no sites" in repr(model)
    message = r"looked for a list of blocks, each with a projection d -> n and later one n -> d.*module:"
    with pytest.raises(UnknownName, match=message):
        model.select("mlp.*")
    with pytest.raises(UnknownName, match=message):
        model.site("mlp.0")
    assert "mlp.*: not listed: looked for" in model.explain_sites()


def test_the_module_that_the_hint_names_can_be_read() -> None:
    model = pc.load(nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()))
    hint = model.explain_sites().rpartition(" ")[2]
    assert model.activations(torch.ones(1, 3, 4, 4), hint).shape == (1, 3, 2, 2)


def test_neurons_are_a_table_of_all_of_them(model: pc.Model) -> None:
    neurons = model.neurons()
    assert len(neurons) == LAYERS * NEURONS and neurons.sites == ["mlp.0", "mlp.1"]
    assert len(model.neurons(["attn.1", "mlp.0"])) == WIDTH + NEURONS
    with pytest.raises(ModelError, match="the number of neurons of module:embeddings is not known"):
        model.neurons("module:embeddings")
