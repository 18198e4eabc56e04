"""`scale`: make neurons louder or quieter."""

from __future__ import annotations

import math
from numbers import Real

from patchclamp.errors import DataError
from patchclamp.intervene.intervention import Intervention, checked_neurons
from patchclamp.neurons import Neurons


def scale(neurons: Neurons, factor: float) -> Intervention:
    """Multiply the activation of each neuron by `factor` at every position; 0 silences it, -1 turns it over.

    Raises:
        DataError: the factor is not a finite number.
    """
    checked_neurons(neurons, "scale")
    if isinstance(factor, bool) or not isinstance(factor, Real) or not math.isfinite(factor):
        raise DataError(f"scale() takes a finite number, not {factor!r}")
    return Intervention("scale", neurons, float(factor))
