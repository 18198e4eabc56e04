"""Statistics that hold: permutations of labels over examples, false discovery rates, intervals, sizes of effects."""

from patchclamp.statistics.bootstrap import Interval, bootstrap
from patchclamp.statistics.effects import cohens_d, welch
from patchclamp.statistics.permutation import PermutationTest, benjamini_hochberg, permutation_test
from patchclamp.statistics.ranking import Ranked, average_precision, recall_at, roc_auc

__all__ = [
    "Interval",
    "PermutationTest",
    "Ranked",
    "average_precision",
    "benjamini_hochberg",
    "bootstrap",
    "cohens_d",
    "permutation_test",
    "recall_at",
    "roc_auc",
    "welch",
]
