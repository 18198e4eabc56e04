"""Neurons of a small decoder that seem to say which animal somebody keeps: do they tell it, and do they matter?"""

from __future__ import annotations

import numpy as np

import patchclamp as pc
from patchclamp.testbed.attribute_world import TrainedWorld, trained_attribute_world
from patchclamp.verify.explanations import Mediated, interventional, observational

CONCEPT = "animal"
SIZES = (1, 5, 10, 20)
SITES = ("mlp.0", "resid_post.0")
SETS, PAIRS = 20, 200


def measure(seed: int = 0) -> dict[str, object]:
    """At two sites the neurons that tell a value best: how well, and as causes beside random ones and the layer."""
    net = trained_attribute_world()
    pairs = prompts(net, seed)
    found = {}
    for site in SITES:
        best, telling = tell(net, site)
        sets = {size: interventional(net.model, best.top(size), pairs, controls=SETS, seed=seed) for size in SIZES}
        singles = [interventional(net.model, best[n : n + 1], pairs, controls=0).iia for n in range(SIZES[-1])]
        found[site] = {
            "neurons": len(best),
            "f1_of_the_best": telling,
            "f1_of_the_best_largest": max(telling.values()),
            "iia": {size: of.iia for size, of in sets.items()},
            "iia_random": {size: float(of.random.mean()) for size, of in sets.items()},
            "iia_random_best": {size: float(of.random.max()) for size, of in sets.items()},
            "p": {size: of.p for size, of in sets.items()},
            "iia_single_largest": max(singles),
            "layer": layer(sets),
        }
    return {"concept": CONCEPT, "pairs": len(pairs), "random_sets": SETS, "sites": found}


def layer(sets: dict[int, Mediated]) -> float:
    """The same for all of them: it does not depend on the set."""
    return next(iter(sets.values())).layer


def tell(net: TrainedWorld, site: str) -> tuple[pc.Neurons, dict[str, float]]:
    """All neurons, those first that tell some value best by F1 at its entities; and the best F1 of each value."""
    world, size = net.world, net.model.site(site).size or 0
    names = list(world.entities)
    texts = [world.templates[CONCEPT][0].format(each) for each in names]
    kinds = np.asarray([world.value(each, CONCEPT) for each in names])
    f1 = np.zeros((size, len(world.attributes[CONCEPT])))
    for column, value in enumerate(world.attributes[CONCEPT]):
        spans = np.asarray(list(zip(texts, names, strict=True)))
        yes, no = (spans[kinds == value].tolist(), spans[kinds != value].tolist())
        f1[:, column] = [observational(net.model, (site, index), yes, no).f1 for index in range(size)]
    order = np.argsort(-f1.max(1), kind="stable")
    best = dict(zip(world.attributes[CONCEPT], f1.max(0).tolist(), strict=True))
    return pc.Neurons({site: order.tolist()}), best


def prompts(net: TrainedWorld, seed: int) -> list[tuple[str, str, str, str]]:
    """Base and source in the same words, about entities that differ in the concept."""
    world, template = net.world, net.world.templates[CONCEPT][0]
    made, found = np.random.default_rng(seed), []
    while len(found) < PAIRS:
        one, two = (world.entities[each] for each in made.choice(len(world.entities), 2, replace=False))
        answers = world.value(one, CONCEPT), world.value(two, CONCEPT)
        if answers[0] != answers[1]:
            found.append((template.format(one), template.format(two), *answers))
    return found
