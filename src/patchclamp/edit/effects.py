"""What interventions come to: for each neuron a factor and a value, or the reason why they come to no such thing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from patchclamp.edit.edited import Step
from patchclamp.errors import DataError
from patchclamp.intervene.intervention import Intervention
from patchclamp.intervene.steer import Steer
from patchclamp.model.model import Model
from patchclamp.model.site import Site


@dataclass
class Effect:
    """What becomes of the neurons of a site.

    Attributes:
        site: the site.
        factor: `[size]` float64, what each is multiplied by.
        value: `[size]` float64, what is added after that.
    """

    site: Site
    factor: np.ndarray
    value: np.ndarray

    def then(self, indices: np.ndarray, factor: float, value: np.ndarray | float) -> None:
        """A later intervention on some of the neurons."""
        self.factor[indices] *= factor
        self.value[indices] = (self.value[indices] * factor if factor else 0.0) + value


@dataclass
class Effects:
    """What becomes of a network.

    Attributes:
        neurons: name of a site -> what becomes of its neurons.
        residual: name of a residual stream -> `[size]` float64, what is added to it.
    """

    neurons: dict[str, Effect] = field(default_factory=dict)
    residual: dict[str, np.ndarray] = field(default_factory=dict)


def effects_of(model: Model, interventions: Sequence[Any]) -> Effects:
    """What interventions come to that act everywhere, in this order; of a later one on top of an earlier one.

    Raises:
        UnknownName: the model has no such site or neuron.
    """
    found = Effects()
    for each in interventions:
        each.edits(model)  # refuses sites and neurons that are not there
        steers = isinstance(each, Steer)
        for name in each.directions.sites if steers else each.neurons.sites:
            site = model.site(name)
            if not steers:
                indices, factor, value = each.neurons.indices(name), each.factor, each.values.get(name, 0.0)
            else:
                vector = each.strength * each.directions[name].astype(np.float64).sum(0)
                if site.kind.startswith("resid"):
                    found.residual[site.name] = found.residual.get(site.name, 0.0) + vector
                    continue
                indices, factor, value = np.arange(len(vector)), 1.0, vector
            size = site.size or int(indices.max()) + 1
            effect = found.neurons.setdefault(site.name, Effect(site, np.ones(size), np.zeros(size)))
            effect.then(indices, factor, value)
    return found


def why_not_everywhere(intervention: Any) -> str:
    """Why an intervention comes to no factor and value for each neuron; empty where it does.

    Raises:
        DataError: it is none, or has no neurons.
    """
    if not (hasattr(intervention, "edits") or hasattr(intervention, "seen_edits")):
        raise DataError(
            f"bake() takes interventions, as pc.ablate(neurons) gives them, not {type(intervention).__name__}"
        )
    if isinstance(intervention, Intervention) and not len(intervention.neurons):
        raise DataError(f"there are no neurons to {intervention.kind}: the table is empty")
    if getattr(intervention, "where", None) is not None:
        return "it acts at some positions or examples only, and weights act at all of them"
    if isinstance(intervention, Steer):
        if intervention.how != "add":
            return "what it takes out depends on the activations: it is no factor and no value of each neuron"
        if intervention.relative:
            return "how much it adds depends on the length of the activations"
        return ""
    if not isinstance(intervention, Intervention):
        return f"{type(intervention).__name__} puts activations of another run there, or acts on parts of a batch"
    if intervention.pools:
        return "resampling draws other values each time, and weights are the same each time"
    return ""


def step_of(intervention: Any) -> Step:
    """The intervention in words, for the card."""
    if isinstance(intervention, Steer):
        directions, sites = intervention.directions, intervention.directions.sites
        vectors = {site: (intervention.strength * directions[site].sum(0)).tolist() for site in sites}
        names = ", ".join(directions.names)
        words = f"Added directions ({names}), times {intervention.strength:g}, at {', '.join(sites)}."
        return Step(words, {}, {"kind": "steer", "strength": intervention.strength, "added": vectors})
    neurons, number = intervention.neurons, len(intervention.neurons)
    many = f"{number} neuron{'s' * (number > 1)}"
    values = {site: np.asarray(each, np.float64).tolist() for site, each in intervention.values.items()}
    distinct = sorted({value for each in values.values() for value in each})
    if intervention.kind == "scale":
        words = f"Multiplied {many} by {intervention.factor:g}."
    elif intervention.kind == "ablate":
        words = f"Silenced {many}, held at {'the mean of each' if values else '0'}."
    else:
        words = f"Held {many} at {f'{distinct[0]:g}' if len(distinct) == 1 else 'a value each'}."
    return Step.on(words, neurons, kind=intervention.kind, factor=intervention.factor, values=values)
