"""Write the pictures and the figures that README and docs show, from a real run.

    .venv/bin/python docs/make_figures.py [ATLAS]

ATLAS is the folder that `make demo` wrote. Needs Chromium. Nothing that this writes is edited by hand.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import polars as pl
from playwright.sync_api import sync_playwright
from rich.console import Console

import patchclamp as pc

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def main(folder: Path) -> None:
    """Take the screenshots, print the card, and write the finding into the README."""
    IMAGES.mkdir(exist_ok=True)
    atlas = pc.Atlas.open(folder)
    recording = pc.Recording.open(folder / "recording")
    found = pc.find.striking(recording, spread=True)
    # The finding: the strongest neuron whose family is the forms of one word, beyond the first layer, where the
    # tokens themselves can still be read off the residual stream.
    deeper = pl.col("site") != recording.sites[0].name
    one_word = pl.col("family").map_elements(_is_one_word, return_dtype=pl.Boolean)
    shown = pc.find.striking(recording).where(deeper & one_word).top(1)
    name = shown.names[0]
    _screenshots(folder, name)
    _card(atlas, name)
    _pages(atlas, found, shown, _null(atlas))
    print(f"written: docs/images, docs/findings.md and the finding of README.md ({name})")


def _is_one_word(family: str) -> bool:
    from patchclamp.find.striking import word_groups

    return len(word_groups([" " + word for word in family.split(", ")])) == 1


def _null(atlas: pc.Atlas) -> int:
    """How many neurons are striking when the activations of the same data are paired with tokens at random."""
    data = pc.corpora.python_docs(limit=atlas.manifest["data"]["examples"])
    kept = pc.record(pc.load("all-MiniLM-L6-v2"), data, summaries=[pc.ByToken()], activations=True)
    if kept.facts["data"]["sha256"] != atlas.manifest["data"]["sha256"]:
        raise SystemExit("the atlas is of another Python's documentation: run make demo again")
    return len(pc.find.striking(kept.with_tokens_permuted(seed=0)))


def _screenshots(folder: Path, name: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "patchclamp.cli",
        "explore",
        str(folder),
        "--port",
        str(port),
        "--no-open",
    ]
    server = subprocess.Popen(command)
    try:
        _wait_for(f"http://127.0.0.1:{port}/api/atlas")
        path = next(each for each in ("chromium", "chromium-browser", "google-chrome") if shutil.which(each))
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which(path), args=CHROMIUM_FLAGS)
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            for address, file in (("/", "explorer.png"), (f"/neuron/{name}", "neuron.png")):
                page.goto(f"http://127.0.0.1:{port}{address}")
                page.wait_for_load_state("networkidle")
                page.wait_for_timeout(300)
                page.screenshot(path=IMAGES / file)
            browser.close()
    finally:
        server.terminate()
        server.wait()


def _wait_for(address: str) -> None:
    for _ in range(100):
        try:
            urllib.request.urlopen(address, timeout=2).read()
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the explorer does not answer")


def _card(atlas: pc.Atlas, name: str) -> None:
    with (Path("/dev/null")).open("w") as nowhere:
        console = Console(record=True, width=100, file=nowhere, force_terminal=True, color_system="truecolor")
        console.print(atlas.neuron(name))
        svg = console.export_svg(title=f"patchclamp neuron demo-atlas {name}")
    # rich's template fetches a font from elsewhere; the reader's own will do.
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    (IMAGES / "card.svg").write_text(re.sub(r"[ \t]+\n", "\n", svg), encoding="utf-8")


def _pages(atlas: pc.Atlas, found: pc.Neurons, shown: pc.Neurons, null: int) -> None:
    data, versions = atlas.manifest["data"], atlas.manifest["versions"]
    row = shown.to_polars().row(0, named=True)
    neuron = f"{row['site']}:{row['index']}"
    origin = (
        f"{data['name']}, {data['tokens']:,} tokens (data `{data['sha256'][:12]}`), patchclamp "
        f"{versions['patchclamp']}, torch {versions['torch']}"
    )
    striking = len(atlas.neurons.where(pl.col("striking")))
    finding = (
        f"One finding: neuron `{neuron}` of all-MiniLM-L6-v2 fires strongly on the forms of one word, "
        f"**{row['family']}**. {row['purity']:.0%} of its strong firings fall on them, and {row['coverage']:.0%} of "
        f"these words make it fire; {striking:,} of the {len(atlas.neurons):,} neurons answer to a family of "
        f"words in this way, and {null} when the same activations are paired with tokens at random.\n\n"
        f"![The page of {neuron}: what it fires on, example by example](docs/images/neuron.png)\n\n"
        f"<sub>{origin}</sub>"
    )
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    start, end = "<!-- finding: written by docs/make_figures.py -->", "<!-- end of finding -->"
    head, _, rest = text.partition(start)
    tail = rest.partition(end)[2]
    readme.write_text(f"{head}{start}\n{finding}\n{end}{tail}", encoding="utf-8")
    _findings(atlas, found, origin, null)


def _findings(atlas: pc.Atlas, found: pc.Neurons, origin: str, null: int) -> None:
    lines = [
        "# What the demo finds",
        "",
        f"Written by `docs/make_figures.py` from the atlas of `make demo`: {origin}.",
        "",
        "The most striking neurons by turns of the layers, no two for the same family of words. Purity is the share of",
        "their strong firings that fall on the family, coverage the share of its words on which they fire strongly.",
        f"When the same activations are paired with tokens at random, {null} neurons are striking.",
        "",
        "| neuron | family | purity | coverage | score | an example |",
        "|---|---|---|---|---|---|",
    ]
    for row in found[:18].to_polars().iter_rows(named=True):
        neuron = f"{row['site']}:{row['index']}"
        lines.append(
            f"| `{neuron}` | {row['family']} | {row['purity']:.2f} | {row['coverage']:.2f} | {row['score']:.2f} | "
            f"{_quoted(atlas.neuron(neuron))} |"
        )
    lines += [
        "",
        "## The explorer",
        "",
        "![The table of all neurons](images/explorer.png)",
        "",
        "![The page of one neuron](images/neuron.png)",
        "",
        "## The card in the terminal",
        "",
        "![The card of one neuron](images/card.svg)",
        "",
    ]
    (ROOT / "docs" / "findings.md").write_text("\n".join(lines), encoding="utf-8")


def _quoted(card: pc.NeuronCard) -> str:
    row = card.examples.row(0, named=True)
    peak = row["position"] - row["start"]
    words = [
        f"**{word.strip()}**" if place == peak else word
        for place, word in enumerate(row["tokens"])
        if abs(place - peak) <= 5
    ]
    text = "".join(word if word.startswith(" ") else f" {word}" if word.startswith("**") else word for word in words)
    return re.sub(r"([|<>`\[\]_*])(?!\*)", r"\\\1", text.replace("**", "\0")).replace("\0", "**").strip()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "demo-atlas"))
