"""Record what neurons do over a data set: one streaming pass, mergeable summaries."""

from patchclamp.recording.batch import Batch, Calibration, Setting
from patchclamp.recording.cluster import RayCluster
from patchclamp.recording.correlate import correlate
from patchclamp.recording.folds import fold_of
from patchclamp.recording.model_correlation import ModelCorrelation
from patchclamp.recording.record import default_summaries, record
from patchclamp.recording.record_over import record_over
from patchclamp.recording.recording import Recording, SiteRecording, StoredActivations
from patchclamp.recording.recording_series import RecordingSeries
from patchclamp.recording.summaries import (
    ByLabel,
    ByPosition,
    ByToken,
    CoFiring,
    Correlation,
    Exemplars,
    FiringRate,
    Histogram,
    MinMax,
    Moments,
    NGrams,
    Partners,
    Pooled,
    Summary,
    TopExamples,
)
from patchclamp.recording.thresholds import FractionOfMaximum, OwnQuantile
from patchclamp.recording.windows import Window

__all__ = [
    "Batch",
    "ByLabel",
    "ByPosition",
    "ByToken",
    "Calibration",
    "CoFiring",
    "Correlation",
    "Exemplars",
    "FiringRate",
    "FractionOfMaximum",
    "Histogram",
    "MinMax",
    "ModelCorrelation",
    "Moments",
    "NGrams",
    "OwnQuantile",
    "Partners",
    "Pooled",
    "RayCluster",
    "Recording",
    "RecordingSeries",
    "Setting",
    "SiteRecording",
    "StoredActivations",
    "Summary",
    "TopExamples",
    "Window",
    "correlate",
    "default_summaries",
    "fold_of",
    "record",
    "record_over",
]
