"""Write docs/cause-findings.md: what the methods of causes find on networks. All its figures are of this run.

    .venv/bin/python docs/make_cause_findings.py [NAME ...]    # all parts without a name; none with --page

Each part is a file of docs/cause_findings with a function `measure`; its docstring says what is measured. What a part
found stays on the page until it is run anew, by its name. Data that are not the
package's own are looked for in PATCHCLAMP_DATA, else in ../shared/data beside the checkout.
"""

# ruff: noqa: E501

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

import patchclamp as pc
from patchclamp.verify import Evidence

HERE = Path(__file__).resolve().parent
PAGE = HERE / "cause-findings.md"
PARTS = {
    "minilm": "Negation, numerals and gender in MiniLM",
    "stories": "Gender of names and dialogue in stories260K",
    "resnet": "Channels for a class in ResNet-20",
    "checkpoints": "What training changed in the project's decoder (S075)",
    "race": "Causes and decoys: causal and correlational finders",
    "conductance": "Conductance (S090)",
    "culnig": "Neurons for a group (S006)",
    "taylor": "Taylor scores by label (S092)",
    "concept_weights": "Concept weights (S095)",
    "context_neurons": "Context neurons (S105)",
    "comparative": "Comparative neuron analysis (S102)",
    "explain": "Who wrote this token",
    "neuron_path": "Neuron paths in a vision transformer (S081)",
    "edge_attribution": "Edges between heads (S043)",
    "lineas": "Learned steering by distributions (S158)",
    "adaptive": "Adaptive steering (S156)",
    "circuit": "Concept circuits (S033)",
    "training_clamp": "Clamping while a network learns (S044)",
    "eigenshift": "Damping a component of the unembedding (S008)",
    "ravel": "Disentangling attributes (S141)",
    "explanations": "Explanations, observed and intervened on (S098)",
    "transfer": "Relation neurons and their three properties (S074)",
}

# What was settled after looking at figures, so that a reader can discount it.
SETTLED = {
    "transfer": "The margin was taken after accuracy had been seen not to move.",
    "race": "The target is the logit, not its logarithm of probability: with that, a first run ranked every decoy of one "
    "relation above the cause, as another neuron had settled the answer.",
    "culnig": "About ten networks were tried before this one.",
    "concept_weights": "The threshold is one of three that were tried.",
    "context_neurons": "About thirteen settings of the network were tried: with wider heads, attention copies the answer by "
    "itself, and scaling neurons does little.",
    "comparative": "The network was made smaller after one with six times the neurons had lost nothing with twenty silent.",
    "neuron_path": "The network was trained a second time, with smoothed labels: the first was so sure that removing any "
    "path changed next to nothing.",
    "edge_attribution": "The numbers of edges were settled after trial runs with 5 to 130.",
    "lineas": "The strengths and sparsities that are called best were picked on the data they are reported on.",
    "adaptive": "The layer and the strength that are called best were picked on the data they are reported on.",
    "circuit": "The strength that is called best was picked on the data it is reported on.",
    "eigenshift": "Other classes of tokens and another network had been tried before this protocol was fixed.",
    "ravel": "The network was chosen so that its site carries the attributes: in plain decoders that were tried, swapping "
    "the whole state at the entity changed few answers. The grid of penalties of the masks was widened after held-out "
    "scores had been seen.",
}


def main(names: list[str]) -> None:
    """Run the parts that are named (all of them without a name), and write the page."""
    found = kept()
    for name in [] if names == ["--page"] else names or PARTS:
        started = time.perf_counter()
        module = importlib.import_module(f"cause_findings.{name}")
        try:
            found[name] = section(name, module, module.measure())
        except FileNotFoundError as error:
            print(f"{name}: {Path(str(error)).name} is not here; what was found before stays")
            continue
        print(f"{name}: done in {time.perf_counter() - started:.0f} s", flush=True)
    there = [name for name in PARTS if name in found]
    PAGE.write_text("\n\n".join([head(), *(found[name] for name in there)]) + "\n", encoding="utf-8")
    print(f"written: docs/{PAGE.name}, {len(there)} parts")


