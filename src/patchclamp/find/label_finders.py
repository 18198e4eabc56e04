"""All finders for a label, with what each wants recorded: for races, and for trying all of them on one's own data."""

from __future__ import annotations

from patchclamp.find.contrast import contrast
from patchclamp.find.coverage import coverage
from patchclamp.find.domains import domains
from patchclamp.find.expertise import expertise
from patchclamp.find.lape import lape, lape_ternary
from patchclamp.find.probe_neurons import probe_neurons
from patchclamp.find.profiles import activation_profiles
from patchclamp.find.sparse_probe import sparse_probe
from patchclamp.recording import Pooled
from patchclamp.testbed import Method


def label_finders() -> dict[str, Method]:
    """Name -> finder for a label, and the summaries and kind of site that it is published for.

    Example:
        >>> len(label_finders())
        15
    """
    fired = (Pooled("fired", dtype="float32"),)
    largest = (Pooled("max", dtype="float32"),)
    mean = (Pooled("mean", dtype="float32"),)  # what these two papers compare
    found = {
        "lape": Method(lape, fired, "gate"),
        "lape_ternary": Method(lape_ternary, fired, "gate"),
        "domains": Method(domains, fired, "gate"),
        "coverage": Method(coverage, fired, "gate"),
        "expertise": Method(expertise, largest),
        "activation_profiles": Method(activation_profiles, mean),
        "contrast": Method(contrast, mean),
        "probe_neurons": Method(probe_neurons, largest),
    }
    for select in ("mean_diff", "f", "mutual_information", "l1", "hinge", "adaptive", "exact"):
        name = "sparse_probe" if select == "mean_diff" else f"sparse_probe, {select}"
        # A null of those that are fitted is a fit for each deal: minutes.
        quick = select in ("mean_diff", "f", "mutual_information")
        found[name] = Method(sparse_probe, largest, options={"select": select}, null=quick)
    return found
