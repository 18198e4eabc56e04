"""Finders for a label: each on values whose answer is known, and all of them by one contract."""

from __future__ import annotations

import functools
import os

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import average_precision_score
from tests.find.planted import network, of_two_sites, of_values

import patchclamp as pc
from patchclamp.find.coverage import coverage_overlap

# All of them, as the registry has them. Fitted ways to rank are tried by `make test-all`.
METHODS = pc.find.label_finders()
FINDERS = {name: functools.partial(each.find, **each.options) for name, each in METHODS.items()}
NAMES = [name if METHODS[name].null else pytest.param(name, marks=pytest.mark.slow) for name in FINDERS]
LONG = bool(os.environ.get("PATCHCLAMP_TEST_ALL"))
KINDS = ("a", "b", "c")


def kinds(examples: int) -> np.ndarray:
    return np.asarray(KINDS)[np.arange(examples) % 3]


def planted(seed: int, examples: int = 90, neurons: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Neurons 0, 1, 2 fire on a, b, c far more often and more strongly than the rest, which fire by chance."""
    made = np.random.default_rng(seed)
    fires = made.random((examples, neurons)) < 0.3
    values = np.where(fires, made.exponential(size=fires.shape), -1.0)
    # In no order: of labels that take turns, those of the neighbours are the same under other names.
    labels = np.random.default_rng(1000 + seed).permutation(kinds(examples))
    for place, kind in enumerate(KINDS):
        on = np.where(made.random(examples) < 0.9, 2 + made.exponential(size=examples), -1.0)
        off = np.where(made.random(examples) < 0.03, 1.0, -1.0)
        values[:, place] = np.where(labels == kind, on, off)
    return values, labels


def recording_for(name: str, values: np.ndarray, labels: np.ndarray) -> pc.Recording:
    return of_values(values, labels.tolist(), summaries=[*METHODS[name].summaries])


# One contract ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_planted_neurons_come_first_each_with_its_label(name: str) -> None:
    for seed in range(5):
        values, labels = planted(seed)
        found = FINDERS[name](recording_for(name, values, labels), "kind")
        top = found.top(3)
        assert {f"{index}{label}" for index, label in zip(top["index"], top["label"], strict=True)} == {
            "0a",
            "1b",
            "2c",
        }


@pytest.mark.parametrize("name", NAMES)
def test_the_table(name: str) -> None:
    values, labels = planted(0)
    recording = recording_for(name, values, labels)
    found = FINDERS[name](recording, labels="kind", positive=None, seed=0, null=None)
    assert found.columns[:4] == ["site", "index", "score", "label"]
    assert len(found) == 60 and len(set(found)) == 60
    score = found["score"].to_numpy()
    assert (np.diff(score) <= 0).all() and np.isfinite(score).all()
    per_label = np.stack([found[f"score_{kind}"].to_numpy() for kind in KINDS], 1)
    np.testing.assert_allclose(per_label.max(1), score)
    assert [KINDS[place] for place in per_label.argmax(1)] == found["label"].to_list()
    one = FINDERS[name](recording, "kind", positive="b")
    assert set(one["label"]) == {"b"} and "score_a" not in one.columns
    model, given = pc.load(network(values.shape[1])), torch.ones(1, values.shape[1])
    before = model(given)
    with model.intervene(pc.ablate(found.top(2))):
        assert not torch.equal(model(given), before)


@pytest.mark.parametrize("name", NAMES)
def test_order_of_examples_and_names_of_labels_do_not_matter(name: str) -> None:
    values, labels = planted(1)
    found = FINDERS[name](recording_for(name, values, labels), "kind")
    order = np.random.default_rng(0).permutation(len(labels))
    moved = FINDERS[name](recording_for(name, values[order], labels[order]), "kind")
    names = {"a": "zebra", "b": "yak", "c": "xerus"}
    renamed = FINDERS[name](recording_for(name, values, labels), [names[each] for each in labels])
    for other in (moved, renamed):
        for table in (found, other):
            assert table.sites == ["mlp.0"]
        one, two = (table.to_polars().sort("index")["score"].to_numpy() for table in (found, other))
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)
    assert renamed["label"].to_list()[:3] == [names[each] for each in found["label"].to_list()[:3]]


@pytest.mark.parametrize("name", NAMES)
def test_each_site_has_its_own_neurons(name: str) -> None:
    values, labels = planted(0, neurons=20)
    recording = of_two_sites(values, labels.tolist(), [*METHODS[name].summaries])
    found = FINDERS[name](recording, "kind").top(6)
    named = zip(found["site"], found["index"], found["label"], strict=True)
    first = {("mlp.0", 0, "a"), ("mlp.0", 1, "b"), ("mlp.0", 2, "c")}
    assert set(named) == first | {("mlp.1", 19, "a"), ("mlp.1", 18, "b"), ("mlp.1", 17, "c")}


@pytest.mark.parametrize("name", NAMES)
def test_an_example_without_a_value_is_as_if_it_were_not_there(name: str) -> None:
    values, labels = planted(0, neurons=20)
    found = FINDERS[name](recording_for(name, values[:80], labels[:80]), "kind")
    values[80:] = np.nan
    more = FINDERS[name](recording_for(name, values, labels), "kind")
    one, two = (table.to_polars().sort("index")["score"].to_numpy() for table in (found, more))
    assert np.isfinite(two).all()
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same(name: str) -> None:
    values = np.random.default_rng(0).exponential(size=(45, 20)) - 1.0
    recording = recording_for(name, values, kinds(45))
    one, two, other = (
        FINDERS[name](recording, "kind", null="permute", permutations=39, seed=each) for each in (1, 1, 2)
    )
    assert one == two
    assert one["p"].to_list() != other["p"].to_list()


@pytest.mark.parametrize("name", NAMES)
def test_under_the_null_hypothesis_something_is_found_no_more_often_than_stated(name: str) -> None:
    by_p = by_q = 0
    seeds, most = (200, 18) if LONG else (60, 7)  # the 99% bounds of a true 5%
    for seed in range(seeds):
        made = np.random.default_rng(seed)
        shared = made.standard_normal((36, 1))
        values = made.exponential(size=(36, 24)) * np.exp(shared) - 1.0
        recording = recording_for(name, values, made.permutation(kinds(36)))
        found = FINDERS[name](recording, "kind", null="permute", permutations=39, seed=seed)
        by_p += bool((found["p"] <= 0.05).any())
        by_q += bool((found["q"] < 0.05).any())
    for what, number in (("p", by_p), ("q", by_q)):
        low, high = stats.binomtest(number, seeds).proportion_ci(0.95, "exact")
        print(f"{name} under the null: {what} in {number} of {seeds} seeds, 95% interval {low:.3f} to {high:.3f}")
    assert by_p <= most
    assert by_q <= most


@pytest.mark.parametrize("name", NAMES)
def test_what_is_planted_keeps_a_small_q(name: str) -> None:
    kept = 0
    for seed in range(5):
        values, labels = planted(seed)
        found = FINDERS[name](recording_for(name, values, labels), "kind", null="permute", permutations=199, seed=seed)
        small = set(found.to_polars().filter(found["q"] < 0.05)["index"])
        kept += len(small & {0, 1, 2})
        assert len(small - {0, 1, 2}) <= 2
    assert kept >= 0.8 * 15


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_said(name: str) -> None:
    values, labels = planted(0, 30, 10)
    recording = recording_for(name, values, labels)
    for given, match in [
        ({"labels": "kinds"}, "nearest: kind"),
        ({"labels": "kind", "positive": "d"}, "There are: a, b, c"),
        ({"labels": ["a"] * 30}, "at least two categories"),
        ({"labels": ["a", "b"]}, "2 labels were given for 30 examples"),
        ({"labels": "kind", "null": "shuffle"}, "permute"),
        ({"labels": "kind", "null": "permute", "permutations": 5}, "at least 19"),
    ]:
        with pytest.raises(pc.errors.PatchclampError, match=match):
            FINDERS[name](recording, **given)
    bare = of_values(values, labels.tolist(), summaries=[pc.MinMax()])
    with pytest.raises(pc.errors.DataError, match=r"record with pc\."):
        FINDERS[name](bare, "kind")


# Expertise ------------------------------------------------------------------------------------------


def test_average_precision_by_hand() -> None:
    """A perfect detector has 1, a constant neuron the label's share, an inverse one 0.41667 of two and two."""
    labels = np.asarray(["n", "n", "y", "y"])
    values = np.asarray([[1, 1, 4.0], [2, 1, 3], [3, 1, 2], [4, 1, 1]])
    found = pc.find.expertise(of_values(values, labels.tolist()), "kind", positive="y").to_polars().sort("index")
    assert found["average_precision"].to_list() == pytest.approx([1, 0.5, 5 / 12])
    assert found["score"].to_list() == pytest.approx([1, 0, (5 / 12 - 0.5) / 0.5])
    away = pc.find.expertise(of_values(values, labels.tolist()), "kind", positive="y", absence=True)
    assert away["index"][0] == 2 and away["average_precision"][0] == 1


def test_each_label_has_its_own_share() -> None:
    labels = np.repeat(["a", "b", "c"], [8, 14, 22])
    values = np.random.default_rng(0).standard_normal((44, 9)) + 5
    found = pc.find.expertise(of_values(values, labels.tolist()), "kind").to_polars().sort("index")
    precision = np.asarray([[average_precision_score(labels == kind, each) for kind in KINDS] for each in values.T])
    share = np.asarray([8, 14, 22]) / 44
    expected = (precision - share) / (1 - share)
    np.testing.assert_allclose(np.stack([found[f"score_{kind}"] for kind in KINDS], 1), expected, rtol=1e-6)
    np.testing.assert_allclose(found["average_precision"], precision[np.arange(9), expected.argmax(1)], rtol=1e-6)


def test_expertise_in_absence_leaves_out_what_has_no_value() -> None:
    values, labels = planted(0, neurons=9)
    found = pc.find.expertise(of_values(values[:80], labels[:80].tolist()), "kind", absence=True)
    values[80:] = np.nan
    with pytest.warns(UserWarning, match="left out"):
        recording = of_values(values, labels.tolist())
    assert pc.find.expertise(recording, "kind", absence=True) == found


def test_it_is_that_of_scikit_learn_ties_and_all() -> None:
    made = np.random.default_rng(0)
    values = made.integers(1, 6, (40, 30)).astype(float)
    labels = kinds(40)
    found = pc.find.expertise(of_values(values, labels.tolist()), "kind", positive="b").to_polars().sort("index")
    expected = [average_precision_score(labels == "b", each) for each in values.T]
    np.testing.assert_allclose(found["average_precision"], expected, rtol=1e-12)


def test_a_relation_neuron_among_4000() -> None:
    made = np.random.default_rng(0)
    values = made.standard_normal((200, 4000)) + 5
    labels = np.where(np.arange(200) % 2, "r", "other")
    values[:, 1234] += 3.0 * (labels == "r")
    found = pc.find.expertise(of_values(values, labels.tolist()), "kind", positive="r")
    assert found["index"][0] == 1234 and found["average_precision"][0] > 0.95
    assert found["average_precision"][1] < 0.7


# Coverage -------------------------------------------------------------------------------------------


def counted(counts: list[list[int]]) -> pc.Recording:
    """counts[label][neuron] firings of 100 examples of each label."""
    rows = [np.where(np.arange(100)[:, None] < np.asarray(each), 1.0, -1.0) for each in counts]
    labels = [f"l{label}" for label in range(len(counts)) for _ in range(100)]
    return of_values(np.concatenate(rows), labels, summaries=[pc.ByLabel()])


def test_the_fewest_neurons_that_cover() -> None:
    found = pc.find.coverage(counted([[50, 30, 15, 4, 1], [0, 1, 4, 15, 80]]), "kind").to_polars().sort("index")
    assert found["covers_l0"].to_list() == [True, True, True, False, False]
    assert found["covers_l1"].to_list() == [False, False, False, True, True]
    assert found["owners"].to_list() == ["l0", "l0", "l0", "l1", "l1"]
    even = pc.find.coverage(counted([[10] * 100 + [0] * 5, [3] * 105]), "kind", covered=0.95)
    assert even["covers_l0"].sum() == 95
    whole = pc.find.coverage(counted([[10] * 100 + [0] * 5, [3] * 105]), "kind", covered=1.0)
    assert whole["covers_l0"].sum() == 100  # one that never fires covers nothing


def test_overlap_of_labels() -> None:
    found = pc.find.coverage(counted([[50, 50, 0, 0], [50, 50, 0, 0], [0, 1, 50, 49]]), "kind", covered=0.9)
    overlap = {(row["label"], row["other"]): row["overlap"] for row in coverage_overlap(found).iter_rows(named=True)}
    assert overlap == {("l0", "l1"): 1.0, ("l0", "l2"): 0.0, ("l1", "l2"): 0.0}
    with pytest.raises(pc.errors.DataError, match="covers_"):
        coverage_overlap(pc.Neurons({"mlp.0": [1]}))


def test_a_layer_that_never_fires_on_a_label_is_said() -> None:
    with pytest.raises(pc.errors.DataError, match="no neuron ever fires on 'l1'"):
        pc.find.coverage(counted([[5, 5], [0, 0]]), "kind")
    with pytest.raises(pc.errors.DataError, match="covered is a share"):
        pc.find.coverage(counted([[5, 5], [1, 0]]), "kind", covered=1.5)


# Profiles -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("summaries", [[pc.ByLabel()], [pc.Pooled("max", dtype="float32")]])
def test_profiles_are_balanced_over_labels(summaries: list[pc.Summary]) -> None:
    made = np.random.default_rng(0)
    labels = np.repeat(["a", "b", "c"], [60, 10, 5])
    values = made.exponential(size=(75, 12)) + 1
    values[labels == "c", 3] += 5
    found = pc.find.activation_profiles(of_values(values, labels.tolist(), summaries=summaries), "kind")
    means = np.stack([values[labels == each].mean(0) for each in KINDS], 1)
    profile = means - means.mean(1, keepdims=True)
    expected = np.abs(profile) / values.std(0)[:, None]
    frame = found.to_polars().sort("index")
    np.testing.assert_allclose(np.stack([frame[f"score_{each}"] for each in KINDS], 1), expected, atol=2e-5)
    np.testing.assert_allclose(frame["profile"], profile[np.arange(12), expected.argmax(1)], atol=1e-5)
    assert (found["index"][0], found["label"][0]) == (3, "c")


def test_a_neuron_that_never_changes_has_no_profile() -> None:
    values = np.ones((30, 3))
    values[:, 1] = np.arange(30)
    found = pc.find.activation_profiles(of_values(values, kinds(30).tolist()), "kind").to_polars().sort("index")
    assert found["score"][0] == found["score"][2] == 0
