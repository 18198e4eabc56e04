"""`ablate`: silence neurons, by zero or by their mean."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np

from patchclamp.errors import DataError
from patchclamp.intervene.intervention import Intervention, checked_neurons
from patchclamp.neurons import Neurons


class _HasMoments(Protocol):
    # A Recording; this room does not import that one.
    def __getitem__(self, site: str) -> Any: ...


def ablate(
    neurons: Neurons, to: Literal["zero", "mean"] = "zero", *, recording: _HasMoments | None = None
) -> Intervention:
    """Silence neurons: hold each at 0, or at its mean over a recording.

    Zero takes a neuron out; the mean takes out only what it says about one input as against another, and
    leaves the constant that the rest of the network is used to.

    Args:
        neurons: the neurons.
        to: `"zero"` or `"mean"`.
        recording: where the means come from (its summary `Moments`); not needed where the table has a
            column `mean`, as `atlas.neurons` and `recording.neurons()` have.

    Raises:
        DataError: `to` is neither, or the means are not known.
    """
    checked_neurons(neurons, "ablate")
    if to == "zero":
        return Intervention("ablate", neurons, 0.0)
    if to != "mean":
        raise DataError(f'ablate(to=...) is "zero" or "mean", not {to!r}')
    if recording is not None:
        means = {site: recording[site].moments.mean[neurons.indices(site)] for site in neurons.sites}
    elif "mean" in neurons.columns:
        means = {site: neurons.at(site)["mean"].to_numpy() for site in neurons.sites}
    else:
        raise DataError(
            'ablate(to="mean") needs the means: give recording=, or neurons of atlas.neurons or recording.neurons()'
        )
    for site, values in means.items():
        if not np.isfinite(values.astype(np.float64)).all():
            raise DataError(f"the mean of a neuron of {site} is not known")
    return Intervention("ablate", neurons, 0.0, means)
