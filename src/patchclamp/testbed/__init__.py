"""Networks whose neurons are known: planted by hand, or trained here on a made-up world."""

from patchclamp.testbed.attribute_world import AttributeWorld, EntityPair, TrainedWorld, trained_attribute_world
from patchclamp.testbed.benchmark import BEDS, EASY_BEDS, Bed, Method, Race, benchmark, random_finder
from patchclamp.testbed.in_context import InContextNetwork, InContextTask
from patchclamp.testbed.plant import ARCHITECTURES, plant
from patchclamp.testbed.planted import Difficulty, Planted, Question
from patchclamp.testbed.roles import DECOYS, ROLES
from patchclamp.testbed.shapes_vit import quarters, shapes_vit
from patchclamp.testbed.silencing import loss_by_label, loss_increase
from patchclamp.testbed.trained import Trained, trained

__all__ = [
    "ARCHITECTURES",
    "BEDS",
    "DECOYS",
    "EASY_BEDS",
    "ROLES",
    "AttributeWorld",
    "Bed",
    "Difficulty",
    "EntityPair",
    "InContextNetwork",
    "InContextTask",
    "Method",
    "Planted",
    "Question",
    "Race",
    "Trained",
    "TrainedWorld",
    "benchmark",
    "loss_by_label",
    "loss_increase",
    "plant",
    "quarters",
    "random_finder",
    "shapes_vit",
    "trained",
    "trained_attribute_world",
]
