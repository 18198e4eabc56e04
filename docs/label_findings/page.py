"""From figures to the text of the page."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

import patchclamp as pc
from label_findings.markdown import table
from label_findings.search import DEALS, FEW_DEALS, FINDERS, SIZES, Found
from label_findings.tasks import SEED


def head(found: Sequence[Found]) -> list[str]:
    """What was run, the summary of all tasks, and how to read the rest."""
    import transformers

    versions = f"patchclamp {pc.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    data = "; ".join(f"{each.task.name}, data `{each.sha256[:12]}`" for each in found)
    return [
        "# What finders find",
        "Finders for a label ([how they are called](labels.md)), run on real networks and real texts. Written by "
        f"`docs/make_label_findings.py`, seed {SEED}: {versions}; {data}. The hash is that of the texts to find in.",
        "70% of the documents are given to the finders; what they name is tried on the other 30%, which no finder saw.",
        table(
            ("label", "AUROC of the neuron of `expertise`", "of the median neuron", "of the length of the text",
             "F1 of one neuron", "of 16", "of one drawn by chance"),
            [short(each) for each in found],
        ),
        "What this shows is correlation. That a neuron tells a label does not say that the network uses it, nor that "
        "the label is what it is for: it may be for a word that is frequent there. Where there are many texts most "
        "neurons tell a coarse label a little; a small q says that it is not chance, not that it is much. The "
        "[last section](#language-neurons-a-decoder-of-four-languages) silences neurons, and there use can be seen.",
        "Length is a rival: the largest of a neuron's activations grows with the number of tokens. Where the length of "
        "a text tells the label by itself, every neuron seems to know something of it.",
        "In the tables of each task:",
        "- *neuron*: the best one. *AUROC*: the chance that a text of the label has a larger value of it than another "
        "text has (a smaller one, if that was so where it was found). *AP*: average precision. Both on held-out "
        "documents.\n"
        f"- *q < 0.05*: how many neurons labels that are dealt anew do not explain ({DEALS} deals, {FEW_DEALS} where "
        "marked \\*). *no relation*: the same after the labels were turned half way round against the texts, which "
        "keeps them together as they are within documents, and takes away what they say. It should be near 0.\n"
        "- *shared*: its 20 best neurons and the 20 best of `expertise`: what is in both, of what is in either.",
    ]  # fmt: skip


def short(found: Found) -> list[str]:
    best = next(row for row in found.rows if row["finder"] == "expertise")
    one, _, many = found.f1["mean_diff"]
    figures = best["auroc"], found.drawn, found.length, one, many, found.f1["random"][0]
    return [found.task.title, *(f"{each:.2f}" for each in figures)]


def section(found: Found) -> str:
    """One task."""
    task, share = found.task, found.task.right[found.held_out].mean()
    documents, others = (len(np.unique(task.documents[found.held_out == out])) for out in (False, True))
    neurons = sum(site.size or 0 for site in task.model.select(task.sites))
    curves = [[f"`{name}`", *(f"{each:.2f}" for each in values)] for name, values in found.f1.items()]
    lines = [
        f"## {task.title}",
        f"{task.about} {int((~found.held_out).sum()):,} texts of {documents} documents to find in, "
        f"{int(found.held_out.sum()):,} texts of {others} documents held out, {share:.0%} of these {task.positive}; "
        f"{neurons:,} neurons.",
        table(
            ("finder", "reads", "neuron", "AUROC", "AP", "q < 0.05", "no relation", "shared"),
            [cells(each, found) for each in found.rows],
        ),
        f"The median neuron has an AUROC of {found.drawn:.2f}, the number of tokens of a text {found.length:.2f}; an "
        f"average precision of {share:.2f} says nothing. The neuron of `expertise`: {found.tokens}.",
        "F1 of a probe of k neurons of one layer, at the best layer, on 30% of the documents to find in. By chance: "
        f"mean over layers and 10 draws. Always saying *{task.positive}* would have "
        f"{2 * found.always / (1 + found.always):.2f}.",
        table(("neurons ranked by", *(f"k = {each}" for each in SIZES)), curves),
        f"One neuron, layer by layer (`mean_diff`): {', '.join(f'{each:.2f}' for each in found.by_layer)}.",
    ]
    if (most := max(float(str(each["auroc"])) for each in found.rows)) < 0.65:
        lines.append(
            f"**No single neuron:** no finder's best neuron gets beyond an AUROC of {most:.2f} on held-out documents."
        )
    if task.claim:
        one, drawn = found.f1["mean_diff"][0], found.f1["random"][0]
        met = one > 0.8, drawn < 0.6
        lines.append(
            "Expected after the paper of sparse probing: one neuron of the best layer has an F1 above 0.8 for code, "
            f"one drawn by chance about 0.5. Here {one:.2f} and {drawn:.2f}: "
            + ("so it is." if all(met) else f"**the {'second' if met[0] else 'first'} does not hold here.**")
        )
    return "\n\n".join(lines)


def cells(row: dict[str, object], found: Found) -> list[str]:
    mark = "" if row["deals"] == DEALS else " \\*"
    shared = jaccard(found.best[str(row["finder"])], found.best["expertise"])
    names = [f"`{row['finder']}`{mark}", str(row["reads"]), f"`{row['neuron']}`"]
    return [
        *names,
        f"{row['auroc']:.2f}",
        f"{row['precision']:.2f}",
        f"{row['q']:,}",
        f"{row['null']:,}",
        f"{shared:.2f}",
    ]


def agreement(found: Sequence[Found]) -> str:
    """How much the finders agree, over all tasks."""
    rows = []
    for number, one in enumerate(FINDERS, 1):
        shared = [np.mean([jaccard(each.best[one], each.best[other]) for each in found]) for other in FINDERS]
        rows.append([str(number), f"`{one}`", *(f"{each:.2f}" for each in shared)])
    return "\n\n".join(
        [
            "## Do finders agree?",
            "The 20 best neurons of each two finders: what is in both, of what is in either, mean of the tasks above. "
            "Finders that read another number of each text, or ask another question, name other neurons.",
            table(("", "", *(str(number + 1) for number in range(len(rows)))), rows),
        ]
    )


def jaccard(one: Sequence[str], other: Sequence[str]) -> float:
    return len({*one} & {*other}) / len({*one} | {*other})
