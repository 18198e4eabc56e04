"""`Activations`: a tensor that knows which token each row belongs to, and how it is made of what a pass showed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from patchclamp.errors import ModelError, SiteNotReached
from patchclamp.model.site import Site
from patchclamp.model.taps import Seen


class Activations(torch.Tensor):
    """Activations of one text at one site: an ordinary tensor `[tokens, size]` with `.tokens`.

    Any operation on it gives a plain tensor.

    Attributes:
        tokens: the string of each row's token, special tokens included; None for inputs without tokens.
        site: name of the site.
    """

    tokens: list[str] | None
    site: str

    # Results of arithmetic have other rows: they must not carry the labels along.
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def of(tensor: torch.Tensor, site: str, tokens: list[str] | None) -> Activations:
        """Label a tensor `[tokens, size]`."""
        labelled: Any = tensor.detach().as_subclass(Activations)
        labelled.tokens, labelled.site = tokens, site
        return labelled

    def __deepcopy__(self, memo: dict[int, Any]) -> Activations:
        return Activations.of(self.clone(), self.site, copy.copy(self.tokens))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        words = "" if self.tokens is None else " on " + " ".join(repr(each) for each in self.tokens[:8])
        more = " ..." if self.tokens is not None and len(self.tokens) > 8 else ""
        return f"Activations({self.site}: {list(self.shape)}, {self.dtype}{words}{more})"


def joined(site: Site, captured: Sequence[Seen]) -> Seen:
    """What one forward pass showed of a site, as one.

    A block that computes its MLP in pieces along the sequence calls the module several times; a cell is called
    once for each time step, and its calls `[examples, size]` become `[examples, time, size]`.

    Raises:
        SiteNotReached: the module was never called.
        ModelError: it was called several times, and neither of these is the reason; or it showed something else
            than the site's neurons.
    """
    if not captured:
        raise SiteNotReached(
            f"the forward pass never reached {site.name}: the module {site.module} was not called. "
            "Its weights may be used directly by a fused kernel, or this input takes another path"
        )
    steps = [seen.tensor for seen in captured]
    if site.size is not None and any(each.shape[-1] != site.size for each in steps):
        shape = next(list(each.shape) for each in steps if each.shape[-1] != site.size)
        raise ModelError(f"{site.name} has {site.size} neurons, and {site.module} shows a tensor {shape}")
    if site.time and all(each.ndim <= 2 and each.shape == steps[0].shape for each in steps):
        return Seen(torch.stack(steps, dim=steps[0].ndim - 1))
    if len(captured) == 1:
        return captured[0]
    if any(seen.place is not None for seen in captured) or min(each.ndim for each in steps) < 3:
        raise ModelError(several_calls(site, len(captured)))
    return Seen(torch.cat(steps, dim=1))


def several_calls(site: Site, number: int) -> str:
    """Why a site whose module one pass calls so often is not read."""
    return (
        f"{site.name}: one forward pass calls the module {site.module} {number} times: which call is meant cannot be "
        "said"
    )


def labelled(site: Site, seen: Seen, strings: list[str] | None) -> Activations:
    """The activations of one input; `strings` are its tokens, None where it is no text."""
    tensor = seen.tensor
    if site.kind == "pattern":
        tensor = tensor.movedim(-1, 1)
        return Activations.of(tensor if strings is None else tensor[0], site.name, None)
    if strings is None:
        return Activations.of(tensor, site.name, None)
    tensor = tensor.reshape(-1, tensor.shape[-1])
    if seen.place is not None:
        strings = [strings[place] for place in seen.place.tolist()]
    return Activations.of(tensor, site.name, strings if len(strings) == len(tensor) else None)
