"""`gradients`: activations and gradients at any number of sites, by one forward and one backward pass.

The tensors that the sites show stay in the graph, and one call of `torch.autograd.grad` gives the gradients at all of
them. Weights are frozen meanwhile: nothing is kept that only their gradients would need, and the graph begins at the
first site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from patchclamp.attribution.targets import Target
from patchclamp.errors import DataError, ModelError
from patchclamp.model.activations import joined, several_calls
from patchclamp.model.hooks import tapped
from patchclamp.model.model import Model
from patchclamp.model.site import Site
from patchclamp.model.taps import Seen, Tap

Edit = Callable[[torch.Tensor], torch.Tensor]

# What enters a projection: nobody writes into it.
_ENTERING = ("mlp", "attn", "mixer")


@dataclass(frozen=True, eq=False)
class Gradients:
    """What one forward and one backward pass showed.

    Attributes:
        value: `[examples]`, the target of each example.
        activations: name of a site -> `[examples, ..., size]`, neurons last; of an expert zero at tokens that were not
            routed to it.
        gradients: the same, the derivative of the example's value; zero where the value does not depend on it.
        mask: `[examples, tokens]` bool, which tokens are real; None where the inputs have no attention mask.
        masks: name of a site -> the mask of its tokens, for sites that have any: a decoder's are others.
    """

    value: torch.Tensor
    activations: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    mask: torch.Tensor | None
    masks: dict[str, torch.Tensor] = field(default_factory=dict)


def gradients(
    model: Model,
    inputs: Any,
    target: Target,
    sites: str | Site | Iterable[str | Site] = "mlp.*",
    *,
    before: Sequence[tuple[str | Site, Edit]] = (),
) -> Gradients:
    """Activations and the gradients of a target at sites: one forward pass, one backward pass, whatever the sites.

    Interventions that are in force when it is called count, and so do gradients through them.

    Args:
        model: the model; no gradient reaches its weights, and their `requires_grad` is put back.
        inputs: a text, a list of texts, a tensor `[examples, ...]`, or the keyword arguments of the module.
        target: `(output, inputs) -> [examples]`, one number for each example, which depends on no other example.
        sites: sites by name or glob.
        before: site -> function of its tensor, applied before it is seen (a point on a path).

    Returns:
        `Gradients`; tensors are detached.

    Raises:
        DataError: the target gives something else than one finite number per example.
        SiteNotReached: the forward pass never reached a site.
        ModelError: a site that cannot be written, or is seen several times at one position.
    """
    chosen = model.select(sites)
    call = prepared(model, inputs)
    with _running(model, chosen, before) as captured, torch.enable_grad():
        value = _value(model, call, target)
        shown = [(site, seen) for site in chosen for seen in captured[site.name]]
        for site in chosen:
            _refuse_unclear(site, captured[site.name])
        if value.requires_grad:
            found = torch.autograd.grad(value.sum(), [seen.tensor for _, seen in shown], allow_unused=True)
        else:
            found = [None] * len(shown)
    slopes: dict[str, list[Seen]] = {site.name: [] for site in chosen}
    for (site, seen), slope in zip(shown, found, strict=True):
        slopes[site.name].append(seen._replace(tensor=torch.zeros_like(seen.tensor) if slope is None else slope))
    return _gathered(value, chosen, captured, slopes, call)


def values(
    model: Model,
    inputs: Any,
    target: Target,
    sites: str | Site | Iterable[str | Site] = "mlp.*",
    *,
    before: Sequence[tuple[str | Site, Edit]] = (),
) -> Gradients:
    """As `gradients`, without the backward pass: there are no gradients in what it returns."""
    chosen = model.select(sites)
    call = prepared(model, inputs)
    with _running(model, chosen, before) as captured, torch.no_grad():
        value = _value(model, call, target)
        for site in chosen:
            _refuse_unclear(site, captured[site.name])
    return _gathered(value, chosen, captured, {}, call)


def prepared(model: Model, inputs: Any) -> Any:
    """The arguments of the module: a dict of keywords, or one tensor.

    Raises:
        DataError: no inputs.
    """
    if isinstance(inputs, Mapping):
        return dict(inputs)
    if isinstance(inputs, torch.Tensor):
        if not inputs.ndim or not len(inputs):
            raise DataError(f"there are no examples: the tensor is {list(inputs.shape)}")
        return inputs
    return model.inputs(inputs)


def rows_of(call: Any, examples: Sequence[int], of: int) -> Any:
    """The arguments of a module for some examples out of so many."""
    if isinstance(call, torch.Tensor):
        return call if list(examples) == list(range(of)) else call[list(examples)]
    return {
        name: rows_of(each, examples, of) if isinstance(each, torch.Tensor) and each.ndim and len(each) == of else each
        for name, each in call.items()
    }


def examples_of(call: Any) -> int:
    """How many examples the arguments of a module hold."""
    if isinstance(call, torch.Tensor):
        return len(call)
    return next((len(each) for each in call.values() if isinstance(each, torch.Tensor) and each.ndim), 1)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No weight wants a gradient while the block runs; afterwards those do that did."""
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


