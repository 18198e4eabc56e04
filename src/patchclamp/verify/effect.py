"""`effect`: does an intervention do what is claimed of it, and more than the same on neurons like these?

Each example is its own control (the metric with and without the intervention), and the neurons have theirs: sets
drawn at random at the same sites among those that fire as often and write as much. The claim is supported only if
hardly any control set does as much.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from patchclamp.errors import DataError
from patchclamp.intervene import Steer
from patchclamp.model.model import Model
from patchclamp.neurons import Neurons
from patchclamp.verify.evidence import LEVEL, Evidence, concluded, paired
from patchclamp.verify.matching import Activity, Controls
from patchclamp.verify.metrics import Metric
from patchclamp.verify.runs import Runs, touched

DOSES = (0.25, 0.5, 0.75)


def effect(
    model: Model,
    intervention: Any,
    metric: Metric,
    data: Any,
    controls: int = 100,
    seed: int = 0,
    dose: bool = False,
    guard: Mapping[str, Any] | None = None,
    *,
    claim: str | None = None,
    match: Sequence[str] = ("rate", "loudness"),
    label: str | None = None,
    level: float = LEVEL,
    batch_tokens: int = 2048,
    found_on: Any = None,
    progress: bool = False,
) -> Evidence:
    """Test an intervention against the same on matched random neurons.

    Args:
        model: the model.
        intervention: `pc.ablate(neurons)` and its like, or `pc.steer(directions)`; several, given as a sequence, act
            together. Controls of directions are random ones of the same length.
        metric: `"loss"`, `"accuracy"`, `"logit_difference"`, `"class_score"`, `"similarity"`, `"kl"`,
            `"embedding_shift"`, or a callable `(model, batch) -> one value per example`.
        data: texts, images or tensors with classes, prompts `(text, answer, foil)`, or pairs of texts.
        controls: how many control sets; a verdict at level 0.01 takes 100.
        seed: of the controls and of the interval.
        dose: also measure a quarter, half and three quarters of it: of the neurons, in the order of the table, or of
            the strength. Reported, not part of the verdict.
        guard: name -> data, or name -> (metric, data): what should not change. Reported, not part of the verdict.
        claim: in words; made of the intervention by default.
        match: what controls are matched by: "rate" and "loudness", or one of them.
        label: which label of the data says the class.
        level: what p has to be below.
        batch_tokens: how many tokens are run at once.
        found_on: the recording (or the hash of the weights) on which the neurons were found, to be sure that
            the model is still that one.
        progress: show how far it is.

    Returns:
        `Evidence`. Too few controls, or fewer different ones than wanted, give the verdict "not resolvable".

    Raises:
        DataError: an empty set, neurons that are not there, a metric that gives one number for a batch or something
            that is not finite, fewer than two examples, or a model that has changed.
    """
    parts = list(intervention) if isinstance(intervention, (list, tuple)) else [intervention]
    check_weights(model, found_on)
    checked(parts)
    parts = [canonical(model, part) for part in parts]
    sites = touched(model, parts)
    runs = Runs(model, metric, data, sites, batch_tokens, label)
    if runs.examples < 2:
        raise DataError("an interval takes at least two examples; the data has one")
    made = control_interventions(model, parts, runs.activity(), controls, seed, match)
    values = runs.values([parts, *made.interventions], progress)
    found = concluded(
        claim or said(parts),
        name_of(metric),
        runs.clean,
        values[0],
        (values[1:] - runs.clean).mean(1),
        made.matching,
        recipe(model, parts, metric, data, controls=controls, seed=seed, match=list(match), label=label),
        level=level,
        seed=seed,
        passes=runs.passes,
    )
    main_passes = runs.passes
    doses = _doses(runs, parts, (found.effect, found.low, found.high), seed) if dose else None
    guards, guard_passes = _guards(model, parts, metric, guard, seed, batch_tokens) if guard else (None, 0.0)
    further = round(runs.passes - main_passes + guard_passes, 6)
    return replace(found, dose=doses, guards=guards, further_passes=further)


# What the relatives of `effect` use too ----------------------------------------------------------------


class MadeControls(NamedTuple):
    """Control interventions, and how well they match."""

    interventions: list[Any]
    matching: pl.DataFrame


def control_interventions(
    model: Model, parts: Sequence[Any], activity: Activity, number: int, seed: int, match: Sequence[str]
) -> MadeControls:
    """The same interventions on matched random neurons, or with random directions.

    Raises:
        DataError: an intervention that nothing can be exchanged in.
    """
    if number < 0:
        raise DataError(f"a number of controls is not negative: {number}")
    if all(isinstance(part, Steer) for part in parts):
        made = np.random.default_rng([seed, 12])
        drawn = [[part.at_random(made) for part in parts] for _ in range(number)]
        lengths = [float(np.linalg.norm(vectors)) for part in parts for vectors in part.directions.values()]
        mean = float(np.mean(lengths))
        columns = ["what", "neurons", "controls", "low", "high"]
        return MadeControls(drawn, pl.DataFrame([("length", *[mean] * 4)], schema=columns, orient="row"))
    neurons = all_neurons(model, parts)
    if set(match) - {"rate", "loudness"} or not match:
        raise DataError(f'match= is "rate", "loudness" or both, not {list(match)!r}')
    drawer = Controls(neurons, _only(activity, match), number, seed, whole_heads(model, neurons))
    sets = drawer.draw()
    return MadeControls([moved(parts, neurons, each, activity) for each in sets], drawer.table(sets, activity))


def moved(parts: Sequence[Any], neurons: Neurons, drawn: list[tuple[str, int]], activity: Activity) -> Any:
    """Interventions with each neuron exchanged for the one that was drawn for it."""
    place = dict(zip(((each.site, each.index) for each in neurons), drawn, strict=True))
    new = []
    for part in parts:
        there = [place[(each.site, each.index)] for each in part.neurons]
        new.append(part.moved(Neurons(there), activity.mean))
    return new


def all_neurons(model: Model, parts: Sequence[Any]) -> Neurons:
    """The neurons of several interventions, each once, under the model's own names of sites."""
    found: dict[tuple[str, int], None] = {}
    for part in parts:
        for site, index in part.neurons:
            found[(model.site(site).name, index)] = None
    return Neurons(list(found))


