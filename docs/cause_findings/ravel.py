"""Taking apart what a small decoder knows of 200 entities: which features hold one attribute and nothing else?"""

from __future__ import annotations

import numpy as np

from patchclamp.decompose.das import Subspace, das, mdas
from patchclamp.decompose.dbm import dbm
from patchclamp.decompose.interchange import Interchanges
from patchclamp.testbed.attribute_world import trained_attribute_world
from patchclamp.verify.ravel import disentangle, select_features

FIT, HELD_OUT, FEW = 400, 200, 50  # pairs for each attribute; the few choose the best of all neurons
DIRECTIONS = 8
LEARNED = {"rate": 1e-2, "batch": 32, "epochs": 10}
WARMTH = (1.0, 1e-2)
STRENGTHS = (1e-3, 2e-3, 5e-3, 1e-2)  # of the classifier that chooses principal components
PENALTIES = (0.0, 1e-2, 5e-2, 1e-1, 2e-1)  # of masks: chosen, as the strengths are, where they are fitted
ORDER = ("mdas", "das", "dbm", "pca")


def measure(seed: int = 0) -> dict[str, object]:
    """Fit features on some entities and templates, swap them between others; the order that the paper found."""
    net = trained_attribute_world()
    given = net.world.pairs(FIT, seed=seed)
    fit = Interchanges(net.model, net.site, given)
    few = Interchanges(net.model, net.site, given[:: FIT // FEW])
    others = net.world.pairs(HELD_OUT, entities="held_out", templates="held_out", seed=seed)
    held_out = Interchanges(net.model, net.site, others)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for attribute in net.world.attributes:
        known = [net.world.value(each.source_entity, attribute) for each in given]
        for name, feature in features(fit, few, attribute, known, seed).items():
            of = disentangle(net.model, net.site, feature, held_out, attribute)
            found.setdefault(name, {})[attribute] = {
                "cause": of.cause,
                "isolation": of.isolation,
                "score": of.score,
                "directions": feature.k,
            }
    mean = {
        name: {what: float(np.mean([of[what] for of in each.values()])) for what in ("cause", "isolation", "score")}
        for name, each in found.items()
    }
    scores = [mean[name]["score"] for name in ORDER]
    return {
        "accuracy": net.facts["accuracy"],
        "site": net.site,
        "entities": len(net.world.entities),
        "held_out_entities": int(net.world.held_out_entities.sum()),
        "pairs_fit": FIT,
        "pairs_held_out": HELD_OUT,
        "mean": mean,
        "by_attribute": found,
        "order": sorted(mean, key=lambda name: -mean[name]["score"]),
        "order_of_the_paper_holds": scores == sorted(scores, reverse=True),
    }


def features(fit: Interchanges, few: Interchanges, attribute: str, known: list[str], seed: int) -> dict[str, Subspace]:
    """Method -> the feature that it names for an attribute."""
    given = (fit.model, fit.site, fit, attribute)
    basis = Subspace.principal(fit.states, site=fit.site.name)
    chosen = [select_features(basis, fit.states, known, strength=each, seed=seed) for each in STRENGTHS]
    masks = [dbm(*given, **LEARNED, l1=each, temperature=WARMTH, seed=seed) for each in PENALTIES]
    singles = [Subspace.of_neurons([each], fit.size) for each in range(fit.size)]
    return {
        "mdas": mdas(*given, DIRECTIONS, **LEARNED, seed=seed),
        "das": das(*given, DIRECTIONS, **LEARNED, seed=seed),
        "multi-task dbm": dbm(*given, **LEARNED, isolate=True, temperature=WARMTH, seed=seed),
        "dbm": best(masks, fit, attribute),
        "pca": best(chosen, fit, attribute),
        "one neuron": best(singles, few, attribute),
        "whole state": Subspace.whole(fit.size),
        "nothing": Subspace.empty(fit.size),
    }


def best(tried: list[Subspace], fit: Interchanges, attribute: str) -> Subspace:
    """The one that does best where it was fitted."""
    return max(tried, key=lambda each: disentangle(fit.model, fit.site, each, fit, attribute).score)
