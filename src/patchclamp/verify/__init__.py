"""Is that so? Tests of interventions, with controls, intervals and a verdict."""

from patchclamp.verify.batches import Batch, Prompt, read
from patchclamp.verify.circuit_diff import CircuitDiff, circuit_diff, circuit_history
from patchclamp.verify.dissociation import Corrupted, Dissociation, dissociate
from patchclamp.verify.effect import effect
from patchclamp.verify.evidence import Evidence
from patchclamp.verify.explanations import Mediated, Observed, interventional, observational
from patchclamp.verify.fragility import Fragility, ablation_fragility
from patchclamp.verify.metrics import per_example
from patchclamp.verify.patch_groups import patch_groups
from patchclamp.verify.ravel import Disentanglement, disentangle, select_features
from patchclamp.verify.sets import Leaderboard, leaderboard, necessity, sufficiency
from patchclamp.verify.transfer import TransferMatrix, transfer_matrix

__all__ = [
    "Batch",
    "CircuitDiff",
    "Corrupted",
    "Disentanglement",
    "Dissociation",
    "Evidence",
    "Fragility",
    "Leaderboard",
    "Mediated",
    "Observed",
    "Prompt",
    "TransferMatrix",
    "ablation_fragility",
    "circuit_diff",
    "circuit_history",
    "disentangle",
    "dissociate",
    "effect",
    "interventional",
    "leaderboard",
    "necessity",
    "observational",
    "patch_groups",
    "per_example",
    "read",
    "select_features",
    "sufficiency",
    "transfer_matrix",
]
