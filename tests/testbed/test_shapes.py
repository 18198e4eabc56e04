"""The procedural world: masks, labels and captions against the pixels, by rules that do not know how it is drawn."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import patchclamp as pc
from patchclamp.testbed import shapes

COLOURED = 30  # how far red, green and blue are apart at least, where an object is


@pytest.fixture(scope="module")
def world() -> shapes.World:
    return shapes.draw(1_500)


def test_masks_are_exactly_the_coloured_pixels(world: shapes.World) -> None:
    apart = world.images.max(-1).astype(int) - world.images.min(-1)
    assert ((apart > COLOURED) == world.masks.any(1)).all()
    moved = np.roll(world.masks, 1, axis=3).any(1)
    assert not ((apart > COLOURED) == moved).all()


def test_objects_do_not_overlap_and_lie_in_their_box(world: shapes.World) -> None:
    assert world.masks.sum(1).max() == 1
    there = world.shape >= 0
    assert (world.masks.any((2, 3)) == there).all()
    number = there.sum(1)
    assert (there[:, 0]).all() and set(number) == {1, 2, 3}
    for values in (world.colour, world.texture, world.radius, world.centre[..., 0]):
        assert ((values >= 0) == there).all()
    assert (world.radius[:, :1] > world.radius[:, 1:]).all()
    for image, place in zip(*np.nonzero(there), strict=True):
        rows, columns = np.nonzero(world.masks[image, place])
        box = [(rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2]
        assert box == world.centre[image, place].tolist()
        # A square is drawn smaller, so that it covers about as much as a circle.
        square = shapes.SHAPES[world.shape[image, place]] == "square"
        assert abs(rows - box[0]).max() == world.radius[image, place] - square


def test_pixels_have_the_labelled_colour(world: shapes.World) -> None:
    high = {"red": "100", "green": "010", "blue": "001", "yellow": "110", "magenta": "101", "cyan": "011"}
    for image, place in zip(*np.nonzero(world.shape >= 0), strict=True):
        pixels = world.images[image][world.masks[image, place]].astype(int)
        middle = (pixels.max(1) + pixels.min(1))[:, None] / 2
        assert {"".join(row) for row in np.where(pixels > middle, "1", "0")} == {
            high[shapes.COLOURS[world.colour[image, place]]]
        }


def test_masks_have_the_labelled_shape(world: shapes.World) -> None:
    for image, place in zip(*np.nonzero(world.shape >= 0), strict=True):
        mask = _cropped(world.masks[image, place])
        assert _shape_of(mask) == shapes.SHAPES[world.shape[image, place]]


def test_large_objects_have_the_labelled_texture(world: shapes.World) -> None:
    seen = set()
    for image in range(len(world)):
        name = shapes.SHAPES[world.shape[image, 0]]
        if name in ("circle", "square", "triangle"):  # the others are too thin to tell by such simple rules
            bright = world.images[image].max(-1).astype(float)
            texture = _texture_of(bright, world.masks[image, 0])
            assert texture == shapes.TEXTURES[world.texture[image, 0]]
            seen.add(texture)
    assert seen == set(shapes.TEXTURES)


def test_captions_say_what_the_pixels_show(world: shapes.World) -> None:
    """Read back: the words are the labels, and the relations hold between the boxes of the masks."""
    relations = {"left of": (1, -1), "right of": (1, 1), "above": (0, -1), "below": (0, 1)}
    described = re.compile(r"a (?P<colour>\w+) (?:(?P<texture>striped|dotted|checkered) )?(?P<shape>\w+)")
    seen = set()
    for image, caption in enumerate(world.captions):
        parts = re.split(rf" (?:and )?({'|'.join(relations)}) ", caption)
        assert len(parts) // 2 + 1 == (world.shape[image] >= 0).sum()
        for place, words in enumerate(parts[::2]):
            found = described.fullmatch(words)
            assert found is not None
            for kind, names in shapes.HEADS.items():
                assert (found[kind] or "plain") == names[getattr(world, kind)[image, place]]
        for place, relation in enumerate(parts[1::2], 1):
            axis, sign = relations[relation]
            away = _box(world.masks[image, 0]) - _box(world.masks[image, place])
            assert away[axis] * sign > 0 and abs(away[axis]) >= abs(away[1 - axis])
            seen.add(relation)
    assert seen == set(relations)


def test_concept_masks_are_those_of_the_objects(world: shapes.World) -> None:
    for kind, names in shapes.HEADS.items():
        masks = np.stack([world.concept_mask(kind, name) for name in names])
        assert (masks.sum(0) == world.masks.any(1)).all()
        assert masks.any((1, 2, 3)).all()
    red = world.concept_mask("colour", "red")
    assert (world.images[red][:, 0] > world.images[red][:, 1:].max(1)).all()
    with pytest.raises(pc.errors.UnknownName, match="colour"):
        world.concept_mask("color", "red")
    with pytest.raises(pc.errors.UnknownName, match="red"):
        world.concept_mask("colour", "reddish")


def test_images_are_fixed_by_the_seed(world: shapes.World) -> None:
    again = shapes.draw(600)
    assert (again.images == world.images[:600]).all() and again.captions == world.captions[:600]
    assert (again.masks == world.masks[:600]).all()
    other = shapes.draw(600, seed=1)
    assert (other.images != again.images).any((1, 2, 3)).all() and other.captions != again.captions
    with pytest.raises(pc.errors.DataError, match="at least one"):
        shapes.draw(0)


def test_kinds_are_drawn_evenly_and_apart(world: shapes.World) -> None:
    """No shape has a colour or texture of its own, which a neuron could take for the shape."""
    there = world.shape >= 0
    for one, other in (("shape", "colour"), ("shape", "texture"), ("colour", "texture")):
        counts = np.zeros((len(shapes.HEADS[one]), len(shapes.HEADS[other])))
        np.add.at(counts, (getattr(world, one)[there], getattr(world, other)[there]), 1)
        assert (abs(counts - counts.mean()) < 5 * np.sqrt(counts.mean())).all()


def test_images_for_a_model(world: shapes.World) -> None:
    images = world.to_images()
    assert images.labels == {kind: tuple(sorted(names)) for kind, names in shapes.HEADS.items()}
    assert images.label_values["colour"][7] == shapes.COLOURS[world.colour[7, 0]]
    given = images.inputs([3])["pixel_values"]
    wanted = (torch.from_numpy(world.images[3]).permute(2, 0, 1) / 255 - shapes.MEAN[0]) / shapes.STD[0]
    torch.testing.assert_close(given[0], wanted)
    logits = shapes.ShapesNetwork().eval()(given)
    parts = shapes.split_heads(logits)
    assert {kind: part.shape[1] for kind, part in parts.items()} == {"shape": 5, "colour": 6, "texture": 4}
    torch.testing.assert_close(torch.cat(list(parts.values()), 1), logits)


# Helpers ----------------------------------------------------------------------------------------


def _box(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(mask)
    return np.asarray([rows.min() + rows.max(), columns.min() + columns.max()]) / 2


def _cropped(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(mask)
    return mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def _shape_of(mask: np.ndarray) -> str:
    """From the outline alone: holes, corners, the width of rows."""
    width = mask.sum(1)
    middle = len(mask) // 2
    if mask.all():
        return "square"
    if not mask[middle, middle]:
        return "ring"
    if (np.diff(width) >= 0).all():
        return "triangle"
    return "cross" if mask.mean() < 0.65 else "circle"


def _texture_of(bright: np.ndarray, mask: np.ndarray) -> str:
    dark = mask & (bright < 0.7 * bright[mask].max())
    share = dark.sum() / mask.sum()
    if share == 0:
        return "plain"
    rows = [dark[row][mask[row]] for row in np.nonzero(mask.any(1))[0]]
    if all(row.all() or not row.any() for row in rows):
        return "striped"
    return "dotted" if share < 0.25 else "checkered"
