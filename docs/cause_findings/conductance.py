"""Conductance in the trained network of shapes: how many channels have to go until it says something else?

Channels of one layer are ranked for each image anew: by conductance, by gradient times activation, by activation, by
chance. From the top they are silenced, until the shape that the network names is another one. Then the same rankings,
over many images, choose channels from which a linear classifier has to tell the shapes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

import patchclamp as pc
from patchclamp import attribution
from patchclamp.find.conductance import conductance
from patchclamp.model.hooks import hooked
from patchclamp.testbed.shapes import SHAPES

LAYER = 8  # of `features`: the third nonlinearity
IMAGES, STEPS, FEATURES, CLASSIFIED = 120, 20, (2, 4, 8), 600
WAYS = ("conductance", "gradient_x_activation", "activation", "chance")


def measure(seed: int = 0) -> dict[str, Any]:
    """Silence channels image by image, and classify from few of them.

    Returns:
        `silenced`: way -> mean and median number of channels until the prediction changes; `classified`: way -> number
        of channels -> accuracy on held-out images; `complete`: whether conductance adds up, and by how much not.
    """
    net = pc.testbed.trained("shapes")
    data: Any = net.held_out
    pixels = data.inputs(range(CLASSIFIED))["pixel_values"]
    site = net.model.site(f"module:features.{LAYER}@output,axis=1")
    module = net.model.module
    with torch.no_grad():
        said = module(pixels)[:, : len(SHAPES)].argmax(1)
    images, named = pixels[:IMAGES], said[:IMAGES]
    scores = {way: _scores(net.model, site, images, named, way, seed) for way in WAYS}
    needed = {way: _needed(module, site, images, named, score) for way, score in scores.items()}
    table = conductance(net.model, images, attribution.class_logit(named.tolist()), [site.name], steps=STEPS)
    return {
        "channels": scores["chance"].shape[1],
        "images": IMAGES,
        "silenced": {
            way: {"mean": float(each.mean()), "median": float(np.median(each))} for way, each in needed.items()
        },
        "wins_over_gradient_x_activation": _compared(needed["conductance"], needed["gradient_x_activation"]),
        "wins_over_activation": _compared(needed["conductance"], needed["activation"]),
        "classified": _classified(net.model, site, pixels, data, scores),
        "complete": bool(table["complete"][0]),
        "incomplete": float(table["incomplete"][0]),
    }


def _compared(ours: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Share of images on which ours needs fewer channels, or more."""
    return {"fewer": float((ours < other).mean()), "more": float((ours > other).mean())}


def _scores(
    model: pc.Model, site: pc.Site, images: torch.Tensor, named: torch.Tensor, way: str, seed: int
) -> np.ndarray:
    """`[images, channels]`, larger for what is silenced first."""
    target = attribution.class_logit(named.tolist())
    if way == "chance":
        size = model.activations(images[:1], site).shape[-1]
        return np.random.default_rng(seed).random((len(images), size))
    if way == "activation":
        return model.activations(images, site).mean((1, 2)).numpy()
    found = attribution.attribute(model, images, target, site, method=way, steps=STEPS)  # type: ignore[arg-type]
    return found.total(site.name).numpy()


def _needed(
    module: torch.nn.Module, site: pc.Site, images: torch.Tensor, named: torch.Tensor, score: np.ndarray
) -> np.ndarray:
    """`[images]`: how many channels are silenced when the prediction first changes; one more than there are: never."""
    rank = (-score).argsort(1, kind="stable").argsort(1)
    needed = np.full(len(images), score.shape[1] + 1)
    for number in range(1, score.shape[1] + 1):
        kept = torch.from_numpy(rank >= number).float()[:, None, None]
        left = np.flatnonzero(needed > score.shape[1])
        if not len(left):
            break
        with torch.no_grad(), hooked(module, [(site, lambda tensor, by=kept[left]: tensor * by)]):
            changed = (module(images[left])[:, : len(SHAPES)].argmax(1) != named[left]).numpy()
        needed[left[changed]] = number
    return needed


def _classified(
    model: pc.Model, site: pc.Site, pixels: torch.Tensor, data: Any, scores: dict[str, np.ndarray]
) -> dict[str, dict[int, float]]:
    """Accuracy of a linear classifier of shapes from the largest value of few channels."""
    labels = np.asarray([SHAPES.index(each) for each in data.label_values["shape"][: len(pixels)]])
    values = model.activations(pixels, site).amax((1, 2)).numpy()
    trained = np.arange(len(pixels)) < len(pixels) * 2 // 3
    found: dict[str, dict[int, float]] = {}
    for way, score in scores.items():
        order = np.argsort(-np.abs(score).mean(0), kind="stable")
        found[way] = {}
        for number in FEATURES:
            chosen = values[:, order[:number]]
            scaled = (chosen - chosen[trained].mean(0)) / (chosen[trained].std(0) + 1e-6)
            fit = LogisticRegression(max_iter=500).fit(scaled[trained], labels[trained])
            found[way][number] = float(fit.score(scaled[~trained], labels[~trained]))
    return found


if __name__ == "__main__":
    print(measure())
