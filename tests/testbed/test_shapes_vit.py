"""The small vision transformer does what its facts say, on quarters of images that it was not trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import patchclamp as pc
from patchclamp.errors import DataError, UnknownName
from patchclamp.testbed import shapes
from patchclamp.testbed.shapes_vit import (
    CLASSES,
    SIZE,
    pixels_and_classes,
    quarters,
    score,
    shapes_vit,
    shapes_vit_facts,
    train,
)


@pytest.fixture(scope="module")
def model() -> pc.Model:
    return shapes_vit()


def test_it_is_as_accurate_as_its_facts_say(model: pc.Model) -> None:
    facts, found = shapes_vit_facts(), score(model)
    assert found["accuracy"] == pytest.approx(facts["accuracy"], abs=0.002)
    assert found["loss"] == pytest.approx(facts["loss"], abs=0.01)
    assert found["accuracy"] > 0.98
    assert facts["parameters"] == sum(each.numel() for each in model.module.parameters())
    # Other images than these, from another seed.
    assert score(model, quarters(500, seed=3))["accuracy"] > 0.98


def test_its_answer_depends_on_what_it_sees(model: pc.Model) -> None:
    pixels, wanted = pixels_and_classes(quarters(300))
    mixed = pixels[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        logits = model.module(pixel_values=mixed).logits
    assert float((logits.argmax(1) == wanted).double().mean()) < 0.15


def test_its_neurons_are_behind_the_nonlinearity_and_the_class_token_is_first(model: pc.Model) -> None:
    pixels, _ = pixels_and_classes(quarters(4))
    found = model.activations(pixels, "mlp.*")
    assert list(found) == [f"mlp.{layer}" for layer in range(6)]
    assert all(tuple(each.shape) == (4, 17, 128) for each in found.values())
    assert -0.2 < float(found["mlp.5"].min()) < 0 < float(found["mlp.5"].max())
    assert model.module.dtype == torch.float32
    # The classifier reads the class token of the last block alone: other tokens of its neurons change nothing there.
    everything = pc.Neurons({"mlp.5": range(128)})
    with torch.no_grad():
        plain = model.module(pixel_values=pixels).logits
        with model.intervene(pc.ablate(everything, positions=[0])):
            first = model.module(pixel_values=pixels).logits
        with model.intervene(pc.ablate(everything, positions=list(range(1, 17)))):
            others = model.module(pixel_values=pixels).logits
    assert (plain - first).abs().max() > 0.1
    torch.testing.assert_close(plain, others)


def test_a_quarter_holds_one_whole_object_and_its_labels() -> None:
    world, images = shapes.draw(50, seed=2), quarters(80)
    painted = [
        (int(world.masks[image, place].sum()), world.shape[image, place], world.colour[image, place])
        for image in range(50)
        for place in range(3)
        if world.shape[image, place] >= 0
    ]
    pixels, classes = pixels_and_classes(images)
    assert pixels.shape == (80, 3, SIZE, SIZE) and len(CLASSES) == 30
    values = np.stack([np.asarray(images.inputs([each])["pixel_values"])[0] for each in range(80)])
    coloured = ((values.max(1) - values.min(1)) > 0.35).sum((1, 2))
    for number, (size, shape, colour) in enumerate(painted[:80]):
        assert CLASSES[int(classes[number])] == f"{shapes.COLOURS[colour]} {shapes.SHAPES[shape]}"
        # The object's own pixels are coloured, all of them; what is grey is not.
        assert abs(int(coloured[number]) - size) <= 0.1 * size
    assert quarters(30).label_values["class"] == images.label_values["class"][:30]
    assert quarters(30, seed=5).label_values["class"] != images.label_values["class"][:30]


@pytest.mark.slow
def test_the_script_writes_what_the_loader_reads(tmp_path: Path) -> None:
    facts = train(3, steps=2, images=300, weights=tmp_path)
    folder = tmp_path / "shapes_vit-3"
    assert sorted(each.name for each in folder.iterdir()) == ["config.json", "facts.json", "model.safetensors"]
    assert facts["steps"] == 2 and 0 <= facts["accuracy"] < 0.3
    assert (folder / "model.safetensors").stat().st_size < 1_000_000
    again = train(3, steps=2, images=300, weights=tmp_path / "again")
    assert {**facts, "seconds": 0} == {**again, "seconds": 0}
    assert score(pc.load(folder, dtype=torch.float32)) == {each: facts[each] for each in ("loss", "accuracy")}


def test_bad_input_is_said() -> None:
    with pytest.raises(UnknownName, match="no seed of shapes_vit is called '7'"):
        shapes_vit(7)
    with pytest.raises(UnknownName, match="no seed of shapes_vit is called '7'"):
        shapes_vit_facts(7)
    with pytest.raises(DataError, match="at least one image"):
        quarters(0)
