# ruff: noqa: E501  (lines of the page that it writes)
"""Race all finders on planted networks and write docs/leaderboard.md with its picture.

    .venv/bin/python docs/make_leaderboard.py

Takes about half an hour on two cores. Nothing that this writes is edited by hand.
"""

from __future__ import annotations

import platform
import time
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import polars as pl
import torch

from patchclamp.cli.benchmark import COLUMNS, contenders, said
from patchclamp.testbed import BEDS, Bed, Race, benchmark

ROOT = Path(__file__).resolve().parent
SEEDS, PERMUTATIONS = range(5), 49
LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
# One line each; the fitted probes are in the tables.
DRAWN = (
    "lape",
    "lape_ternary",
    "expertise",
    "activation_profiles",
    "sparse_probe, mutual_information",
    "probe_neurons",
    "contrast",
    "chance",
)
PANELS = (("gpt2", "selective"), ("gpt2", "relation"), ("gpt2", "safety"), ("mlp", "selective"))

INTRODUCTION = """# A race of finders

Neurons were planted, so the answer is known: {neurons} neurons in three networks (`testbed.plant`), {seeds} seeds of each, at the
default difficulty, among decoys that fire where they do, less reliably, and do nothing. Each finder of the library ranks all neurons,
as it was published; no finder was tuned on these networks, whose parameters were committed before any was run on them: while they were
chosen, only differences of means were looked at, plain and in standard deviations (which is near to `activation_profiles`). (After a first
race, `contrast` and `activation_profiles` were given what their papers compare, means over a text, in place of maxima.)

- *average precision*: 1 where all planted neurons come first, mean over labels and seeds; *lowest*: of the seeds.
- *recall*: the share of what was planted among as many neurons at the top.
- *decoys above*: the share of pairs of a decoy and a planted neuron in which the decoy is ranked first.
- *power*: the share of what was planted that has q < 0.05; *false alarms*: the share of seeds in which any neuron has q < 0.05 though the
  labels were dealt anew over the documents ({permutations} permutations each). "-": none stated, or (fitted probes) not run.
- *seconds*: of one call for all labels, after recording.

`patchclamp benchmark` runs the same race, and `testbed.benchmark` takes finders of your own. This page was written by a run of
{minutes:.0f} minutes with Python {python}, torch {torch}.
"""

READING = """
## How to read it

- A finder does well on what it is for: `lape` and `domains` on languages, `expertise` on relations, probes on one class of prompts.
  `lape` gives relations and harm next to nothing: its filter wants a neuron that fires *often*, and these fire on one word of a
  document.
- On some plain networks, decoys beat what was planted for `lape`: they fire on half of their category and nowhere else, and entropy
  does not ask how often a neuron fires, only where.
- Easy is not easy for all: without noise, decoys too fire on nothing else, and what looks at *where* a neuron fires (`lape`,
  `expertise`, `mutual_information`) cannot tell them apart from what was planted. When words are very rare, the filter of `lape` drops
  what was planted, and its figure falls to nothing at once.
- `lape_ternary` has no filter: a neuron that fired three times, by chance on one language, has no entropy, and comes high.
- A probe shares its weight among neurons that say the same: on the plain network, where every neuron sees the category, the weights
  of `probe_neurons` single out few of those that were planted for it.
- `coverage` ranks by how much of a layer's firing a neuron makes. That is what the paper wants of it (the units that a task uses),
  and it is not selectivity.
- `l1`, `adaptive`, `exact` and `hinge` look for a *few* neurons that are enough together. Of three planted neurons that say the same they
  want one; a low figure here is no fault of theirs.
- `contrast`, the difference of means, ranks what is loud, and some neurons are much louder than others. Divided by their standard
  deviations (`activation_profiles`, `sparse_probe`) the same differences find nearly everything here.
- That a neuron is selective does not say that the network uses it: decoys without any effect are told apart here only because they
  are less selective. A decoy that fired exactly as a planted neuron does could not be told from it by any finder that looks at
  activations alone.
"""


