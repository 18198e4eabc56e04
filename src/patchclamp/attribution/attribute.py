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

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import polars as pl
import torch

from patchclamp.attribution.engine import Gradients, gradients, prepared
from patchclamp.attribution.targets import Target
from patchclamp.errors import DataError, ModelError
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
    """

    by_site: dict[str, torch.Tensor]
    value: torch.Tensor
    baseline_value: torch.Tensor | None
    mask: torch.Tensor | None

    def total(self, site: str) -> torch.Tensor:
        """`[examples, size]`: summed over positions, padding left out."""
        return _total(self.by_site[site], self.mask)

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
    batch: int = 256,
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
        points: where on the path: evenly, or at the abscissas of Gauss and Legendre, as captum's default.
        rule: gradients of a step: the mean of its two ends, whose error falls with the square of the steps, or that of
            its beginning, as captum does.
        batch: how many points times examples are run at once.

    Raises:
        DataError: unknown method, no baseline for patching, one equal to the inputs, or of another shape.
    """
    if method == "gradient_x_activation":
        seen = gradients(model, inputs, target, sites)
        found = {site: seen.activations[site] * slope for site, slope in seen.gradients.items()}
        return Attributions(found, seen.value, None, seen.mask)
    if method == "patching":
        return _patching(model, inputs, baseline, target, sites)
    if method not in ("conductance", "integrated_gradients"):
        raise DataError(
            f'method is "gradient_x_activation", "patching", "conductance" or "integrated_gradients", not {method!r}'
        )
    if steps < 1:
        raise DataError(f"a path has at least 1 step, not {steps}")
    if points not in ("uniform", "gausslegendre") or rule not in ("trapezoid", "left"):
        raise DataError('points is "uniform" or "gausslegendre", and rule "trapezoid" or "left"')
    along = _along(model, inputs, baseline, target, sites, _alphas(steps, points), batch)
    return _integrated(along, method, rule)


# Helpers --------------------------------------------------------------------------------------------


def _patching(model: Model, inputs: Any, baseline: Any, target: Target, sites: Any) -> Attributions:
    if baseline is None:
        raise DataError('method="patching" needs baseline=: the inputs whose activations would be put there')
    seen = gradients(model, inputs, target, sites)
    other = gradients(model, baseline, target, sites)
    found = {}
    for site, slope in seen.gradients.items():
        if other.activations[site].shape != slope.shape:
            raise DataError(
                f"the baseline has another shape: {site} is {list(slope.shape)}, and on the baseline "
                f"{list(other.activations[site].shape)}"
            )
        found[site] = (other.activations[site] - seen.activations[site]) * slope
    # What is added up to is the change from these inputs to the baseline.
    return Attributions(found, other.value, seen.value, seen.mask)


def _alphas(steps: int, points: str) -> np.ndarray:
    if points == "uniform":
        return np.linspace(0, 1, steps + 1)
    return (1 + np.polynomial.legendre.leggauss(steps + 1)[0]) / 2


