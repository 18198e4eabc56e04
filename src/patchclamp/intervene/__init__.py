"""Interventions are values: what to do to which neurons. `model.intervene(...)` applies them for a while."""

from patchclamp.intervene.ablate import ablate
from patchclamp.intervene.clamp import clamp
from patchclamp.intervene.intervention import Intervention
from patchclamp.intervene.patch import Patch, patch
from patchclamp.intervene.patch_path import patch_path
from patchclamp.intervene.scale import scale
from patchclamp.intervene.side_by_side import SideBySide
from patchclamp.intervene.steer import Steer, steer
from patchclamp.intervene.where import Where

__all__ = [
    "Intervention",
    "Patch",
    "SideBySide",
    "Steer",
    "Where",
    "ablate",
    "clamp",
    "patch",
    "patch_path",
    "scale",
    "steer",
]
