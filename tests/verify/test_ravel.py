"""RAVEL's scores: what each planted feature must get, what is left out of the count, and a trained network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.decompose.test_das import FAST, SITE, VALUES, WIDTH, Entities, Planted
from tests.raw import hooks_of

import patchclamp as pc
from patchclamp.decompose.das import Subspace, das, mdas
from patchclamp.decompose.dbm import dbm
from patchclamp.decompose.interchange import Interchanges
from patchclamp.testbed.attribute_world import TrainedWorld, trained_attribute_world
from patchclamp.verify.ravel import Disentanglement, disentangle, select_features


@pytest.fixture(scope="module")
def model() -> pc.Model:
    return pc.load(Planted().eval())


@pytest.fixture(scope="module")
def runs(model: pc.Model) -> Interchanges:
    return Interchanges(model, SITE, Entities.drawn(60, 2).pairs(150, seed=1))


@pytest.fixture(scope="module")
def known() -> TrainedWorld:
    return trained_attribute_world()


def plane(model: pc.Model, *numbers: int) -> Subspace:
    module: Any = model.module
    return Subspace.spanned_by(torch.cat([module.plane(each).rows for each in numbers]))


# Planted --------------------------------------------------------------------------------------------


def test_planted_features_get_their_scores(model: pc.Model, runs: Interchanges) -> None:
    def of(feature: Subspace, attribute: str = "a") -> tuple[float, dict[str, float], float]:
        found = disentangle(model, SITE, feature, runs, attribute)
        return found.cause, dict(found.isolate), found.score

    assert of(plane(model, 0)) == (1.0, {"b": 1.0, "c": 1.0}, 1.0)
    assert of(plane(model, 1)) == (0.0, {"b": 0.0, "c": 1.0}, 0.25)
    assert of(plane(model, 0, 2)) == (1.0, {"b": 1.0, "c": 0.0}, 0.75)
    assert of(plane(model, 0, 2), "c") == (1.0, {"a": 0.0, "b": 1.0}, 0.75)
    assert of(Subspace.empty(WIDTH)) == (0.0, {"b": 1.0, "c": 1.0}, 0.5)
    assert of(Subspace.whole(WIDTH)) == (1.0, {"b": 0.0, "c": 0.0}, 0.5)


def test_any_object_that_swaps_is_tested(model: pc.Model, runs: Interchanges) -> None:
    """Not a linear one: what is put there is the source's state, where the first coordinate agrees in sign."""

    class Odd:
        def swap(self, base: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
            return torch.where((base[:, :1] > 0) == (source[:, :1] > 0), source, base)

    found = disentangle(model, SITE, Odd(), runs, "a")
    assert 0.2 < found.cause < 0.8 and found.isolation == pytest.approx(1 - found.cause, abs=0.2)


def test_attributes_count_alike_and_are_not_rounded(model: pc.Model) -> None:
    """150 pairs that ask for b, 30 for c: their mean is one of two numbers, not of 180."""
    given = Entities.drawn(60, 2).pairs(150)
    few = Interchanges(model, SITE, [*given[:300], *given[300:330]])
    found = disentangle(model, SITE, Subspace.whole(WIDTH).only(range(6)), few, "a")
    assert found.pairs["c"] < 30 < found.pairs["b"]
    assert found.isolation == (found.isolate["b"] + found.isolate["c"]) / 2
    assert found.cause * found.pairs["a"] == pytest.approx(round(found.cause * found.pairs["a"]))
    assert round(found.cause, 2) != found.cause


def test_pairs_that_cannot_tell_are_left_out_and_counted(model: pc.Model) -> None:
    given = Entities.drawn(60, 2).pairs(150)
    alike = sum(each.base_answer == each.source_answer for each in given)
    unknown = [each._replace(base_answer=(each.base_answer + 1) % VALUES) for each in given[:10]]
    unknown = [each for each in unknown if each.base_answer != each.source_answer]
    before = disentangle(model, SITE, plane(model, 0), given, "a")
    after = disentangle(model, SITE, plane(model, 0), [*given, *unknown], "a")
    assert before.alike == after.alike == alike > 0 and (before.unknown, after.unknown) == (0, len(unknown))
    assert sum(before.pairs.values()) == len(given) - alike
    assert after.pairs == before.pairs and (after.cause, after.isolate) == (before.cause, before.isolate)


def test_it_leaves_nothing_behind(model: pc.Model, runs: Interchanges) -> None:
    before = hooks_of(model.module)
    model.module.train()
    disentangle(model, SITE, plane(model, 0), runs, "a")
    assert hooks_of(model.module) == before and model.module.training
    assert all(each.requires_grad for each in model.module.parameters())
    model.module.eval()


def test_features_that_a_sparse_classifier_needs(model: pc.Model) -> None:
    """Two noisy directions tell the values apart; of a basis that holds them as they are, these are chosen."""
    entities = Entities.drawn(300, 5)
    states = torch.from_numpy(entities.states)
    found = select_features(Subspace.whole(WIDTH), states, entities.values[:, 1], strength=0.02)
    assert found.rows.argmax(1).tolist() == [2, 3]
    assert select_features(Subspace.whole(WIDTH), states, entities.values[:, 1], strength=1e-6).k == 0
    with pytest.raises(pc.errors.DataError, match="300 states have as many values"):
        select_features(Subspace.whole(WIDTH), states, entities.values[:7, 1])


def test_bad_input_is_said(model: pc.Model, known: TrainedWorld) -> None:
    given = Entities.drawn(60, 2).pairs(20)
    nobody = [each._replace(base_answer=VALUES - 1 - each.base_answer, source_answer=2) for each in given]
    nobody = [each for each in nobody if each.base_answer != 2]
    for pairs, attribute, match in [
        (given[:20], "a", "anything else than 'a'"),
        ([each for each in nobody if each.attribute == "a"] + given[20:], "a", "no base prompt about 'a' rightly"),
        ([each._replace(base_answer=1, source_answer=1) for each in given], "a", "in no pair"),
    ]:
        with pytest.raises(pc.errors.DataError, match=match):
            disentangle(model, SITE, Subspace.whole(WIDTH), pairs, attribute)
    with pytest.raises(pc.errors.UnknownName, match="'colour'"):
        disentangle(known.model, known.site, Subspace.whole(64), known.world, "colour")


# Trained --------------------------------------------------------------------------------------------


def test_the_trained_network_knows_and_whole_states_carry_it(known: TrainedWorld) -> None:
    whole = disentangle(known.model, known.site, Subspace.whole(64), known.world, "trade")
    none = disentangle(known.model, known.site, Subspace.empty(64), known.world, "trade")
    assert whole.cause > 0.99 and whole.isolation < 0.01 and whole.unknown == none.unknown == 0
    assert none == Disentanglement("trade", 0.0, {name: 1.0 for name in none.isolate}, none.pairs, 0, 0)


@pytest.mark.slow
def test_directions_learned_on_some_entities_take_others_apart(known: TrainedWorld) -> None:
    """The paper's order; the mask is told as well what should stay."""
    fit = Interchanges(known.model, known.site, known.world.pairs(400))
    learned: dict[str, Any] = {**FAST, "rate": 1e-2, "epochs": 10}
    given = (known.model, known.site, fit, "country")
    features = [
        mdas(*given, 8, **learned),
        das(*given, 8, **learned),
        dbm(*given, **learned, isolate=True, temperature=(1.0, 0.01)),
    ]
    scores = [disentangle(known.model, known.site, each, known.world, "country").score for each in features]
    assert scores[0] > 0.99 and scores[0] > scores[1] > 0.95 and scores[2] < 0.8
