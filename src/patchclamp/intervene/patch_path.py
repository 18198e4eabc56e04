"""`patch_path`: what one place does to another directly, and not through what lies between (path patching).

The sender gets its activations of another input while everything else that writes into the residual stream is held at
what it does on this one; what the receivers then compute is what is put there in the run that is patched. Kevin Wang
et al., "Interpretability in the Wild" (2022); Nicholas Goldowsky-Dill et al., "Localizing Model Behavior with Path
Patching" (2023).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from patchclamp.errors import DataError
from patchclamp.intervene.patch import Patch, patch
from patchclamp.intervene.where import Positions
from patchclamp.model.activations import joined
from patchclamp.model.hooks import reading
from patchclamp.model.model import Model
from patchclamp.model.site import Site
from patchclamp.neurons import Neurons

_WRITERS = ("attn", "cross_attn", "mlp", "mixer", "expert")


def patch_path(
    model: Model,
    sender: Neurons | str | Site,
    receivers: Neurons | str | Site | Iterable[str | Site],
    inputs: Any,
    other: Any,
    positions: Positions = None,
) -> Patch:
    """The patch that lets a sender, as it is on another input, act on receivers by the direct path only.

    It is an intervention for runs on `inputs`. To patch a path in the other direction, exchange the two inputs.

    Args:
        model: the model.
        sender: a site that writes into the residual stream (`attn.3`, `mlp.3`), or neurons of it (those of one head).
        receivers: sites that are reached after the sender, or neurons of them; `resid_post` of the last layer stands
            for the direct path to the logits.
        inputs: a text, several of them, or the keyword arguments of the module.
        other: the same for the other input: as many tokens.
        positions: tokens at which the sender is replaced, as in `patch`. None for all.

    Returns:
        A `Patch` of the receivers.

    Raises:
        DataError: the two inputs are not of one shape, or a receiver is not reached after the sender.
    """
    there = sender.sites if isinstance(sender, Neurons) else [model.site(sender).name]
    ends = receivers.sites if isinstance(receivers, Neurons) else [each.name for each in model.select(receivers)]
    order = list(model.sites)
    late = [name for name in there for end in ends if order.index(name) >= order.index(model.site(end).name)]
    if late:
        raise DataError(f"the sender {late[0]} is not reached before the receivers {', '.join(ends)}")
    held = [site for site in _writing(model) if site.name not in (*there, *ends)]
    clean = _seen(model, inputs, [*held, *map(model.site, there)])
    foreign = _seen(model, other, [model.site(name) for name in there])
    for name in there:
        if foreign[name].shape != clean[name].shape:
            raise DataError(
                f"the two inputs are not of one shape: {name} is {list(clean[name].shape)} on the one and "
                f"{list(foreign[name].shape)} on the other"
            )
    frozen = patch([site.name for site in held], {site.name: clean[site.name] for site in held})
    sent = patch(sender, foreign, positions)
    with model.intervene(frozen, sent):
        received = _seen(model, inputs, [model.site(end) for end in ends])
    where = receivers if isinstance(receivers, Neurons) else ends
    return patch(where, received)


def _writing(model: Model) -> list[Site]:
    """The sites through which blocks write into the residual stream."""
    return [site for site in model.sites.values() if site.kind in _WRITERS and not site.fixed]


def _seen(model: Model, inputs: Any, sites: list[Site]) -> dict[str, torch.Tensor]:
    """Site -> `[examples, ..., size]` on these inputs, interventions that are in force included."""
    with model.evaluating(), torch.no_grad(), reading(model.module, sites) as captured:
        if isinstance(inputs, dict):
            model(**inputs)
        else:
            model([inputs] if isinstance(inputs, str) else inputs)
    found = {}
    for site in sites:
        seen = joined(site, captured[site.name])
        if seen.place is not None:
            raise DataError(f"{site.name} shows only the tokens that were routed to it, and cannot be held")
        found[site.name] = seen.tensor.movedim(-1, -3) if site.kind == "pattern" else seen.tensor
    return found
