"""From interventions to taps: each edit at its site, in order, at its positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from patchclamp.model.calls import Call, Calls
from patchclamp.model.layout import width_of
from patchclamp.model.site import Site
from patchclamp.model.taps import Seen, Tap

SeenEdit = Callable[[Seen, Call], torch.Tensor]
"""What an edit makes of what a site shows in a call."""


def seen_edits(intervention: Any, model: Any) -> dict[str, SeenEdit]:
    """Name of a site -> what an intervention makes of it there, its positions heeded.

    An intervention has `edits(model)`, and may have `where`, with a method `mask(site, seen, call)`; or it has
    `seen_edits(model)` of its own.
    """
    own = getattr(intervention, "seen_edits", None)
    if own is not None:
        return dict(own(model))
    where = getattr(intervention, "where", None)
    return {name: located(model.site(name), on_tensor(edit), where) for name, edit in intervention.edits(model).items()}


def taps_of(model: Any, interventions: Sequence[Any], calls: Calls, reached: set[str]) -> list[Tap]:
    """The taps of several interventions, in order; `reached` collects the names of sites that were seen."""
    found = [
        (model.site(name), edit)
        for intervention in interventions
        for name, edit in seen_edits(intervention, model).items()
    ]
    return [_tap(site, edit, calls, reached, key) for key, (site, edit) in enumerate(found)]


def _tap(site: Site, edit: SeenEdit, calls: Calls, reached: set[str], key: int) -> Tap:
    def see(seen: Seen) -> torch.Tensor:
        reached.add(site.name)
        call = calls.at(site)
        start = call.shown.get(key, 0)
        call.shown[key] = start + width_of(site, seen)
        return edit(seen, replace(call, start=start))

    return Tap(site, see)


def on_tensor(edit: Callable[[torch.Tensor], torch.Tensor]) -> SeenEdit:
    """An edit that looks at the tensor alone."""
    return lambda seen, _call: edit(seen.tensor)


def located(site: Site, edit: SeenEdit, where: Any) -> SeenEdit:
    """The edit at some positions and examples only; None for all."""
    if where is None:
        return edit

    def at(seen: Seen, call: Call) -> torch.Tensor:
        mask = where.mask(site, seen, call)
        if not bool(mask.any()):
            return seen.tensor
        return torch.where(mask, edit(seen, call), seen.tensor)

    return at
