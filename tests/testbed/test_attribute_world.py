"""The world of entities: what is drawn is what is said, the splits hold, and the network knows it all."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import patchclamp as pc
from patchclamp.testbed.attribute_world import (
    WEIGHTS,
    AttributeWorld,
    accuracy,
    attribute_world,
    network,
    train,
    trained_attribute_world,
)


@pytest.fixture(scope="module")
def world() -> AttributeWorld:
    return attribute_world()


# The world ------------------------------------------------------------------------------------------


def test_what_is_drawn(world: AttributeWorld) -> None:
    assert len(set(world.entities)) == 200 and world.values.shape == (200, 4)
    assert world.held_out_entities.sum() == 40 and world.held_out_templates.sum() == 2
    for column in (0, 2, 3):
        assert np.bincount(world.values[:, column]).tolist() == [25] * 8
    same = [(world.values[:, one] == world.values[:, two]).mean() for one, two in itertools.combinations(range(4), 2)]
    assert same[0] > 0.45 and max(same[1:]) < 0.25
    apart = attribute_world(together=0.0)
    assert (apart.values[:, 0] == apart.values[:, 1]).mean() < 0.25
    bound = attribute_world(together=1.0)
    assert np.array_equal(bound.values[:, 0], bound.values[:, 1])


def test_the_seed_says_all(world: AttributeWorld) -> None:
    assert attribute_world().sha256 == world.sha256 != attribute_world(seed=1).sha256
    assert world.pairs(20, seed=1) == world.pairs(20, seed=1) != world.pairs(20, seed=2)


def test_pairs_are_what_they_say(world: AttributeWorld) -> None:
    pairs = world.pairs(150)
    assert [each.attribute for each in pairs] == [name for name in world.attributes for _ in range(150)]
    asked_of_sources = set()
    for pair in pairs:
        base, source = (["<start>", *text.split()] for text in (pair.base, pair.source))
        assert base[pair.base_position] == pair.base_entity and source[pair.source_position] == pair.source_entity
        assert pair.base_answer == world.value(pair.base_entity, pair.attribute)
        assert pair.source_answer == world.value(pair.source_entity, pair.attribute) != pair.base_answer
        template = pair.base.replace(pair.base_entity, "{}")
        assert template in world.templates[pair.attribute]
        other = pair.source.replace(pair.source_entity, "{}")
        asked_of_sources |= {name for name, each in world.templates.items() if other in each}
    assert asked_of_sources == set(world.attributes)
    assert len({(each.base_entity, each.source_entity, each.base) for each in pairs}) == len(pairs)
    assert {each.attribute for each in world.pairs(5, attribute="trade")} == {"trade"}


@pytest.mark.parametrize("part", ["fit", "held_out"])
def test_splits_hold(world: AttributeWorld, part: str) -> None:
    held = {name for name, out in zip(world.entities, world.held_out_entities, strict=True) if out}
    kept = {each[place] for each in world.templates.values() for place in np.flatnonzero(world.held_out_templates)}
    for pair in world.pairs(200, entities=part, templates=part):
        for entity, text in ((pair.base_entity, pair.base), (pair.source_entity, pair.source)):
            assert (entity in held) == (part == "held_out")
            assert (text.replace(entity, "{}") in kept) == (part == "held_out")


def test_one_token_a_word(world: AttributeWorld) -> None:
    tokenizer = world.tokenizer()
    for text in (pair.base for pair in world.pairs(20, templates="all")):
        ids = tokenizer(text)["input_ids"]
        assert [world.words[each] for each in ids] == ["<start>", *text.split()]
    # What is asked for is known from the last word alone, and no name is a word of a template.
    last = {name: {each.split()[-1] for each in templates} for name, templates in world.templates.items()}
    assert sum(map(len, last.values())) == len(set().union(*last.values()))
    assert not set(world.entities) & {
        word for each in world.templates.values() for text in each for word in text.split()
    }


def test_bad_numbers_are_said(world: AttributeWorld) -> None:
    bad: list[dict[str, Any]] = [{"entities": 5}, {"entities": 10_000}, {"attributes": 1}, {"values": 9}]
    for given in [*bad, {"together": 2.0}]:
        with pytest.raises(pc.errors.DataError):
            attribute_world(**given)
    with pytest.raises(pc.errors.UnknownName, match="country"):
        world.pairs(attribute="contry")
    with pytest.raises(pc.errors.UnknownName, match="held_out"):
        world.pairs(entities="heldout")
    with pytest.raises(pc.errors.UnknownName):
        world.value("nobody", "trade")
    alike = AttributeWorld(**{**vars_of(world), "values": np.zeros_like(world.values)})
    with pytest.raises(pc.errors.DataError, match="have the same country"):
        alike.pairs(1)


def vars_of(world: AttributeWorld) -> dict:
    names = ("entities", "attributes", "values", "templates", "held_out_entities", "held_out_templates")
    return {name: getattr(world, name) for name in names}


# The network ----------------------------------------------------------------------------------------


def test_the_network_knows_its_world() -> None:
    net = trained_attribute_world()
    assert min(net.facts["accuracy"].values()) > 0.99
    untrained = accuracy(network(len(net.world.words)).eval(), net.world)
    assert max(untrained.values()) < 0.1
    pairs = net.world.pairs(10, entities="held_out", templates="all")
    ids = net.model.tokenizer.get_vocab()
    for pair in pairs:
        assert int(net.model.logits(pair.base)[-1].argmax()) == ids[pair.base_answer]
    assert net.site in net.model.sites and net.model.module.lm_head.weight is net.model.module.transformer.wte.weight  # type: ignore[union-attr]


def test_another_world_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AttributeWorld, "sha256", "another")
    with pytest.raises(pc.errors.DataError, match="draws another world"):
        trained_attribute_world()


def test_weights_are_small_and_float16() -> None:
    assert {each.dtype for each in load_file(WEIGHTS / "model.safetensors").values()} == {torch.float16}
    assert sum(file.stat().st_size for file in WEIGHTS.iterdir()) < 200_000


def test_training_is_the_same_again(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        train(seed=seed, steps=3, folder=tmp_path / name)
    one, two, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two", "other"))
    assert all(torch.equal(each, two[name]) for name, each in one.items())
    assert not torch.equal(one["transformer.wte.weight"], other["transformer.wte.weight"])


@pytest.mark.slow
def test_the_script_makes_the_weights_that_travel(tmp_path: Path) -> None:
    """Not to the bit on every machine: but a network that knows its world as well."""
    assert min(train(folder=tmp_path)["accuracy"].values()) > 0.99
