"""Any torch module seen as named sites of neurons."""

from patchclamp.model.activations import Activations
from patchclamp.model.load import load
from patchclamp.model.model import Intervention, Model, joined
from patchclamp.model.site import Site

__all__ = ["Activations", "Intervention", "Model", "Site", "joined", "load"]
