"""A procedural world: images of one to three coloured, textured shapes, with captions, masks and labels.

An image of 32 by 32 pixels has four quarters. Each object lies inside one of its own, so that objects never overlap and
a mask is exactly the pixels that its object painted. The first object has the largest radius. The background is grey;
an object's pixels are coloured, the dark ones of its texture too: where red, green and blue differ is an object.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from patchclamp.data import Images
from patchclamp.errors import DataError, unknown

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan")
TEXTURES = ("plain", "striped", "dotted", "checkered")
HEADS = {"shape": SHAPES, "colour": COLOURS, "texture": TEXTURES}
SIZE, MOST = 32, 3
MEAN, STD = (0.35, 0.35, 0.35), (0.2, 0.2, 0.2)

_HIGH, _LOW = 225.0, 35.0
_PALETTE = np.where([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]], _HIGH, _LOW).astype(np.float32)
_DARK = np.float32(0.4)  # brightness of a texture's dark pixels
_LARGE, _SMALL = (6, 7), (4, 5)  # least and greatest radius in pixels
_BLOCK = 500  # images that are drawn at once


@dataclass(frozen=True, eq=False)
class World:
    """Images and all that is known of them; an object that an image does not have is -1 in the arrays and no mask.

    Attributes:
        images: `[images, 32, 32, 3]` uint8.
        captions: one for each image, "a red striped circle left of a blue square": the first object, and where it is
            in regard to the others; a plain texture is not said.
        masks: the pixels of each object, `[images, 3, 32, 32]` bool.
        shape: of each object, its place in `SHAPES`, `[images, 3]`.
        colour: the same in `COLOURS`.
        texture: the same in `TEXTURES`.
        centre: row and column of each object's centre, `[images, 3, 2]`.
        radius: of each object in pixels, `[images, 3]`.
    """

    images: np.ndarray
    captions: tuple[str, ...]
    masks: np.ndarray
    shape: np.ndarray
    colour: np.ndarray
    texture: np.ndarray
    centre: np.ndarray
    radius: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def concept_mask(self, kind: str, name: str) -> np.ndarray:
        """The pixels of all objects of a concept, `[images, 32, 32]` bool: `concept_mask("colour", "red")`.

        Raises:
            UnknownName: the kind is none of "shape", "colour", "texture", or has no such concept.
        """
        if kind not in HEADS:
            raise unknown("kind of concept", kind, HEADS)
        if name not in HEADS[kind]:
            raise unknown(kind, name, HEADS[kind])
        chosen = getattr(self, kind) == HEADS[kind].index(name)
        return (self.masks & chosen[:, :, None, None]).any(1)

    def to_images(self) -> Images:
        """The images as a model reads them, with the labels `shape`, `colour` and `texture` of the largest object."""
        labels = {kind: [names[each] for each in getattr(self, kind)[:, 0]] for kind, names in HEADS.items()}
        return Images(self.images, labels=labels, mean=MEAN, std=STD, channels="last", name="shapes")


def draw(count: int, seed: int = 0) -> World:
    """Draw images; the first n of a seed are the same for every `count`.

    Args:
        count: how many.
        seed: of everything that chance decides.

    Raises:
        DataError: `count` is below 1.
    """
    if count < 1:
        raise DataError(f"count={count!r}: at least one image")
    blocks = [_block(np.random.default_rng([seed, number])) for number in range(-(-count // _BLOCK))]
    joined = {name: np.concatenate([block[name] for block in blocks])[:count] for name in blocks[0]}
    return World(captions=tuple(_caption(joined, index) for index in range(count)), **joined)


class ShapesNetwork(nn.Module):
    """Four convolutions with batch norm and ReLU, and a linear head each for shape, colour and texture."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_layer(3, 16, stride=1), *_layer(16, 32, stride=2), *_layer(32, 48, stride=1), *_layer(48, 64, stride=2)
        )
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.heads = nn.ModuleDict({kind: nn.Linear(64, len(names)) for kind, names in HEADS.items()})

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits `[images, 5 + 6 + 4]` of shapes, colours and textures of `pixel_values` `[images, 3, 32, 32]`."""
        pooled = self.pool(self.features(pixel_values)).flatten(1)
        return torch.cat([head(pooled) for head in self.heads.values()], 1)


def split_heads(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """The logits `[images, 15]` of a `ShapesNetwork`, by head: "shape", "colour", "texture"."""
    return dict(zip(HEADS, logits.split([len(names) for names in HEADS.values()], 1), strict=True))


# Helpers ----------------------------------------------------------------------------------------


def _layer(channels: int, size: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, size, 3, stride, padding=1, bias=False), nn.BatchNorm2d(size), nn.ReLU()]


def _block(generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Images of one block, masks and what the objects are; everything but the captions."""
    number = generator.integers(1, MOST + 1, _BLOCK)
    there = np.arange(MOST) < number[:, None]
    found = {kind: generator.integers(0, len(names), there.shape) for kind, names in HEADS.items()}
    radius = np.concatenate(
        [generator.integers(_LARGE[0], _LARGE[1] + 1, (_BLOCK, 1)),
         generator.integers(_SMALL[0], _SMALL[1] + 1, (_BLOCK, MOST - 1))], 1
    )  # fmt: skip
    half = SIZE // 2
    quarter = generator.permuted(np.tile(np.arange(4), (_BLOCK, 1)), axis=1)[:, :MOST]
    corner = half * np.stack([quarter // 2, quarter % 2], -1)
    centre = corner + generator.integers(radius[..., None], half - radius[..., None], (_BLOCK, MOST, 2))

    grain = generator.standard_normal((_BLOCK, SIZE, SIZE), np.float32)
    painted = np.repeat((generator.uniform(30, 110, (_BLOCK, 1, 1)).astype(np.float32) + 6 * grain)[..., None], 3, -1)
    noise = 4 * generator.standard_normal(painted.shape, np.float32)
    shine = generator.uniform(0.85, 1.0, (_BLOCK, MOST)).astype(np.float32)
    masks = np.zeros((_BLOCK, MOST, SIZE, SIZE), bool)
    for place in range(MOST):
        down, right = _offsets(centre[:, place])
        inside = _inside(found["shape"][:, place], down, right, radius[:, place])
        masks[:, place] = inside & there[:, place, None, None]
        # Only the pixels of the object, as one list.
        here = masks[:, place]
        image = np.nonzero(here)[0]
        light = (
            np.where(_bright(found["texture"][image, place], down[here], right[here]), np.float32(1), _DARK)
            * shine[image, place]
        )
        painted[here] = _PALETTE[found["colour"][image, place]] * light[:, None] + noise[here]
    absent = {kind: np.where(there, values, -1) for kind, values in (found | {"radius": radius}).items()}
    centre = np.where(there[..., None], centre, -1)
    return {"images": painted.clip(0, 255).round().astype(np.uint8), "masks": masks, "centre": centre, **absent}


def _offsets(centre: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far each pixel lies below and right of a centre `[images, 2]`: two `[images, 32, 32]`."""
    pixels, centre = np.arange(SIZE, dtype=np.int16), centre.astype(np.int16)
    down = np.broadcast_to((pixels - centre[:, :1])[:, :, None], (len(centre), SIZE, SIZE))
    right = np.broadcast_to((pixels - centre[:, 1:])[:, None, :], (len(centre), SIZE, SIZE))
    return down, right


def _inside(shape: np.ndarray, down: np.ndarray, right: np.ndarray, radius: np.ndarray) -> np.ndarray:
    radius = radius[:, None, None].astype(np.int16)
    distance, farthest = down**2 + right**2, np.maximum(abs(down), abs(right))
    nearest = np.minimum(abs(down), abs(right))
    disc = distance <= (radius + 0.3) ** 2
    shapes = [
        disc,
        farthest <= radius - 1,
        (abs(down) <= radius) & (2 * abs(right) <= down + radius),
        (farthest <= radius) & (nearest <= radius // 3),
        disc & (distance >= (0.55 * radius) ** 2),
    ]
    return np.choose(shape[:, None, None], shapes)


def _bright(texture: np.ndarray, down: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Which pixels, each with its texture and offsets, are not darkened by the texture: three lists, and one."""
    textures = [
        np.ones(down.shape, bool),
        down % 4 < 2,
        (down % 3 != 0) | (right % 3 != 0),
        (down // 2 + right // 2) % 2 == 0,
    ]
    return np.choose(texture, textures)


def _caption(found: dict[str, np.ndarray], index: int) -> str:
    words = [_named(found, index, place) for place in range(MOST) if found["shape"][index, place] >= 0]
    others = [f"{_relation(*found['centre'][index, [0, place]])} {words[place]}" for place in range(1, len(words))]
    return " ".join([words[0], " and ".join(others)]).strip()


def _named(found: dict[str, np.ndarray], index: int, place: int) -> str:
    texture = TEXTURES[found["texture"][index, place]]
    parts = ["a", COLOURS[found["colour"][index, place]], texture, SHAPES[found["shape"][index, place]]]
    return " ".join(each for each in parts if each != "plain")


def _relation(one: np.ndarray, other: np.ndarray) -> str:
    """Where one centre (row, column) lies in regard to another, along the axis on which they differ more."""
    down, right = one - other
    if abs(right) >= abs(down):
        return "left of" if right < 0 else "right of"
    return "above" if down < 0 else "below"
