"""`attribute`: how much each neuron contributed to a target, for all sites at once.

| method | of neuron j | passes |
|---|---|---|
| `"gradient_x_activation"` | `a_j * dF/da_j` | one forward and one backward |
| `"patching"` | `(a'_j - a_j) * dF/da_j`, a' on the baseline | two forward, one backward |
| `"conductance"` | the integral of `dF/da_j * da_j` along a path | `steps` and one, batched |
| `"integrated_gradients"` | `(a_j - a'_j)` times the mean of `dF/da_j` along it | the same |

Patching says to first order what the target would change if the neuron alone were as on the baseline. The path is the
straight line from the baseline to the inputs; it runs through the input embeddings of a text, or through the tensor
itself. Conductance: Kedar Dhamdhere, Mukund Sundararajan, Qiqi Yan, "How Important Is a Neuron?" (2018), in the
telescoping form. Attribution patching: Neel Nanda (2023); Aaquib Syed, Can Rager, Arthur Conmy (2023).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import polars as pl
import torch

from patchclamp.attribution.engine import examples_of, gradients, prepared, rows_of, values
from patchclamp.attribution.path import Path, integral
from patchclamp.attribution.targets import OfExamples, Target
from patchclamp.errors import DataError, unknown
from patchclamp.model.model import Model
from patchclamp.model.site import Site
from patchclamp.neurons import Neurons

Method = Literal["gradient_x_activation", "patching", "conductance", "integrated_gradients"]


@dataclass(frozen=True, eq=False)
class Attributions:
    """What each neuron contributed, at each position.

    Attributes:
        by_site: name of a site -> `[examples, ..., size]`, signed, in units of the target.
        value: `[examples]`, the target.
        baseline_value: `[examples]`, the target of the baseline; None where the method has none.
        mask: `[examples, tokens]` bool, the real tokens; None where there is no attention mask.
        masks: name of a site -> the mask of its tokens, for sites that have any: a decoder's are others.
    """

    by_site: dict[str, torch.Tensor]
    value: torch.Tensor
    baseline_value: torch.Tensor | None
    mask: torch.Tensor | None
    masks: dict[str, torch.Tensor] = field(default_factory=dict)

    def total(self, site: str) -> torch.Tensor:
        """`[examples, size]`: summed over positions, padding left out."""
        if site not in self.by_site:
            raise unknown("site with attributions", site, self.by_site)
        return _total(self.by_site[site], self.masks.get(site))

    def completeness(self) -> pl.DataFrame:
        """Whether the contributions at each site add up to what the target changed from the baseline.

        Only at a site through which everything passes they have to: beside a residual stream they do not.

        Returns:
            One row for each site: `site`, `sum` and `wanted` (means over examples), `relative_error` (mean over
            examples of |sum - wanted| / |wanted|) and `complete`, whether that is below 0.01.

        Raises:
            DataError: the method has no baseline.
        """
        if self.baseline_value is None:
            raise DataError("gradient times activation has no baseline: nothing is to add up to anything")
        wanted = (self.value - self.baseline_value).double()
        rows = []
        for site in self.by_site:
            summed = self.total(site).double().sum(1)
            error = float(((summed - wanted).abs() / wanted.abs().clamp(min=1e-12)).mean())
            rows.append((site, float(summed.mean()), float(wanted.mean()), error, error < 0.01))
        columns = ["site", "sum", "wanted", "relative_error", "complete"]
        return pl.DataFrame(rows, schema=columns, orient="row")

    def neurons(self, absolute: bool = False) -> Neurons:
        """Every neuron, the largest contribution first: column `score`, summed over positions, mean over examples.

        Args:
            absolute: the mean of magnitudes, so that what helps here and hinders there does not cancel out.
        """
        frames = []
        for site in self.by_site:
            total = self.total(site)
            score = (total.abs() if absolute else total).double().mean(0).cpu().numpy()
            frames.append(pl.DataFrame({"site": site, "index": np.arange(len(score)), "score": score}))
        return Neurons.from_polars(pl.concat(frames).sort("score", descending=True, maintain_order=True))


def attribute(
    model: Model,
    inputs: Any,
    target: Target,
    sites: str | Site | Iterable[str | Site] = "mlp.*",
    *,
    method: Method = "gradient_x_activation",
    baseline: Any = None,
    steps: int = 20,
    points: Literal["uniform", "gausslegendre"] = "uniform",
    rule: Literal["trapezoid", "left"] = "trapezoid",
    batch: int = 64,
) -> Attributions:
    """How much each neuron of the sites contributed to a target.

    Args:
        model: the model.
        inputs: a text, a list of texts, a tensor `[examples, ...]`, or the keyword arguments of the module.
        target: `(output, inputs) -> [examples]`; `patchclamp.attribution` has those that are usual.
        sites: sites by name or glob, all at once.
        method: see the table above.
        baseline: what `inputs` are compared with. For `"patching"`: inputs of the same shape. For the paths: of texts
            an embedding, by default zeros (`"zero"`), or the id of a token, such as the padding or mask token; of a
            tensor another one (broadcast), by default zeros.
        steps: of the path; gradients are taken at `steps` + 1 points.
        points: where on the path: evenly, or at the abscissas of Gauss and Legendre, as captum's default, which
            begin a little behind the baseline and end a little before the inputs.
        rule: gradients of a step: the mean of its two ends, whose error falls with the square of the steps, or that of
            its beginning, as captum does.
        batch: how many points times examples are run at once. A target that is a function of your own is shown all
            examples at a time, whatever this says: it may know them by their number.

    Raises:
        DataError: unknown method, no baseline for patching, one equal to the inputs, or of another shape.
        ModelError: as of `gradients`; a path through texts, and the module does not say where its embeddings are.
    """
    if method not in _METHODS:
        raise DataError(f"method is one of {', '.join(repr(each) for each in _METHODS)}, not {method!r}")
    if batch < 1:
        raise DataError(f"batch is how many are run at once, not {batch}")
    call = prepared(model, inputs)
    if method == "gradient_x_activation":
        return _joined([_first_order(model, part, goal, sites) for part, goal, _ in _parts(call, target, batch)])
    if method == "patching":
        if baseline is None:
            raise DataError('method="patching" needs baseline=: the inputs whose activations would be put there')
        other = prepared(model, baseline)
        if examples_of(other) != examples_of(call):
            raise DataError(f"{examples_of(call)} examples, and {examples_of(other)} as their baseline")
        return _joined(
            [
                _patching(model, part, rows_of(other, examples, examples_of(call)), goal, sites)
                for part, goal, examples in _parts(call, target, batch)
            ]
        )
    if steps < 1:
        raise DataError(f"a path has at least 1 step, not {steps}")
    if points not in ("uniform", "gausslegendre") or rule not in ("trapezoid", "left"):
        raise DataError('points is "uniform" or "gausslegendre", and rule "trapezoid" or "left"')
    path = Path.between(model, call, baseline)
    chosen = model.select(sites)
    found = []
    for part, goal, examples in _parts(call, target, batch):
        here = path.rows(examples, examples_of(call))
        by_site, end, start = integral(model, part, here, goal, chosen, method, steps, points, rule, batch)
        found.append(Attributions(by_site, end.value, start, end.mask, end.masks))
    return _joined(found)


# Helpers --------------------------------------------------------------------------------------------

_METHODS = ("gradient_x_activation", "patching", "conductance", "integrated_gradients")


def _parts(call: Any, target: Target, batch: int) -> Iterator[tuple[Any, Target, list[int]]]:
    """Examples in batches: the arguments of the module, the target, and which they are."""
    examples = examples_of(call)
    if not isinstance(target, OfExamples):
        yield call, target, list(range(examples))
        return
    for start in range(0, examples, batch):
        which = list(range(start, min(start + batch, examples)))
        yield rows_of(call, which, examples), target.rows(which, examples), which


def _joined(parts: list[Attributions]) -> Attributions:
    if len(parts) == 1:
        return parts[0]
    return Attributions(
        {site: torch.cat([each.by_site[site] for each in parts]) for site in parts[0].by_site},
        torch.cat([each.value for each in parts]),
        None if parts[0].baseline_value is None else torch.cat([each.baseline_value for each in parts]),  # type: ignore[misc]
        None if parts[0].mask is None else torch.cat([each.mask for each in parts]),  # type: ignore[misc]
        {site: torch.cat([each.masks[site] for each in parts]) for site in parts[0].masks},
    )


def _first_order(model: Model, call: Any, target: Target, sites: Any) -> Attributions:
    seen = gradients(model, call, target, sites)
    found = {site: seen.activations[site] * slope for site, slope in seen.gradients.items()}
    return Attributions(found, seen.value, None, seen.mask, seen.masks)


def _patching(model: Model, call: Any, other: Any, target: Target, sites: Any) -> Attributions:
    seen = gradients(model, call, target, sites)
    baseline = values(model, other, target, sites)
    activations = baseline.activations
    found = {}
    for site, slope in seen.gradients.items():
        if activations[site].shape != slope.shape:
            raise DataError(
                f"the baseline has another shape: {site} is {list(slope.shape)}, and on the baseline "
                f"{list(activations[site].shape)}"
            )
        found[site] = (activations[site] - seen.activations[site]) * slope
    # What is added up to is the change from these inputs to the baseline.
    return Attributions(found, baseline.value, seen.value, seen.mask, seen.masks)


def _total(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is not None and values.ndim >= 3 and values.shape[:2] == mask.shape:
        values = values * mask.reshape(*mask.shape, *[1] * (values.ndim - 2)).to(values)
    return values.flatten(1, -2).sum(1) if values.ndim > 2 else values
