"""The demo of `make demo`: what do the neurons of a real sentence encoder respond to?

Builds the atlas of all-MiniLM-L6-v2 on the documentation and source code that this Python carries,
and prints the most striking neurons. Nothing is downloaded. Run it from anywhere:

    python examples/demo.py [FOLDER]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import polars as pl
from rich.console import Console
from rich.table import Table

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
    console.print(_table(atlas, found[:SHOWN]))
    first = found.names[0]
    console.print("\nLook at one of them in the terminal:")
    console.print(f"    .venv/bin/patchclamp neuron {folder} {first}", highlight=False)
    console.print("or at all of them in the browser:")
    console.print(f"    .venv/bin/patchclamp explore {folder}", highlight=False)


def _table(atlas: pc.Atlas, found: pc.Neurons) -> Table:
    table = Table(title="The most striking neuron of each layer, strongest first", title_justify="left", expand=True)
    table.add_column("neuron", no_wrap=True)
    table.add_column("fires strongly on", ratio=2)
    table.add_column("of its strong firings", justify="right")
    table.add_column("of these words", justify="right")
    table.add_column("for example", ratio=3)
    for row in found.to_polars().iter_rows(named=True):
        name = f"{row['site']}:{row['index']}"
        table.add_row(
            name,
            row["family"],
            f"{row['purity']:.0%}",
            f"{row['coverage']:.0%}",
            _example(atlas.neuron(name)),
        )
    return table


def _example(card: pc.NeuronCard) -> str:
    row = card.examples.row(0, named=True)
    peak = row["position"] - row["start"]
    near = range(max(0, peak - 5), min(len(row["tokens"]), peak + 6))
    # Words of the corpus may hold brackets, which rich would read as markup.
    from rich.markup import escape

    words = [escape(row["tokens"][place]) for place in near]
    marked = [f"[reverse]{word}[/reverse]" if place == peak else word for place, word in zip(near, words, strict=True)]
    return "".join(marked).strip()


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-atlas"))
    except PatchclampError as error:
        sys.exit(f"demo: {error}")
