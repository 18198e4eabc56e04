"""Whole sets: what is left when only they are kept, what is lost without them, and which of many does most."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import polars as pl

from patchclamp.errors import DataError
from patchclamp.intervene import Intervention, ablate
from patchclamp.model.model import Model
from patchclamp.neurons import Neurons
from patchclamp.verify.effect import (
    all_neurons,
    canonical,
    check_weights,
    checked,
    control_interventions,
    effect,
    name_of,
    recipe,
    said,
    whole_heads,
)
from patchclamp.verify.evidence import LEVEL, Evidence, concluded
from patchclamp.verify.matching import Activity, Controls
from patchclamp.verify.metrics import Metric
from patchclamp.verify.runs import Runs, touched


def necessity(
    model: Model, neurons: Neurons, metric: Metric, data: Any, controls: int = 100, seed: int = 0, **options: Any
) -> Evidence:
    """What is lost when a set of neurons is silenced to zero: `effect(model, pc.ablate(neurons), ...)`."""
    return effect(model, ablate(neurons), metric, data, controls, seed, **options)


def sufficiency(
    model: Model,
    neurons: Neurons,
    metric: Metric,
    data: Any,
    controls: int = 100,
    seed: int = 0,
    *,
    among: Neurons | None = None,
    to: Literal["mean", "zero"] = "mean",
    label: str | None = None,
    level: float = LEVEL,
    batch_tokens: int = 2048,
    found_on: Any = None,
) -> Evidence:
    """What is left when only a set of neurons is kept and the others are silenced.

    Args:
        model: the model.
        neurons: the set that is kept.
        metric: see `effect`.
        data: see `effect`.
        controls: how many matched random sets are kept in its place.
        seed: of the controls and of the interval.
        among: all that are silenced but for the set; by default all neurons of its sites.
        to: to what the others are silenced; their means are those on the data.
        label: which label of the data says the class.
        level: what p has to be below.
        batch_tokens: how many tokens are run at once.
        found_on: the recording (or hash of the weights) on which the neurons were found.

    Returns:
        `Evidence`: `clean` is the metric with all of `among` silenced, `edited` with the set kept, so that the effect
        is what the set brings back; `recipe["recovered"]` is that as a share of what silencing all takes away.

    Raises:
        DataError: an empty set, or one that is not part of `among`; and as `effect`.
    """
    check_weights(model, found_on)
    checked([ablate(neurons)])
    mine = all_neurons(model, [ablate(neurons)])
    pool = model.neurons(mine.sites) if among is None else all_neurons(model, [ablate(among)])
    stray = mine - pool
    if len(stray):
        raise DataError(f"{stray.names[0]} is not among the neurons that are silenced")
    runs = Runs(model, metric, data, touched(model, [ablate(pool)]), batch_tokens, label)
    activity = runs.activity()
    kept_sets = Controls(mine, activity, controls, seed, whole_heads(model, mine))
    drawn = kept_sets.draw()

    def silenced(kept: Neurons) -> Intervention:
        rest = pool - kept
        means = {site: activity.mean[site][rest.indices(site)] for site in rest.sites}
        return Intervention("ablate", rest, 0.0, means if to == "mean" else {})

    values = runs.values([silenced(Neurons()), silenced(mine), *(silenced(Neurons(each)) for each in drawn)])
    nothing, kept = values[0], values[1]
    how = recipe(model, [ablate(mine)], metric, data, controls=controls, seed=seed, to=to, label=label)
    found = concluded(
        f"Keeping {len(mine)} of {len(pool)} neurons of {', '.join(mine.sites)}, the others at {to}",
        name_of(metric),
        nothing,
        kept,
        (values[2:] - nothing).mean(1),
        kept_sets.table(drawn, activity),
        how,
        level=level,
        seed=seed,
        passes=runs.passes,
    )
    lost = float((runs.clean - nothing).mean())
    return replace(found, recipe=how | {"recovered": found.effect / lost if lost else float("nan")})


@dataclass(frozen=True, eq=False)
class Leaderboard:
    """Several sets of neurons, the largest effect first.

    Attributes:
        table: `set`, `neurons`, `effect`, `low`, `high`, `p`, `verdict`.
        evidence: name of a set -> its `Evidence`.
        level: what each p has to be below: 0.01 over the number of sets.
        passes: passes over the network and the data that all of it took.
    """

    table: pl.DataFrame
    evidence: dict[str, Evidence] = field(repr=False)
    level: float
    passes: float


def leaderboard(
    model: Model,
    candidate_sets: Mapping[str, Neurons],
    metric: Metric,
    data: Any,
    *,
    intervention: Callable[[Neurons], Any] = ablate,
    controls: int | None = None,
    seed: int = 0,
    label: str | None = None,
    batch_tokens: int = 2048,
    progress: bool = False,
) -> Leaderboard:
    """Test several sets of neurons at once, each with a p that counts that there are several.

    With m sets each p has to be below 0.01 / m, which takes 100 m controls. Sets of the same size at each site whose
    neurons are in the same thirds of firing rate and loudness share their controls.

    Args:
        model: the model.
        candidate_sets: name -> neurons.
        metric: see `effect`.
        data: see `effect`.
        intervention: what is done to each set.
        controls: for each group of sets that share theirs; None: as many as a verdict takes, 100 m.
        seed: of the controls and of the intervals.
        label: which label of the data says the class.
        batch_tokens: how many tokens are run at once.
        progress: show how far it is.

    Raises:
        DataError: no sets; and as `effect`.
    """
    if not candidate_sets:
        raise DataError("a leaderboard wants at least one set of neurons")
    parts = {name: [canonical(model, intervention(neurons))] for name, neurons in candidate_sets.items()}
    for each in parts.values():
        checked(each)
    runs = Runs(model, metric, data, touched(model, [p for each in parts.values() for p in each]), batch_tokens, label)
    activity = runs.activity()
    level, number = LEVEL / len(parts), 100 * len(parts) if controls is None else controls
    values = dict(zip(parts, runs.values(list(parts.values()), progress), strict=True))
    evidence: dict[str, Evidence] = {}
    for members in _alike(model, parts, activity).values():
        share = -(-number // len(members))
        made = {
            name: control_interventions(model, parts[name], activity, share, seed + place, ("rate", "loudness"))
            for place, name in enumerate(members)
        }
        pooled = [each for one in made.values() for each in one.interventions][:number]
        effects = (runs.values(pooled, progress) - runs.clean).mean(1) if pooled else np.zeros(0)
        for name in members:
            evidence[name] = concluded(
                f"{name}: {said(parts[name])}",
                name_of(metric),
                runs.clean,
                values[name],
                effects,
                made[name].matching,
                recipe(model, parts[name], metric, data, controls=number, seed=seed, sets=len(parts), label=label),
                level=level,
                seed=seed,
                passes=runs.passes,
            )
    rows = [
        (name, len(candidate_sets[name]), each.effect, each.low, each.high, each.p, each.verdict)
        for name, each in evidence.items()
    ]
    columns = ["set", "neurons", "effect", "low", "high", "p", "verdict"]
    table = pl.DataFrame(rows, schema=columns, orient="row").sort(pl.col("effect").abs(), descending=True)
    return Leaderboard(table, evidence, level, runs.passes)


def _alike(model: Model, parts: Mapping[str, list[Any]], activity: Activity) -> dict[Any, list[str]]:
    """Groups of sets that may share their controls."""
    groups: dict[Any, list[str]] = {}
    for name, each in parts.items():
        key = sorted(
            (site, _third(activity.rate[site], index), _third(activity.loudness[site], index))
            for site, index in all_neurons(model, each)
        )
        groups.setdefault(tuple(key), []).append(name)
    return groups


def _third(values: np.ndarray, index: int) -> int:
    return int(np.searchsorted(np.quantile(values, [1 / 3, 2 / 3]), values[index]))
