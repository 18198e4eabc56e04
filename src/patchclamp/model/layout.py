"""`Layout`: which rows of what a site shows belong to which example and position of the batch."""

from __future__ import annotations

from typing import NamedTuple

import torch

from patchclamp.errors import DataError
from patchclamp.model.calls import Call
from patchclamp.model.site import Site
from patchclamp.model.taps import Seen


class Layout(NamedTuple):
    """The rectangle of examples and positions, and where the rows of a tensor are in it."""

    examples: int
    length: int
    """Positions of each example; 1 where there are none to tell apart."""
    positions: bool
    """Whether the positions are tokens, or steps in time."""
    place: torch.Tensor | None = None
    """`[rows]` int64, `example * length + position` of each row; None where the tensor is the rectangle itself."""


def layout_of(site: Site, seen: Seen, call: Call) -> Layout:
    """How the rows of a tensor lie.

    Raises:
        DataError: the tensor does not say, and neither does the call.
    """
    shape = seen.tensor.shape
    if seen.place is not None:
        return _of_places(site, seen, seen.place, call)
    if site.through == "recurrent":
        raise DataError(f"{site.name}: the module packs its sequences itself, and which row is which is not known")
    if len(shape) < 2:
        return Layout(1, 1, site.time)
    if site.time:
        return Layout(shape[0], 1, True)
    if without_tokens(site) or (len(shape) > 3 and site.through != "attention"):
        return _checked(site, Layout(shape[0], 1, False), call)
    if len(shape) == 2:
        if call.examples is None or call.columns is None or shape[0] != call.examples * call.columns:
            return _checked(site, Layout(shape[0], 1, False), call)
        # All tokens of the batch one after the other, as blocks with experts hand them on.
        return Layout(call.examples, call.columns, True, torch.arange(shape[0], device=seen.tensor.device))
    return _checked(site, Layout(shape[0], shape[1], True), call)


def without_tokens(site: Site) -> bool:
    """Whether a site's positions are places in an image; those of attention probabilities are the queries."""
    return site.axis != -1 and site.through != "attention"


def width_of(site: Site, seen: Seen) -> int:
    """How many columns of a call one call of a module shows."""
    return 1 if site.time or seen.place is not None or seen.tensor.ndim < 3 else seen.tensor.shape[1]


def _of_places(site: Site, seen: Seen, place: torch.Tensor, call: Call) -> Layout:
    examples, length = seen.examples, seen.length
    if examples is None or length is None:
        examples, length = call.examples, call.columns
    if examples is None or length is None:
        raise DataError(f"{site.name} shows single tokens, and which of them are of which example is not known here")
    if place.numel() and int(place.max()) >= examples * length:
        raise DataError(f"{site.name} shows more tokens than the {examples} x {length} of the batch")
    return Layout(examples, length, True, place)


def _checked(site: Site, layout: Layout, call: Call) -> Layout:
    if call.examples is not None and layout.examples != call.examples:
        raise DataError(
            f"{site.name} shows {layout.examples} rows of a batch of {call.examples} examples: which row is of which "
            "example is not known"
        )
    return layout
