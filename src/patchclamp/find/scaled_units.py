"""Chosen units of some sites, scaled together at one position of each example: what paths of neurons are found with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from patchclamp.attribution import Target, class_probability, gradients
from patchclamp.attribution.engine import prepared
from patchclamp.attribution.targets import class_logits
from patchclamp.errors import DataError
from patchclamp.model import Model
from patchclamp.model.activations import joined
from patchclamp.model.hooks import Edit, hooked, reading

Classes = int | Sequence[int] | np.ndarray | torch.Tensor


@dataclass(frozen=True, eq=False)
class ScaledUnits:
    """A model, examples with their classes, and what the sites do on them at the position.

    Attributes:
        model: a classifier.
        call: a tensor, or the keyword arguments of the module.
        classes: `[examples]` int64, of which the probability is wanted.
        recorded: site -> `[examples, size]`, as the network is.
        place: `[examples]`, the row of the position among the tokens of each example.
        position: as it was given.
        batch: examples that are run at once.
    """

    model: Model
    call: Any
    classes: np.ndarray
    recorded: dict[str, torch.Tensor]
    place: np.ndarray
    position: int
    batch: int

    @classmethod
    def of(cls, model: Model, inputs: Any, target: Classes, sites: Any, position: int, batch: int) -> ScaledUnits:
        chosen = model.select(sites)
        if wrong := [site.name for site in chosen if site.kind == "expert" or site.axis != -1]:
            raise DataError(f"{wrong[0]} is not [examples, size] or [examples, tokens, size]: no path goes through it")
        call = prepared(model, inputs)
        count = len(call) if isinstance(call, torch.Tensor) else len(next(iter(call.values())))
        classes = np.asarray(target.cpu() if isinstance(target, torch.Tensor) else target)
        if classes.dtype.kind not in "iu" or classes.shape not in ((), (count,)):
            raise DataError(f"target_class is the number of a class, or one for each of {count} examples")
        found = cls(
            model, call, np.broadcast_to(classes, count).astype(np.int64), {}, np.zeros(count, int), position, batch
        )
        parts: dict[str, list[torch.Tensor]] = {site.name: [] for site in chosen}
        for rows in found.batches():
            with model.evaluating(), torch.no_grad(), reading(model.module, chosen) as captured:
                found.run(rows)
            for site in chosen:
                seen = joined(site, captured[site.name]).tensor
                if seen.ndim not in (2, 3) or len(seen) != len(rows):
                    raise DataError(
                        f"{site.name} is {list(seen.shape)}, not [examples, size] or [examples, tokens, size]"
                    )
                found.place[rows] = _places(found._cut(rows), seen, position)
                parts[site.name].append(at_position(seen, found.place[rows]).clone())
        found.recorded.update({name: torch.cat(each) for name, each in parts.items()})
        return found

    @property
    def sites(self) -> list[str]:
        """Names of the sites, in the order of the network."""
        return list(self.recorded)

    def scaled(self, units: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """Which units of the first sites are on the path: site -> `[examples, size]` bool."""
        return {
            site: torch.zeros_like(self.recorded[site], dtype=torch.bool).scatter(
                1, column_of(each, self.recorded[site]), True
            )
            for site, each in zip(self.sites, units, strict=False)
        }

    def slopes(self, scaled: Mapping[str, torch.Tensor], points: np.ndarray) -> dict[str, torch.Tensor]:
        """Mean over the points of dF/dw, the scaled units at that share of their activation: `[examples, size]`."""
        found = {site: torch.zeros_like(self.recorded[site], dtype=torch.float64) for site in scaled}
        count = len(self.classes)
        examples, shares = np.repeat(np.arange(count), len(points)), np.tile(points, count)
        for start in range(0, len(examples), self.batch):
            rows, share = examples[start : start + self.batch], shares[start : start + self.batch]
            edits = self._edits(rows, scaled, share)
            seen = gradients(self.model, self._cut(rows), self.target(rows), list(scaled), before=edits)
            for site, slope in seen.gradients.items():
                here = at_position(slope, self.place[rows]).double() / len(points)
                found[site].index_add_(0, torch.as_tensor(rows, device=here.device), here)
        return found

    def on_path(
        self, units: Sequence[np.ndarray], slopes: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sums over the path of activations, of slopes, and of the products of the two: `[examples]` float64 each."""
        first = next(iter(self.recorded.values()))
        weight, slope, own = (
            torch.zeros(len(self.classes), dtype=torch.float64, device=first.device) for _ in range(3)
        )
        for site, each in zip(self.sites, units, strict=False):
            column = column_of(each, first)
            here = self.recorded[site].double().gather(1, column)[:, 0]
            there = slopes[site].gather(1, column)[:, 0]
            weight, slope, own = weight + here, slope + there, own + here * there
        return weight, slope, own

    def answers(self, scaled: Mapping[str, torch.Tensor], factor: float) -> tuple[np.ndarray, np.ndarray]:
        """The probability of each example's class, and whether it is the answer, with units multiplied."""
        probability, right = np.zeros(len(self.classes)), np.zeros(len(self.classes), bool)
        for rows in self.batches():
            edits = []
            for name, chosen in scaled.items():
                factors = torch.where(chosen[rows], factor, 1.0)
                edits.append((self.model.site(name), self._scaling(rows, factors)))
            with self.model.evaluating(), torch.no_grad(), hooked(self.model.module, edits):
                logits = class_logits(self.run(rows)).double()
            own = torch.as_tensor(self.classes[rows], device=logits.device)
            probability[rows] = logits.softmax(-1).gather(1, own[:, None])[:, 0].cpu().numpy()
            right[rows] = (logits.argmax(1) == own).cpu().numpy()
        return probability, right

    def _edits(self, rows: np.ndarray, scaled: Mapping[str, torch.Tensor], share: np.ndarray) -> list[tuple[str, Edit]]:
        edits = []
        for site, chosen in scaled.items():
            weight = self.recorded[site][rows]
            part = torch.as_tensor(share, dtype=weight.dtype, device=weight.device)[:, None] * weight
            edits.append((site, self._putting(rows, torch.where(chosen[rows], part, weight))))
        return edits

    def _putting(self, rows: np.ndarray, values: torch.Tensor) -> Edit:
        return lambda tensor: _put(tensor, self.place[rows], values)

    def _scaling(self, rows: np.ndarray, factors: torch.Tensor) -> Edit:
        return lambda tensor: _put(tensor, self.place[rows], at_position(tensor, self.place[rows]) * factors)

    def target(self, rows: np.ndarray) -> Target:
        """The probability of each of these examples' class."""
        return class_probability(self.classes[rows].tolist())

    def batches(self) -> list[np.ndarray]:
        """Numbers of the examples that are run together."""
        count = len(self.classes)
        return [np.arange(start, min(start + self.batch, count)) for start in range(0, count, self.batch)]

    def _cut(self, rows: np.ndarray) -> Any:
        if isinstance(self.call, torch.Tensor):
            return self.call[rows]
        return {
            name: each[rows]
            if isinstance(each, torch.Tensor) and each.ndim and len(each) == len(self.classes)
            else each
            for name, each in self.call.items()
        }

    def run(self, rows: np.ndarray) -> Any:
        """What the network gives for these examples."""
        call = self._cut(rows)
        return self.model.module(call) if isinstance(call, torch.Tensor) else self.model.module(**call)


