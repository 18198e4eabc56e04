"""A small vision transformer that names the shape and colour of one object: `python -m patchclamp.testbed.shapes_vit`.

It reads a quarter of an image of `testbed.shapes`, 16 by 16 pixels with one whole object, and tells 30 classes apart:
"red circle", ..., "cyan ring". Six blocks of 64 with 128 neurons each are a Hugging Face `ViTForImageClassification`;
the classifier reads the class token. Labels are smoothed while it learns: probabilities of 1 could not be changed by a
few neurons. Training takes minutes on one core; the weights are float16 safetensors and are loaded as float32. Beside
them, `facts.json` holds what the script used and measured.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from patchclamp.data import Images
from patchclamp.errors import DataError, unknown
from patchclamp.model import Model, load
from patchclamp.testbed import shapes

CLASSES = tuple(f"{colour} {shape}" for colour in shapes.COLOURS for shape in shapes.SHAPES)
SIZE = shapes.SIZE // 2

_WEIGHTS = Path(__file__).parent / "weights"
_IMAGES, _STEPS, _BATCH, _RATE, _SMOOTHING = 12_000, 2_000, 128, 2e-3, 0.1


def shapes_vit(seed: int = 0) -> Model:
    """Load the vision transformer.

    Args:
        seed: of its training; there is 0.

    Returns:
        A model that takes `pixel_values` `[images, 3, 16, 16]` and gives logits `[images, 30]` of `CLASSES`; its sites
        `mlp.0` to `mlp.5` are `[images, 17, 128]`, the class token first.

    Raises:
        UnknownName: there is no such seed.
    """
    model = load(_kept(seed), dtype=torch.float32)
    model.name = f"testbed shapes_vit, seed {seed}"
    return model


def shapes_vit_facts(seed: int = 0) -> dict[str, Any]:
    """What the training measured on held-out images and used: `accuracy`, `loss`, `seconds`, `parameters`, versions.

    Raises:
        UnknownName: there is no such seed.
    """
    return json.loads((_kept(seed) / "facts.json").read_text(encoding="utf-8"))


def quarters(count: int, seed: int = 2) -> Images:
    """Quarters of images of the world of shapes, each with one whole object.

    Args:
        count: how many quarters; the first n of a seed are the same for every `count`.
        seed: of the images; the network was trained on those of 1, so that every other one is held out.

    Returns:
        Images `[count, 16, 16, 3]`, with the labels `class` (one of `CLASSES`), `shape`, `colour` and `texture`.

    Raises:
        DataError: `count` is below 1.
    """
    if count < 1:
        raise DataError(f"count={count!r}: at least one image")
    world = shapes.draw(count, seed)
    image, place = np.nonzero(world.shape >= 0)
    image, place = image[:count], place[:count]
    row, column = (world.centre[image, place] // SIZE).T
    cut = np.stack(
        [
            world.images[number, SIZE * down : SIZE * (down + 1), SIZE * right : SIZE * (right + 1)]
            for number, down, right in zip(image, row, column, strict=True)
        ]
    )
    labels = {
        kind: [names[each] for each in getattr(world, kind)[image, place]] for kind, names in shapes.HEADS.items()
    }
    labels["class"] = [f"{one} {other}" for one, other in zip(labels["colour"], labels["shape"], strict=True)]
    return Images(cut, labels=labels, mean=shapes.MEAN, std=shapes.STD, channels="last", name="quarters of shapes")


def pixels_and_classes(images: Images) -> tuple[torch.Tensor, torch.Tensor]:
    """`pixel_values` `[images, 3, 16, 16]` float32 and the number of each image's class `[images]` int64."""
    pixels = [
        images.inputs(range(start, min(start + 1_000, len(images))))["pixel_values"]
        for start in range(0, len(images), 1_000)
    ]
    return torch.cat(pixels), torch.tensor([CLASSES.index(each) for each in images.label_values["class"]])


def train(seed: int = 0, *, steps: int = _STEPS, images: int = _IMAGES, weights: Path = _WEIGHTS) -> dict[str, Any]:
    """Train the network, and write its weights and facts.

    Args:
        seed: of the first weights and the order of the images.
        steps: of the optimiser; fewer to try it out.
        images: quarters to train on.
        weights: folder to write to; `shapes_vit-<seed>` is made in it.

    Returns:
        What was written to `facts.json`.
    """
    torch.manual_seed(seed)
    started = time.process_time()
    module = _untrained()
    pixels, wanted = pixels_and_classes(quarters(images, seed=1))
    matrices = [each for each in module.parameters() if each.ndim > 1]
    others = [each for each in module.parameters() if each.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=_RATE, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(seed)
    module.train()
    for step in range(steps):
        for group in optimiser.param_groups:
            rise = min(1.0, (step + 1) / max(10, steps // 20))
            group["lr"] = _RATE * rise * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)
        chosen = torch.randint(len(pixels), (_BATCH,), generator=generator)
        loss = nn.functional.cross_entropy(
            module(pixel_values=pixels[chosen]).logits, wanted[chosen], label_smoothing=_SMOOTHING
        )
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        if step % 200 == 0:
            print(f"step {step}: loss {loss.item():.4f}, {time.process_time() - started:.0f} s", flush=True)
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = _folder(weights, seed)
    folder.mkdir(parents=True, exist_ok=True)
    module.half().save_pretrained(folder)
    import transformers

    versions = {"torch": torch.__version__, "numpy": np.__version__, "transformers": transformers.__version__}
    facts = {
        **score(load(folder, dtype=torch.float32)),
        "steps": steps,
        "images": images,
        "label_smoothing": _SMOOTHING,
        "parameters": sum(each.numel() for each in module.parameters()),
        "seconds": round(time.process_time() - started, 1),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
    }
    (folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return facts


@torch.no_grad()
def score(model: Model, images: Images | None = None) -> dict[str, float]:
    """`loss` in nats and `accuracy` of the network on quarters; by default on 2,000 that it was not trained on."""
    pixels, wanted = pixels_and_classes(quarters(2_000) if images is None else images)
    with model.evaluating():
        logits = torch.cat([model.module(pixel_values=part).logits for part in pixels.split(500)])
    loss = nn.functional.cross_entropy(logits, wanted)
    return {"loss": float(loss), "accuracy": float((logits.argmax(1) == wanted).double().mean())}


def _untrained() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=SIZE,
        patch_size=4,
        hidden_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: number for number, name in enumerate(CLASSES)},
    )
    return ViTForImageClassification(config)


def _kept(seed: int) -> Path:
    seeds = sorted(int(each.parent.name.rpartition("-")[2]) for each in _WEIGHTS.glob("shapes_vit-*/facts.json"))
    if seed not in seeds:
        raise unknown("seed of shapes_vit", seed, seeds)
    return _folder(_WEIGHTS, seed)


def _folder(weights: Path, seed: int) -> Path:
    return weights / f"shapes_vit-{seed}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    print(train(parser.parse_args().seed))
