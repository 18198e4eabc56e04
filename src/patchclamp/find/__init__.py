"""Which neurons matter? One file a method; each gives a table of `Neurons`, best first."""

from patchclamp.find.activation_coverage import ActivationCoverage, activation_coverage
from patchclamp.find.comparative import comparative
from patchclamp.find.concept_weights import concept_weights
from patchclamp.find.conductance import conductance
from patchclamp.find.context_neurons import ContextAttributions, context_attributions, context_neurons
from patchclamp.find.contrast import contrast, contrast_overlap
from patchclamp.find.coverage import coverage, coverage_overlap
from patchclamp.find.culnig import Questions, culnig
from patchclamp.find.direction_contribution import (
    class_directions,
    direction_contribution,
    grouped_differences,
    head_contribution,
)
from patchclamp.find.domains import domains, domains_overlap
from patchclamp.find.edge_attribution import Circuit, EdgeAttribution, eap_ig, head_neurons
from patchclamp.find.expertise import expertise
from patchclamp.find.explain import explain
from patchclamp.find.explanation import Explanation
from patchclamp.find.fingerprint import Fingerprint, FingerprintDistance, fingerprint, fingerprint_distance
from patchclamp.find.frequency_tagging import TaggedRate, frequency_tagging, tagged_rates, tagging_signal
from patchclamp.find.generic_marker import GenericMarkers, generic_marker_test
from patchclamp.find.induction import induction_strength, previous_token_strength
from patchclamp.find.label_finders import label_finders
from patchclamp.find.lape import lape, lape_ternary
from patchclamp.find.logprob_increase import head_importance, logprob_increase
from patchclamp.find.neuron_path import NeuronPath, PathEffect, neuron_path, path_baseline, path_effect
from patchclamp.find.out_of_distribution import Mahalanobis, classify, detection_auroc, energy, maximum_softmax
from patchclamp.find.probe_neurons import probe_neurons
from patchclamp.find.profiles import activation_profiles
from patchclamp.find.projection_change import neurons_for_share, projection_change, projection_groups, projection_probe
from patchclamp.find.sparse_probe import SparseProbeCurve, sparse_probe, sparse_probe_curve
from patchclamp.find.striking import striking
from patchclamp.find.taylor import taylor
from patchclamp.find.weighted_assignment import WeightedAssignment, weighted_assignment

__all__ = [
    "ActivationCoverage",
    "Circuit",
    "ContextAttributions",
    "EdgeAttribution",
    "Explanation",
    "Fingerprint",
    "FingerprintDistance",
    "GenericMarkers",
    "Mahalanobis",
    "NeuronPath",
    "PathEffect",
    "Questions",
    "SparseProbeCurve",
    "TaggedRate",
    "WeightedAssignment",
    "activation_coverage",
    "activation_profiles",
    "class_directions",
    "classify",
    "comparative",
    "concept_weights",
    "conductance",
    "context_attributions",
    "context_neurons",
    "contrast",
    "contrast_overlap",
    "coverage",
    "coverage_overlap",
    "culnig",
    "detection_auroc",
    "direction_contribution",
    "domains",
    "domains_overlap",
    "eap_ig",
    "energy",
    "expertise",
    "explain",
    "fingerprint",
    "fingerprint_distance",
    "frequency_tagging",
    "generic_marker_test",
    "grouped_differences",
    "head_contribution",
    "head_importance",
    "head_neurons",
    "induction_strength",
    "label_finders",
    "lape",
    "lape_ternary",
    "logprob_increase",
    "maximum_softmax",
    "neuron_path",
    "neurons_for_share",
    "path_baseline",
    "path_effect",
    "previous_token_strength",
    "probe_neurons",
    "projection_change",
    "projection_groups",
    "projection_probe",
    "sparse_probe",
    "sparse_probe_curve",
    "striking",
    "tagged_rates",
    "tagging_signal",
    "taylor",
    "weighted_assignment",
]