def canonical(model: Model, part: Any) -> Any:
    """An intervention under the model's own names of sites, where a user gave others."""
    if isinstance(part, Steer) or all(model.site(site).name == site for site in part.neurons.sites):
        return part
    names = {site: model.site(site).name for site in part.neurons.sites}
    neurons = Neurons([(names[site], index) for site, index in part.neurons])
    changed = {"neurons": neurons, "values": {names.get(site, site): each for site, each in part.values.items()}}
    if hasattr(part, "pools"):
        changed["pools"] = {names.get(site, site): each for site, each in part.pools.items()}
    if hasattr(part, "sites"):
        changed["sites"] = tuple(names.values())
    return replace(part, **changed)


def whole_heads(model: Model, neurons: Neurons) -> dict[str, int]:
    """Site -> number of its heads, where the neurons there are whole heads."""
    found = {}
    for name in neurons.sites:
        site = model.site(name)
        if site.heads and site.size:
            width = site.size // site.heads
            indices = np.sort(neurons.indices(name))
            whole = {head for head in indices // width}
            if len(indices) == width * len(whole):
                found[name] = site.heads
    return found


def check_weights(model: Model, found_on: Any) -> None:
    """Refuse a model that is no longer the one on which neurons were found.

    Raises:
        DataError: its weights have another hash.
    """
    if found_on is None:
        return
    facts = getattr(found_on, "facts", None)
    wanted = found_on if isinstance(found_on, str) else (facts or {}).get("model", {}).get("weights_sha256")
    if not isinstance(wanted, str):
        raise DataError(f"found_on= is a recording or the hash of the weights, not {type(found_on).__name__}")
    if wanted != model.weights_sha256():
        raise DataError(
            f"{model.name} has other weights now than the model on which the neurons were found: "
            f"{model.weights_sha256()[:12]}... is not {wanted[:12]}..."
        )


def checked(parts: Sequence[Any]) -> None:
    """Refuse what cannot be tested.

    Raises:
        DataError: nothing, an empty set of neurons, or no intervention.
    """
    if not parts:
        raise DataError("there is no intervention to test")
    for part in parts:
        if isinstance(part, Steer):
            continue
        neurons = getattr(part, "neurons", None)
        if not isinstance(neurons, Neurons) or not hasattr(part, "moved"):
            raise DataError(
                f"a test exchanges the neurons of an intervention, and {type(part).__name__} has none: "
                "give pc.ablate(neurons), pc.clamp, pc.scale, pc.patch of neurons, or pc.steer"
            )
        if not len(neurons):
            raise DataError("the set of neurons is empty: there is nothing to test")


def said(parts: Iterable[Any]) -> str:
    """What interventions do, in words."""
    words = {"ablate": "silencing", "clamp": "holding", "scale": "scaling", "patch": "patching"}
    found = []
    for part in parts:
        if isinstance(part, Steer):
            found.append(f"steering at {', '.join(part.directions.sites)} by {part.strength:g}")
            continue
        number = len(part.neurons)
        neurons = f"{number} neuron{'s' if number > 1 else ''} of {', '.join(part.neurons.sites)}"
        found.append(f"{words.get(part.kind, part.kind)} {neurons}")
    text = " and ".join(found)
    return text[0].upper() + text[1:]


def name_of(metric: Metric) -> str:
    """The name of a metric."""
    return metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)


