"""`transfer_matrix`: what silencing the neurons of each task does to every task.

A set of neurons that is a task's own costs that task most. Three things are read off the matrix and its growth with the
size of the sets: whether the cost grows with more neurons (cumulativity), whether sets share neurons and cost other
tasks (versatility), and whether some task gets better (interference).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
from scipy.stats import rankdata

from patchclamp.errors import DataError
from patchclamp.intervene import ablate
from patchclamp.model.model import Model
from patchclamp.neurons import Neurons
from patchclamp.published import published
from patchclamp.verify.effect import canonical, checked, name_of
from patchclamp.verify.evidence import paired
from patchclamp.verify.metrics import Metric
from patchclamp.verify.runs import Runs, touched


@dataclass(frozen=True, eq=False)
class TransferMatrix:
    """What silencing each set does to each task.

    Attributes:
        sets: names of the sets, rows.
        tasks: names of the tasks, columns.
        change: `[sets, tasks]`, relative change of the metric at the largest size: -0.4 where 40% of it is lost.
        low, high: `[sets, tasks]`, its 95% interval, examples drawn anew.
        random: `[sets, tasks]`, the same for random sets of the same sites, mean over `seeds`.
        clean: `[tasks]`, the metric without interventions.
        curve: one row for each set, task and size: `set`, `task`, `neurons`, `change`, `random`.
        jaccard: `[sets, sets]`, shared neurons over all neurons of two sets.
        metric: its name.
    """

    sets: list[str]
    tasks: list[str]
    change: np.ndarray
    low: np.ndarray
    high: np.ndarray
    random: np.ndarray
    clean: np.ndarray
    curve: pl.DataFrame = field(repr=False)
    jaccard: np.ndarray
    metric: str

    @property
    def cumulativity(self) -> dict[str, float]:
        """Of each set with a task of its own name: Spearman's correlation of its size with what that task loses.

        1 where every further neuron costs more; NaN where nothing changes, or with fewer than two sizes.
        """
        found = {}
        for name in self.sets:
            own = self.curve.filter((pl.col("set") == name) & (pl.col("task") == name)).sort("neurons")
            lost = -own["change"].to_numpy()
            constant = len(lost) < 2 or np.ptp(lost) == 0
            ranks = np.corrcoef(rankdata(own["neurons"].to_numpy()), rankdata(lost))
            found[name] = float("nan") if constant else float(ranks[0, 1])
        return found

    @property
    def versatility(self) -> pl.DataFrame:
        """Other tasks that a set costs something: `set`, `task`, `change`, `jaccard` with that task's own set.

        Only where the whole interval lies below 0.
        """
        return self._others(self.high < 0)

    @property
    def interference(self) -> pl.DataFrame:
        """Other tasks that get better without a set, as `versatility`: where the whole interval lies above 0."""
        return self._others(self.low > 0)

    def _others(self, chosen: np.ndarray) -> pl.DataFrame:
        rows = []
        for row, name in enumerate(self.sets):
            for column, task in enumerate(self.tasks):
                if name != task and chosen[row, column]:
                    shared = self.jaccard[row, self.sets.index(task)] if task in self.sets else float("nan")
                    rows.append((name, task, float(self.change[row, column]), float(shared)))
        schema = {"set": pl.String, "task": pl.String, "change": pl.Float64, "jaccard": pl.Float64}
        return pl.DataFrame(rows, schema=schema, orient="row").sort(pl.col("change").abs(), descending=True)

    def __repr__(self) -> str:
        return f"TransferMatrix({self.metric}, {len(self.sets)} sets, {len(self.tasks)} tasks)\n{self.change.round(3)}"


@published(
    row="S074",
    title="On Relation-Specific Neurons in Large Language Models",
    authors="Liu et al.",
    year=2025,
    url="https://arxiv.org/abs/2502.17355",
    part="cumulativity, versatility, interference",
)
def transfer_matrix(
    model: Model,
    sets: Mapping[str, Neurons],
    tasks: Mapping[str, Any],
    metric: Metric = "accuracy",
    *,
    sizes: Sequence[int] | None = None,
    intervention: Callable[[Neurons], Any] = ablate,
    seeds: int = 5,
    seed: int = 0,
    batch_tokens: int = 2048,
) -> TransferMatrix:
    """What silencing each task's neurons does to every task, for growing numbers of them.

    Args:
        model: the model.
        sets: name -> its neurons, best first; the name of a task, where they are that task's own.
        tasks: name -> data, see `effect`. They should not be those on which the neurons were found.
        metric: see `effect`; larger is better.
        sizes: how many of each set's best neurons are silenced; None: an eighth, a quarter, a half and all.
        intervention: what is done to them.
        seeds: how many random sets of the same sites each is compared with.
        seed: of these and of the intervals.
        batch_tokens: how many tokens are run at once.

    Raises:
        DataError: no sets or tasks, an empty set, a task in which the metric is 0 without interventions, so that
            nothing is a share of it; and as `effect`.

    Source: Liu et al. (2025), with intervals; the paper silences at all positions, to zero.
    """
    if not sets or not tasks:
        raise DataError("a transfer matrix wants at least one set and one task")
    parts = {name: canonical(model, intervention(neurons)) for name, neurons in sets.items()}
    checked(list(parts.values()))
    ordered = {name: part.neurons for name, part in parts.items()}
    steps = {name: _sizes(name, len(neurons), sizes) for name, neurons in ordered.items()}
    chance = {name: _chance(model, neurons, seeds, seed) for name, neurons in ordered.items()}
    shape = (len(sets), len(tasks))
    change, low, high, random = (np.zeros(shape) for _ in range(4))
    clean, rows = np.zeros(len(tasks)), []
    for column, (task, data) in enumerate(tasks.items()):
        runs = Runs(model, metric, data, touched(model, list(parts.values())), batch_tokens)
        clean[column] = runs.clean.mean()
        if clean[column] == 0:
            raise DataError(f"the {name_of(metric)} of task {task!r} is 0 without interventions: nothing can be lost")
        for row, name in enumerate(sets):
            made = [intervention(ordered[name][:size]) for size in steps[name]]
            by_chance = [intervention(each[:size]) for size in steps[name] for each in chance[name]]
            values = (runs.values([*made, *by_chance]) - runs.clean) / abs(clean[column])
            beside = values[len(made) :].reshape(len(made), seeds, -1).mean((1, 2)) if seeds else np.zeros(len(made))
            for place, size in enumerate(steps[name]):
                rows.append((name, task, size, float(values[place].mean()), float(beside[place])))
            change[row, column], low[row, column], high[row, column] = paired(values[len(made) - 1], seed)
            random[row, column] = beside[-1] if seeds else np.nan
    schema = ["set", "task", "neurons", "change", "random"]
    curve = pl.DataFrame(rows, schema=schema, orient="row")
    jaccard = np.asarray([[_jaccard(one, other) for other in ordered.values()] for one in ordered.values()])
    return TransferMatrix(list(sets), list(tasks), change, low, high, random, clean, curve, jaccard, name_of(metric))


def _sizes(name: str, number: int, sizes: Sequence[int] | None) -> list[int]:
    if sizes is None:
        return sorted({max(1, round(number * share)) for share in (0.125, 0.25, 0.5, 1.0)})
    found = sorted({int(size) for size in sizes})
    if not found or found[0] < 1 or found[-1] > number:
        raise DataError(f"sizes lie between 1 and the {number} neurons of {name!r}, not {list(sizes)}")
    return found


def _chance(model: Model, neurons: Neurons, seeds: int, seed: int) -> list[Neurons]:
    """Random sets with as many neurons at each site, none of them in the set, in the order of its sites."""
    everyone = model.neurons(neurons.sites)
    found = []
    for number in range(seeds):
        drawn = everyone.sample(like=neurons, seed=1000 * seed + number)
        left = {site: iter(drawn.at(site)) for site in neurons.sites}
        found.append(Neurons([next(left[site]) for site, _ in neurons]))
    return found


def _jaccard(one: Neurons, other: Neurons) -> float:
    return len(one & other) / len(one | other)
