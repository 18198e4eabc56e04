"""`scale`: make neurons louder or quieter."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real

from patchclamp.errors import DataError
from patchclamp.intervene.intervention import Intervention, checked_neurons
from patchclamp.intervene.where import Positions, Where
from patchclamp.neurons import Neurons


def scale(
    neurons: Neurons, factor: float, *, positions: Positions = None, examples: Iterable[int] | None = None
) -> Intervention:
    """Multiply the activation of each neuron by `factor`; 0 silences it, -1 turns it over.

    Args:
        neurons: the neurons.
        factor: a finite number.
        positions: numbers of tokens in each text, without padding; negative ones count from the end. Or "prompt" or
            "generated", while `generate` runs. None for all.
        examples: the rows of a batch. None for all.

    Raises:
        DataError: the factor is not a finite number.
    """
    checked_neurons(neurons, "scale")
    if isinstance(factor, bool) or not isinstance(factor, Real) or not math.isfinite(factor):
        raise DataError(f"scale() takes a finite number, not {factor!r}")
    return Intervention("scale", neurons, float(factor), where=Where.of(positions, examples, "scale"))
