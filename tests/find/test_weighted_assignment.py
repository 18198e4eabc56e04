"""`weighted_assignment`: the case computed by hand, neurons that always fire, abstentions, and digits in bad light."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from tests.find.planted import of_values
from torch import nn

import patchclamp as pc
from patchclamp.find.weighted_assignment import WeightedAssignment

POOLED = [pc.Pooled("mean", dtype="float32")]


def by_hand(counts: Sequence[Sequence[float]], weighted: bool = True) -> WeightedAssignment:
    """counts[neuron][label], one example a label."""
    labels = ["A", "B", "C"][: len(counts[0])]
    recording = of_values(np.asarray(counts).T, labels, summaries=POOLED)
    return pc.find.weighted_assignment(recording, "kind", weighted=weighted)


def test_the_case_computed_by_hand() -> None:
    """A: 8 * 1 + 4 / 2 * 1/2 = 9, all 15 of 15 heard; B: 4 / 2 * 1/2 = 1, 5 of 15 heard."""
    found = by_hand([[10, 0], [5, 5], [0, 10]])
    np.testing.assert_allclose(found.counts, [[10, 0], [5, 5], [0, 10]])
    assert found.scores([8, 4, 0]).tolist() == [[pytest.approx(9), pytest.approx(1 / 3)]]
    assert replace(found, weighted=False).scores([8, 4, 0]).tolist() == [[6, 0]]
    assert found.predict([[8, 4, 0], [0, 0, 1]]) == ["A", "B"]


def test_only_relevant_neurons_are_expected() -> None:
    """The second has 1 of its 20 counts on A: that it is silent is no sign against A."""
    assert by_hand([[10, 0], [1, 19]]).scores([4, 0]).tolist() == [[4, 0]]


def test_the_table_of_neurons() -> None:
    found = by_hand([[5, 5], [10, 0], [0, 0], [2, 8]]).neurons
    assert found["index"].to_list() == [1, 3, 0, 2]
    assert found["score"].to_list() == [1, pytest.approx(0.8), 0.5, 0]
    assert found["label"].to_list() == ["A", "B", "A", None]
    assert found["responds_to"].to_list() == [1, 2, 2, 0]


def test_a_neuron_that_always_fires_changes_the_standard_answer_only() -> None:
    specific, always = [[6, 0], [0, 6]], [19, 20]
    # Standard: 5 against 4, then 5 against (4 + 60) / 2. Weighted: 5 + 60 / 2 * 19/39 against 4 + 60 / 2 * 20/39.
    for weighted, after in [(True, "A"), (False, "B")]:
        assert by_hand(specific, weighted).predict([5, 4]) == ["A"]
        assert by_hand([*specific, always], weighted).predict([5, 4, 60]) == [after]


def test_relevance_and_ambiguity() -> None:
    """One neuron in ten labels: relevant to none at 1/10 each; divided by 10 unless responding to all is no matter."""
    labels = [f"l{each}" for each in range(10)]
    recording = of_values(np.concatenate([np.eye(10), np.ones((10, 1))], 1), labels, summaries=POOLED)
    found = pc.find.weighted_assignment(recording, "kind")
    query = np.ones((1, 11))
    assert found.scores(query) == pytest.approx(1)
    low = pc.find.weighted_assignment(recording, "kind", relevance=0.05)
    assert low.scores(query) == pytest.approx(1 + 0.1 / 10)
    assert replace(low, ambiguous_share=1.0).scores(query) == pytest.approx(1 + 0.1 / 10)
    few = pc.find.weighted_assignment(recording, "kind", relevance=0.05, ambiguous_share=0.2)
    one = np.zeros((1, 11))
    one[0, 0] = 3
    assert few.scores(one)[0, 0] == pytest.approx(3 * 1 / 2)  # half of what is expected of l0 was heard
    assert not few.scores(one)[0, 1:].any()


def test_a_label_of_more_examples_does_not_take_the_neurons() -> None:
    values = np.asarray([[4, 1.0]] + [[1, 2.0]] * 9)
    found = pc.find.weighted_assignment(of_values(values, ["A"] + ["B"] * 9, summaries=POOLED), "kind", weighted=False)
    assert found.neurons.to_polars().sort("index")["label"].to_list() == ["A", "B"]
    twice = pc.find.weighted_assignment(of_values(np.repeat(values[:2], 2, 0), list("AABB"), summaries=POOLED), "kind")
    np.testing.assert_allclose(twice.counts, [[8, 2], [2, 4]])  # of equally many they are plain sums


def test_probabilities() -> None:
    found = by_hand([[10, 0, 0], [5, 5, 0], [0, 0, 10]])
    given = found.probabilities([[8, 4, 0], [0, 0, 3], [0, 0, 0]])
    assert given[0] == pytest.approx([0.9, 0.1, 0])  # scores 9, 1, 0
    assert given[1].tolist() == [0, 0, 1]
    assert given[2] == pytest.approx([1 / 3] * 3)


def test_nothing_is_said_of_what_says_nothing() -> None:
    found = by_hand([[10, 0], [0, 10], [0, 0]])
    for each in (found, replace(found, weighted=False)):
        assert each.predict([[0, 0, 0], [3, 0, 0], [0, 0, 7]]) == [None, "A", None]


def test_a_label_without_a_neuron_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="no neuron speaks for 'B'"):
        found = by_hand([[10, 1], [20, 1]])
    assert found.predict([[1, 1]]) == ["A"]
    with pytest.warns(UserWarning, match="no neuron speaks for 'B'"):
        by_hand([[10, 9], [20, 19]], weighted=False)


def test_several_sites_and_a_recording_as_query() -> None:
    network = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    made = torch.Generator().manual_seed(0)
    data = pc.Tensors(torch.randn(30, 4, generator=made), labels={"kind": ["a", "b", "c"] * 10})
    recording = pc.record(network, data, "mlp.*", POOLED, progress=False)
    found = pc.find.weighted_assignment(recording, "kind")
    assert found.counts.shape == (11, 3) and len(found.neurons) == 11 and len(found.neurons.sites) == 2
    values = np.concatenate([recording[site].pooled.values for site in recording], 1)
    np.testing.assert_allclose(found.scores(recording), found.scores(values), rtol=1e-6)
    one = values[7].astype(float)
    expected = 0.0
    counts = found.counts[:, 1]
    own = counts / np.where(found.counts.sum(1) > 0, found.counts.sum(1), 1)
    for neuron in np.flatnonzero(own > 0.1):
        expected += one[neuron] / (found.counts[neuron] > 0).sum() * own[neuron]
    expected *= counts[(own > 0.1) & (one > 0)].sum() / counts[own > 0.1].sum()
    assert found.scores(one)[0, 1] == pytest.approx(expected, rel=1e-6)


def test_bad_input_is_said() -> None:
    values = np.random.default_rng(0).exponential(size=(6, 4))
    recording = of_values(values, list("aabbcc"), summaries=POOLED)
    found = pc.find.weighted_assignment(recording, "kind")
    gelu = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)).eval()
    data = pc.Tensors(torch.randn(6, 4), labels={"kind": list("aabbcc")})
    negative = pc.record(gelu, data, "mlp.*", POOLED, progress=False)
    other = of_values(values[:, :3], list("aabbcc"), summaries=POOLED)
    for call, match in [
        (lambda: pc.find.weighted_assignment(negative, "kind"), r"mlp\.0 has negative activations.*fired"),
        (lambda: found.scores(-values), "the query has negative"),
        (lambda: found.scores(values[:, :3]), r"\[examples, 4 neurons\]; not \[6, 3\]"),
        (lambda: found.predict(other), "has 3 neurons here, and 4"),
        (lambda: pc.find.weighted_assignment(recording, "kinds"), "nearest: kind"),
        (lambda: pc.find.weighted_assignment(recording, "kind", relevance=2.0), "relevance is a share"),
        (
            lambda: pc.find.weighted_assignment(of_values(values, list("aabbcc"), summaries=[pc.ByLabel()]), "kind"),
            "Pooled",
        ),
    ]:
        with pytest.raises(pc.errors.PatchclampError, match=match):
            call()
    fired = pc.record(gelu, data, "mlp.*", [pc.Pooled("fired")], progress=False)
    assert pc.find.weighted_assignment(fired, "kind").scores(fired).shape == (6, 3)


# Digits ---------------------------------------------------------------------------------------------


def of_digits(seed: int, brightness: float, noise: float) -> tuple[float, float]:
    """Accuracy of weighted and of standard assignment, on digits that look otherwise than those it was made from."""
    images, target = (np.asarray(each) for each in load_digits(return_X_y=True))
    made = np.random.default_rng(seed)
    order = made.permutation(len(target))
    images, target = (images / 16).astype(np.float32)[order], target[order]
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    given, wanted = torch.from_numpy(images[:1000]), torch.from_numpy(target[:1000])
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(given), wanted).backward()
        optimizer.step()
    network.eval()
    shifted = (images[1000:] * brightness + noise * made.standard_normal(images[1000:].shape)).astype(np.float32)

    def recorded(pixels: np.ndarray, which: np.ndarray) -> pc.Recording:
        data = pc.Tensors(torch.from_numpy(pixels), labels={"digit": [str(each) for each in which]})
        return pc.record(network, data, "mlp.*", POOLED, progress=False)

    found = pc.find.weighted_assignment(recorded(images[:1000], target[:1000]), "digit")
    query = recorded(shifted, target[1000:])
    right = [str(each) for each in target[1000:]]
    accuracies = [
        float(np.mean([one == other for one, other in zip(each.predict(query), right, strict=True)]))
        for each in (found, replace(found, weighted=False))
    ]
    return accuracies[0], accuracies[1]


@pytest.mark.parametrize(("brightness", "noise"), [(0.6, 0.1), (1.6, 0.2)])
def test_digits_that_look_otherwise(brightness: float, noise: float) -> None:
    """Three points more than standard assignment on average; of single networks some are no better."""
    found = np.asarray([of_digits(seed, brightness, noise) for seed in range(6)])
    weighted, standard = found.mean(0)
    print(f"digits, brightness {brightness}, noise {noise}: weighted {weighted:.3f}, standard {standard:.3f}")
    assert weighted > standard + 0.03
    assert weighted > 0.7


def test_an_example_without_a_value_counts_nothing() -> None:
    values = np.asarray([[4.0, 0], [0, 4], [4, 0], [np.nan, np.nan]])
    with pytest.warns(UserWarning, match="left out"):
        recording = of_values(values, list("ABAB"), summaries=POOLED)
    found = pc.find.weighted_assignment(recording, "kind")
    assert np.isfinite(found.counts).all() and found.predict([[1, 0], [0, 1]]) == ["A", "B"]