@contextmanager
def capturing(root: nn.Module, sites: Sequence[Site]) -> Iterator[dict[str, list[Seen]]]:
    """Like `reading`, but what is collected is what flows on, in the graph: name -> list, newest last."""
    captured: dict[str, list[Seen]] = {site.name: [] for site in sites}

    def tap(site: Site) -> Tap:
        if site.fixed:
            raise ModelError(f"no gradient is taken at {site.name}: {site.fixed}")

        def see(seen: Seen) -> torch.Tensor:
            given, own = seen.tensor, site.through == "module" and site.kind in _ENTERING
            # Another node of the graph than the given one, which may flow on elsewhere too.
            if not given.requires_grad:
                kept = (given.detach() if own else given.detach().clone()).requires_grad_()
            else:
                kept = given.view_as(given) if own else given.clone()
            captured[site.name].append(seen._replace(tensor=kept))
            # What goes on is yet another one, where the network may write into it (`ReLU(inplace=True)`).
            return kept if own else kept.clone()

        return Tap(site, see)

    with tapped(root, [tap(site) for site in sites]):
        yield captured


def dense(site: Site, captured: Sequence[Seen], shape: tuple[int, int | None]) -> torch.Tensor:
    """What one pass showed of a site as `[examples, ..., size]`; zero at positions that it does not have."""
    if any(seen.place is None for seen in captured):
        return joined(site, captured).tensor
    rows = torch.cat([seen.tensor for seen in captured])
    place = torch.cat([seen.place for seen in captured if seen.place is not None])
    examples = captured[0].examples or shape[0]
    length = captured[0].length or shape[1]
    if length is None:
        last = int(place.max()) + 1 if len(place) else examples
        length = -(-last // examples)
    return rows.new_zeros(examples * length, rows.shape[-1]).index_copy(0, place, rows).view(examples, length, -1)


def checked_value(value: Any, call: Any) -> torch.Tensor:
    """What a target gave, `[examples]`.

    Raises:
        DataError: something else, or not finite.
    """
    examples = examples_of(call)
    if not isinstance(value, torch.Tensor) or value.ndim != 1:
        got = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise DataError(f"a target gives one number for each of {examples} examples, not {got}")
    if len(value) != examples:
        raise DataError(f"a target gives one number for each of {examples} examples, not {len(value)}")
    if not value.isfinite().all():
        raise DataError(f"the target of example {int((~value.isfinite()).nonzero()[0])} is not finite")
    return value


# Helpers --------------------------------------------------------------------------------------------


@contextmanager
def _running(
    model: Model, sites: Sequence[Site], before: Sequence[tuple[str | Site, Edit]]
) -> Iterator[dict[str, list[Seen]]]:
    with ExitStack() as stack:
        stack.enter_context(model.evaluating())
        stack.enter_context(frozen(model.module))
        for site, edit in before:
            stack.enter_context(tapped(model.module, [_editing(model.site(site), edit)]))
        yield stack.enter_context(capturing(model.module, sites))


def _value(model: Model, call: Any, target: Target) -> torch.Tensor:
    if isinstance(call, Mapping):
        return checked_value(target(model.module(**call), call), call)
    return checked_value(target(model.module(call), {}), call)


def _gathered(
    value: torch.Tensor,
    sites: Sequence[Site],
    captured: Mapping[str, list[Seen]],
    slopes: Mapping[str, list[Seen]],
    call: Any,
) -> Gradients:
    mask = _mask(call, "attention_mask")
    shape = (len(value), mask.shape[1]) if mask is not None else (len(value), None)
    activations = {site.name: dense(site, captured[site.name], shape).detach() for site in sites}
    masks = {}
    for site in sites:
        name = "decoder_attention_mask" if site.stack == "decoder" else "attention_mask"
        of_site = _mask(call, name)
        if of_site is not None and activations[site.name].shape[:2] == of_site.shape:
            masks[site.name] = of_site
    return Gradients(
        value.detach(),
        activations,
        {site.name: dense(site, slopes[site.name], shape).detach() for site in sites if site.name in slopes},
        mask,
        masks,
    )


def _mask(call: Any, name: str) -> torch.Tensor | None:
    mask = call.get(name) if isinstance(call, Mapping) else None
    return mask.bool() if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None


def _refuse_unclear(site: Site, captured: Sequence[Seen]) -> None:
    """Refuse a site that was not reached, or was seen twice at the same position."""
    if not captured or any(seen.place is None for seen in captured):
        joined(site, captured)
        return
    place = torch.cat([seen.place for seen in captured if seen.place is not None])
    if len(place.unique()) < len(place):
        raise ModelError(several_calls(site, len(captured)))


def _editing(site: Site, edit: Edit) -> Tap:
    return Tap(site, lambda seen: edit(seen.tensor))
