"""`projection_change`: which neurons moved a model along a direction, between two checkpoints?

A direction in the residual stream (what a probe reads: toxicity, a class of tokens) gains from neuron i its mean
activation times the cosine with what it writes. What a fine-tuning changed is the sum of what it changed at every
neuron, and each neuron belongs to one of eight groups: it writes along the direction or against it, it was active
above 0 or below, and it became more active or less.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import polars as pl
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.preprocessing import StandardScaler

from patchclamp.directions import Directions
from patchclamp.errors import DataError
from patchclamp.model.model import Model
from patchclamp.model.site import Site
from patchclamp.neurons import Neurons
from patchclamp.published import published
from patchclamp.recording import Moments, Pooled, record


@published(
    row="S075",
    title="Ablation is Not Enough to Emulate DPO: How Neuron Dynamics Drive Toxicity Reduction",
    authors="Yang et al.",
    year=2024,
    url="https://arxiv.org/abs/2411.06424",
    part="projection change",
)
def projection_change(
    before: Model,
    after: Model,
    data: Any,
    direction: Directions | np.ndarray,
    sites: str | Site | Iterable[str | Site] = "mlp.*",
    *,
    own_weights: bool = False,
    progress: bool = False,
) -> Neurons:
    """What each neuron contributed to the change of a projection between two checkpoints.

    Args:
        before: the model at first.
        after: the same architecture, later.
        data: the texts that both read (the same, so that nothing else changes).
        direction: a vector `[d]` of the residual stream, or `Directions` with one.
        sites: sites whose neurons write into the residual stream.
        own_weights: project what each model's own neurons write; False: what those of `before` write, for both.
        progress: show how far it is.

    Returns:
        One row for each neuron, the largest reduction first: `score` = `before` - `after`, the projections
        (mean activation times output weights along the direction, which is scaled to length 1); `mean_before`,
        `mean_after`; `cosine` of its output weights with the direction; `group`, as in "along, active, falls" (none
        where nothing changed or the cosine is 0); `share` of the reduction of all reducing neurons, or of the increase
        of all others.

    Raises:
        DataError: models that do not fit together, a direction of another width, or no change at all.

    Source: Yang et al. (2024). The paper generates 20 tokens for each prompt; here both models read the same text.
    Means are summed in double precision and leave padding out. An activation of 0 counts as active, as in the paper.
    """
    vector = _vector(direction)
    sums = [record(each, data, sites, [Moments()], progress=progress) for each in (before, after)]
    if list(sums[0].by_site) != list(sums[1].by_site):
        raise DataError("the two models have other sites: they are not of one architecture")
    frames = []
    for site in sums[0].by_site:
        means = [np.asarray(each[site].moments.mean, np.float64) for each in sums]
        if means[0].shape != means[1].shape:
            raise DataError(f"the two models have other numbers of neurons at {site}: {[len(each) for each in means]}")
        writes = [each.output_weights(site).double().cpu().numpy() for each in (before, after)]
        if writes[0].shape[1] != len(vector):
            raise DataError(f"{site} writes {writes[0].shape[1]} numbers, and the direction has {len(vector)}")
        along = [weights @ vector for weights in writes]
        cosine = along[0] / np.maximum(np.linalg.norm(writes[0], axis=1), 1e-300)
        projections = (means[0] * along[0], means[1] * along[1 if own_weights else 0])
        frames.append(
            pl.DataFrame(
                {
                    "site": site,
                    "index": np.arange(len(cosine)),
                    "score": projections[0] - projections[1],
                    "before": projections[0],
                    "after": projections[1],
                    "mean_before": means[0],
                    "mean_after": means[1],
                    "cosine": cosine,
                }
            )
        )
    return _grouped(pl.concat(frames))


def projection_groups(found: Neurons) -> pl.DataFrame:
    """What each group did: `group`, `reduces`, `neurons`, `sum` of scores, `share` of all reduction (or increase).

    Args:
        found: what `projection_change` gave.
    """
    frame = found.to_polars().filter(pl.col("group").is_not_null())
    return (
        frame.group_by("group")
        .agg(
            (pl.col("score").sum() > 0).alias("reduces"),
            pl.len().alias("neurons"),
            pl.col("score").sum().alias("sum"),
            pl.col("share").sum(),
        )
        .sort("sum", descending=True)
    )


def neurons_for_share(found: Neurons, shares: Iterable[float] = (0.5, 0.75, 0.99)) -> dict[float, int]:
    """How many of the most reducing neurons make up each share of the whole reduction."""
    scores = np.sort(found["score"].to_numpy())[::-1]
    total = np.cumsum(scores[scores > 0])
    if not len(total):
        raise DataError("no neuron reduces the projection")
    return {share: int(np.searchsorted(total, share * total[-1] * (1 - 1e-12)) + 1) for share in shares}


def projection_probe(
    model: Model, data: Any, label: str, positive: str, site: str | None = None, *, seed: int = 0
) -> tuple[Directions, float]:
    """A direction that tells one label from the others: a logistic regression on the mean residual stream.

    Args:
        model: the model.
        data: texts with that label.
        label: its name.
        positive: the category that the direction points to.
        site: where; None: `resid_post` of the last block.
        seed: of the cross-validation.

    Returns:
        The direction, and the accuracy of five-fold cross-validation.

    Raises:
        DataError: no such label or category, or a probe that is no better than always saying the larger class.
    """
    name = site or [each for each in model.sites if "resid_post" in each][-1]
    recording = record(model, data, name, [Pooled("mean")], progress=False)
    if positive not in recording.labels.get(label, ()):
        raise DataError(f"the data has no {label!r} called {positive!r}")
    wanted = np.asarray(recording.categories_of_examples(label)) == positive
    values = np.asarray(recording[name].pooled.values, np.float64)
    scaler = StandardScaler().fit(values)
    probe = LogisticRegression(max_iter=2000)
    accuracy = float(cross_val_score(probe, scaler.transform(values), wanted, cv=5).mean())
    most = max(wanted.mean(), 1 - wanted.mean())
    if accuracy <= most + 0.02:
        raise DataError(
            f"a probe for {positive!r} is right for {accuracy:.2f}, and always saying one class for {most:.2f}"
        )
    weights = probe.fit(scaler.transform(values), wanted).coef_[0] / scaler.scale_
    return Directions({name: weights}, [positive]), accuracy


# Helpers --------------------------------------------------------------------------------------------


def _vector(direction: Directions | np.ndarray) -> np.ndarray:
    if isinstance(direction, Directions):
        if len(direction) != 1 or direction.count != 1:
            raise DataError(f"one direction at one site is wanted, not {direction!r}")
        direction = next(iter(direction.values()))[0]
    vector = np.asarray(direction, np.float64)
    length = np.linalg.norm(vector)
    if vector.ndim != 1 or not np.isfinite(length) or length == 0:
        raise DataError(f"a direction is a vector [d] that is not zero, not {list(vector.shape)}")
    return vector / length


def _grouped(frame: pl.DataFrame) -> Neurons:
    if frame["score"].abs().max() == 0:
        raise DataError("nothing changed between the two models on this data: there are no shares")
    rises = pl.col("mean_after") > pl.col("mean_before")
    words = pl.concat_str(
        pl.when(pl.col("cosine") > 0).then(pl.lit("along, ")).otherwise(pl.lit("against, ")),
        pl.when(pl.col("mean_before") >= 0).then(pl.lit("active, ")).otherwise(pl.lit("below zero, ")),
        pl.when(rises).then(pl.lit("rises")).otherwise(pl.lit("falls")),
    )
    none = (pl.col("score") == 0) | (pl.col("cosine") == 0) | (pl.col("mean_after") == pl.col("mean_before"))
    score = pl.col("score")
    total = pl.when(score > 0).then(score.filter(score > 0).sum()).otherwise(score.filter(score < 0).sum())
    return Neurons.from_polars(
        frame.with_columns(
            pl.when(none).then(None).otherwise(words).alias("group"),
            pl.when(score == 0).then(0.0).otherwise(score / total).alias("share"),
        ).sort("score", descending=True, maintain_order=True)
    )
