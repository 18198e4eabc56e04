"""Recordings whose neurons do exactly what a test says: a plain ReLU network that hands on what it is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

import patchclamp as pc


def network(size: int) -> nn.Sequential:
    """Its neurons are its inputs, cut at 0."""
    first = nn.Linear(size, size, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.eye(size))
    return nn.Sequential(first, nn.ReLU(), nn.Linear(size, 2)).eval()


def of_values(values: np.ndarray, labels: Sequence[str], label: str = "kind", **how: Any) -> pc.Recording:
    """What the neurons of the one site do on examples `[examples, neurons]`, one row each."""
    given = torch.from_numpy(np.ascontiguousarray(values, np.float32))
    summaries = how.pop("summaries", [pc.ByLabel(), pc.Pooled("max", dtype="float32")])
    data = pc.Tensors(given, labels={label: list(labels)})
    return pc.record(network(given.shape[1]), data, "mlp.*", summaries, progress=False, **how)


def of_two_sites(values: np.ndarray, labels: Sequence[str], summaries: Sequence[pc.Summary]) -> pc.Recording:
    """As `of_values`, and after them a second site with the same neurons in the opposite order."""
    size = values.shape[1]
    second = nn.Linear(size, size, bias=False)
    with torch.no_grad():
        second.weight.copy_(torch.eye(size).flip(0))
    module = nn.Sequential(*list(network(size))[:2], second, nn.ReLU(), nn.Linear(size, 2)).eval()
    data = pc.Tensors(torch.from_numpy(np.ascontiguousarray(values, np.float32)), labels={"kind": list(labels)})
    return pc.record(module, data, "mlp.*", list(summaries), progress=False)