def kept() -> dict[str, str]:
    """Name of a part -> what the page says of it now."""
    parts = PAGE.read_text(encoding="utf-8").split("\n## ")[1:] if PAGE.is_file() else []
    text = {each.split("\n", 1)[0]: f"## {each.rstrip()}" for each in parts}
    return {name: text[title] for name, title in PARTS.items() if title in text}


def head() -> str:
    """The beginning of the page."""
    return (
        "# What causes were found\n\n"
        "Every method that makes a claim about causes, run on a network that was not planted. Written by "
        "`docs/make_cause_findings.py`; no figure is typed by hand. Where the claim of a paper does not come out here, "
        "the figures say so: that is a result on small networks, not a verdict on the paper.\n\n"
        f"<sub>patchclamp {pc.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}</sub>"
    )


def section(name: str, module: Any, found: Mapping[str, Any]) -> str:
    """One part as text."""
    lines = [f"## {PARTS[name]}", " ".join((module.__doc__ or "").split("\n\n")[0].split())]
    more = (module.__doc__ or "").split("\n\n")[1:]
    lines += [" ".join(each.split()) for each in more]
    figures: list[tuple[str, str]] = []
    for key, value in found.items():
        if isinstance(value, Mapping) and value and all(isinstance(each, Evidence) for each in value.values()):
            lines += [_evidence(what, each) for what, each in value.items()]
        elif isinstance(value, Evidence):
            lines.append(_evidence(_words(key), value))
        elif isinstance(value, pl.DataFrame) and len(value) > 100:
            continue  # a page shows what is summed up of it
        elif isinstance(value, pl.DataFrame):
            lines += [f"**{_words(key)}**", _table(value)]
        elif isinstance(value, Mapping) and value and all(isinstance(each, pl.DataFrame) for each in value.values()):
            for what, each in value.items():
                lines += [f"**{_words(key)}: {_words(str(what))}**", _table(each)]
        elif isinstance(value, Mapping) and value and all(isinstance(each, Mapping) for each in value.values()):
            lines += [f"**{_words(key)}**", _rows([{"": _words(str(k)), **v} for k, v in value.items()])]
        elif isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
            lines += [f"**{_words(key)}**", _rows(value)]
        elif isinstance(value, str) and len(value) > 60:
            lines.append(value)
        else:
            figures.append((_words(key), _cell(value)))
    if figures:
        lines.insert(2 if len(lines) > 2 else len(lines), _markdown(["what", "found"], figures))
    if name in SETTLED:
        lines.append(f"*Settled after looking: {SETTLED[name]}*")
    return "\n\n".join(lines)


def _evidence(what: str, evidence: Evidence) -> str:
    parts = [f"**{what}.** {evidence.sentence}"]
    if evidence.dose is not None:
        parts += ["Dose:", _table(evidence.dose)]
    if evidence.guards is not None:
        parts += ["Guards:", _table(evidence.guards)]
    return "\n\n".join(parts)


def _table(frame: pl.DataFrame, most: int = 16) -> str:
    rows = [[_cell(each) for each in row] for row in frame.head(most).rows()]
    return _markdown(frame.columns, rows) + (f"\n\n{len(frame) - most} more rows." if len(frame) > most else "")


def _rows(rows: list[Any]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return _markdown([_words(str(name)) for name in names], [[_cell(row.get(name)) for name in names] for row in rows])


def _markdown(names: Any, rows: Any) -> str:
    lines = [list(names), ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in each)} |" for each in lines)


def _words(key: str) -> str:
    return str(key).replace("_", " ")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (float, np.floating)):
        return f"{float(value):.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{_words(key)}: {_cell(each)}" for key, each in value.items())
    if isinstance(value, (list, tuple, np.ndarray)):
        return ", ".join(_cell(each) for each in value)
    return str(value).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


if __name__ == "__main__":
    main(sys.argv[1:])
