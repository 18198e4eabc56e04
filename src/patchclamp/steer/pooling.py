"""One vector per example at a site: what learned steering compares.

Tokens of padding are never counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from patchclamp.errors import DataError, SiteNotReached
from patchclamp.model import Model, Site
from patchclamp.model.hooks import reading

How = Literal["mean", "last"]
Examples = Sequence[str] | torch.Tensor | Mapping[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Prepared:
    """Examples as the module takes them.

    Attributes:
        inputs: keywords, or the one tensor.
        mask: `[examples, tokens]` of the tokens that are real; None where nothing is padded.
        count: how many examples.
    """

    inputs: Mapping[str, torch.Tensor] | torch.Tensor
    mask: torch.Tensor | None
    count: int

    def run(self, model: Model) -> None:
        """One forward pass."""
        if isinstance(self.inputs, torch.Tensor):
            model.module(self.inputs)
        else:
            model.module(**self.inputs)


def prepared(model: Model, examples: Examples, what: str, least: int = 2) -> Prepared:
    """Examples that a module can be run on, and which of their tokens are real.

    Args:
        model: the model.
        examples: texts, a tensor `[examples, ...]`, or a mapping of keywords.
        what: how an error calls them.
        least: how many there must be.

    Raises:
        DataError: there are fewer, or they are something else.
    """
    if isinstance(examples, torch.Tensor):
        found = Prepared(examples.to(model.device), None, len(examples))
    elif isinstance(examples, Mapping):
        inputs = {name: value.to(model.device) for name, value in examples.items()}
        found = Prepared(inputs, inputs.get("attention_mask"), len(next(iter(inputs.values()), ())))
    elif isinstance(examples, str) or not isinstance(examples, Sequence):
        raise DataError(f"{what} are a list of texts, a tensor or a mapping of keywords, not {type(examples).__name__}")
    else:
        inputs = model.inputs(list(examples)) if examples else {}
        found = Prepared(inputs, inputs.get("attention_mask"), len(examples))
    if found.count < least:
        raise DataError(f"{what}: {found.count} example{'s' * (found.count != 1)}; at least {least} are needed")
    return found


def pooled(site: Site, tensor: torch.Tensor, given: Prepared, how: How) -> torch.Tensor:
    """`[examples, size]` of the site's tensor `[examples, ..., size]`, with its gradient.

    Raises:
        DataError: the tensor has no row of its own for each example, or no tokens of which there is a last.
    """
    if tensor.ndim < 2 or tensor.shape[0] != given.count or site.kind == "pattern":
        raise DataError(
            f"{site.name} shows {list(tensor.shape)}, not [examples, ..., neurons] of {given.count} examples"
        )
    if tensor.ndim == 2:
        return tensor
    mask = given.mask
    if mask is not None and tensor.shape[:2] == mask.shape and tensor.ndim == 3:
        weight = mask.to(tensor)
    else:
        weight = torch.ones(tensor.shape[:2], dtype=tensor.dtype, device=tensor.device)
        if how == "mean":
            return tensor.flatten(1, -2).mean(1)
    if how == "last":
        if tensor.ndim != 3:
            raise DataError(f"{site.name} has no last token: it shows {list(tensor.shape)}")
        position = torch.arange(tensor.shape[1], device=tensor.device)
        last = (weight * (position + 1)).argmax(1)
        return tensor[torch.arange(len(tensor), device=tensor.device), last]
    return (tensor * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)


@torch.no_grad()
def read_pooled(model: Model, given: Prepared, sites: Sequence[Site], how: How) -> dict[str, torch.Tensor]:
    """Site -> `[examples, size]` in the model as it is, float32 or float64.

    Raises:
        SiteNotReached: the pass never called a site.
        DataError: as `pooled`, or an activation that is not finite.
    """
    with model.evaluating(), reading(model.module, sites) as captured:
        given.run(model)
    found = {}
    for site in sites:
        if not captured[site.name]:
            raise SiteNotReached(f"the forward pass never called {site.name} ({site.module})")
        values = pooled(site, captured[site.name][-1].tensor, given, how)
        found[site.name] = values.to(torch.promote_types(values.dtype, torch.float32))
        if not bool(found[site.name].isfinite().all()):
            raise DataError(f"an activation at {site.name} is not finite")
    return found


def as_model(given: Any) -> Model:
    """A `Model`, also of a plain module."""
    from patchclamp.model import load

    return given if isinstance(given, Model) else load(given)
