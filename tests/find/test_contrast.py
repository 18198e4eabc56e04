"""`contrast` and its overlap: hand-made means, SciPy, planted and empty sets, and chance."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_ind
from tests.find.planted import of_values

import patchclamp as pc
from patchclamp.find.contrast import contrast_overlap


def two(examples: int) -> np.ndarray:
    return np.where(np.arange(examples) % 2, "memorised", "ordinary")


def test_hand_case() -> None:
    """Means of a: 3 and 1; of b: 1 and 2."""
    values = np.asarray([[2, 1], [4, 1], [0, 0], [0, 3], [3, 3]], float)
    found = pc.find.contrast(of_values(values, list("aabbb")), "kind", positive="a").to_polars().sort("index")
    assert found["score"].to_list() == pytest.approx([2, -1])
    assert found["difference"].to_list() == found["score"].to_list()
    assert found["selected"].to_list() == [True, False]
    assert found["owners"].to_list() == ["a", ""]


@pytest.mark.parametrize("summaries", [[pc.ByLabel()], [pc.Pooled("max", dtype="float32")]])
def test_it_is_that_of_scipy_with_labels_of_unequal_numbers(summaries: list[pc.Summary]) -> None:
    made = np.random.default_rng(0)
    labels = np.repeat(["a", "b", "c"], [40, 9, 6])
    values = made.exponential(size=(55, 12)) * (1 + (labels == "b")[:, None]) + 50
    found = pc.find.contrast(of_values(values, labels.tolist(), summaries=summaries), "kind").to_polars().sort("index")
    for label in "abc":
        inside, rest = values[labels == label], values[labels != label]
        np.testing.assert_allclose(found[f"score_{label}"], inside.mean(0) - rest.mean(0), atol=1e-5)
    for neuron, label in enumerate(found["label"]):
        inside, rest = values[labels == label, neuron], values[labels != label, neuron]
        assert found["p_welch"][neuron] == pytest.approx(ttest_ind(inside, rest, equal_var=False)[1], rel=1e-3)
        spread = np.sqrt((inside.var() * len(inside) + rest.var() * len(rest)) / 53)
        expected = (inside.mean() - rest.mean()) / spread * (1 - 3 / (4 * 55 - 9))
        assert found["cohens_d"][neuron] == pytest.approx(expected, rel=1e-3)


def test_owners_are_the_labels_on_which_a_neuron_does_more() -> None:
    labels = np.repeat(["a", "b", "c"], [4, 6, 10])
    values = np.random.default_rng(0).exponential(size=(20, 15)) + 1
    found = pc.find.contrast(of_values(values, labels.tolist()), "kind").to_polars()
    more = [[label for label in "abc" if row[f"score_{label}"] > 0] for row in found.iter_rows(named=True)]
    assert found["owners"].to_list() == [", ".join(each) for each in more]
    assert {len(each) for each in more} == {1, 2}


def test_if_both_groups_hold_the_same_examples_the_set_is_empty() -> None:
    values = np.random.default_rng(0).exponential(size=(41, 50)) + 100
    both = np.concatenate([values, values[np.random.default_rng(1).permutation(41)]])
    recording = of_values(both, ["memorised"] * 41 + ["ordinary"] * 41)
    found = pc.find.contrast(recording, "kind", positive="memorised")
    assert not found["selected"].any() and set(found["owners"]) == {""}
    found = pc.find.contrast(recording, "kind")
    assert not found["selected"].any()


def test_by_chance_half_of_all_neurons_belong_to_a_label() -> None:
    """What the published rule is worth by itself."""
    values = np.random.default_rng(0).exponential(size=(100, 400))
    found = pc.find.contrast(of_values(values, two(100).tolist()), "kind", positive="memorised")
    assert 150 < found["selected"].sum() < 250


# Overlap --------------------------------------------------------------------------------------------


def test_planted_neurons_are_found_by_both_halves() -> None:
    values = np.random.default_rng(0).exponential(size=(120, 500))
    values[1::2, [3, 70, 71, 300, 499]] += 4
    recording = of_values(values, two(120).tolist())
    row = contrast_overlap(recording, "kind", "memorised").row(0, named=True)
    assert (row["site"], row["top"]) == ("mlp.0", 5)
    assert row["overlap"] == row["smallest"] == 1
    assert row["shuffled"] < 0.05 and row["chance"] < 0.01
    assert contrast_overlap(recording, "kind", "ordinary")["overlap"][0] < 0.1


def test_without_an_effect_the_overlap_is_that_of_chance() -> None:
    values = np.random.default_rng(0).standard_normal((80, 600)) + 5
    recording = of_values(values, two(80).tolist())
    for top in (0.05, 0.3, None):
        row = contrast_overlap(recording, "kind", "memorised", top=top, splits=40).row(0, named=True)
        # Halves that share nothing: the rest must be cut in two as well, or its noise is in both.
        assert row["overlap"] == pytest.approx(row["chance"], abs=0.03)
        assert row["shuffled"] == pytest.approx(row["chance"], abs=0.05)
        assert row["smallest"] < row["overlap"] < 0.5


def test_chance_is_that_of_sets_drawn_at_random() -> None:
    values = np.random.default_rng(0).standard_normal((60, 50)) + 9
    row = contrast_overlap(of_values(values, two(60).tolist()), "kind", "memorised", top=0.2).row(0, named=True)
    made = np.random.default_rng(1)
    drawn = [len(set(made.permutation(50)[:10]) & set(made.permutation(50)[:10])) for _ in range(4000)]
    assert row["chance"] == pytest.approx(np.mean([each / (20 - each) for each in drawn]), abs=0.004)


def test_sets_of_all_neurons_overlap_by_chance() -> None:
    values = np.random.default_rng(0).exponential(size=(40, 30))
    values[1::2] += 20
    row = contrast_overlap(of_values(values, two(40).tolist()), "kind", "memorised", top=None).row(0, named=True)
    assert row["overlap"] == row["chance"] == 1


def test_two_examples_of_a_label_are_one_in_each_half() -> None:
    values = np.random.default_rng(0).exponential(size=(30, 100))
    values[:2, 7] += 20
    labels = ["a"] * 2 + ["b"] * 28
    assert contrast_overlap(of_values(values, labels), "kind", "a")["overlap"][0] == 1


def test_an_example_without_a_value_is_in_no_half() -> None:
    values = np.random.default_rng(0).standard_normal((44, 60)) + 5
    without = contrast_overlap(of_values(values[:40], two(40).tolist()), "kind", "memorised", top=0.2)
    values[40:] = np.nan
    with pytest.warns(UserWarning, match="left out"):
        recording = of_values(values, two(44).tolist())
    assert contrast_overlap(recording, "kind", "memorised", top=0.2).equals(without)


def test_neurons_that_vary_much_overlap_whatever_the_label() -> None:
    """The hypergeometric chance is too small here; dealing the labels anew shows it."""
    made = np.random.default_rng(0)
    values = made.standard_normal((80, 400)) * np.where(np.arange(400) < 20, 30, 1) + 200
    row = contrast_overlap(of_values(values, two(80).tolist()), "kind", "memorised", top=0.05).row(0, named=True)
    assert row["shuffled"] > 4 * row["chance"]
    assert row["overlap"] == pytest.approx(row["shuffled"], abs=0.1)


def test_the_same_seed_gives_the_same() -> None:
    values = np.random.default_rng(0).standard_normal((40, 60)) + 5
    recording = of_values(values, two(40).tolist())
    one, same, other = (contrast_overlap(recording, "kind", "memorised", top=0.2, seed=each) for each in (1, 1, 2))
    assert one.equals(same) and not one.equals(other)


def test_bad_input_is_said() -> None:
    values = np.ones((6, 3))
    recording = of_values(values, list("aabbbb"))
    for call, match in [
        (lambda: contrast_overlap(recording, "kind", "a", top=0.0), "top is a share"),
        (lambda: contrast_overlap(recording, "kind", "a", splits=0), "splits"),
        (lambda: contrast_overlap(recording, "kind", "c"), "nearest|There are"),
        (lambda: contrast_overlap(recording, list("abbbbb"), "a"), "at least two examples"),
        (lambda: pc.find.contrast(recording, list("abbbbb")), "at least two examples in each"),
        (lambda: contrast_overlap(of_values(values, list("aabbbb"), summaries=[pc.ByLabel()]), "kind", "a"), "Pooled"),
    ]:
        with pytest.raises(pc.errors.PatchclampError, match=match):
            call()