def main() -> None:
    """Race, draw, write."""
    start = time.perf_counter()
    found = benchmark(contenders(), BEDS, SEEDS, permutations=PERMUTATIONS)
    curves = _curves()
    _draw(curves)
    planted = sum(len(bed.make(0).of(each.role)) for bed in BEDS for each in bed.make(0).questions)
    head = INTRODUCTION.format(
        neurons=planted,
        seeds=len(SEEDS),
        permutations=PERMUTATIONS,
        minutes=(time.perf_counter() - start) / 60,
        python=platform.python_version(),
        torch=torch.__version__,
    )
    page = ROOT / "leaderboard.md"
    page.write_text(head + _tables(found) + _difficulty(curves) + READING + _skipped(found), encoding="utf-8")
    print(f"written: {page.name}, images/difficulty.svg")


def _tables(found: Race) -> str:
    parts = []
    for (bed, role), rows in found.summary().group_by("bed", "role", maintain_order=True):
        head = f"\n## {bed}: neurons planted as {role}\n\n| method | {' | '.join(COLUMNS.values())} |\n"
        head += f"|---|{'---:|' * len(COLUMNS)}\n"
        lines = [
            f"| `{row['method']}` | {' | '.join(said(row, name) for name in COLUMNS)} |" for row in rows.to_dicts()
        ]
        parts.append(head + "\n".join(lines) + "\n")
    return "".join(parts)


def _curves() -> pl.DataFrame:
    methods = {name: each for name, each in contenders().items() if name in DRAWN}
    parts = []
    for level in LEVELS:
        for name in sorted({bed for bed, _ in PANELS}):
            bed = Bed(name, {"architecture": name, "difficulty": level})
            found = benchmark(methods, [bed], SEEDS[:3], null=False).summary()
            parts.append(found.with_columns(pl.lit(level).alias("difficulty")))
    return pl.concat(parts, how="vertical_relaxed")


def _difficulty(curves: pl.DataFrame) -> str:
    text = (
        "\n## Against difficulty\n\n![Average precision of each finder against difficulty](images/difficulty.svg)\n\n"
    )
    text += "Mean of three seeds. Difficulty makes planted neurons noisier, their words rarer, the directions of classes overlap more, and\n"
    text += "ordinary neurons louder; 0 is easy, 1 the default.\n"
    for bed, role in PANELS:
        here = curves.filter((pl.col("bed") == bed) & (pl.col("role") == role))
        text += f"\n| {bed}, {role} | {' | '.join(f'{level:g}' for level in LEVELS)} |\n|---|{'---:|' * len(LEVELS)}\n"
        for method in DRAWN:
            line = here.filter(pl.col("method") == method).sort("difficulty")
            if len(line):
                text += f"| `{method}` | {' | '.join(f'{value:.2f}' for value in line['average_precision'])} |\n"
    return text


def _draw(curves: pl.DataFrame) -> None:
    plt.rcParams.update(
        {"font.size": 9, "svg.hashsalt": "patchclamp", "axes.spines.top": False, "axes.spines.right": False}
    )
    figure, panels = plt.subplots(1, len(PANELS), figsize=(12, 3.4), sharey=True)
    styles = dict(zip(DRAWN, ["-", "--", "-.", "-", "--", "-.", ":", ":"], strict=True))
    for panel, (bed, role) in zip(panels, PANELS, strict=True):
        here = curves.filter((pl.col("bed") == bed) & (pl.col("role") == role))
        for place, method in enumerate(DRAWN):
            line = here.filter(pl.col("method") == method).sort("difficulty")
            if len(line):
                panel.plot(
                    line["difficulty"],
                    line["average_precision"],
                    styles[method],
                    color=f"C{place}",
                    marker=".",
                    label=method,
                )
        panel.set_title(f"{bed}: {role}")
        panel.set_xlabel("difficulty")
        panel.axvline(1.0, color="0.8", linewidth=1, zorder=0)
    panels[0].set_ylabel("average precision")
    panels[0].set_ylim(-0.03, 1.03)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.16, 1, 1))
    (ROOT / "images").mkdir(exist_ok=True)
    figure.savefig(ROOT / "images" / "difficulty.svg", metadata={"Date": None})
    plt.close(figure)


def _skipped(found: Race) -> str:
    if not len(found.skipped):
        return ""
    why = found.skipped.group_by("method", "role", "why", maintain_order=True).len()
    lines = [f"- `{row['method']}` on {row['role']}: {row['why']}" for row in why.to_dicts()]
    return "\n## Who could not answer\n\n" + "\n".join(dict.fromkeys(lines)) + "\n"


if __name__ == "__main__":
    main()
