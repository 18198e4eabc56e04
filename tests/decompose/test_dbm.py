"""Differential binary masking: finds neurons that carry an attribute alone, and cannot where a rotation hides them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.decompose.test_das import SITE, WIDTH, Entities, Planted, rates

import patchclamp as pc
from patchclamp.decompose.das import Subspace
from patchclamp.decompose.dbm import dbm
from patchclamp.decompose.interchange import Interchanges

FAST = {"rate": 0.05, "batch": 32, "epochs": 6, "temperature": (1.0, 0.01)}


def prepared(rotated: bool) -> tuple[pc.Model, Interchanges, Interchanges]:
    model = pc.load(Planted(rotated=rotated).eval())
    fit, held_out = (Interchanges(model, SITE, Entities.drawn(60, seed).pairs(150, seed)) for seed in (1, 2))
    return model, fit, held_out


def neurons(found: Subspace) -> list[int]:
    return found.rows.argmax(1).tolist()


def test_planted_neurons_are_found_whatever_else_there_is() -> None:
    model, fit, held_out = prepared(rotated=False)
    for number, name in enumerate("abc"):
        found = dbm(model, SITE, fit, name, **FAST, isolate=True, l1=0.01)
        assert neurons(found) == [2 * number, 2 * number + 1]
        assert rates(held_out, found, name) == (1.0, 1.0)
        assert torch.equal(found.rows, torch.eye(WIDTH)[neurons(found)])


def test_behind_a_rotation_no_choice_of_neurons_does() -> None:
    """The choice learned, and the best single neuron of all."""
    model, fit, held_out = prepared(rotated=True)
    learned = [dbm(model, SITE, fit, "a", **FAST, isolate=each) for each in (False, True)]
    singles = [Subspace.of_neurons([each], WIDTH) for each in range(WIDTH)]
    for feature in (*learned, *singles):
        assert np.mean(rates(held_out, feature)) < 0.75
    plane = model.module.plane(0)  # type: ignore[operator]
    assert np.mean(rates(held_out, plane)) == 1.0


def test_what_isolation_and_the_penalty_are_for() -> None:
    """One neuron that two attributes share is left out where the other should stay; a dear one is left out anyway."""
    model, _, _ = prepared(rotated=False)
    read = model.module.get_submodule("read")
    with torch.no_grad():
        read.weight[:5, 2] += 0.05 * read.weight[:5, 0]  # type: ignore[index, operator]
    fit = Interchanges(model, SITE, Entities.drawn(60, 1).pairs(150))
    assert 2 in neurons(dbm(model, SITE, fit, "a", **FAST)) or 2 in neurons(dbm(model, SITE, fit, "a", **FAST, seed=1))
    assert neurons(dbm(model, SITE, fit, "a", **FAST, isolate=True)) == [0, 1]
    assert neurons(dbm(model, SITE, fit, "a", **FAST, l1=0.05)) == [0, 1]
    assert dbm(model, SITE, fit, "a", **FAST, l1=50.0).k == 0


def test_it_is_the_same_again() -> None:
    model, fit, _ = prepared(rotated=True)
    one, two, other = (dbm(model, SITE, fit, "a", epochs=1, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(one.losses, two.losses) and torch.equal(one.rows, two.rows)
    assert not np.array_equal(one.losses, other.losses)


def test_bad_input_is_said() -> None:
    model, fit, _ = prepared(rotated=False)
    for given, match in [
        ({"temperature": (0.1, 0.0)}, "the temperature falls"),
        ({"temperature": (0.1, 0.2)}, "the temperature falls"),
        ({"l1": -1.0}, "l1 is at least 0"),
        ({"epochs": 0}, "epochs at least 1"),
    ]:
        with pytest.raises(pc.errors.DataError, match=match):
            dbm(model, SITE, fit, "a", **given)
