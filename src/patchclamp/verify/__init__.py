"""Is that so? Tests of interventions, with controls, intervals and a verdict."""

from patchclamp.verify.batches import Batch, Prompt
from patchclamp.verify.effect import effect
from patchclamp.verify.evidence import Evidence
from patchclamp.verify.metrics import per_example
from patchclamp.verify.sets import Leaderboard, leaderboard, necessity, sufficiency

__all__ = [
    "Batch",
    "Evidence",
    "Leaderboard",
    "Prompt",
    "effect",
    "leaderboard",
    "necessity",
    "per_example",
    "sufficiency",
]
