"""`patch_groups`: does setting neurons to what a later checkpoint does reproduce what the checkpoint changed?

The groups of `find.projection_change` are tested one by one and together: in the model before, each neuron of a group
is held at its mean after. Beside them: silencing the neurons that write most along the direction, which is what
explanations by ablation claim to be enough.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from patchclamp.errors import DataError
from patchclamp.intervene import ablate, clamp
from patchclamp.model.model import Model
from patchclamp.neurons import Neurons
from patchclamp.published import published
from patchclamp.verify.evidence import paired
from patchclamp.verify.metrics import Metric, per_example
from patchclamp.verify.runs import Runs, touched


@published(
    row="S075",
    title="Ablation is Not Enough to Emulate DPO: How Neuron Dynamics Drive Toxicity Reduction",
    authors="Yang et al.",
    year=2024,
    url="https://arxiv.org/abs/2411.06424",
    part="patching groups",
)
def patch_groups(
    before: Model,
    after: Model,
    found: Neurons,
    metric: Metric,
    data: Any,
    *,
    ablated: int = 100,
    seed: int = 0,
    batch_tokens: int = 2048,
) -> pl.DataFrame:
    """What holding each group of neurons at its later mean does to a metric, as a share of what the checkpoint did.

    Args:
        before: the model at first.
        after: the later one.
        found: what `find.projection_change` gave: columns `group`, `score`, `mean_after`, `cosine`.
        metric: see `effect`.
        data: see `effect`.
        ablated: how many of the neurons with the largest cosine are silenced for comparison.
        seed: of the intervals.
        batch_tokens: how many tokens are run at once.

    Returns:
        `what`, `neurons`, `effect` (change of the mean metric from `before`), `low`, `high`, `share` of the change from
        `before` to `after`. Rows: the later model itself, all reducing groups together, all groups together, each
        group, and the ablation.

    Raises:
        DataError: a table without these columns, or no neuron in a group.

    Source: Yang et al. (2024).
    """
    missing = [name for name in ("group", "score", "mean_after", "cosine") if name not in found.columns]
    if missing:
        raise DataError(f"the neurons have no column {missing[0]!r}: give what find.projection_change gave")
    grouped = found.where(pl.col("group").is_not_null())
    if not len(grouped):
        raise DataError("no neuron is in a group")
    sets = {
        "all reducing groups": grouped.where(pl.col("score") > 0),
        "all groups": grouped,
        **{name: grouped.where(pl.col("group") == name) for name in sorted(set(grouped["group"].to_list()))},
    }
    sets = {name: neurons for name, neurons in sets.items() if len(neurons)}
    made = [clamp(neurons, neurons["mean_after"].to_list()) for neurons in sets.values()]
    toxic = found.top(min(ablated, len(found)), by="cosine")
    made.append(ablate(toxic))
    runs = Runs(before, metric, data, touched(before, made), batch_tokens)
    values = runs.values(made)
    later = per_example(after, metric, data, batch_tokens)
    names = [*sets, f"silencing the {len(toxic)} neurons that write most along it"]
    numbers = [*(len(each) for each in sets.values()), len(toxic)]
    whole = paired(later - runs.clean, seed)
    rows = [("the later model", 0, *whole, 1.0)]
    for name, number, value in zip(names, numbers, values, strict=True):
        change = paired(value - runs.clean, seed)
        rows.append((name, number, *change, change[0] / whole[0] if whole[0] else float(np.nan)))
    return pl.DataFrame(rows, schema=["what", "neurons", "effect", "low", "high", "share"], orient="row")
