"""`gradients`: activations and gradients at any number of sites, by one forward and one backward pass.

The tensors that the sites show stay in the graph, and one call of `torch.autograd.grad` gives the gradients at all of
them. Weights are frozen meanwhile: nothing is kept that only their gradients would need, and the graph begins at the
first site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from patchclamp.attribution.targets import Target
from patchclamp.errors import DataError
from patchclamp.model.activations import joined
from patchclamp.model.hooks import tapped
from patchclamp.model.model import Model
from patchclamp.model.site import Site
from patchclamp.model.taps import Seen, Tap

Edit = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Gradients:
    """What one forward and one backward pass showed.

    Attributes:
        value: `[examples]`, the target of each example.
        activations: name of a site -> `[examples, ..., size]`, neurons last; of an expert zero at tokens that were not
            routed to it.
        gradients: the same, the derivative of the example's value; zero where the value does not depend on it.
        mask: `[examples, tokens]` bool, which tokens are real; None where the inputs have no attention mask.
    """

    value: torch.Tensor
    activations: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    mask: torch.Tensor | None


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
    """
    chosen = model.select(sites)
    call = prepared(model, inputs)
    with ExitStack() as stack:
        stack.enter_context(model.evaluating())
        stack.enter_context(frozen(model.module))
        stack.enter_context(torch.enable_grad())
        for site, edit in before:
            stack.enter_context(tapped(model.module, [_editing(model.site(site), edit)]))
        captured = stack.enter_context(capturing(model.module, chosen))
        output = model.module(**call) if isinstance(call, Mapping) else model.module(call)
        value = checked_value(target(output, call if isinstance(call, Mapping) else {}), call)
        shown = [(site, seen) for site in chosen for seen in captured[site.name]]
        for site in chosen:
            joined(site, captured[site.name])  # refuses a site that was not reached
        if value.requires_grad:
            found = torch.autograd.grad(value.sum(), [seen.tensor for _, seen in shown], allow_unused=True)
        else:
            found = [None] * len(shown)
    slopes: dict[str, list[Seen]] = {site.name: [] for site in chosen}
    for (site, seen), slope in zip(shown, found, strict=True):
        slopes[site.name].append(seen._replace(tensor=torch.zeros_like(seen.tensor) if slope is None else slope))
    mask = call.get("attention_mask") if isinstance(call, Mapping) else None
    mask = mask.bool() if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
    shape = (len(value), mask.shape[1]) if mask is not None else (len(value), None)
    return Gradients(
        value.detach(),
        {site.name: dense(site, captured[site.name], shape).detach() for site in chosen},
        {site.name: dense(site, slopes[site.name], shape).detach() for site in chosen},
        mask,
    )


def prepared(model: Model, inputs: Any) -> Any:
    """The arguments of the module: a dict of keywords, or one tensor.

    Raises:
        DataError: no inputs.
    """
    if isinstance(inputs, Mapping):
        return dict(inputs)
    if isinstance(inputs, torch.Tensor):
        if not len(inputs):
            raise DataError("there are no examples: the tensor is empty")
        return inputs
    return model.inputs(inputs)


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
        def see(seen: Seen) -> torch.Tensor:
            # Another tensor than the given one: that may be a view, or be written into later.
            tensor = seen.tensor.clone() if seen.tensor.requires_grad else seen.tensor.detach().clone()
            tensor.requires_grad_()
            captured[site.name].append(seen._replace(tensor=tensor))
            return tensor

        return Tap(site, see)

    with tapped(root, [tap(site) for site in sites]):
        yield captured


def dense(site: Site, captured: Sequence[Seen], shape: tuple[int, int | None]) -> torch.Tensor:
    """What one pass showed of a site as `[examples, ..., size]`; zero at positions that it does not have."""
    if captured[0].place is None:
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
    first = next(iter(call.values())) if isinstance(call, Mapping) else call
    examples = len(first) if isinstance(first, torch.Tensor) and first.ndim else 1
    if not isinstance(value, torch.Tensor) or value.ndim != 1:
        got = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise DataError(f"a target gives one number for each of {examples} examples, not {got}")
    if len(value) != examples:
        raise DataError(f"a target gives one number for each of {examples} examples, not {len(value)}")
    if not value.isfinite().all():
        raise DataError(f"the target of example {int((~value.isfinite()).nonzero()[0])} is not finite")
    return value


def _editing(site: Site, edit: Edit) -> Tap:
    return Tap(site, lambda seen: edit(seen.tensor))
