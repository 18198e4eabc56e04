"""The table of architectures in the docs: every answer in it is tried here, and the table is what was found.

`PATCHCLAMP_WRITE_DOCS=1` writes docs/architectures.md anew.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from tests.raw import assert_same, hooks_of, plain_weights, watching
from tests.zoo import CASES, Case, Inputs
from torch import nn

import patchclamp as pc
from patchclamp.model.kinds import Kind, groups_of

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
BEGIN, END = "<!-- tables: written by tests/model/test_table.py -->", "<!-- end of tables -->"
every = pytest.mark.parametrize("case", CASES, ids=str)


@cache
def loaded(case: Case) -> pc.Model:
    """One model for all tests that leave it as it is."""
    return pc.load(case.build())


def outputs(module: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    """Every floating tensor that a call returns."""

    def tensors(value: object) -> Iterator[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            if value.is_floating_point():
                yield value.detach()
        elif isinstance(value, dict):
            for each in value.values():
                yield from tensors(each)
        elif isinstance(value, (list, tuple)):
            for each in value:
                yield from tensors(each)

    quiet = {"use_cache": False} if hasattr(module, "generate") else {}
    with torch.no_grad():
        return list(tensors(module(**inputs, **quiet)))


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    """To float32's precision. Padding may be NaN in both."""
    assert len(left) == len(right) > 0
    scale = max(float(each.nan_to_num().abs().max()) for each in right)
    return all(
        torch.allclose(one, other, rtol=1e-4, atol=1e-5 * scale, equal_nan=True)
        for one, other in zip(left, right, strict=True)
    )


def members(case: Case, kind: Kind) -> list[pc.Site]:
    """The first and the last site of a kind; of experts, some that the batch routes tokens to."""
    there = groups_of(loaded(case).sites)[kind.name]
    return list({site.name: site for site in (there[0], there[-1])}.values())


def listed(case: Case) -> list[Kind]:
    return [kind for kind in loaded(case).kinds() if kind.number]


@every
def test_what_is_read_is_of_the_size_that_the_site_says(case: Case) -> None:
    model, inputs = loaded(case), case.inputs("right")
    for kind in listed(case):
        sites = members(case, kind)
        with watching(model.module, {site.writes for site in sites if site.writes}) as seen:
            read = model.activations(inputs, sites)
        for name, tensor in read.items():
            site = model.site(name)
            if site.writes:  # what is read, times the weights, is what the projection gives
                written = seen[site.writes][1]
                bias = plain_weights(model.module, site.writes)[1]
                assert_same(
                    tensor.reshape(-1, tensor.shape[-1]) @ model.output_weights(site) + bias,
                    written.reshape(-1, written.shape[-1]),
                )
            axis = 1 if site.kind == "pattern" else -1
            assert site.size in (None, tensor.shape[axis])
            assert tensor.numel() and bool(tensor.any()), name
    assert hooks_of(model.module) == hooks_of(case.build())


@every
def test_what_is_written_is_there_and_changes_the_output(case: Case) -> None:
    model, inputs = loaded(case), case.inputs("left")
    before = outputs(model.module, inputs)
    for kind in listed(case):
        assert kind.written, f"{kind.name}: {kind.why_not}"
        for site in members(case, kind):
            axis = 1 if site.kind == "pattern" else -1
            with model.intervene(pc.clamp(pc.Neurons({site.name: [1]}), 2.5)):
                read = model.activations(inputs, site).movedim(axis, -1)
                after = outputs(model.module, inputs)
            # Whether a neuron counts is another question: the norm of CLIP's image reads one position only.
            assert bool((read[..., 1] == 2.5).all()) and bool((read[..., 0] != 2.5).any())
            assert not same(after, before), site.name
    assert same(outputs(model.module, inputs), before)
    assert hooks_of(model.module) == hooks_of(case.build())


@every
def test_what_is_baked_is_the_same_for_good(case: Case) -> None:
    model, inputs = loaded(case), case.inputs("right")
    blocks = {name: block for block in model.blocks for name in block.sites}
    for kind in listed(case):
        there = [site for site in groups_of(model.sites)[kind.name] if not blocks[site.name].why_inexact(site)]
        assert bool(there) == kind.baked
        if not kind.baked:
            assert kind.why_not
        for site in there[:1] + there[-1:]:
            block, neuron = blocks[site.name], 1
            with model.intervene(pc.ablate(pc.Neurons({site.name: [neuron]}))):
                expected = outputs(model.module, inputs)
            edited = copy.deepcopy(model.module)
            with torch.no_grad():
                for consumer in block.consumers(site):
                    consumer.of(edited, neuron).zero_()
            assert block.consumers(site) and same(outputs(edited, inputs), expected), site.name


@every
def test_what_is_not_listed_has_a_reason_and_refuses_with_it(case: Case) -> None:
    model = loaded(case)
    for kind in model.kinds():
        if not kind.number:
            assert len(kind.why_not) > 10
            with pytest.raises(pc.errors.UnknownName) as raised:
                model.select(kind.name)
            assert kind.why_not in str(raised.value)


def tables() -> str:
    """A table for each architecture, in Markdown, with a row for each kind of site."""
    lines: list[str] = []
    for case in CASES:
        lines += [f"## {case.title}", "", "| sites | neurons | read | written | baked | why not |", "|" + "---|" * 6]
        for kind in loaded(case).kinds():
            sizes = ", ".join("?" if size is None else str(size) for size in kind.sizes)
            answers = " | ".join("yes" if answer else "no" for answer in (kind.read, kind.written, kind.baked))
            why = kind.why_not.replace("|", "\\|")
            lines.append(f"| `{kind.name}` | {sizes} | {answers} | {why} |")
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
