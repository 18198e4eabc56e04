"""Conductance: how much of what a network says flows through each neuron, on the way from a baseline to the input.

Along the straight path from a baseline x' to the input x, each step moves a neuron a little, and the target F by as
much as its slope there; all steps together are what the neuron contributed:

    conductance_j = integral of dF/dy_j dy_j,    and at a layer through which all passes their sum is F(x) - F(x')

Unlike gradient times activation it does not forget what a neuron did before it, or the output, saturated. The integral
is taken by steps of y itself, which needs no derivative of y: the later, cheaper form of the paper's.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import polars as pl

from patchclamp.attribution import Target, attribute
from patchclamp.attribution.batches import batches
from patchclamp.model.model import Model
from patchclamp.neurons import Neurons
from patchclamp.published import published


@published(
    row="S090",
    title="How Important Is a Neuron?",
    authors="Dhamdhere, Sundararajan, Yan",
    year=2018,
    url="https://arxiv.org/abs/1805.12233",
)
def conductance(
    model: Model,
    inputs: Any,
    target: Target,
    sites: str | list[str] = "mlp.*",
    *,
    baseline: Any = None,
    absolute: bool = False,
    steps: int = 50,
    points: Literal["uniform", "gausslegendre"] = "uniform",
    rule: Literal["trapezoid", "left"] = "trapezoid",
    batch: int = 64,
) -> Neurons:
    """Neurons through which most of a target flows, on the way from a baseline to inputs (Dhamdhere et al., 2018).

    The module is run in evaluation mode: dropout and batch norms that learn would make the path none.

    Args:
        model: the model.
        inputs: `pc.Texts`, `pc.Tensors`, `pc.Images`, texts, a tensor `[examples, ...]`, or keyword arguments.
        target: `(output, inputs) -> [examples]`, of `patchclamp.attribution`: `class_logit(3)`, `logit(tokens)`.
            Logits are before the softmax, probabilities behind it; the paper has either.
        sites: sites by name or glob.
        baseline: of a tensor another one, by default zeros; of texts `"zero"` embeddings, the default, or the id of a
            token, such as that for padding.
        absolute: rank by the mean of magnitudes, so that what helps here and hinders there does not cancel out.
        steps: of the path.
        points: "gausslegendre" with `rule="left"` takes what captum's `LayerConductance` takes by default.
        rule: of a step, as of `attribution.attribute`.
        batch: how many points times examples are run at once.

    Returns:
        All neurons, the largest first: `score` (mean over examples, of channels summed over space, of texts over
        tokens without padding), in units of the target; `magnitude`, the mean of magnitudes (the score if `absolute`,
        with the signed mean as `mean`); of the site, `incomplete`: by how much its sum misses F(x) - F(x'), mean over
        examples of |sum - wanted| / |wanted|, and `complete`, whether that is below 0.01. Beside a residual stream no
        site is complete.

    Raises:
        DataError: a baseline that is equal to an example, too few steps, a target that is not finite.
        ModelError: a site that is reached more than once, or that cannot be written.
    """
    signed: dict[str, list[np.ndarray]] = {}
    magnitudes: dict[str, list[np.ndarray]] = {}
    errors: dict[str, list[np.ndarray]] = {}
    count = 0
    for call, goal, which in batches(model, inputs, target, batch):
        found = attribute(
            *(model, call, goal, sites),
            method="conductance",
            baseline=_rows_of_baseline(baseline, which),
            steps=steps,
            points=points,
            rule=rule,
            batch=batch,
        )
        assert found.baseline_value is not None
        wanted = (found.value - found.baseline_value).double().cpu().numpy()
        count += len(which)
        for site in found.by_site:
            total = found.total(site).double().cpu().numpy()
            signed.setdefault(site, []).append(total.sum(0))
            magnitudes.setdefault(site, []).append(np.abs(total).sum(0))
            errors.setdefault(site, []).append(np.abs(total.sum(1) - wanted) / np.maximum(np.abs(wanted), 1e-12))
    frames = []
    for site in signed:
        mean, magnitude = np.sum(signed[site], 0) / count, np.sum(magnitudes[site], 0) / count
        error = float(np.concatenate(errors[site]).mean())
        columns = {"score": magnitude, "mean": mean} if absolute else {"score": mean, "magnitude": magnitude}
        frames.append(
            pl.DataFrame({"site": site, "index": np.arange(len(mean)), **columns}).with_columns(
                pl.lit(error).alias("incomplete"), pl.lit(error < 0.01).alias("complete")
            )
        )
    return Neurons.from_polars(pl.concat(frames).sort("score", descending=True, maintain_order=True))


def _rows_of_baseline(baseline: Any, which: list[int]) -> Any:
    """Of a baseline with one row for each example, those of a batch; one for all stays as it is."""
    shape = getattr(baseline, "shape", ())
    return baseline[which] if len(shape) > 1 and shape[0] > 1 else baseline
