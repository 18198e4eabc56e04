"""Summaries: what a recording keeps of every neuron. One file each; the base class says how to add one."""

from patchclamp.recording.summaries.by_label import ByLabel, Group
from patchclamp.recording.summaries.by_token import ByToken
from patchclamp.recording.summaries.firing_rate import FiringRate
from patchclamp.recording.summaries.histogram import Histogram
from patchclamp.recording.summaries.min_max import MinMax
from patchclamp.recording.summaries.moments import Moments
from patchclamp.recording.summaries.summary import Summary
from patchclamp.recording.summaries.top_examples import TopExamples

__all__ = [
    "ByLabel",
    "ByToken",
    "FiringRate",
    "Group",
    "Histogram",
    "MinMax",
    "Moments",
    "Summary",
    "TopExamples",
]
