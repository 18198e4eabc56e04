"""Permutation tests: what they keep where nothing is there, what they find, and what they can resolve."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import false_discovery_control

from patchclamp.errors import DataError
from patchclamp.statistics import benjamini_hochberg, permutation_test
from patchclamp.statistics.permutation import Score

SEEDS = 200
AT_MOST = 18  # of 200: the 99% bound for a true rate of 5%


def difference(values: np.ndarray) -> Score:
    """|difference of means| between the examples of label 1 and the rest, as a score; `values` [examples, neurons]."""
    return lambda labels: np.abs(values[labels == 1].mean(0) - values[labels != 1].mean(0))


def neurons(seed: int, examples: int, number: int, shared: float) -> np.ndarray:
    """Skewed values that have `shared` of their variance in common, each on a scale of its own."""
    made = np.random.default_rng(seed)
    common = made.standard_normal((examples, 1))
    own = made.standard_normal((examples, number))
    return np.exp(np.sqrt(shared) * common + np.sqrt(1 - shared) * own) * made.exponential(size=number)


@pytest.mark.parametrize("shared", [0.0, 0.5, 0.95])
def test_under_the_null_hypothesis_something_is_found_no_more_often_than_stated(shared: float) -> None:
    labels = np.arange(40) % 2
    by_p = by_q = 0
    for seed in range(SEEDS):
        found = permutation_test(difference(neurons(seed, 40, 50, shared)), labels, permutations=99, seed=seed)
        by_p += bool((found.p <= 0.05).any())
        by_q += bool((found.q < 0.05).any())
    print(f"shared {shared}: something found in {by_p} (p) and {by_q} (q) of {SEEDS}")
    assert by_p <= AT_MOST
    assert by_q <= AT_MOST


def test_tokens_of_one_document_are_not_independent() -> None:
    """Dealing labels over tokens calls many neurons that have nothing to do with the label; over documents, none."""
    over_tokens = over_documents = 0
    for seed in range(40):
        made = np.random.default_rng(seed)
        of_document = made.standard_normal((20, 1, 30))  # what a document is about
        tokens = (of_document + made.standard_normal((20, 25, 30))).reshape(500, 30)
        label = np.arange(20) % 2
        over_tokens += bool((permutation_test(difference(tokens), label.repeat(25), permutations=99).p <= 0.05).any())
        pooled = tokens.reshape(20, 25, 30).mean(1)
        over_documents += bool((permutation_test(difference(pooled), label, permutations=99).p <= 0.05).any())
    assert over_tokens > 35
    assert over_documents <= 6  # the 99% bound of 40


def test_what_is_planted_is_found() -> None:
    values = neurons(0, 60, 400, 0.2)
    labels = np.arange(60) % 2
    values[labels == 1, :20] *= 6
    found = permutation_test(difference(values), labels, permutations=199)
    assert (found.q[:20] < 0.05).mean() >= 0.8
    assert (found.q[20:] < 0.05).sum() <= 4
    assert (found.p[:20] <= 0.05).mean() >= 0.5
    assert found.below(0.05).tolist() == (found.q < 0.05).tolist()


def test_all_deals_by_hand() -> None:
    """Four examples, two of each label, one neuron: the observed difference is the largest of six deals."""
    values, labels = np.asarray([[0.0], [1.0], [4.0], [6.0]]), np.asarray([0, 0, 1, 1])
    differences = [
        abs(values[list(ones)].mean() - values[[each for each in range(4) if each not in ones]].mean())
        for ones in itertools.combinations(range(4), 2)
    ]
    share = np.mean(np.asarray(differences) >= 4.5)  # both deals that separate them
    assert share == pytest.approx(2 / 6)
    found = permutation_test(difference(values), labels, permutations=4999)
    assert found.score == pytest.approx([4.5])
    assert found.p == pytest.approx([share], abs=0.03)
    assert found.q == pytest.approx([share], abs=0.03)


def test_a_smaller_neuron_is_not_held_against_a_larger_one() -> None:
    """Step-down: the neuron that is out of the way no longer counts among the largest of a deal."""
    values = neurons(1, 30, 2, 0.0)
    labels = np.arange(30) % 2
    values[labels == 1] *= [[30.0, 1.6]]
    found = permutation_test(difference(values), labels, permutations=999)
    alone = permutation_test(difference(values[:, 1:]), labels, permutations=999)
    assert found.p[0] < found.p[1] == alone.p[0]


def test_labels_stay_within_their_stratum() -> None:
    strata = np.arange(30) // 10
    labels = (np.arange(30) % 10 < strata + 2).astype(int)
    seen: list[np.ndarray] = []

    def score(dealt: np.ndarray) -> np.ndarray:
        seen.append(dealt)
        return np.asarray([dealt[:5].sum(), 1.0])

    found = permutation_test(score, labels, permutations=50, strata=strata)
    for dealt in seen:
        assert [int(dealt[strata == each].sum()) for each in range(3)] == [2, 3, 4]
    assert any((dealt != labels).any() for dealt in seen)
    assert found.z[1] == 0 and found.p[1] == 1  # nothing changes it


def test_the_same_seed_gives_the_same() -> None:
    values, labels = neurons(0, 20, 5, 0.0), np.arange(20) % 2
    one, two, other = (permutation_test(difference(values), labels, permutations=99, seed=each) for each in (3, 3, 4))
    assert one.p.tobytes() == two.p.tobytes() and one.q.tobytes() == two.q.tobytes()
    assert one.p.tobytes() != other.p.tobytes()


def test_benjamini_hochberg_is_that_of_scipy() -> None:
    made = np.random.default_rng(0)
    for number in (1, 2, 50):
        p = made.uniform(size=number) ** 3
        np.testing.assert_allclose(benjamini_hochberg(p), false_discovery_control(p), rtol=1e-12)
    assert benjamini_hochberg(np.zeros(0)).shape == (0,)


def test_what_it_can_resolve_is_said_and_no_more_is_given() -> None:
    values, labels = neurons(0, 20, 3, 0.0), np.arange(20) % 2
    found = permutation_test(difference(values), labels, permutations=19)
    assert found.least_p == 0.05
    assert found.p.min() >= found.least_p
    assert found.q.min() >= found.least_q(3)
    with pytest.raises(DataError, match=r"q < 0.01 cannot be reached with 19 permutations: at least 35 are needed"):
        found.below(0.01)
    assert "19 permutations" in repr(found) and "from 0.05" in repr(found)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"permutations": 18}, "at least 19"),
        ({"labels": np.zeros(20)}, "at least two of them differ"),
        ({"strata": np.zeros(19)}, "strata are"),
        ({"score": lambda labels: np.full(3, np.nan)}, "score of 3 neurons"),
        ({"score": lambda labels: np.zeros((3, 2))}, "one number for each neuron"),
        ({"score": lambda labels: np.zeros(3 if labels[0] else 4)}, "one number for each neuron"),
    ],
)
def test_bad_input_is_said(change: dict, match: str) -> None:
    given = {"score": lambda labels: np.zeros(3), "labels": np.arange(20) % 2, "permutations": 50} | change
    with pytest.raises(DataError, match=match):
        permutation_test(given.pop("score"), given.pop("labels"), **given)


@pytest.mark.parametrize("level", [0.0, 1.0, -0.1])
def test_a_rate_is_a_share(level: float) -> None:
    found = permutation_test(difference(neurons(0, 20, 3, 0.0)), np.arange(20) % 2, permutations=19)
    with pytest.raises(DataError, match="between 0 and 1"):
        found.below(level)


@pytest.mark.parametrize("p", [[-0.1], [1.1], [[0.1]], [float("nan")]])
def test_a_p_is_a_share(p: list) -> None:
    with pytest.raises(DataError, match="from 0 to 1"):
        benjamini_hochberg(np.asarray(p))
