"""The table of what can be baked, in the docs: every answer in it is tried here, and the table is what was found.

`PATCHCLAMP_WRITE_DOCS=1` writes docs/baking.md anew.
"""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path

import polars as pl
import pytest
import torch
from tests.model.test_table import outputs, same
from tests.zoo import CASES, Case

import patchclamp as pc
from patchclamp.edit import bake, bakeable
from patchclamp.intervene import Intervention
from patchclamp.model.kinds import groups_of

PAGE = Path(__file__).parents[2] / "docs" / "baking.md"
BEGIN, END = "<!-- tables: written by tests/edit/test_bake_table.py -->", "<!-- end of tables -->"


@cache
def loaded(case: Case) -> pc.Model:
    return pc.load(case.build())


@cache
def found(case: Case) -> pl.DataFrame:
    return bakeable(loaded(case))


def tried(model: pc.Model, intervention: Intervention, inputs: dict, untouched: list[torch.Tensor]) -> str:
    """ "exact" where it was baked and computes what the intervention does, else the reason why it was refused."""
    try:
        edited = bake(model, intervention)
    except pc.errors.ModelError as error:
        return str(error)
    with model.intervene(intervention):
        expected = outputs(model.module, inputs)
    assert not same(expected, untouched) or _unread(intervention)
    assert same(outputs(edited.module, inputs), expected), intervention
    return "exact"


def _unread(intervention: Intervention) -> bool:
    # Nobody may have been routed there, and the norm of CLIP's and ViT's images reads one position only.
    return intervention.neurons.sites[0].startswith(("expert", "conv", "vision"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_exact_is_the_same_for_good_and_what_is_impossible_is_refused(case: Case) -> None:
    model, inputs = loaded(case), case.inputs("right")
    groups, untouched = groups_of(model.sites), outputs(model.module, inputs)
    for row in found(case).iter_rows(named=True):
        sites = groups[row["sites"]]
        ends = list({each.name: each for each in (sites[0], sites[-1])}.values())
        for column, ways in _ways().items():
            few = sites if " of " in row[column].partition(";")[0] else ends
            few = few[:1] if row[column].startswith("impossible") else few
            positive = "factors above 0" in row[column]
            answers: list[str] = []
            for number, make in enumerate(ways):
                answers = [tried(model, make(pc.Neurons({site.name: _some(site)})), inputs, untouched) for site in few]
                able = answers.count("exact")
                if positive and number:
                    assert not able
                elif counted := re.match(r"(\d+) of (\d+) exact", row[column]):
                    assert (able, len(sites)) == tuple(map(int, counted.groups()))
                else:
                    assert able == (len(few) if row[column].startswith("exact") else 0), (row["sites"], column, answers)
            if row[column].startswith("impossible"):
                assert row[column].removeprefix("impossible: ") in answers[0]


def _some(site: pc.Site) -> list[int]:
    # Several, as a neuron of a ReLU may be silent on the whole batch.
    return [index for index in (1, 3, 4, 5, 7) if index < (site.size or 2)]


def _ways() -> dict:
    return {
        "zero": [pc.ablate],
        "scale": [lambda neurons: pc.scale(neurons, 2.0), lambda neurons: pc.scale(neurons, -1.5)],
        "value": [lambda neurons: pc.clamp(neurons, 0.7)],
    }


def tables() -> str:
    """A table for each architecture, in Markdown, with a row for each kind of site."""
    lines: list[str] = []
    for case in CASES:
        lines += [f"## {case.title}", "", "| sites | zero | scale | mean, clamp | why not |", "|" + "---|" * 5]
        for row in found(case).iter_rows(named=True):
            cells = [row["zero"], row["scale"], row["value"]]
            reasons = dict.fromkeys(cell.rpartition("impossible: ")[2] for cell in cells if "impossible" in cell)
            said = [re.sub(r"(; )?impossible: .*", "", cell) or "no" for cell in cells]
            said = [re.sub(r"exact with a config flag \((.*)\)", r"exact with `\1`", each) for each in said]
            lines.append(f"| `{row['sites']}` | {' | '.join(said)} | {'; '.join(reasons)} |")
        lines.append("")
    return "\n".join(lines).rstrip("\n")


def test_the_page_in_the_docs_is_what_is_found() -> None:
    written = PAGE.read_text(encoding="utf-8") if PAGE.exists() else f"{BEGIN}\n{END}\n"
    head, _, rest = written.partition(BEGIN)
    _, _, tail = rest.partition(END)
    expected = f"{head}{BEGIN}\n\n{tables()}\n\n{END}{tail}"
    if os.environ.get("PATCHCLAMP_WRITE_DOCS"):
        PAGE.write_text(expected, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == expected, "out of date: run the test with PATCHCLAMP_WRITE_DOCS=1"
