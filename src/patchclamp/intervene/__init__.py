"""Interventions are values: what to do to which neurons. `model.intervene(...)` applies them for a while."""

from patchclamp.intervene.ablate import ablate
from patchclamp.intervene.clamp import clamp
from patchclamp.intervene.intervention import Intervention
from patchclamp.intervene.patch import patch
from patchclamp.intervene.scale import scale

__all__ = ["Intervention", "ablate", "clamp", "patch", "scale"]