def _places(call: Any, seen: torch.Tensor, position: int) -> np.ndarray:
    """In which row of each example's tokens the position is."""
    if seen.ndim == 2:
        return np.zeros(len(seen), int)
    mask = call.get("attention_mask") if isinstance(call, Mapping) else None
    if mask is None or tuple(mask.shape) != tuple(seen.shape[:2]):
        mask = torch.ones(seen.shape[:2])
    real = mask.bool().cpu().numpy()
    lengths = real.sum(1)
    wanted = position + lengths if position < 0 else np.full(len(real), position)
    if short := [each for each in range(len(real)) if not 0 <= wanted[each] < lengths[each]]:
        raise DataError(f"an example has {lengths[short[0]]} tokens, and no position {position}")
    return ((real.cumsum(1) - 1 == wanted[:, None]) & real).argmax(1)


def at_position(tensor: torch.Tensor, place: np.ndarray) -> torch.Tensor:
    """`[examples, size]`: a site at the place of each example."""
    return tensor if tensor.ndim == 2 else tensor[torch.arange(len(tensor)), torch.as_tensor(place)]


def _put(tensor: torch.Tensor, place: np.ndarray, values: torch.Tensor) -> torch.Tensor:
    if tensor.ndim == 2:
        return values
    changed = tensor.clone()
    changed[torch.arange(len(tensor)), torch.as_tensor(place)] = values
    return changed


def column_of(units: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    """One unit of each example as `[examples, 1]`, to gather with."""
    return torch.as_tensor(units, device=like.device, dtype=torch.int64)[:, None]
