"""Change a network for good: interventions written into weights, and an ordinary checkpoint on disk."""

from patchclamp.edit.bake import bake
from patchclamp.edit.bakeable import bakeable
from patchclamp.edit.edited import EditedModel
from patchclamp.edit.prune import PrunedModel, prune
from patchclamp.edit.report import Report, report
from patchclamp.edit.scale_neurons import scale_neurons
from patchclamp.edit.spectral import damp_components

__all__ = [
    "EditedModel",
    "PrunedModel",
    "Report",
    "bake",
    "bakeable",
    "damp_components",
    "prune",
    "report",
    "scale_neurons",
]
