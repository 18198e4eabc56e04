"""`report`: what an edit did to what it was meant for, and to everything else that one cares about, in plain words.

The same examples are given to the model before and after. Each metric is one number per example, so the difference is
paired, and its interval is that of a bootstrap over examples. Where the interval holds 0, no change was resolvable:
which is not to say that there is none.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from patchclamp.edit.edited import EditedModel
from patchclamp.edit.report_page import page
from patchclamp.errors import DataError, StoreError
from patchclamp.model import Model
from patchclamp.statistics import bootstrap
from patchclamp.storage import write_file
from patchclamp.verify import per_example

Metric = str | Callable[..., Any]
Measured = tuple[Metric, Any]


def report(
    before: Model,
    after: Model,
    target: Mapping[str, Measured] | Measured,
    guards: Mapping[str, Measured] | None = None,
    *,
    prompts: Sequence[str] = (),
    title: str = "What the edit changed",
    level: float = 0.95,
    draws: int = 1000,
    max_new_tokens: int = 40,
    seed: int = 0,
) -> Report:
    """Compare a model with an edited one on what the edit was for, and on what it was to leave alone.

    Args:
        before: the model before; interventions that are in force in it count.
        after: the model after, as `edit.bake` and others give it.
        target: name of a data set -> (metric, data), what the edit was for; or one such pair. A metric is a name of
            `verify.per_example` ("loss", "accuracy", ...) or a callable `(model, batch) -> one value per example`.
        guards: the same, of what was to stay as it is.
        prompts: texts that both continue, if they can.
        title: of the page.
        level: of the intervals.
        draws: of the bootstrap.
        max_new_tokens: how far prompts are continued, greedily.
        seed: of the bootstrap.

    Returns:
        A `Report`, with `sentences`, `to_json`, `to_html` and `save`.

    Raises:
        DataError: fewer than two examples, or a metric that gives something else than one number for each.
        UnknownName: no metric is called so.
    """
    if isinstance(target, tuple):
        target = {"target": target}
    if not target:
        raise DataError('report() is given no target: target={"name": (metric, data)}')
    seeds: Iterator[int] = iter(range(seed, seed + 10**6))
    changes = [
        _compared(before, after, role, name, given, level, draws, next(seeds))
        for role, measured in (("target", target), ("guard", guards or {}))
        for name, given in measured.items()
    ]
    told = [
        Continuation(
            prompt,
            before.generate(prompt, max_new_tokens=max_new_tokens),
            after.generate(prompt, max_new_tokens=max_new_tokens),
        )
        for prompt in ([prompts] if isinstance(prompts, str) else prompts)
    ]
    hashes = before.weights_sha256(), after.weights_sha256()
    steps = _steps(after, hashes[0])
    return Report(title, before.name, after.name, hashes, steps, changes, _weights(before, after), told)


@dataclass(frozen=True)
class Change:
    """One metric on one data set, before and after.

    Attributes:
        role: "target" or "guard".
        name: of the data set.
        metric: in words.
        before: mean over the examples.
        after: the same.
        difference: after less before.
        low: lower end of its interval.
        high: upper end.
        level: of the interval.
        examples: how many.
        changed: of how many of them the value is another.
    """

    role: str
    name: str
    metric: str
    before: float
    after: float
    difference: float
    low: float
    high: float
    level: float
    examples: int
    changed: int

    @property
    def resolvable(self) -> bool:
        """Whether the interval of the difference does not hold 0."""
        return self.low > 0 or self.high < 0

    @property
    def sentence(self) -> str:
        """The change in words."""
        width = max(abs(self.difference), self.high - self.low)
        places = 2 if width == 0 else min(8, max(0, 1 - math.floor(math.log10(width))))
        before, after, difference, low, high = (
            f"{round(each, places) + 0.0:,.{places}f}"
            for each in (self.before, self.after, self.difference, self.low, self.high)
        )
        what = f"{self.metric} on {self.name}"
        if not self.changed:
            return f"{what}: no change was resolvable: {before} before and after, alike on all {self.examples} examples"
        evidence = f"difference {difference}, {self.level:.0%} interval {low} to {high}, {self.examples} examples"
        if not self.resolvable:
            return f"{what}: no change was resolvable: {before} before, {after} after ({evidence})"
        return f"{what} {'rose' if self.difference > 0 else 'fell'} from {before} to {after} ({evidence})"


@dataclass(frozen=True)
class Continuation:
    """A prompt, and what the models before and after add to it."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class ParameterChange:
    """One parameter that is another now.

    Attributes:
        parameter: dotted name.
        shape_before: None where it was not there.
        shape: None where it is there no more.
        changed: how many of its numbers are others; None where the shape is another.
        largest_change: in size; None where the shape is another.
    """

    parameter: str
    shape_before: tuple[int, ...] | None
    shape: tuple[int, ...] | None
    changed: int | None = None
    largest_change: float | None = None


