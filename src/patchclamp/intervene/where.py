"""`Where`: at which positions, and for which examples, an intervention acts."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from patchclamp.errors import DataError
from patchclamp.model.calls import Call
from patchclamp.model.layout import Layout, layout_of, without_tokens
from patchclamp.model.site import Site
from patchclamp.model.taps import Seen

_IN_PIECES = ("mlp", "gate")

Positions = Iterable[int] | Literal["prompt", "generated"] | None


@dataclass(frozen=True)
class Where:
    """Positions in each text, and examples of each batch.

    Attributes:
        positions: numbers of tokens in each text, without padding, from 0; negative ones count from the end of the text
            (of the prompt, while `generate` runs). Or "prompt" or "generated". None: all.
        examples: numbers of the rows of a batch. None: all.
    """

    positions: tuple[int, ...] | Literal["prompt", "generated"] | None = None
    examples: tuple[int, ...] | None = None

    @classmethod
    def of(cls, positions: Positions, examples: Iterable[int] | None, what: str) -> Where | None:
        """What a user gave, checked; None where it is everywhere.

        Raises:
            DataError: not whole numbers.
        """
        if positions is None and examples is None:
            return None
        if isinstance(positions, str):
            if positions not in ("prompt", "generated"):
                raise DataError(f'{what}(positions=...) is "prompt", "generated" or token indices, not {positions!r}')
            chosen: Any = positions
        else:
            chosen = _whole(positions, f"{what}(positions=...) is a list of token indices")
        rows = _whole(examples, f"{what}(examples=...) is a list of the rows of a batch")
        if rows is not None and any(row < 0 for row in rows):
            raise DataError(f"{what}(examples=...) counts the rows of a batch from 0, not {min(rows)}")
        return cls(chosen, rows)

    def mask(self, site: Site, seen: Seen, call: Call) -> torch.Tensor:
        """Where to act, bool, of the shape of what the site shows but for the neurons: broadcast over these.

        Raises:
            DataError: a position or an example that is not there, or a site without positions.
        """
        if call.outside:
            raise DataError(
                f"{site.name} is in a part of the network that was called by itself: positions and examples are "
                "counted in calls of the whole network"
            )
        layout = layout_of(site, seen, call)
        chosen = self._chosen(site, seen, layout, call)
        if layout.place is not None:
            chosen = chosen.flatten()[layout.place]
        elif layout.length == 1 or not layout.positions:
            chosen = chosen[:, 0]
        return chosen.reshape(*chosen.shape, *[1] * (seen.tensor.ndim - chosen.ndim))

    def _chosen(self, site: Site, seen: Seen, layout: Layout, call: Call) -> torch.Tensor:
        """`[examples, length]` bool."""
        device = seen.tensor.device
        rows = torch.ones(layout.examples, dtype=torch.bool, device=device)
        if self.examples is not None:
            beyond = [row for row in self.examples if row >= layout.examples]
            if beyond:
                raise DataError(f"example {beyond[0]} is not there: the batch has {layout.examples}")
            rows = torch.zeros_like(rows)
            rows[list(self.examples)] = True
        if self.positions is None:
            return rows[:, None].expand(-1, layout.length)
        if not layout.positions:
            given = list(seen.tensor.shape)
            images = without_tokens(site) or len(given) > 3
            why = "its neurons are channels of images" if images else f"its tensor here is {given}"
            raise DataError(f"{site.name} has no positions to choose from: {why}")
        return self._tokens(site, seen, layout, call, rows) & rows[:, None]

    def _tokens(self, site: Site, seen: Seen, layout: Layout, call: Call, rows: torch.Tensor) -> torch.Tensor:
        """`[examples, length]`, whether each token of this call is at one of the positions."""
        first, real, ended = _text(site, seen, layout, call)
        real = real.to(rows.device)
        columns = torch.arange(real.shape[1], device=rows.device)
        prompt = real.shape[1] if call.prompt is None else call.prompt
        shown = slice(first, first + layout.length)
        if isinstance(self.positions, str):
            wanted = columns < prompt if self.positions == "prompt" else columns >= prompt
            return (real & wanted)[:, shown]
        number = real.cumsum(1) - 1  # of each column's token in its text
        ends = real[:, :prompt].sum(1, keepdim=True)
        wanted = torch.zeros_like(real)
        for position in self.positions or ():
            if position < 0 and not ended:
                raise DataError(f"position {position} counts from the end, and how long {site.name} runs is not known")
            wanted |= real & (number == (position if position >= 0 else ends + position))
            # Of a text that grows, a position may still come; one that lies before its beginning never does.
            there = (ends + position >= 0 if position < 0 else ends > position)[:, 0]
            if (position < 0 or (ended and not call.grows)) and not bool(there[rows].all()):
                raise DataError(f"there is no position {position} at {site.name}; there are {int(ends[rows].min())}")
        return wanted[:, shown]


def _text(site: Site, seen: Seen, layout: Layout, call: Call) -> tuple[int, torch.Tensor, bool]:
    """The column at which a tensor begins, `[examples, columns]` which columns are tokens, and whether the text ends.

    Raises:
        DataError: that is not known.
    """
    length, device = layout.length, seen.tensor.device
    if seen.lengths is not None:
        return 0, torch.arange(length, device=device) < seen.lengths.to(device)[:, None], True
    first, end, ended = call.past, call.past + length, True
    if site.time:
        # The steps are the tokens, where the network is given tokens.
        known = call.end if call.columns is not None else 0 if call.mask is None else call.mask.shape[1]
        first, end, ended = call.start, max(call.start + 1, known), known > 0
    elif call.columns is not None and seen.length is None:
        end = call.end
        # A block may compute its MLP in pieces along the sequence.
        pieces = site.kind in _IN_PIECES and length < call.columns
        first += call.start % call.columns if pieces else 0
        if layout.place is None and length != call.columns and not pieces:
            raise DataError(
                f"{site.name} shows {length} positions, and each example has {call.columns} tokens: which is which is "
                "not known"
            )
    if call.unclear:
        raise DataError(f"which tokens are real is not known: {call.unclear}")
    if call.mask is None:
        return first, torch.ones(layout.examples, end, dtype=torch.bool, device=device), ended
    if tuple(call.mask.shape) != (layout.examples, end):
        raise DataError(
            f"{site.name} shows {layout.examples} x {length} positions, but the attention mask has "
            f"{list(call.mask.shape)}: which position is which token is not known"
        )
    return first, call.mask, True


def _whole(given: Any, what: str) -> tuple[int, ...] | None:
    if given is None:
        return None
    try:
        if isinstance(given, str):
            raise TypeError
        listed = list(given)
        if any(isinstance(each, bool) for each in listed):
            raise TypeError
        return tuple(operator.index(each) for each in listed)
    except TypeError as error:
        raise DataError(f"{what}, not {given!r:.60}") from error
