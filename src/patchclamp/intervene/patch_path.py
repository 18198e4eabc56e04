"""`patch_path`: what one place does to another directly, and not through what lies between (path patching).

The sender gets its activations of another input while everything else that writes into the residual stream is held at
what it does on this one, the receivers too, so that none of them acts on another; what the receivers then compute is
what is put there in the run that is patched. Kevin Wang
et al., "Interpretability in the Wild" (2022); Nicholas Goldowsky-Dill et al., "Localizing Model Behavior with Path
Patching" (2023).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
        DataError: the two inputs are not of one shape, a receiver is not reached after the sender, the sender does not
            write into the residual stream, or something that does cannot be held (experts).
    """
    there = [model.site(name) for name in (sender.sites if isinstance(sender, Neurons) else [sender])]
    named = [model.site(each) for each in receivers.sites] if isinstance(receivers, Neurons) else None
    ends = model.select(receivers) if named is None else named  # type: ignore[arg-type]
    writing = [site for site in model.sites.values() if site.kind in _WRITERS and not site.fixed]
    _check_order(list(model.sites), writing, there, ends)
    inputs, other = _read(model, inputs), _read(model, other)
    clean, foreign = _seen(model, inputs, writing), _seen(model, other, there)
    _check_lengths(inputs, other)
    for site in there:
        if foreign[site.name].shape != clean[site.name].shape:
            raise DataError(
                f"the two inputs are not of one shape: {site.name} is {list(clean[site.name].shape)} on the one and "
                f"{list(foreign[site.name].shape)} on the other"
            )
    held = patch([site.name for site in writing], {site.name: clean[site.name] for site in writing})
    if isinstance(sender, Neurons):
        foreign = {name: foreign[model.site(name).name] for name in sender.sites}
    sent = patch(sender if isinstance(sender, Neurons) else there[0], foreign, positions)
    received = _seen(model, inputs, ends, held, sent)
    if isinstance(receivers, Neurons):
        return patch(receivers, {name: received[model.site(name).name] for name in receivers.sites})
    return patch(list(received), received)


def _check_order(order: list[str], writing: list[Site], there: list[Site], ends: list[Site]) -> None:
    for site in there:
        if site not in writing:
            kinds = ", ".join(_WRITERS)
            raise DataError(f"the sender {site.name} does not write into the residual stream: senders are {kinds}")
    for end in ends:
        if end.name not in order:
            raise DataError(f"the receiver {end.name} is not listed: whether the sender comes before it is not known")
    late = [site.name for site in there for end in ends if order.index(site.name) >= order.index(end.name)]
    if late:
        raise DataError(f"the sender {late[0]} is not reached before the receivers {', '.join(e.name for e in ends)}")


def _read(model: Model, inputs: Any) -> Any:
    texts = isinstance(inputs, str) or (isinstance(inputs, Sequence) and all(isinstance(each, str) for each in inputs))
    return model.inputs(inputs) if texts else inputs


def _check_lengths(inputs: Any, other: Any) -> None:
    masks = [each.get("attention_mask") if isinstance(each, Mapping) else None for each in (inputs, other)]
    first, second = masks
    if first is not None and second is not None and first.shape == second.shape and not torch.equal(first, second):
        raise DataError("the two inputs are not of one shape: an example has more tokens in the one than in the other")


def _seen(model: Model, inputs: Any, sites: list[Site], *interventions: Patch) -> dict[str, torch.Tensor]:
    """Site -> `[examples, ..., size]` on these inputs, as it is before these interventions act there."""
    with (
        model.evaluating(),
        torch.no_grad(),
        reading(model.module, sites) as captured,
        model.intervene(*interventions),
    ):
        if isinstance(inputs, Mapping):
            model.module(**inputs)
        else:
            model.module(inputs)
    found = {}
    for site in sites:
        seen = joined(site, captured[site.name])
        if seen.place is not None:
            raise DataError(f"{site.name} shows only the tokens that were routed to it, and cannot be held")
        found[site.name] = seen.tensor.movedim(-1, -3) if site.kind == "pattern" else seen.tensor
    return found
