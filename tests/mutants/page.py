"""The page of a run of mutants: the table of what was killed, and why each survivor survives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Survivor(NamedTuple):
    """What a sentence belongs to: a mutant by its text, as the numbers of lines change."""

    module: str
    operator: str
    function: str
    line: str
    change: str


class Outcome(NamedTuple):
    """A mutant and how it ended: "killed", "timeout" or "survived"."""

    module: str
    operator: str
    function: str
    line: str
    change: str
    ended: str

    @property
    def killed(self) -> bool:
        """Whether the tests failed on it, or did not end."""
        return self.ended != "survived"

    @property
    def survivor(self) -> Survivor:
        """The mutant alone."""
        return Survivor(*self[:5])


def page(
    outcomes: Sequence[Outcome],
    sentences: Mapping[Survivor, str],
    said: Mapping[str, str],
    cap: int,
) -> str:
    """Everything as Markdown.

    Args:
        outcomes: of all mutants.
        sentences: why survivors survive.
        said: the operators, and what each does.
        cap: the most mutants of an operator in a module.
    """
    operators = list(said)
    late, left = (sum(each.ended == how for each in outcomes) for how in ("timeout", "survived"))
    lines = [
        "# Mutants",
        "",
        "Would the tests notice a mistake? Each mutant is a copy of the package with one mistake in it, and the tests "
        "of the method must fail on it. This page is written by `make mutants`.",
        "",
        f"**{len(outcomes) - left} of {len(outcomes)} mutants were killed**, {late} of them because the tests did not "
        f"end in time; {left} survived, each with its reason [below](#survivors).",
        "",
        "## The operators",
        "",
        *(f"- **{name}**: {said[name]}." for name in operators),
        "",
        f"An operator is applied at most at {cap} places of a module, spread over the file. The modules of `find` and "
        "`decompose` hold published methods or what several share; the others record what they read, and are changed "
        "at the places that `tests/mutants/by_hand.toml` describes.",
        "",
        "## Killed, of all",
        "",
        "A dash: the module has no place where the operator applies (a method that reads no weights cannot take those "
        "of the input for those of the output).",
        "",
        *_table(outcomes, operators),
        "",
        "## Survivors",
        "",
    ]
    survivors = sorted({each.survivor for each in outcomes if not each.killed})
    for each in survivors:
        where = f"`{each.module}`" + (f", `{each.function}`" if each.function else "")
        why = sentences.get(each) or "**No reason is known.**"
        lines += [f"- {where}, {each.operator}: `{each.line}`", f"    - `{each.change}`", f"    - {why}"]
    if not survivors:
        lines.append("None.")
    return "\n".join(lines) + "\n"


def _table(outcomes: Sequence[Outcome], operators: Sequence[str]) -> list[str]:
    modules = list(dict.fromkeys(each.module for each in outcomes))
    rows = [_row(f"`{module}`", [each for each in outcomes if each.module == module], operators) for module in modules]
    head = ["module", "all", *operators]
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *rows,
        _row("**all**", outcomes, operators),
    ]


def _row(name: str, outcomes: Sequence[Outcome], operators: Sequence[str]) -> str:
    cells = [_cell([each for each in outcomes if each.operator == operator]) for operator in operators]
    return "| " + " | ".join([name, _cell(outcomes), *cells]) + " |"


def _cell(outcomes: Sequence[Outcome]) -> str:
    killed = sum(each.killed for each in outcomes)
    return f"{killed}/{len(outcomes)}" if outcomes else "-"
