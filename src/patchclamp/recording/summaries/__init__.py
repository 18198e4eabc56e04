"""Summaries: what a recording keeps of every neuron. One file each; the base class says how to add one."""

from patchclamp.recording.summaries.by_label import ByLabel, Group
from patchclamp.recording.summaries.by_position import ByPosition
from patchclamp.recording.summaries.by_token import ByToken, TokenCounts
from patchclamp.recording.summaries.co_firing import CoFiring
from patchclamp.recording.summaries.correlation import Correlation
from patchclamp.recording.summaries.exemplars import Exemplars, ExemplarSet
from patchclamp.recording.summaries.firing_rate import FiringRate
from patchclamp.recording.summaries.histogram import Histogram
from patchclamp.recording.summaries.min_max import MinMax
from patchclamp.recording.summaries.moments import Moments
from patchclamp.recording.summaries.ngrams import NGrams
from patchclamp.recording.summaries.pairs import Partners
from patchclamp.recording.summaries.pooled import Pooled
from patchclamp.recording.summaries.summary import Summary
from patchclamp.recording.summaries.top_examples import TopExamples

__all__ = [
    "ByLabel",
    "ByPosition",
    "ByToken",
    "CoFiring",
    "Correlation",
    "ExemplarSet",
    "Exemplars",
    "FiringRate",
    "Group",
    "Histogram",
    "MinMax",
    "Moments",
    "NGrams",
    "Partners",
    "Pooled",
    "Summary",
    "TokenCounts",
    "TopExamples",
]
