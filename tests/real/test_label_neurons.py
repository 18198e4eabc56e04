"""Neurons for a label in real networks: they tell it on documents that no finder saw, and language neurons are used."""

from __future__ import annotations

import warnings

import numpy as np
import polars as pl
import pytest
import torch

import patchclamp as pc
from patchclamp.statistics import roc_auc
from patchclamp.testbed import languages, trained
from patchclamp.testbed.silencing import loss_by_label, loss_increase

# Code against documentation -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def docs(minilm: pc.Model) -> tuple[pc.Recording, pc.Recording]:
    """Texts of two orders of the corpus: to find in, and to try on."""
    first = pc.corpora.python_docs(240, kinds=("docstring", "code"))
    seen = {each.text for each in first}
    others = [
        each for each in pc.corpora.python_docs(260, kinds=("docstring", "code"), seed=1) if each.text not in seen
    ]
    second = pc.Texts(
        [each.text for each in others], labels={"kind": [each.labels["kind"] for each in others]}, name=first.name
    )
    made = (
        pc.record(minilm, each, "mlp.[1-3]", [pc.Pooled("max")], max_length=48, progress=False)
        for each in (first, second)
    )
    return tuple(made)  # type: ignore[return-value]


def test_the_best_neuron_for_code_knows_code_that_no_finder_saw(docs: tuple[pc.Recording, pc.Recording]) -> None:
    known, new = docs
    right = new.categories_of_examples("kind") == "code"
    for finder in (pc.find.expertise, pc.find.activation_profiles, pc.find.sparse_probe):
        best = finder(known, "kind", "code").top(1)
        values = new[best.sites[0]].pooled.values[:, best.indices(best.sites[0])[0]].astype(np.float64)
        auroc = float(roc_auc(right, values))
        assert max(auroc, 1 - auroc) > 0.9, finder.__name__


def test_labels_without_a_relation_find_no_neurons(docs: tuple[pc.Recording, pc.Recording]) -> None:
    known, _ = docs
    kinds = known.categories_of_examples("kind")
    dealt = [np.random.default_rng(seed).permutation(kinds) for seed in range(4)]
    counts = []
    for labels in (kinds, *dealt):
        found = pc.find.activation_profiles(known, labels, "code", null="permute", permutations=40)
        counts.append(int((found["q"] < 0.05).sum()))
    # At a rate of 0.05 one deal in twenty may find some; of the true labels most neurons know something.
    assert counts[0] > 1000
    assert sorted(counts[1:])[2] == 0


def test_one_neuron_says_more_than_one_drawn_by_chance(docs: tuple[pc.Recording, pc.Recording]) -> None:
    known, _ = docs
    best = pc.find.sparse_probe_curve(known, "kind", "code", k=[1]).best("code")["f1"][0]
    drawn = [
        pc.find.sparse_probe_curve(known, "kind", "code", k=[1], select="random", seed=seed).frame["f1"].mean()
        for seed in range(5)
    ]
    assert best > 0.8 and best > np.mean(drawn) + 0.1  # type: ignore[arg-type]


# Language neurons -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoder() -> pc.Model:
    return trained("four_languages").model


@pytest.fixture(scope="module")
def gates(decoder: pc.Model) -> pc.Recording:
    return pc.record(decoder, languages.documents(400, seed=2), "gate.*", [pc.ByLabel(), pc.Moments()], progress=False)


def owned(gates: pc.Recording) -> list[pc.Neurons]:
    """The neurons of each language, of the fifth of all that are most concentrated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer pass the filter than are asked for
        found = pc.find.lape(gates, "language", top_rate=0.2)
    owners = pl.col("owners").str.split(", ")
    return [found.where(owners.list.contains(each)) for each in languages.NAMES]


def excess(rise: np.ndarray) -> float:
    """How much more each language suffers from its own set than the others do, in the mean."""
    own = np.eye(len(rise), dtype=bool)
    return float(rise[own].mean() - rise[~own].mean())


def test_silencing_a_language_costs_that_language_most_and_random_sets_do_not(
    decoder: pc.Model, gates: pc.Recording
) -> None:
    held_out = languages.documents(80, seed=3)
    sets = owned(gates)
    assert min(map(len, sets)) >= 10
    rise = loss_increase(decoder, held_out, "language", sets)
    assert (rise.argmax(1) == np.arange(4)).all()
    everyone = gates.neurons()
    drawn = [[everyone.sample(like=each, seed=seed) for each in sets] for seed in range(5)]
    chance = np.stack([loss_increase(decoder, held_out, "language", each) for each in drawn])
    assert not any((each.argmax(1) == np.arange(4)).all() for each in chance)
    assert excess(rise) > 3 * max(map(excess, chance))


def test_nothing_is_left_behind_and_an_empty_set_costs_nothing(decoder: pc.Model, gates: pc.Recording) -> None:
    held_out = languages.documents(8, seed=3)
    before = loss_by_label(decoder, held_out, "language")
    rise = loss_increase(decoder, held_out, "language", [pc.Neurons(), gates.neurons()])
    assert (rise[0] == 0).all() and (rise[1] > 0.1).all()
    at_their_means = loss_increase(decoder, held_out, "language", [gates.neurons()], to="mean")
    assert (at_their_means[0] > 0.1).all() and (at_their_means[0] != rise[1]).all()
    np.testing.assert_array_equal(loss_by_label(decoder, held_out, "language"), before)


def test_the_loss_is_that_of_each_text_by_itself(decoder: pc.Model) -> None:
    """Texts of unlike lengths in one batch, against one after the other."""
    held_out = languages.documents(12, seed=3)
    found = loss_by_label(decoder, held_out, "language")
    for place, language in enumerate(held_out.labels["language"]):
        total, count = 0.0, 0
        for each in held_out:
            if each.labels["language"] == language:
                ids = decoder.tokenizer(each.text, return_tensors="pt")["input_ids"]
                with torch.no_grad():
                    loss = float(decoder.module(input_ids=ids, labels=ids).loss)
                total, count = total + loss * (ids.shape[1] - 1), count + ids.shape[1] - 1
        assert found[place] == pytest.approx(total / count, abs=1e-5)
    with pytest.raises(pc.errors.DataError, match="no label 'tongue'"):
        loss_by_label(decoder, held_out, "tongue")
