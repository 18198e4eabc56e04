"""A decoder that remembers facts and is told otherwise: making its context-aware neurons louder."""

from __future__ import annotations

import numpy as np

import patchclamp as pc
from patchclamp.find.context_neurons import context_attributions
from patchclamp.testbed.conflict import Conflict, conflict

EXAMPLES, RANDOM_SETS = 40, 20
LEAST_RECALLED = 0.95
SIZES, FACTORS = range(1, 11), (2.0, 3.0, 5.0, 8.0, 12.0, 20.0)


def measure(seed: int = 0) -> dict[str, object]:
    """Train, find neurons on pairs of the training, choose how many and how loud on others, and try on yet others."""
    bed = conflict(seed=seed)
    attributions = context_attributions(bed.model, bed.examples[:EXAMPLES])
    found = attributions.neurons()
    size, factor = chosen(bed, found)
    everyone = bed.model.neurons("mlp.*")
    chance = [louder(bed, everyone.sample(like=found.top(size), seed=each), factor) for each in range(RANDOM_SETS)]
    with bed.model.intervene(pc.scale(found.top(size), factor)):
        after, loss, recalled = bed.faithful(bed.held_out), bed.loss(), bed.recalled()
    complete = attributions.completeness
    return {
        "recalled": bed.recalled(),
        "faithful_before": bed.faithful(bed.held_out),
        "faithful_said_twice": bed.faithful(bed.said_twice),
        "held_out": len(bed.held_out),
        "faithful_after": after,
        "neurons": found.top(size).names,
        "count": found.top(size)["count"].to_list(),
        "examples": EXAMPLES,
        "factor": factor,
        "faithful_random": float(np.mean(chance)),
        "faithful_random_best": max(chance),
        "loss_before": bed.loss(),
        "loss_after": loss,
        "recalled_after": recalled,
        "largest_error_of_completeness": float((complete["error"].abs()).max()),  # type: ignore[arg-type]
        "mean_wanted": float(complete["wanted"].abs().mean()),  # type: ignore[arg-type]
    }


def chosen(bed: Conflict, found: pc.Neurons) -> tuple[int, float]:
    """How many neurons and how loud, on the development items; of equals the fewest and the quietest.

    Only settings that leave nearly all facts where no context contradicts them.
    """
    tried = {(size, factor): try_out(bed, found.top(size), factor) for size in SIZES for factor in FACTORS}
    least = LEAST_RECALLED * bed.recalled()
    allowed = {setting: faithful for setting, (faithful, recalled) in tried.items() if recalled >= least}
    return max(allowed, key=lambda each: (allowed[each], -each[0], -each[1]), default=(SIZES[0], FACTORS[0]))


def try_out(bed: Conflict, neurons: pc.Neurons, factor: float) -> tuple[float, float]:
    """The faithful share of the development items with louder neurons, and the share of facts that are recalled."""
    with bed.model.intervene(pc.scale(neurons, factor)):
        return bed.faithful(bed.development), bed.recalled()


def louder(bed: Conflict, neurons: pc.Neurons, factor: float) -> float:
    """The faithful share of the held-out items with louder neurons."""
    with bed.model.intervene(pc.scale(neurons, factor)):
        return bed.faithful(bed.held_out)


if __name__ == "__main__":
    print(measure())
