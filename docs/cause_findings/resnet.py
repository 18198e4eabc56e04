"""ResNet-20 on CIFAR-10: channels that are selective for a class, and what the class loses without them.

Channels of the last stage are ranked by their expertise (average precision) for a class on one half of the images;
silencing the best eight is tested on the other half, with the other classes as guards.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import patchclamp as pc

ROOT = Path(__file__).resolve().parents[2]
CHANNELS = 8


def measure(controls: int = 100) -> dict[str, Any]:
    """Evidence for two classes."""
    sys.path.insert(0, str(ROOT))
    from tests.real import test_resnet_cifar as real

    folder = data_folder()
    network = real.resnet(folder, 3)
    with np.load(folder / "cifar10" / "cifar10_test5000.npz", allow_pickle=False) as held:
        order = np.random.default_rng(0).permutation(len(held["y"]))  # the file is in the order of the classes
        images, classes = real.plain_input(held["x"][order]), held["y"][order].astype(int)
    model = pc.load(network, example=torch.zeros(1, 3, 32, 32))
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    half = len(images) // 2
    sites = [site.name for site in model.sites.values() if site.kind == "conv" and "layer3" in site.name]
    labels = {"class": [names[each] for each in classes[:half]]}
    recording = pc.record(model, pc.Tensors(images[:half], labels), sites, [pc.Pooled("mean")], progress=False)
    ranked = pc.find.expertise(recording, "class")
    results: dict[str, Any] = {"channels": CHANNELS, "controls": controls, "sites": sites, "evidence": {}}
    for name in ("frog", "ship"):
        number = names.index(name)
        own = np.flatnonzero(classes[half:] == number)[:60] + half
        others = np.flatnonzero(classes[half:] != number)[:120] + half
        neurons = ranked.top(CHANNELS, by=f"score_{name}")
        results["evidence"][name] = pc.verify.effect(
            model,
            pc.ablate(neurons),
            "class_score",
            (images[own], classes[own].tolist()),
            controls,
            guard={
                "accuracy on the class": ("accuracy", (images[own], classes[own].tolist())),
                "accuracy on the others": ("accuracy", (images[others], classes[others].tolist())),
            },
        )
    return results


def data_folder() -> Path:
    """Where the real data is.

    Raises:
        FileNotFoundError: it is not here.
    """
    import os

    folder = Path(os.environ.get("PATCHCLAMP_DATA") or ROOT.parent / "shared" / "data")
    for part in ("resnet_cifar10", "cifar10"):
        if not (folder / part).exists():
            raise FileNotFoundError(part)
    return folder
