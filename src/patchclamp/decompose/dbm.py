"""Differential binary masking: which single neurons of a site carry an attribute, learned by swapping them softly.

As `das.py`, with one number for each neuron in place of directions; as the temperature falls, each becomes 0 or 1:

    h  <-  (1 - s) * h + s * h_source,    s = sigmoid(mask / temperature)

What a rotation could take apart stays together here: that is what it is compared with.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from patchclamp.decompose.das import Subspace, learned
from patchclamp.decompose.interchange import Interchanges
from patchclamp.errors import DataError
from patchclamp.model import Model, Site
from patchclamp.published import published


@published(
    row="S141",
    title="RAVEL: Evaluating Interpretability Methods on Disentangling Language Model Representations",
    authors="Huang et al.",
    year=2024,
    url="https://arxiv.org/abs/2402.17700",
    part="dbm",
)
def dbm(
    model: Model,
    site: str | Site,
    pairs: Iterable[Any] | Interchanges,
    attribute: str,
    *,
    isolate: bool = False,
    l1: float = 0.0,
    temperature: tuple[float, float] = (1e-2, 1e-4),
    rate: float = 1e-3,
    batch: int = 16,
    epochs: int = 3,
    seed: int = 0,
    show: bool = False,
) -> Subspace:
    """The neurons of a site whose swap changes the answer about an attribute (and, with `isolate`, about no other).

    The authors' code starts at a temperature of 0.01; where it ends, and their rate, could not be found.

    Args:
        model: as of `das`.
        site: as of `das`.
        pairs: as of `das`.
        attribute: as of `das`.
        isolate: half of each batch asks for other attributes, whose answers should stay, as in `mdas` (the paper's
            multi-task DBM).
        l1: weight of the sum of `s`, which makes for fewer neurons.
        temperature: first and last; it falls along a line.
        rate: of AdamW, without weight decay.
        batch: as of `das`.
        epochs: as of `das`.
        seed: as of `das`.
        show: as of `das`.

    Returns:
        The neurons of which `s` is above a half, as rows of a subspace (it may be empty), with the loss of each step.

    Raises:
        DataError: as `das`; a temperature that is not above 0, or a negative weight.
    """
    first, last = temperature
    if not 0 < last <= first or l1 < 0:
        raise DataError(f"the temperature falls and stays above 0, and l1 is at least 0; not {temperature}, {l1}")
    runs = Interchanges.of(model, site, pairs)
    mask = nn.Parameter(torch.zeros(runs.size, device=runs.states.device))
    warmth = first

    def shares() -> torch.Tensor:
        return torch.sigmoid(mask / warmth)

    def swap(base: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(base.dtype, torch.float32)
        return torch.lerp(base.to(wide), source.to(wide), shares().to(wide)).to(base.dtype)

    def cool(done: float) -> torch.Tensor:
        nonlocal warmth
        warmth = first + done * (last - first)
        return l1 * shares().sum()

    losses = learned(runs, attribute, [mask], swap, isolate, rate, batch, epochs, seed, show, cool)
    chosen = np.flatnonzero(mask.detach().cpu().numpy() > 0)
    found = Subspace.of_neurons(chosen, runs.size, runs.site.name)
    return Subspace(found.rows, found.site, losses)
