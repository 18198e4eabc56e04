"""Record what neurons do over a data set: one streaming pass, mergeable summaries."""

from patchclamp.recording.batch import Batch, Calibration, Setting
from patchclamp.recording.record import default_summaries, record
from patchclamp.recording.recording import Recording, SiteRecording, StoredActivations
from patchclamp.recording.summaries import (
    ByLabel,
    ByToken,
    FiringRate,
    Histogram,
    MinMax,
    Moments,
    Summary,
    TopExamples,
)
from patchclamp.recording.thresholds import FractionOfMaximum, OwnQuantile
from patchclamp.recording.windows import Window

__all__ = [
    "Batch",
    "ByLabel",
    "ByToken",
    "Calibration",
    "FiringRate",
    "FractionOfMaximum",
    "Histogram",
    "MinMax",
    "Moments",
    "OwnQuantile",
    "Recording",
    "Setting",
    "SiteRecording",
    "StoredActivations",
    "Summary",
    "TopExamples",
    "Window",
    "default_summaries",
    "record",
]
