"""Networks whose neurons are known: planted by hand, or trained here on a made-up world."""

from patchclamp.testbed.plant import ARCHITECTURES, plant
from patchclamp.testbed.planted import Difficulty, Planted, Question
from patchclamp.testbed.roles import DECOYS, ROLES

__all__ = ["ARCHITECTURES", "DECOYS", "ROLES", "Difficulty", "Planted", "Question", "plant"]
