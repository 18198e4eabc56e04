"""Learned interventions: what to do to which neurons, found from examples of what is wanted.

The room has the name of an intervention: `pc.steer(directions, strength)` is `patchclamp.intervene.steer`, whichever of
the two was imported first.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from patchclamp.intervene import steer as _steer
from patchclamp.steer.adaptive import AdaptiveSteering, Probe
from patchclamp.steer.circuit import Circuit, Modulation, SublayerImportance, modulate, sublayer_importance
from patchclamp.steer.lineas import LinEAS, LinEASSteering

__all__ = [
    "AdaptiveSteering",
    "Circuit",
    "LinEAS",
    "LinEASSteering",
    "Modulation",
    "Probe",
    "SublayerImportance",
    "modulate",
    "sublayer_importance",
]


class _Room(ModuleType):
    """Importing a module puts it in the place of anything of its name in the package, so it has to be both."""

    __call__ = staticmethod(_steer)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


sys.modules[__name__].__class__ = _Room
