"""`Tap`: a function that sees the tensor of a site while the network runs, and may return another in its place.

A network is tapped in several ways (a module's hooks, inside fused experts, in an attention's softmax, in
the steps of a recurrent layer); each way is one file with a function `tapped(root, taps)`. The ways that replace
what a module does share `installed`: several contexts may tap one module, in the order in which they were
entered, and the module is itself again when the last one ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from patchclamp.model.site import Site


class Seen(NamedTuple):
    """What one call of a module showed of a site, neurons last."""

    tensor: torch.Tensor
    """`[..., size]`."""
    place: torch.Tensor | None = None
    """`[rows]` int64 where the tensor is `[rows, size]` and not every position has a row (tokens routed to an expert,
    a packed sequence): the position of each row, `example * length + position`, in the rectangle of the batch."""
    length: int | None = None
    """The width of that rectangle, where the module that is tapped knows it."""
    examples: int | None = None
    """Its height, likewise."""
    lengths: torch.Tensor | None = None
    """`[examples]` int64, how many positions each example has, where the module that is tapped knows it."""


@dataclass(frozen=True)
class Tap:
    """A function at a site.

    Attributes:
        site: where.
        see: is given what one call shows; returns its tensor, or another of the same shape, dtype and device.
        writes: whether `see` ever returns another tensor; a tap that only reads may be served more cheaply.
    """

    site: Site
    see: Callable[[Seen], torch.Tensor]
    writes: bool = True


_installed: WeakKeyDictionary[nn.Module, dict[str, tuple[list[Tap], Callable[[], None]]]] = WeakKeyDictionary()


@contextmanager
def installed(
    module: nn.Module,
    way: str,
    taps: Sequence[Tap],
    install: Callable[[nn.Module, list[Tap]], Callable[[], None]],
) -> Iterator[None]:
    """Tap a module in a way that replaces something of it, for as long as the block runs.

    `install(module, taps)` is called when the first context taps the module in this way; it is given the list of
    taps, which changes as contexts come and go, and returns what undoes it.
    """
    ways = _installed.setdefault(module, {})
    if way not in ways:
        live: list[Tap] = []
        ways[way] = (live, install(module, live))
    live, undo = ways[way]
    live.extend(taps)
    try:
        yield
    finally:
        for tap in taps:
            # By identity: two contexts may hold equal taps.
            del live[next(place for place, each in enumerate(live) if each is tap)]
        if not live:
            del ways[way]
            undo()
