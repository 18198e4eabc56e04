"""The project's decoder of Python documentation: which neurons its training changed, between two checkpoints.

A probe tells code from docstrings in the last residual stream of the later checkpoint. What each neuron contributed
to the change of that projection on code, by group; and how much of the change of the projection itself, and of the
loss, is reproduced by holding the neurons of the groups at their later means in the earlier checkpoint, beside
silencing those that write most along the probe.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import patchclamp as pc
from patchclamp.find.projection_change import (
    neurons_for_share,
    projection_change,
    projection_groups,
    projection_probe,
)
from patchclamp.model.hooks import reading


def measure(texts: int = 120) -> dict[str, Any]:
    """Groups of neurons, and what patching each does."""
    before = pc.testbed.trained("python_docs", checkpoint="early").model
    trained = pc.testbed.trained("python_docs", checkpoint="last")
    after, held_out = trained.model, trained.held_out
    assert isinstance(held_out, pc.Texts)
    kinds = [each.labels["kind"] for each in held_out]
    positive = "code" if "code" in kinds else sorted(set(kinds))[0]
    direction, accuracy = projection_probe(after, held_out, "kind", positive)
    code = [each.text for each in held_out if each.labels["kind"] == positive][:texts]
    found = projection_change(before, after, code, direction)
    site = direction.sites[0]
    vector = torch.from_numpy(direction.unit()[site][0].copy())

    def projection(model: pc.Model, batch: Any) -> torch.Tensor:
        """Of the mean residual stream of each text on the probe."""
        with reading(model.module, [model.site(site)]) as captured:
            batch.run(model)
        weight = batch.mask[..., None].float()
        mean = (captured[site][0].tensor * weight).sum(1) / weight.sum(1)
        return mean @ vector

    tables = {
        name: pc.verify.patch_groups(before, after, found, metric, code, ablated=30)
        for name, metric in (("projection", projection), ("loss", "loss"))
    }
    losses = [float(np.mean(pc.verify.per_example(each, "loss", code))) for each in (before, after)]
    return {
        "kind": positive,
        "probe_accuracy": accuracy,
        "texts": len(code),
        "loss_before": losses[0],
        "loss_after": losses[1],
        "neurons": len(found),
        "neurons_for_share": neurons_for_share(found),
        "groups": projection_groups(found),
        "patched": tables,
        "top": found.top(5).names,
    }
