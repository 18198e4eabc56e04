"""Change a network for good: interventions written into weights, and an ordinary checkpoint on disk."""

from patchclamp.edit.bake import bake
from patchclamp.edit.bakeable import bakeable
from patchclamp.edit.edited import EditedModel
from patchclamp.edit.scale_neurons import scale_neurons

__all__ = ["EditedModel", "bake", "bakeable", "scale_neurons"]
