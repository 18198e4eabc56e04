"""Is that so? Tests of interventions, with controls, intervals and a verdict."""

from patchclamp.verify.batches import Batch, Prompt, read
from patchclamp.verify.dissociation import Corrupted, Dissociation, dissociate
from patchclamp.verify.effect import effect
from patchclamp.verify.evidence import Evidence
from patchclamp.verify.fragility import Fragility, ablation_fragility
from patchclamp.verify.metrics import per_example
from patchclamp.verify.patch_groups import patch_groups
from patchclamp.verify.sets import Leaderboard, leaderboard, necessity, sufficiency
from patchclamp.verify.transfer import TransferMatrix, transfer_matrix

__all__ = [
    "Batch",
    "Corrupted",
    "Dissociation",
    "Evidence",
    "Fragility",
    "Leaderboard",
    "Prompt",
    "TransferMatrix",
    "ablation_fragility",
    "dissociate",
    "effect",
    "leaderboard",
    "necessity",
    "patch_groups",
    "per_example",
    "read",
    "sufficiency",
    "transfer_matrix",
]
