"""`NeuronCard`: everything an atlas knows of one neuron; draws itself in a terminal and a notebook."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from patchclamp.atlas.words import headline

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class NeuronCard:
    """Everything an atlas knows of one neuron.

    `print(card)` with rich, or the last line of a notebook's cell, draws it.

    Attributes:
        facts: its row in the table of neurons, by name of column.
        examples: the texts on which it is most active, strongest first: `rank`, `value`, `example`,
            `position` (of the peak token in its example), `start` (position of the first token
            shown), `tokens` (as they read), `values` (its activation on each token shown; NaN on
            tokens that do not count), `labels`. Ranks may skip: near-duplicates were removed.
        tokens: the tokens that trigger it: `token`, `fired` and `occurrences` (counts),
            `share_of_firings` and `share_of_token` (in 0..1).
        neighbors: the neurons whose activations go most with its own, or most against it: `other_site`, `other_index`,
            `correlation` (Pearson), `relation` ("layer": of its own layer; "next": of the next one).
        labels: its activity by category: `label`, `value`, `count`, `mean`, `firing_rate`, `strong_rate`.
        histogram: one row per bin of its activations: `low`, `high`, `count`; the outermost edges
            may be infinite.
    """

    facts: dict[str, Any]
    examples: pl.DataFrame
    tokens: pl.DataFrame
    neighbors: pl.DataFrame
    labels: pl.DataFrame
    histogram: pl.DataFrame

    @property
    def name(self) -> str:
        """The neuron, written `mlp.3:417`."""
        return f"{self.facts['site']}:{self.facts['index']}"

    @property
    def headline(self) -> str:
        """One sentence on what it fires on."""
        return headline(self.facts)

    def __repr__(self) -> str:
        return f"NeuronCard({self.name}: {self.headline})"

    def __rich__(self) -> RenderableType:
        from patchclamp.atlas.terminal import draw_card

        return draw_card(self)

    def _repr_html_(self) -> str:
        from patchclamp.atlas.notebook import draw_card

        return draw_card(self)