def _along(
    model: Model, inputs: Any, baseline: Any, target: Target, sites: Any, alphas: np.ndarray, batch: int
) -> list[Gradients]:
    """Gradients at each point of the path from the baseline to the inputs."""
    call = prepared(model, inputs)
    examples = len(call) if isinstance(call, torch.Tensor) else len(next(iter(call.values())))
    together = max(1, batch // max(examples, 1))
    found: list[Gradients] = []
    for start in range(0, len(alphas), together):
        here = torch.as_tensor(alphas[start : start + together], dtype=torch.float32)
        scale = here.repeat_interleave(examples)
        if isinstance(call, torch.Tensor):
            points = _points(call, _tensor_baseline(call, baseline), scale)
            seen = gradients(model, points, _each(target, examples), sites)
        else:
            repeated = {name: _repeated(each, len(here), examples) for name, each in call.items()}
            site, edit = _embedding(model, baseline, scale, examples)
            seen = gradients(model, repeated, _each(target, examples), sites, before=[(site, edit)])
        found += _split(seen, len(here))
    return found


def _embedding(model: Model, baseline: Any, scale: torch.Tensor, examples: int) -> tuple[Site, Any]:
    """The site of the input embeddings, and what makes points of the path out of them."""
    getter = getattr(model.module, "get_input_embeddings", None)
    embedding = getter() if getter is not None else None
    paths = [path for path, module in model.module.named_modules() if module is embedding]
    if embedding is None or not paths:
        raise ModelError(f"{type(model.module).__name__} has no input embeddings to run a path through")
    if baseline in (None, "zero"):
        start: Any = None
    elif isinstance(baseline, int) and not isinstance(baseline, bool):
        weight: Any = embedding.weight
        if not 0 <= baseline < len(weight):
            raise DataError(f"the baseline is token {baseline}, and there are {len(weight)}")
        start = embedding(torch.tensor([baseline], device=weight.device)).detach()
    else:
        raise DataError(f'the baseline of texts is "zero" or the id of a token, not {baseline!r:.60}')

    def edit(tensor: torch.Tensor) -> torch.Tensor:
        share = scale.to(tensor).view(-1, *[1] * (tensor.ndim - 1))
        return tensor * share if start is None else start.to(tensor) * (1 - share) + tensor * share

    return Site.custom(paths[0]), edit


def _tensor_baseline(inputs: torch.Tensor, baseline: Any) -> torch.Tensor:
    if baseline is None or (isinstance(baseline, str) and baseline == "zero"):
        return torch.zeros_like(inputs)
    given = torch.as_tensor(baseline, dtype=inputs.dtype, device=inputs.device)
    try:
        given = given.expand_as(inputs)
    except RuntimeError as error:
        raise DataError(f"the baseline is {list(given.shape)}, and the inputs {list(inputs.shape)}") from error
    if torch.equal(given, inputs):
        raise DataError("the baseline is equal to the inputs: there is no path between them")
    return given


def _points(inputs: torch.Tensor, baseline: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    times = len(scale) // len(inputs)
    share = scale.to(inputs).view(-1, *[1] * (inputs.ndim - 1))
    repeated = [each.repeat(times, *[1] * (inputs.ndim - 1)) for each in (inputs, baseline)]
    return repeated[1] + share * (repeated[0] - repeated[1])


def _repeated(value: Any, times: int, examples: int) -> Any:
    if isinstance(value, torch.Tensor) and value.ndim and len(value) == examples:
        return value.repeat(times, *[1] * (value.ndim - 1))
    return value


def _each(target: Target, examples: int) -> Target:
    """The target on examples that stand several times one after another: those that name one token for each know."""

    def of_all(output: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
        parts = _rows(output, examples)
        kept = [{name: _row(value, examples, number) for name, value in inputs.items()} for number in range(len(parts))]
        return torch.cat([target(part, each) for part, each in zip(parts, kept, strict=True)])

    return of_all


def _rows(output: Any, examples: int) -> list[Any]:
    """An output cut into parts of so many examples."""
    if isinstance(output, torch.Tensor):
        return list(output.split(examples))
    if isinstance(output, Mapping):
        tensors = {name: each for name, each in output.items() if isinstance(each, torch.Tensor) and each.ndim}
        count = max(len(each) for each in tensors.values()) // examples
        return [
            type(output)(**{name: each[number * examples : (number + 1) * examples] for name, each in tensors.items()})
            for number in range(count)
        ]
    tensors = [each for each in output if isinstance(each, torch.Tensor) and each.ndim]
    count = len(tensors[0]) // examples
    return [tuple(each[number * examples : (number + 1) * examples] for each in tensors) for number in range(count)]


def _row(value: Any, examples: int, number: int) -> Any:
    if isinstance(value, torch.Tensor) and value.ndim and len(value) % examples == 0 and len(value) > examples:
        return value[number * examples : (number + 1) * examples]
    return value


def _split(seen: Gradients, times: int) -> list[Gradients]:
    def part(tensor: torch.Tensor, number: int) -> torch.Tensor:
        return tensor.chunk(times)[number]

    return [
        Gradients(
            part(seen.value, number),
            {site: part(each, number) for site, each in seen.activations.items()},
            {site: part(each, number) for site, each in seen.gradients.items()},
            None if seen.mask is None else part(seen.mask, number),
        )
        for number in range(times)
    ]


def _integrated(along: list[Gradients], method: str, rule: str) -> Attributions:
    found: dict[str, torch.Tensor] = {}
    first, last = along[0], along[-1]
    for site in first.gradients:
        total = torch.zeros_like(first.gradients[site])
        for one, two in pairwise(along):
            slope = one.gradients[site]
            slope = (slope + two.gradients[site]) / 2 if rule == "trapezoid" else slope
            step = two.activations[site] - one.activations[site]
            total += slope * step if method == "conductance" else slope / (len(along) - 1)
        if method == "integrated_gradients":
            total *= last.activations[site] - first.activations[site]
        found[site] = total
    return Attributions(found, last.value, first.value, last.mask)


def _total(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is not None and values.ndim >= 3 and values.shape[:2] == mask.shape:
        values = values * mask.reshape(*mask.shape, *[1] * (values.ndim - 2)).to(values)
    return values.flatten(1, -2).sum(1) if values.ndim > 2 else values
