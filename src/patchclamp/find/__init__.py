"""Which neurons matter? One file a method; each gives a table of `Neurons`, best first."""

from patchclamp.find.activation_coverage import ActivationCoverage, activation_coverage
from patchclamp.find.contrast import contrast, contrast_overlap
from patchclamp.find.coverage import coverage, coverage_overlap
from patchclamp.find.domains import domains, domains_overlap
from patchclamp.find.expertise import expertise
from patchclamp.find.fingerprint import Fingerprint, FingerprintDistance, fingerprint, fingerprint_distance
from patchclamp.find.frequency_tagging import TaggedRate, frequency_tagging, tagged_rates, tagging_signal
from patchclamp.find.generic_marker import GenericMarkers, generic_marker_test
from patchclamp.find.label_finders import label_finders
from patchclamp.find.lape import lape, lape_ternary
from patchclamp.find.out_of_distribution import Mahalanobis, classify, detection_auroc, energy, maximum_softmax
from patchclamp.find.probe_neurons import probe_neurons
from patchclamp.find.profiles import activation_profiles
from patchclamp.find.sparse_probe import SparseProbeCurve, sparse_probe, sparse_probe_curve
from patchclamp.find.striking import striking
from patchclamp.find.weighted_assignment import WeightedAssignment, weighted_assignment

__all__ = [
    "ActivationCoverage",
    "Fingerprint",
    "FingerprintDistance",
    "GenericMarkers",
    "Mahalanobis",
    "SparseProbeCurve",
    "TaggedRate",
    "WeightedAssignment",
    "activation_coverage",
    "activation_profiles",
    "classify",
    "contrast",
    "contrast_overlap",
    "coverage",
    "coverage_overlap",
    "detection_auroc",
    "domains",
    "domains_overlap",
    "energy",
    "expertise",
    "fingerprint",
    "fingerprint_distance",
    "frequency_tagging",
    "generic_marker_test",
    "label_finders",
    "lape",
    "lape_ternary",
    "maximum_softmax",
    "probe_neurons",
    "sparse_probe",
    "sparse_probe_curve",
    "striking",
    "tagged_rates",
    "tagging_signal",
    "weighted_assignment",
]
