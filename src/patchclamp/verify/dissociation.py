"""`dissociate`: do two abilities rest on different units?

Units whose clean activation restores the answer in a corrupted prompt of one task, and not of the other, are picked on
one half of the prompts; silenced on the other half, each set should cost its own task and not the other (a double
dissociation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import polars as pl
import torch

from patchclamp.errors import DataError
from patchclamp.intervene import SideBySide, ablate, patch
from patchclamp.model.activations import joined
from patchclamp.model.hooks import reading
from patchclamp.model.model import Model
from patchclamp.model.site import Site
from patchclamp.neurons import Neurons
from patchclamp.published import published
from patchclamp.verify.batches import Batch, Prompt, read
from patchclamp.verify.metrics import measured
from patchclamp.verify.runs import Runs


@dataclass(frozen=True)
class Corrupted:
    """A prompt, the same with something changed, and the answer of each.

    Attributes:
        clean: the prompt.
        corrupt: the changed one, of as many tokens.
        answer: what should follow the clean one.
        other: what should follow the corrupt one.
    """

    clean: str
    corrupt: str
    answer: str
    other: str


@dataclass(frozen=True, eq=False)
class Dissociation:
    """What was found.

    Attributes:
        effects: one row for each unit: `unit`, `site`, `effect_a`, `effect_b` (0: nothing is restored, 1: all),
            `selectivity`, their difference, and `set`: "a", "b" or none.
        a: the neurons of the units that were picked for task a.
        b: those for task b.
        drops: `[2, 2]`, what silencing set a (row 0) and b (row 1) takes from the logit difference of task a (column 0)
            and b (column 1), on held-out prompts, as a share of what it is without interventions.
        index: (drop of a without A - drop of b without A) - (drop of a without B - drop of b without B).
        p: (1 + pairs of random unit sets of the same size with as large an index) / (pairs + 1).
        skipped: prompts left out because the two answers differ too little without interventions.
    """

    effects: pl.DataFrame
    a: Neurons = field(repr=False)
    b: Neurons = field(repr=False)
    drops: np.ndarray
    index: float
    p: float
    skipped: int


@published(
    row="S010",
    title="Disentangling Recall and Reasoning in Transformer Models through Layer-wise Attention and Activation "
    "Analysis",
    authors="Fartale et al.",
    year=2025,
    url="https://arxiv.org/abs/2510.03366",
    part="double dissociation",
)
def dissociate(
    model: Model,
    task_a: Sequence[Corrupted | tuple[str, str, str, str]],
    task_b: Sequence[Corrupted | tuple[str, str, str, str]],
    sites: str | Site | Sequence[str | Site] = "attn.*",
    *,
    units: Literal["heads", "neurons", "sites"] = "heads",
    count: int = 2,
    controls: int = 199,
    seed: int = 0,
    batch_tokens: int = 2048,
) -> Dissociation:
    """Pick units that serve one of two tasks, and test on other prompts whether each serves its own.

    Args:
        model: a decoder with a tokenizer.
        task_a: `Corrupted` prompts of the one task, or tuples of their four texts; half of them, dealt by `seed`, pick
            the units, the others test them.
        task_b: those of the other.
        sites: where the units are.
        units: attention heads, single neurons, or whole sites.
        count: how many units are picked for each task.
        controls: pairs of disjoint random sets of units.
        seed: of the split and of the random sets.
        batch_tokens: how many tokens are run at once.

    Raises:
        DataError: fewer than four prompts that can be used, a prompt in both tasks, prompts of a pair with different
            numbers of tokens, or too few units.

    Source: Fartale et al. (2025) patch, ablate and compare firing; the split into halves, the index and its p value are
    the card's, as the paper's own statistics are not known.
    """
    given = [[each if isinstance(each, Corrupted) else Corrupted(*each) for each in task] for task in (task_a, task_b)]
    twice = {each.clean for each in given[0]} & {each.clean for each in given[1]}
    if twice:
        raise DataError(f"a prompt is in both tasks: {min(twice)!r}")
    listed = _units(model, model.select(sites), units)
    if len(listed) < 2 * count:
        raise DataError(f"there are {len(listed)} units, too few to pick {count} for each of two tasks")
    made = np.random.default_rng([seed, 13])
    effects, tests, skipped = [], [], 0
    for name, task in zip("ab", given, strict=True):
        usable = _usable(model, task, batch_tokens)
        skipped += len(task) - len(usable)
        if len(usable) < 4:
            raise DataError(f"task {name} has {len(usable)} prompts that can be used; at least four are needed")
        order = made.permutation(len(usable))
        half = len(usable) // 2
        effects.append(_restored(model, [usable[place] for place in order[:half]], listed, batch_tokens))
        tests.append([usable[place] for place in order[half:]])
    selectivity = effects[0] - effects[1]
    ranked = np.argsort(-selectivity, kind="stable")
    picked = (ranked[:count].tolist(), ranked[::-1][:count].tolist())
    drops, index, p = _tested(model, tests, listed, picked, controls, made, batch_tokens)
    chosen = ["a" if n in picked[0] else "b" if n in picked[1] else None for n in range(len(listed))]
    table = pl.DataFrame(
        {
            "unit": [name for name, _ in listed],
            "site": [neurons.sites[0] for _, neurons in listed],
            "effect_a": effects[0],
            "effect_b": effects[1],
            "selectivity": selectivity,
            "set": pl.Series(chosen, dtype=pl.String),
        }
    ).sort("selectivity", descending=True, maintain_order=True)
    sets = [_together([listed[place][1] for place in each]) for each in picked]
    return Dissociation(table, sets[0], sets[1], drops, index, p, skipped)


# Helpers --------------------------------------------------------------------------------------------


def _units(model: Model, sites: list[Site], units: str) -> list[tuple[str, Neurons]]:
    found: list[tuple[str, Neurons]] = []
    for site in sites:
        size = site.size or 0
        if units == "heads":
            if not site.heads:
                raise DataError(f"{site.name} has no heads: it is of kind {site.kind!r}")
            found += [(f"{site.name} head {n}", Neurons({site.name: site.head(n)})) for n in range(site.heads)]
        elif units == "neurons":
            found += [(f"{site.name}:{index}", Neurons({site.name: [index]})) for index in range(size)]
        elif units == "sites":
            found.append((site.name, Neurons({site.name: range(size)})))
        else:
            raise DataError(f'units are "heads", "neurons" or "sites", not {units!r}')
    return found


def _usable(model: Model, task: list[Corrupted], batch_tokens: int) -> list[Corrupted]:
    """Prompts whose answers differ between clean and corrupt; the others restore nothing that could be measured."""
    if not task:
        return []
    for each in task:
        lengths = [len(model.tokens(text)) for text in (each.clean, each.corrupt)]
        if lengths[0] != lengths[1]:
            raise DataError(f"{each.clean!r} has {lengths[0]} tokens and {each.corrupt!r} has {lengths[1]}")
    clean, corrupt = (_difference(model, task, which, batch_tokens) for which in ("clean", "corrupt"))
    apart = np.abs(clean - corrupt) > 1e-3 * np.maximum(np.abs(clean), 1e-6)
    return [each for each, far in zip(task, apart & (clean > corrupt), strict=True) if far]


def _prompts(task: list[Corrupted], which: str) -> list[Prompt]:
    return [Prompt(getattr(each, which), each.answer, each.other) for each in task]


def _difference(model: Model, task: list[Corrupted], which: str, batch_tokens: int) -> np.ndarray:
    values = np.zeros(len(task))
    with model.evaluating(), torch.no_grad():
        for batch in read(model, _prompts(task, which), batch_tokens):
            values[batch.examples] = measured(model, "logit_difference", batch).double().cpu().numpy()
    return values


def _restored(model: Model, task: list[Corrupted], units: list[tuple[str, Neurons]], batch_tokens: int) -> np.ndarray:
    """`[units]`: (patched - corrupt) / (clean - corrupt) of the logit difference, mean over prompts."""
    clean = _difference(model, task, "clean", batch_tokens)
    corrupt = _difference(model, task, "corrupt", batch_tokens)
    sites = [model.site(name) for name in dict.fromkeys(neurons.sites[0] for _, neurons in units)]
    total = np.zeros(len(units))
    with model.evaluating(), torch.no_grad():
        # Prompts of a pair have as many tokens, so both sorts of batches hold the same examples in the same order.
        pairs = zip(
            read(model, _prompts(task, "clean"), batch_tokens), _corrupted(model, task, batch_tokens), strict=True
        )
        for batch, broken in pairs:
            with reading(model.module, sites) as captured:
                batch.run(model)
            source = {site.name: joined(site, captured[site.name]).tensor for site in sites}
            apart = clean[batch.examples] - corrupt[batch.examples]
            together = max(1, batch_tokens // max(broken.tokens, 1))
            for start in range(0, len(units), together):
                parts = [patch(neurons, source) for _, neurons in units[start : start + together]]
                chosen = SideBySide(parts) if len(parts) > 1 else parts[0]
                with model.intervene(chosen):
                    values = measured(model, "logit_difference", broken.repeated(len(parts)))
                each = values.double().cpu().numpy().reshape(len(parts), -1)
                total[start : start + len(parts)] += ((each - corrupt[batch.examples]) / apart).sum(1)
    return total / len(task)


def _corrupted(model: Model, task: list[Corrupted], batch_tokens: int) -> list[Batch]:
    return read(model, _prompts(task, "corrupt"), batch_tokens)


def _tested(
    model: Model,
    tests: list[list[Corrupted]],
    units: list[tuple[str, Neurons]],
    picked: tuple[list[int], list[int]],
    controls: int,
    made: np.random.Generator,
    batch_tokens: int,
) -> tuple[np.ndarray, float, float]:
    """Drops, index, and the p of the index among random pairs of sets."""
    count = len(picked[0])
    pairs = [picked]
    for _ in range(controls):
        drawn = made.permutation(len(units))[: 2 * count].tolist()
        pairs.append((drawn[:count], drawn[count:]))
    sets = [_together([units[place][1] for place in each]) for pair in pairs for each in pair]
    sites = [model.site(name) for name in dict.fromkeys(neurons.sites[0] for _, neurons in units)]
    shares = []
    for task in tests:
        runs = Runs(model, "logit_difference", _prompts(task, "clean"), sites, batch_tokens)
        values = runs.values([ablate(each) for each in sets])
        shares.append(1 - values.mean(1) / runs.clean.mean())
    drops = np.stack(shares, axis=1).reshape(len(pairs), 2, 2)  # pair, silenced set, task
    indices = (drops[:, 0, 0] - drops[:, 0, 1]) - (drops[:, 1, 0] - drops[:, 1, 1])
    p = (1 + int((indices[1:] >= indices[0]).sum())) / (controls + 1)
    return drops[0], float(indices[0]), p


def _together(parts: list[Neurons]) -> Neurons:
    found = parts[0]
    for each in parts[1:]:
        found = found | each
    return found
