"""Paths of neurons in a small vision transformer: whether removing them costs a class more than simpler paths do."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import polars as pl

from patchclamp.find.neuron_path import BASELINES, NeuronPath, neuron_path, path_baseline, path_effect
from patchclamp.testbed import shapes
from patchclamp.testbed.shapes_vit import CLASSES, pixels_and_classes, quarters, shapes_vit, shapes_vit_facts

IMAGES, STEPS, BATCH = 450, 10, 256


def measure() -> dict[str, Any]:
    """Find paths on held-out images, and remove and enhance them.

    Returns:
        `ways`: for each way to find a path the mean change of the class's probability when its units are removed and
        doubled, the accuracy without them, and the joint attribution score; `shares`: of the 30 classes, those that
        lose more without the path than without a simpler one; `clusters`: cosines of how often units are on paths,
        within a class (two halves of its images), between classes of one colour, of one shape, and of neither.
    """
    started = time.process_time()
    model = shapes_vit()
    pixels, classes = pixels_and_classes(quarters(IMAGES))
    labels = classes.numpy()
    options: dict[str, Any] = {"steps": STEPS, "batch": BATCH}
    paths = {
        "neuron_path": neuron_path(model, pixels, classes, **options),
        "neuron_path_as_published": neuron_path(model, pixels, classes, score="joint", rule="left", **options),
    }
    paths |= {each: path_baseline(model, pixels, classes, method=each, **options) for each in BASELINES}
    ways, removed = {}, {}
    for name, path in paths.items():
        without, twice = (path_effect(model, pixels, path, factor) for factor in (0.0, 2.0))
        ways[name] = {
            "removed": float(without.change.mean()),
            "enhanced": float(twice.change.mean()),
            "accuracy_before": float(without.right_before.mean()),
            "accuracy_removed": float(without.right_after.mean()),
            "score": float(path.jas[:, -1].mean()),
        }
        removed[name] = np.asarray([without.change[labels == each].mean() for each in np.unique(labels)])
    shares = {
        name: {each: float((removed[name] < removed[each]).mean()) for each in BASELINES}
        for name in ("neuron_path", "neuron_path_as_published")
    }
    return {
        "images": IMAGES,
        "classes": len(np.unique(labels)),
        "facts": {name: shapes_vit_facts()[name] for name in ("accuracy", "loss")},
        "ways": ways,
        "shares_of_classes_that_lose_more": shares,
        "more_than_70_percent": {
            name: bool(min(each["activation"], each["random"]) > 0.7) for name, each in shares.items()
        },
        "clusters": {
            name: _clusters(paths[name]) for name in ("neuron_path", "neuron_path_as_published", "activation")
        },
        "seconds": round(time.process_time() - started, 1),
    }


def _clusters(path: NeuronPath) -> dict[str, float]:
    between = path.class_similarity().filter(pl.col("class") != pl.col("other"))
    one, other = between["class"].to_numpy(), between["other"].to_numpy()
    cosine = between["cosine"].to_numpy()
    number = len(shapes.SHAPES)
    colour, shape = one // number == other // number, one % number == other % number
    within = []
    for each in np.unique(path.classes):
        rows = np.flatnonzero(path.classes == each)
        halves = np.where(np.arange(len(rows)) % 2 == 0, 0, 1)
        part = NeuronPath(path.sites, path.units[rows], path.jas[rows], path.probability[rows], halves, path.position)
        within.append(part.class_similarity()["cosine"][1])
    return {
        "within_class": float(np.mean(within)),
        "same_colour": float(cosine[colour].mean()),
        "same_shape": float(cosine[shape].mean()),
        "neither": float(cosine[~colour & ~shape].mean()),
    }


if __name__ == "__main__":
    assert len(CLASSES) == len(shapes.COLOURS) * len(shapes.SHAPES)
    print(json.dumps(measure(), indent=2))
