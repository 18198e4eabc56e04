"""`Where`: at which positions, and for which examples, an intervention acts."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from patchclamp.errors import DataError
from patchclamp.model.calls import Call, rectangle, without_tokens
from patchclamp.model.site import Site
from patchclamp.model.taps import Seen

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
        examples, length = rectangle(site, seen, call)
        rectangular = self._rectangle(site, seen, (examples, length), call)
        if seen.place is not None:
            return rectangular.flatten()[seen.place][:, None]
        if seen.tensor.ndim == 2 or without_tokens(site) or length == 1 != seen.tensor.shape[1]:
            return rectangular[:, 0].reshape(-1, *[1] * (seen.tensor.ndim - 1))
        return rectangular.reshape(examples, length, *[1] * (seen.tensor.ndim - 2))

    def _rectangle(self, site: Site, seen: Seen, shape: tuple[int, int], call: Call) -> torch.Tensor:
        (examples, length), device = shape, seen.tensor.device
        chosen = torch.ones(examples, length, dtype=torch.bool, device=device)
        if self.examples is not None:
            beyond = [row for row in self.examples if row >= examples]
            if beyond:
                raise DataError(f"example {beyond[0]} is not there: the batch has {examples}")
            rows = torch.zeros(examples, 1, dtype=torch.bool, device=device)
            rows[list(self.examples)] = True
            chosen &= rows
        if self.positions is None:
            return chosen
        if without_tokens(site):
            raise DataError(f"{site.name} has no positions to choose from: its neurons are channels of images")
        if seen.place is None and seen.tensor.ndim < 3 and not site.time:
            given = list(seen.tensor.shape)
            raise DataError(f"{site.name} has no positions to choose from: its tensor here is {given}")
        return chosen & self._tokens(site, examples, length, call, device)

    def _tokens(self, site: Site, examples: int, length: int, call: Call, device: torch.device) -> torch.Tensor:
        """`[examples, length]`, whether each token of this call is at one of the positions."""
        step = call.steps.get(site.name) if site.time else None
        past = call.past if step is None else step
        columns = past + length
        real = torch.ones(examples, columns, dtype=torch.bool, device=device)
        if call.mask is not None and step is None:
            if call.mask.shape[1] < columns or call.mask.shape[0] != examples:
                raise DataError(
                    f"{site.name} shows {examples} x {length} positions, but the attention mask has "
                    f"{list(call.mask.shape)}: which position is which token is not known"
                )
            real = call.mask[:, :columns].to(device)
        prompt = columns if call.prompt is None else min(call.prompt, columns)
        number = real.cumsum(1) - 1  # of each column's token in its text
        ends = real[:, :prompt].sum(1, keepdim=True)
        if isinstance(self.positions, str):
            first = torch.arange(columns, device=device)[None] < prompt
            return (real & (first if self.positions == "prompt" else ~first))[:, past:]
        wanted = torch.zeros(examples, columns, dtype=torch.bool, device=device)
        for position in self.positions or ():
            at = position if position >= 0 else ends + position
            wanted |= real & (number == at)
            # Of a text that grows, a position may still come; one that lies before its beginning never does.
            there = ((ends + position) >= 0) if position < 0 else (ends > position)
            fixed = not call.grows and step is None and not site.time
            if (fixed or position < 0) and not bool(there.all()):
                raise DataError(f"there is no position {position} at {site.name}; there are {int(ends.min())}")
        return wanted[:, past:]


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
