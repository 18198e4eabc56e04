"""Whose doing is it? One engine of gradients for all sites at once, and the targets that they are taken of."""

from patchclamp.attribution.attribute import Attributions, attribute
from patchclamp.attribution.batches import batches
from patchclamp.attribution.engine import Gradients, frozen, gradients
from patchclamp.attribution.targets import (
    OfExamples,
    Target,
    class_logit,
    class_probability,
    log_probability,
    logit,
    logit_difference,
    next_token_loss,
    probability,
    similarity,
)

__all__ = [
    "Attributions",
    "Gradients",
    "OfExamples",
    "Target",
    "attribute",
    "batches",
    "class_logit",
    "class_probability",
    "frozen",
    "gradients",
    "log_probability",
    "logit",
    "logit_difference",
    "next_token_loss",
    "probability",
    "similarity",
]
