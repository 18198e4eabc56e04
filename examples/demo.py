"""The demo of `make demo`: what do the neurons of a real sentence encoder respond to?

Builds the atlas of all-MiniLM-L6-v2 on the documentation and source code that this Python carries,
and prints the most striking neurons. Nothing is downloaded. Run it from anywhere:

    python examples/demo.py [FOLDER]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

import patchclamp as pc
from patchclamp.errors import PatchclampError

EXAMPLES = 2000
SHOWN = 5


def main(folder: Path) -> None:
    """Build the atlas in `folder` and say what is in it."""
    console = Console()
    started = time.perf_counter()
    model = pc.load("all-MiniLM-L6-v2")
    atlas = pc.Atlas.build(model, pc.corpora.python_docs(limit=EXAMPLES), folder)
    seconds = time.perf_counter() - started

    data = atlas.manifest["data"]
    neurons = atlas.neurons
    striking = neurons.where(pl.col("striking"))
    console.print(
        f"\n[bold]{len(neurons):,} neurons[/bold] of {atlas.manifest['model']['name']} watched on "
        f"[bold]{data['tokens']:,} tokens[/bold] of {data['name']} in {seconds:.0f} s. "
        f"{len(striking):,} of them answer to one family of words.\n"
    )
    found = pc.find.striking(pc.Recording.open(folder / "recording"), spread=True)
    console.print(f"The {SHOWN} most striking, the best of each layer first:\n")
    for row in found[:SHOWN].to_polars().iter_rows(named=True):
        name = f"{row['site']}:{row['index']}"
        console.print(Padding(_described(name, row), (0, 0, 0, 2)))
        console.print(Padding(_example(atlas.neuron(name)), (0, 0, 1, 4)))
    first = found.names[0]
    console.print("Look at one of them in the terminal:")
    console.print(f"    .venv/bin/patchclamp neuron {folder} {first}", highlight=False)
    console.print("or at all of them in the browser:")
    console.print(f"    .venv/bin/patchclamp explore {folder}", highlight=False)


def _described(name: str, row: dict[str, Any]) -> Text:
    return Text.assemble(
        (name, "bold cyan"),
        "  ",
        (row["family"], "bold"),
        f"\n{row['purity']:.0%} of its strong firings fall on these words, and {row['coverage']:.0%} of these words "
        "make it fire strongly.",
    )


def _example(card: pc.NeuronCard) -> Text:
    row = card.examples.row(0, named=True)
    peak = row["position"] - row["start"]
    text = Text("… ", style="dim")
    for place, word in enumerate(row["tokens"]):
        if place == peak:
            # Marked by more than colour: this may go to a file.
            text.append(" " if word.startswith(" ") else "").append(f"«{word.strip()}»", style="bold not dim")
        elif abs(place - peak) <= 8:
            text.append(word, style="not dim")
    return text.append(" …")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-atlas"))
    except PatchclampError as error:
        sys.exit(f"demo: {error}")
