"""`SideBySide`: several interventions in one pass, each on its own part of the batch.

The batch is the same examples as often as there are interventions: the first part is changed by the first, and so on.
That is how many control sets are tried in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from patchclamp.errors import DataError
from patchclamp.model.applying import SeenEdit, seen_edits
from patchclamp.model.calls import Call
from patchclamp.model.layout import layout_of
from patchclamp.model.model import Model
from patchclamp.model.site import Site
from patchclamp.model.taps import Seen


@dataclass(frozen=True, eq=False)
class SideBySide:
    """Interventions on equal parts of a batch, in order; None leaves its part as it is.

    Attributes:
        parts: for each part of the batch an intervention, several of them, or None. Positions and examples of an
            intervention are those of its part.

    Raises:
        DataError: there is no part; or, in a call, the batch has not that many equal parts.
    """

    parts: Sequence[Any]

    kind = "side_by_side"

    def __post_init__(self) -> None:
        if not len(self.parts):
            raise DataError("SideBySide takes at least one part")

    def seen_edits(self, model: Model) -> dict[str, SeenEdit]:
        """Name of a site -> what becomes of what it shows in a call."""
        by_site: dict[str, list[list[SeenEdit]]] = {}
        for number, part in enumerate(self.parts):
            for each in () if part is None else part if isinstance(part, (list, tuple)) else (part,):
                for name, edit in seen_edits(each, model).items():
                    there = by_site.setdefault(model.site(name).name, [[] for _ in self.parts])
                    there[number].append(edit)
        return {name: _shared(model.site(name), edits) for name, edits in by_site.items()}

    def edits(self, model: Model) -> dict[str, Any]:
        """It has none that know the tensor alone; `seen_edits` are used."""
        raise DataError("interventions side by side are applied by model.intervene only")


def _shared(site: Site, parts: list[list[SeenEdit]]) -> SeenEdit:
    def edit(seen: Seen, call: Call) -> torch.Tensor:
        examples, length, *_ = layout_of(site, seen, call)
        if examples % len(parts):
            raise DataError(f"{len(parts)} interventions side by side need a batch of that many parts, not {examples}")
        each = examples // len(parts)
        if seen.place is not None:
            return _placed(seen, call, parts, each, length)
        changed = []
        for number, (edits, tensor) in enumerate(zip(parts, seen.tensor.chunk(len(parts)), strict=True)):
            changed.append(_all(edits, Seen(tensor), call.rows(slice(number * each, (number + 1) * each))))
        return torch.cat(changed)

    return edit


def _placed(seen: Seen, call: Call, parts: list[list[SeenEdit]], each: int, length: int) -> torch.Tensor:
    """Of rows of which one knows the place: those of each part of the batch."""
    assert seen.place is not None
    part_of_row = seen.place // length // each
    changed = seen.tensor.clone()
    for number, edits in enumerate(parts):
        there = (part_of_row == number).nonzero()[:, 0]
        if edits and len(there):
            rows = slice(number * each, (number + 1) * each)
            place = seen.place[there] - number * each * length
            # Whoever does not know the rectangle is told by the call.
            known = None if seen.examples is None else each
            lengths = None if seen.lengths is None else seen.lengths[rows]
            new = _all(edits, Seen(seen.tensor[there], place, seen.length, known, lengths), call.rows(rows))
            changed = changed.index_copy(0, there, new)
    return changed


def _all(edits: list[SeenEdit], seen: Seen, call: Call) -> torch.Tensor:
    for edit in edits:
        seen = seen._replace(tensor=edit(seen, call))
    return seen.tensor
