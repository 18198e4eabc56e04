"""Thresholds above which a neuron fires: a number, or one relative to the neuron's own activity.

A relative threshold is turned into a number per neuron before the first batch, from a small
sample of the data (the calibration), and then stays fixed: so every part of a recording counts
by the same rule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias

import numpy as np

from patchclamp.errors import DataError, unknown
from patchclamp.recording.batch import Setting


@dataclass(frozen=True)
class FractionOfMaximum:
    """This fraction of the largest activation that the neuron showed in the calibration sample; at least 0.

    Raises:
        DataError: the fraction is not in [0, 1].
    """

    fraction: float = 0.5

    def __post_init__(self) -> None:
        _check_share(self, self.fraction)


@dataclass(frozen=True)
class OwnQuantile:
    """This quantile of the activations that the neuron showed in the calibration sample; at least 0.

    Raises:
        DataError: the quantile is not in [0, 1].
    """

    quantile: float = 0.99

    def __post_init__(self) -> None:
        _check_share(self, self.quantile)


Threshold: TypeAlias = float | FractionOfMaximum | OwnQuantile

_RELATIVE = {"fraction_of_maximum": FractionOfMaximum, "own_quantile": OwnQuantile}


def as_threshold(threshold: Any) -> Threshold:
    """Check one threshold that a user gave: a finite number, or a relative one.

    Raises:
        DataError: it is neither.
    """
    if isinstance(threshold, FractionOfMaximum | OwnQuantile):
        return threshold
    if isinstance(threshold, Real) and not isinstance(threshold, bool) and math.isfinite(threshold):
        return float(threshold)
    raise DataError(f"a threshold is a finite number, FractionOfMaximum(0.5) or OwnQuantile(0.99), not {threshold!r}")


def is_relative(threshold: Threshold) -> bool:
    """Whether the threshold needs a calibration to become a number."""
    return not isinstance(threshold, float | int)


def resolve(threshold: Threshold, setting: Setting) -> np.ndarray:
    """The threshold of each neuron of a site.

    Returns:
        [size] float64. A relative threshold has float32 precision and is never below 0; a plain
        number is kept as given.

    Raises:
        DataError: the threshold is relative and the setting has no calibration, or not one number per neuron.
    """
    if isinstance(threshold, float | int):
        return np.full(setting.size, float(threshold), dtype=np.float64)
    if setting.calibration is None:
        raise DataError(
            f"{threshold} is relative to what the neurons of {setting.site} do, and they have not been "
            "calibrated on a sample of the data"
        )
    if isinstance(threshold, FractionOfMaximum):
        found = threshold.fraction * np.asarray(setting.calibration.maximum, dtype=np.float64)
    else:
        found = np.asarray(setting.calibration.quantile(threshold.quantile))
    if found.shape != (setting.size,) or not np.isfinite(found).all():
        raise DataError(
            f"the calibration of {setting.site} does not give one finite number for each of {setting.size} "
            f"neurons (for {threshold}: shape {list(found.shape)})"
        )
    return np.maximum(found.astype(np.float32), 0).astype(np.float64)


def to_json(threshold: Threshold) -> float | dict[str, float]:
    """A number, or {"fraction_of_maximum": 0.5}."""
    if isinstance(threshold, FractionOfMaximum):
        return {"fraction_of_maximum": threshold.fraction}
    if isinstance(threshold, OwnQuantile):
        return {"own_quantile": threshold.quantile}
    return threshold


def from_json(value: float | Mapping[str, float]) -> Threshold:
    """The inverse of `to_json`.

    Raises:
        UnknownName: no such kind of threshold.
        DataError: it is not a threshold at all.
    """
    if not isinstance(value, Mapping):
        return as_threshold(value)
    if len(value) != 1:
        raise DataError(f"not a threshold: {dict(value)!r}")
    ((kind, share),) = value.items()
    if kind not in _RELATIVE:
        raise unknown("threshold", kind, _RELATIVE)
    return _RELATIVE[kind](share)


def _check_share(threshold: FractionOfMaximum | OwnQuantile, share: object) -> None:
    if not isinstance(share, float | int) or isinstance(share, bool) or not 0 <= share <= 1:
        raise DataError(f"{threshold}: a fraction or quantile is a number in [0, 1]")