def recipe(model: Model, parts: Sequence[Any], metric: Metric, data: Any, **parameters: Any) -> dict[str, Any]:
    """How to run a test again, in values that JSON knows."""
    return {
        "model": {"name": model.name, "weights_sha256": model.weights_sha256()},
        "interventions": [_part(part) for part in parts],
        "metric": name_of(metric) if isinstance(metric, str) else f"callable {name_of(metric)}",
        "data": {"name": getattr(data, "name", type(data).__name__), "examples": _length(data)},
        **parameters,
    }


def _part(part: Any) -> dict[str, Any]:
    where = getattr(part, "where", None)
    plain: dict[str, Any] = {"kind": part.kind, "where": None if where is None else str(where)}
    if isinstance(part, Steer):
        return plain | {"sites": part.directions.sites, "directions": part.directions.names, "strength": part.strength}
    values = getattr(part, "values", {})
    plain |= {"neurons": part.neurons.names, "factor": getattr(part, "factor", None)}
    if part.kind != "patch":
        plain["values"] = {site: np.asarray(each).tolist() for site, each in values.items()}
    return plain


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:
        return None


def _only(activity: Activity, match: Sequence[str]) -> Activity:
    """Activity in which what is not matched is the same for all."""
    rate = activity.rate if "rate" in match else {site: np.zeros_like(each) for site, each in activity.rate.items()}
    loud = (
        activity.loudness
        if "loudness" in match
        else {site: np.ones_like(each) for site, each in activity.loudness.items()}
    )
    return Activity(rate, loud, activity.mean, activity.weighted)


def _doses(runs: Runs, parts: Sequence[Any], whole: tuple[float, float, float], seed: int) -> pl.DataFrame:
    made = [[_share(part, share) for part in parts] for share in DOSES]
    values = runs.values(made)
    rows = [(0.0, 0.0, 0.0, 0.0)]
    rows += [(share, *paired(each - runs.clean, seed)) for share, each in zip(DOSES, values, strict=True)]
    rows.append((1.0, *whole))
    return pl.DataFrame(rows, schema=["share", "effect", "low", "high"], orient="row")


def _share(part: Any, share: float) -> Any:
    if isinstance(part, Steer):
        return replace(part, strength=part.strength * share)
    kept = part.neurons[: max(1, round(share * len(part.neurons)))]
    means = {
        site: _spread(part.neurons.indices(site), np.asarray(each))
        for site, each in getattr(part, "values", {}).items()
        if part.kind != "patch"
    }
    new = part.moved(kept, means)
    if part.kind == "clamp":
        new = replace(new, values={site: means[site][kept.indices(site)] for site in kept.sites})
    return new


def _spread(indices: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`[largest index + 1]`, the values at their neurons."""
    spread = np.full(int(indices.max()) + 1, np.nan)
    spread[indices] = values
    return spread


def _guards(
    model: Model, parts: Sequence[Any], metric: Metric, guard: Mapping[str, Any], seed: int, batch_tokens: int
) -> tuple[pl.DataFrame, float]:
    rows, passes = [], 0.0
    for name, given in guard.items():
        both = isinstance(given, tuple) and len(given) == 2 and (isinstance(given[0], str) or callable(given[0]))
        its_metric, data = given if both else (metric, given)
        runs = Runs(model, its_metric, data, touched(model, parts), batch_tokens)
        values = runs.values([parts])[0]
        found, low, high = paired(values - runs.clean, seed)
        rows.append((name, name_of(its_metric), float(runs.clean.mean()), float(values.mean()), found, low, high))
        passes += runs.passes
    schema = ["guard", "metric", "clean", "edited", "effect", "low", "high"]
    return pl.DataFrame(rows, schema=schema, orient="row"), passes
