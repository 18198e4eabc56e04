"""Control neurons: at random, but as active and as loud as those under test, at the same sites.

A set of neurons has to be compared with sets that could have had as large an effect. Neurons that fire as often may
write nothing; so a control neuron is drawn among those that are nearest in two things, how often it fires and how much
it writes (mean |activation| times the length of its output weights).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
import torch

from patchclamp.errors import DataError, ModelError
from patchclamp.model.model import Model
from patchclamp.neurons import Neurons

NEAREST = 50
# In standard deviations of the site: those further away are controls only of a neuron that has hardly any nearer.
FARTHEST = 2.0
FEWEST = 10


@dataclass(frozen=True, eq=False)
class Activity:
    """How neurons of some sites behave on the data.

    Attributes:
        rate: site -> `[size]`, the share of positions at which the neuron is above 0.
        loudness: site -> `[size]`, mean |activation| times the norm of its output weights.
        mean: site -> `[size]`, the mean activation.
        weighted: site -> whether its output weights are known; else loudness is mean |activation|.
    """

    rate: dict[str, np.ndarray]
    loudness: dict[str, np.ndarray]
    mean: dict[str, np.ndarray]
    weighted: dict[str, bool]


class ActivityCount:
    """Counts the activity of sites, batch by batch."""

    def __init__(self) -> None:
        self._sums: dict[str, list[torch.Tensor]] = {}
        self._rows: dict[str, int] = {}

    def update(self, site: str, rows: torch.Tensor) -> None:
        """Count activations `[rows, size]` of real positions."""
        values = rows.detach().double()
        sums = [(values > 0).sum(0).double(), values.abs().sum(0), values.sum(0)]
        before = self._sums.get(site)
        self._sums[site] = sums if before is None else [one + two for one, two in zip(before, sums, strict=True)]
        self._rows[site] = self._rows.get(site, 0) + len(values)

    def activity(self, model: Model) -> Activity:
        """What was counted, with the weights of the model."""
        rate, loudness, mean, weighted = {}, {}, {}, {}
        for site, (above, magnitude, total) in self._sums.items():
            count = max(self._rows[site], 1)
            norms = output_norms(model, site)
            rate[site] = (above / count).cpu().numpy()
            mean[site] = (total / count).cpu().numpy()
            loudness[site] = (magnitude / count).cpu().numpy() * (1.0 if norms is None else norms)
            weighted[site] = norms is not None
        return Activity(rate, loudness, mean, weighted)


def output_norms(model: Model, site: str) -> np.ndarray | None:
    """`[size]`, the length of each neuron's output weights; None where nobody knows who reads it."""
    try:
        return model.output_weights(site).float().norm(dim=1).double().cpu().numpy()
    except ModelError:
        pass
    for block in model.blocks:
        if site in block.sites and not block.why_incomplete(site):
            slices = block.consumers(site)
            if slices:
                squares = sum(each.every(model.module).double().flatten(1).square().sum(1) for each in slices)
                return torch.as_tensor(squares).sqrt().cpu().numpy()
    return None


class Controls:
    """Draws control sets for a set of neurons.

    Args:
        neurons: the set under test.
        activity: of all neurons at its sites.
        number: how many different control sets are wanted.
        seed: of the drawing.
        groups: site -> number of heads, where the set is made of whole heads there: heads are drawn then.
    """

    def __init__(
        self, neurons: Neurons, activity: Activity, number: int, seed: int, groups: dict[str, int] | None = None
    ) -> None:
        self.neurons, self.activity, self.number = neurons, activity, number
        self._groups = groups or {}
        self._made = np.random.default_rng([seed, 11])
        self.far = 0  # units of the set that nothing near may be exchanged for
        self._near = [self._nearest(site) for site in neurons.sites]

    def draw(self) -> list[list[tuple[str, int]]]:
        """Different control sets, each in the order of the set; fewer than wanted where there are no more."""
        found: list[list[tuple[str, int]]] = []
        seen: set[tuple[tuple[str, int], ...]] = set()
        tries = 0
        while len(found) < self.number and tries < 20 * self.number + 100:
            tries += 1
            drawn = self._one()
            key = tuple(sorted(drawn))
            if drawn and key not in seen:
                seen.add(key)
                found.append(drawn)
        return found

    def table(self, sets: list[list[tuple[str, int]]], activity: Activity) -> pl.DataFrame:
        """How well the controls match: means over a set's neurons, and their range over controls."""
        rows = []
        for what, values in (("firing rate", activity.rate), ("loudness", activity.loudness)):
            mine = float(np.mean([values[site][index] for site, index in self.neurons]))
            theirs = np.asarray([np.mean([values[site][index] for site, index in each]) for each in sets] or [np.nan])
            low, high = np.quantile(theirs, [0.025, 0.975])
            rows.append((what, mine, float(theirs.mean()), float(low), float(high)))
        if self.far:
            rows.append(("without a near match", float(self.far), None, None, None))
        return pl.DataFrame(rows, schema=["what", "neurons", "controls", "low", "high"], orient="row")

    def _nearest(self, site: str) -> tuple[str, np.ndarray, list[np.ndarray], int]:
        """For each unit of the set at a site, the units that it may be exchanged for; and the neurons of a unit."""
        heads = self._groups.get(site)
        indices = self.neurons.indices(site)
        rate, loudness = self.activity.rate[site], self.activity.loudness[site]
        width = 1
        if heads is not None:
            width = len(rate) // heads
            rate, loudness = rate.reshape(heads, width).mean(1), loudness.reshape(heads, width).mean(1)
            indices = np.unique(indices // width)
        outside = np.setdiff1d(np.arange(len(rate)), indices)
        if len(outside) < len(indices):
            raise DataError(
                f"{site} has {len(outside)} neurons outside of the set, too few to draw {len(indices)} controls"
            )
        places = _places(rate, loudness)
        # A set of one has as many controls as there are neighbours.
        number = min(len(outside), max(NEAREST, int(np.ceil(1.5 * self.number / max(len(self.neurons), 1)))))
        near = []
        for index in indices:
            distance = np.square(places[outside] - places[index]).sum(1)
            order = np.argsort(distance, kind="stable")[:number]
            within = int((distance[order] <= FARTHEST**2).sum())
            self.far += within == 0
            near.append(outside[order[: max(within, FEWEST)]])
        return site, indices, near, width

    def _one(self) -> list[tuple[str, int]]:
        drawn: dict[tuple[str, int], tuple[str, int]] = {}
        for site, indices, near, width in self._near:
            taken: set[int] = set()
            # Those with the fewest neighbours left would go without; the order is dealt anew each time.
            for place in self._made.permutation(len(indices)):
                free = [each for each in near[place] if each not in taken]
                if not free:
                    return []
                choice = int(self._made.choice(free))
                taken.add(choice)
                for offset in range(width):
                    mine = (site, int(indices[place]) * width + offset)
                    drawn[mine] = (site, choice * width + offset)
        return [drawn[(site, index)] for site, index in self.neurons]


def _places(rate: np.ndarray, loudness: np.ndarray) -> np.ndarray:
    """`[n, 2]`: where each unit lies, in units of the spread of its site."""
    active = np.arcsin(np.sqrt(np.clip(rate, 0, 1)))
    loud = np.log(np.maximum(loudness, 1e-12))
    audible = loud[loudness > 1e-12]
    spreads = (max(active.std(), 1e-6), max(audible.std() if len(audible) else 0.0, 1e-6))
    return np.stack([active / spreads[0], loud / spreads[1]], axis=1)
