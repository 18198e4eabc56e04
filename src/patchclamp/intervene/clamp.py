"""`clamp`: hold neurons at a value, as a patch clamp holds a cell at a voltage."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from patchclamp.errors import DataError
from patchclamp.intervene.intervention import Intervention, checked_neurons
from patchclamp.neurons import Neurons


def clamp(neurons: Neurons, value: float | Sequence[float]) -> Intervention:
    """Hold each neuron at a value at every position.

    Args:
        neurons: the neurons.
        value: one number for all, or one per neuron in the order of the table.

    Raises:
        DataError: a value is not a finite number, or there are not as many as neurons.
    """
    checked_neurons(neurons, "clamp")
    try:
        values = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"clamp() takes one number, or one per neuron, not {value!r:.60}") from error
    if values.ndim == 0:
        values = np.full(len(neurons), float(values))
    if values.shape != (len(neurons),):
        raise DataError(f"clamp() takes one value, or one per neuron ({len(neurons)}); there are {values.size}")
    if not all(math.isfinite(each) for each in values):
        raise DataError("clamp() takes finite numbers")
    sites = np.asarray([neuron.site for neuron in neurons])
    return Intervention("clamp", neurons, 0.0, {site: values[sites == site] for site in neurons.sites})
