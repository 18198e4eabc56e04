"""Addition of two digits: the best head, the neurons through which it acts, and what either is needed for."""

from __future__ import annotations

import numpy as np

import patchclamp as pc
from patchclamp.find.comparative import comparative
from patchclamp.find.logprob_increase import head_importance, logprob_increase
from patchclamp.testbed.addition import Addition, addition

NEURONS, RANDOM_SETS = 20, 20


def measure(seed: int = 0) -> dict[str, object]:
    """Train, find the best head and its neurons after it, silence either, and random neurons of the same layers."""
    bed = addition(seed=seed)
    model = bed.model
    heads = head_importance(model, bed.prompts, bed.answers)
    site, head = heads.row(0)[:2]
    silent = pc.ablate(pc.Neurons({site: model.site(site).head(head)}))
    later = [f"mlp.{layer}" for layer in range(model.site(site).layer or 0, len(model.blocks))]
    found = comparative(model, bed.prompts, bed.answers, silent, later)
    first = logprob_increase(model, bed.prompts, bed.answers, later)
    everyone = model.neurons(later)
    chance = [without(bed, everyone.sample(like=found.top(NEURONS), seed=each)) for each in range(RANDOM_SETS)]
    with model.intervene(silent):
        without_head = bed.accuracy()
    return {
        "accuracy": bed.accuracy(),
        "best_head": f"{site} head {head}",
        "accuracy_without_best_head": without_head,
        "accuracy_without_other_heads": [bed.accuracy() - each for each in heads["accuracy_drop"][1:]],
        "neurons": NEURONS,
        "neurons_searched": len(everyone),
        "accuracy_without_comparative": without(bed, found.top(NEURONS)),
        "accuracy_without_logprob_increase": without(bed, first.top(NEURONS)),
        "accuracy_without_random": float(np.mean(chance)),
        "accuracy_without_random_worst": min(chance),
    }


def without(bed: Addition, neurons: pc.Neurons) -> float:
    """Accuracy with neurons silent."""
    with bed.model.intervene(pc.ablate(neurons)):
        return bed.accuracy()


if __name__ == "__main__":
    print(measure())
