"""Two small decoders, trained here: an addition through one head, and facts against contexts. Slow."""

from __future__ import annotations

import numpy as np
import pytest

import patchclamp as pc
from patchclamp.errors import DataError
from patchclamp.find.comparative import comparative
from patchclamp.find.context_neurons import context_attributions
from patchclamp.find.logprob_increase import head_importance
from patchclamp.testbed.addition import addition
from patchclamp.testbed.conflict import conflict


@pytest.mark.slow
def test_addition_needs_one_head_and_the_neurons_through_which_it_acts() -> None:
    bed = addition()
    model, right = bed.model, bed.accuracy()
    assert right == 1.0
    heads = head_importance(model, bed.prompts, bed.answers)
    assert heads["accuracy_drop"][0] > 0.3
    site, head = heads.row(0)[:2]
    found = comparative(model, bed.prompts, bed.answers, pc.ablate(pc.Neurons({site: model.site(site).head(head)})))
    everyone = model.neurons("mlp.*")

    def cost(neurons: pc.Neurons) -> float:
        with model.intervene(pc.ablate(neurons)):
            return right - bed.accuracy()

    chance = np.mean([cost(everyone.sample(like=found.top(20), seed=seed)) for seed in range(10)])
    assert cost(found.top(20)) > max(0.1, 3 * chance)


@pytest.mark.slow
def test_louder_context_neurons_make_contexts_believed() -> None:
    bed = conflict(seed=1)
    before = bed.faithful(bed.held_out)
    assert bed.recalled() > 0.9 and before < 0.2 and bed.faithful(bed.said_twice) > 0.8
    attributions = context_attributions(bed.model, bed.examples[:40])
    assert np.abs(attributions.completeness["error"].to_numpy()).max() < 0.01
    found, everyone = attributions.neurons().top(10), bed.model.neurons("mlp.*")

    def believed(neurons: pc.Neurons) -> float:
        with bed.model.intervene(pc.scale(neurons, 5.0)):
            return bed.faithful(bed.held_out)

    chance = np.mean([believed(everyone.sample(like=found, seed=seed)) for seed in range(10)])
    assert believed(found) - before > max(0.2, 3 * (chance - before))
    with bed.model.intervene(pc.scale(found, 5.0)):
        assert bed.recalled() > 0.9


def test_a_world_that_is_too_small_is_refused() -> None:
    with pytest.raises(DataError, match="at least 4 names"):
        conflict(names=2)
    with pytest.raises(DataError, match="shares in"):
        conflict(once=0.9, twice=0.3)


def test_the_same_seed_trains_the_same() -> None:
    one, two = (conflict(names=5, colours=4, steps=2, seed=3) for _ in range(2))
    assert one.facts == two.facts and one.held_out == two.held_out and one.loss() == two.loss()
    assert set(one.held_out).isdisjoint(one.examples) and set(one.held_out).isdisjoint(one.development)
    sums = [addition(steps=2, seed=1) for _ in range(2)]
    assert (
        sums[0].answers[37] == "0"
        and sums[0].prompts[37] == "3+7="
        and sums[0].model.weights_sha256() == sums[1].model.weights_sha256()
    )
