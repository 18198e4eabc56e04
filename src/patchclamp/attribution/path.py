"""The straight path from a baseline to the inputs, and what neurons contribute along it.

Points of the path are run several at once: the examples stand one after another once for each point. Nothing is kept
of a point but what its neighbour needs, so that memory does not grow with the steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from patchclamp.attribution.engine import Edit, Gradients, examples_of, gradients, values
from patchclamp.attribution.targets import OfExamples, Target
from patchclamp.errors import DataError, ModelError
from patchclamp.model.model import Model
from patchclamp.model.site import Site


@dataclass(frozen=True, eq=False)
class Path:
    """Where the path runs, and where it begins.

    Attributes:
        through: name of the argument that moves; None where the argument is the one tensor.
        start: its baseline, of the shape of the inputs; of texts one embedding `[d]`, or None for zeros.
        embedding: site of the input embeddings, where the path runs through these.
    """

    through: str | None
    start: torch.Tensor | None
    embedding: Site | None = None

    @classmethod
    def between(cls, model: Model, call: Any, baseline: Any) -> Path:
        """The path to the inputs.

        Raises:
            DataError: a baseline that is equal to the inputs, or none at all.
            ModelError: texts, and the module does not say where its embeddings are.
        """
        if isinstance(call, torch.Tensor):
            if not call.is_floating_point():
                raise DataError(f"a path through inputs of {call.dtype}: give them as input_ids=, or as floats")
            return cls(None, _tensor_baseline(call, baseline))
        moving = [name for name, each in call.items() if isinstance(each, torch.Tensor) and each.is_floating_point()]
        if "input_ids" not in call and len(moving) == 1:
            return cls(moving[0], _tensor_baseline(call[moving[0]], baseline))
        return cls(None, _embedding_baseline(model, call, baseline), _embedding_site(model))

    def rows(self, examples: Sequence[int], of: int) -> Path:
        """The path of some of the examples only."""
        if self.embedding is not None or self.start is None or len(self.start) != of:
            return self
        return replace(self, start=self.start[list(examples)])

    def points(self, call: Any, alphas: torch.Tensor) -> tuple[Any, list[tuple[Site, Edit]]]:
        """The arguments of the module at these shares of the way, one point after another, and what is done inside."""
        examples = examples_of(call)
        share = alphas.repeat_interleave(examples)
        if isinstance(call, torch.Tensor):
            return self._moved(call, share), []
        repeated = {name: _repeated(each, len(alphas), examples) for name, each in call.items()}
        if self.through is not None:
            return repeated | {self.through: self._moved(call[self.through], share)}, []
        assert self.embedding is not None
        return repeated, [(self.embedding, self._scaled(share))]

    def _moved(self, inputs: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        assert self.start is not None
        share = share.to(inputs).view(-1, *[1] * (inputs.ndim - 1))
        times = len(share) // len(inputs)
        end, start = (each.repeat(times, *[1] * (inputs.ndim - 1)) for each in (inputs, self.start))
        return start + share * (end - start)

    def _scaled(self, share: torch.Tensor) -> Edit:
        def edit(tensor: torch.Tensor) -> torch.Tensor:
            here = share.to(tensor).view(-1, *[1] * (tensor.ndim - 1))
            return tensor * here if self.start is None else self.start.to(tensor) * (1 - here) + tensor * here

        return edit


def integral(
    model: Model,
    call: Any,
    path: Path,
    target: Target,
    sites: list[Site],
    method: str,
    steps: int,
    points: str,
    rule: str,
    batch: int,
) -> tuple[dict[str, torch.Tensor], Gradients, torch.Tensor]:
    """What neurons contribute along a path; arguments as of `attribute`.

    Returns:
        By site; what the end of the path showed (of Gauss-Legendre without gradients); the target of the baseline.
    """
    examples = examples_of(call)
    gauss = points == "gausslegendre"
    alphas, weights = _quadrature(steps, gauss, rule)
    together = max(1, batch // examples)
    summed = _Conductance(rule) if method == "conductance" else _Mean(weights)
    ends: list[Gradients] = []
    if gauss:  # its points do not reach the ends
        arguments, before = path.points(call, torch.tensor([0.0, 1.0]))
        ends = _split(values(model, arguments, several(target, examples, 2), sites, before=before), 2)
    for start in range(0, len(alphas), together):
        here = torch.as_tensor(alphas[start : start + together], dtype=torch.float32)
        arguments, before = path.points(call, here)
        seen = gradients(model, arguments, several(target, examples, len(here)), sites, before=before)
        for each in _split(seen, len(here)):
            summed.add(each)
            if not gauss:
                ends = [*ends[:1], each]
    found = summed.total
    if method == "integrated_gradients":
        found = {site: each * (ends[1].activations[site] - ends[0].activations[site]) for site, each in found.items()}
    return found, ends[1], ends[0].value


def several(target: Target, examples: int, times: int) -> Target:
    """The target on examples that stand several times one after another."""
    if times == 1:
        return target
    if isinstance(target, OfExamples):
        return target.rows(list(range(examples)) * times, examples)

    def of_all(output: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
        parts = [slice(number * examples, (number + 1) * examples) for number in range(times)]
        given = examples * times
        return torch.cat([target(_part(output, part, given), _part(inputs, part, given)) for part in parts])

    return of_all


# Helpers --------------------------------------------------------------------------------------------


def _quadrature(steps: int, gauss: bool, rule: str) -> tuple[np.ndarray, np.ndarray]:
    """Points from 0 to 1, and the weight of each in a mean along the path."""
    if gauss:
        places, weights = np.polynomial.legendre.leggauss(steps + 1)
        return (1 + places) / 2, weights / 2
    weights = np.full(steps + 1, 1 / steps)
    if rule == "left":
        weights[-1] = 0
    else:
        weights[[0, -1]] /= 2
    return np.linspace(0, 1, steps + 1), weights


class _Conductance:
    """Sum over the steps of the slope times what the neuron moved."""

    def __init__(self, rule: str) -> None:
        self.total: dict[str, torch.Tensor] = {}
        self._rule, self._last = rule, None

    def add(self, seen: Gradients) -> None:
        last: Any = self._last
        for site, slope in seen.gradients.items():
            if last is None:
                self.total[site] = torch.zeros_like(slope)
                continue
            moved = seen.activations[site] - last.activations[site]
            if self._rule == "left":
                self.total[site].addcmul_(last.gradients[site], moved)
            else:
                self.total[site].addcmul_(last.gradients[site] + slope, moved, value=0.5)
        self._last = seen


class _Mean:
    """Weighted mean of the slopes."""

    def __init__(self, weights: np.ndarray) -> None:
        self.total: dict[str, torch.Tensor] = {}
        self._weights = iter(weights.tolist())

    def add(self, seen: Gradients) -> None:
        weight = next(self._weights)
        for site, slope in seen.gradients.items():
            self.total.setdefault(site, torch.zeros_like(slope)).add_(slope, alpha=weight)


def _embedding_site(model: Model) -> Site:
    getter = getattr(model.module, "get_input_embeddings", None)
    embedding = getter() if getter is not None else None
    paths = [path for path, module in model.module.named_modules() if module is embedding]
    if embedding is None or not paths:
        raise ModelError(f"{type(model.module).__name__} has no input embeddings to run a path through")
    return Site.custom(paths[0])


def _embedding_baseline(model: Model, call: Mapping[str, Any], baseline: Any) -> torch.Tensor | None:
    if baseline is None or (isinstance(baseline, str) and baseline == "zero"):
        return None
    if not isinstance(baseline, int) or isinstance(baseline, bool):
        raise DataError(f'the baseline of texts is "zero" or the id of a token, not {baseline!r:.60}')
    embedding: Any = model.module.get_submodule(_embedding_site(model).module)
    if not 0 <= baseline < len(embedding.weight):
        raise DataError(f"the baseline is token {baseline}, and there are {len(embedding.weight)}")
    ids, mask = call.get("input_ids"), call.get("attention_mask")
    if ids is not None:
        same = (ids == baseline) if mask is None else (ids == baseline) | (mask == 0)
        if bool(same.flatten(1).all(1).any()):
            number = int(same.flatten(1).all(1).nonzero()[0])
            raise DataError(f"example {number} is equal to the baseline, token {baseline}: there is no path between")
    with torch.no_grad():
        return embedding(torch.tensor([baseline], device=embedding.weight.device))[0]


def _tensor_baseline(inputs: torch.Tensor, baseline: Any) -> torch.Tensor:
    if baseline is None or (isinstance(baseline, str) and baseline == "zero"):
        baseline = 0.0
    try:
        given = torch.as_tensor(baseline, dtype=inputs.dtype, device=inputs.device).expand_as(inputs)
    except RuntimeError as error:
        shape = list(torch.as_tensor(baseline).shape)
        raise DataError(f"the baseline is {shape}, and the inputs {list(inputs.shape)}") from error
    except (TypeError, ValueError) as error:
        raise DataError(f"the baseline of a tensor is a tensor, not {baseline!r:.60}") from error
    if not bool(given.isfinite().all()):
        raise DataError("the baseline is not finite")
    same = (given == inputs).flatten(1).all(1) if inputs.ndim > 1 else given == inputs
    if bool(same.any()):
        number = int(same.nonzero()[0])
        raise DataError(f"example {number} is equal to the baseline: there is no path between them")
    return given


def _repeated(value: Any, times: int, examples: int) -> Any:
    if isinstance(value, torch.Tensor) and value.ndim and len(value) == examples:
        return value.repeat(times, *[1] * (value.ndim - 1))
    return value


def _part(value: Any, part: slice, given: int) -> Any:
    """Some of the examples of whatever a network is given or returns."""
    if isinstance(value, torch.Tensor):
        return value[part] if value.ndim and len(value) == given else value
    if isinstance(value, Mapping):
        kept = {name: _part(each, part, given) for name, each in value.items()}
        return kept if type(value) is dict else type(value)(**kept)
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_part(each, part, given) for each in value)
    if isinstance(value, list):
        return [_part(each, part, given) for each in value]
    return value


def _split(seen: Gradients, times: int) -> list[Gradients]:
    def part(tensor: torch.Tensor, number: int) -> torch.Tensor:
        size = len(tensor) // times
        return tensor[number * size : (number + 1) * size]

    return [
        Gradients(
            part(seen.value, number),
            {site: part(each, number) for site, each in seen.activations.items()},
            {site: part(each, number) for site, each in seen.gradients.items()},
            None if seen.mask is None else part(seen.mask, number),
            {site: part(each, number) for site, each in seen.masks.items()},
        )
        for number in range(times)
    ]