@dataclass(frozen=True)
class Weights:
    """What changed in the weights.

    Attributes:
        before: how many parameters (numbers) the model before has.
        after: how many the model after has.
        tensors: how many weight tensors either has, by name.
        parameters: those that changed.
    """

    before: int
    after: int
    tensors: int
    parameters: list[ParameterChange]

    @property
    def sentence(self) -> str:
        """The change in words."""
        if not self.parameters:
            return f"no weight changed: all {self.before:,} are as they were"
        names = f"{len(self.parameters)} of {self.tensors} weight tensors changed"
        if self.before != self.after:
            return f"{names}, and {self.before:,} parameters became {self.after:,}"
        return f"{names}: {sum(each.changed or 0 for each in self.parameters):,} of {self.before:,} parameters"


@dataclass(frozen=True)
class Report:
    """What an edit changed. Made by `report`.

    Attributes:
        title: of the page.
        before: name of the model before.
        after: name of the model after.
        weights_sha256: of both.
        steps: what was done, in words, where the model knows it.
        changes: a `Change` for each target, then for each guard.
        weights: what changed in the weights.
        continuations: what both make of the prompts.
    """

    title: str
    before: str
    after: str
    weights_sha256: tuple[str, str]
    steps: list[str]
    changes: list[Change]
    weights: Weights
    continuations: list[Continuation] = field(default_factory=list)

    @property
    def sentences(self) -> list[str]:
        """What changed, in plain words: targets, guards, weights, texts."""
        said = [each.sentence for each in self.changes] + [self.weights.sentence]
        if self.continuations:
            other = sum(each.before != each.after for each in self.continuations)
            said.append(f"{other} of {len(self.continuations)} prompts are continued otherwise")
        return said

    def diff(self) -> list[ParameterChange]:
        """The parameters that are others now."""
        return self.weights.parameters

    def to_json(self) -> str:
        """All of it as JSON, with the sentences."""
        return json.dumps({**asdict(self), "sentences": self.sentences}, indent=1, ensure_ascii=False)

    def to_html(self) -> str:
        """A page of its own, without scripts and without anything that is loaded."""
        return page(self)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write `report.html` and `report.json` into a folder; earlier ones there are replaced.

        Raises:
            StoreError: the folder cannot be written.
        """
        folder = Path(directory)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in (("report.html", self.to_html()), ("report.json", self.to_json() + "\n")):
                write_file(folder / name, text.encode("utf-8"))
        except OSError as error:
            raise StoreError(f"cannot write {folder}: {error.strerror or error}") from error
        return folder

    def __str__(self) -> str:
        return "\n".join([self.title, *self.sentences])

    def _repr_html_(self) -> str:
        return page(self, whole=False)


# Helpers ------------------------------------------------------------------------------------------------


def _steps(after: Model, before_sha256: str) -> list[str]:
    """What was done to the model before, which may have been edited already; all where that cannot be told."""
    edits = after.edits if isinstance(after, EditedModel) else ()
    done = next((number for number, edit in enumerate(edits, 1) if edit.after == before_sha256), 0)
    return [step.words for edit in edits[done:] for step in edit.steps]


def _compared(
    before: Model, after: Model, role: str, name: str, given: Measured, level: float, draws: int, seed: int
) -> Change:
    if not isinstance(given, tuple) or len(given) != 2:
        raise DataError(f"{role} {name!r} is a pair (metric, data), not {type(given).__name__}")
    metric, data = given
    data = list(data) if isinstance(data, Iterator) else data  # it is read twice
    values = np.stack([per_example(model, metric, data) for model in (before, after)])
    if values.shape[1] < 2:
        raise DataError(f"{role} {name!r} has {values.shape[1]} example: an interval wants at least two")
    differences = values[1] - values[0]
    found = bootstrap(
        lambda chosen: differences[chosen].mean(keepdims=True), len(differences), level=level, draws=draws, seed=seed
    )
    called = metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)
    means = values.mean(1)
    return Change(
        role,
        name,
        "the metric" if called == "<lambda>" else called.replace("_", " "),
        float(means[0]),
        float(means[1]),
        float(differences.mean()),
        float(found.low[0]),
        float(found.high[0]),
        level,
        len(differences),
        int((differences != 0).sum()),
    )


def _weights(before: Model, after: Model) -> Weights:
    old, new = dict(before.module.named_parameters()), dict(after.module.named_parameters())
    counts = [sum(each.numel() for each in side.values()) for side in (old, new)]
    # The names of tied ones too, so that one that was tied and is no more is no new parameter.
    every = [dict(each.module.named_parameters(remove_duplicate=False)) for each in (before, after)]
    rows = []
    names = list(dict.fromkeys((*new, *old)))
    for name in names:
        one, two = every[0].get(name), every[1].get(name)
        shapes = [None if each is None else tuple(each.shape) for each in (one, two)]
        if one is None or two is None or shapes[0] != shapes[1]:
            rows.append(ParameterChange(name, shapes[0], shapes[1]))
            continue
        difference = (two.detach().double() - one.detach().to(two.device).double()).abs()
        if changed := int((difference != 0).sum()):
            rows.append(ParameterChange(name, shapes[0], shapes[1], changed, float(difference.max())))
    return Weights(counts[0], counts[1], len(names), rows)
