"""`clamp`: hold neurons at a value, as a patch clamp holds a cell at a voltage."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from patchclamp.errors import DataError
from patchclamp.intervene.intervention import Intervention, checked_neurons
from patchclamp.intervene.where import Positions, Where
from patchclamp.neurons import Neurons


class _HasHistogram(Protocol):
    # A Recording; this room does not import that one.
    def __getitem__(self, site: str) -> Any: ...


def clamp(
    neurons: Neurons,
    value: float | Sequence[float] | None = None,
    *,
    quantile: float | None = None,
    recording: _HasHistogram | None = None,
    positions: Positions = None,
    examples: Iterable[int] | None = None,
) -> Intervention:
    """Hold each neuron at a value.

    Args:
        neurons: the neurons.
        value: one number for all, or one per neuron in the order of the table.
        quantile: instead of a value: each neuron's own quantile, in [0, 1], over a recording.
        recording: where the quantiles come from (its summary `Histogram`).
        positions: numbers of tokens in each text, without padding; negative ones count from the end. Or "prompt" or
            "generated", while `generate` runs. None for all.
        examples: the rows of a batch. None for all.

    Raises:
        DataError: a value is not a finite number, or there are not as many as neurons; not just one of value and
            quantile, or a quantile without a recording.
    """
    checked_neurons(neurons, "clamp")
    where = Where.of(positions, examples, "clamp")
    if (value is None) == (quantile is None):
        raise DataError("clamp() takes a finite value, or quantile= and recording=")
    if quantile is not None:
        return Intervention("clamp", neurons, 0.0, _quantiles(neurons, quantile, recording), where)
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
    return Intervention("clamp", neurons, 0.0, {site: values[sites == site] for site in neurons.sites}, where)


def _quantiles(neurons: Neurons, quantile: float, recording: _HasHistogram | None) -> dict[str, np.ndarray]:
    if recording is None:
        raise DataError("clamp(quantile=...) needs recording=, with the summary Histogram")
    found = {}
    for site in neurons.sites:
        found[site] = np.asarray(recording[site].histogram.quantile(quantile))[neurons.indices(site)]
        if not np.isfinite(found[site]).all():
            raise DataError(f"the quantile of a neuron of {site} is not known")
    return found
