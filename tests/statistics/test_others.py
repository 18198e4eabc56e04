"""Ranking, bootstrap and effect sizes, beside scikit-learn and scipy, and by what they promise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap as scipy_bootstrap
from scipy.stats import ttest_ind
from sklearn.metrics import average_precision_score, roc_auc_score

from patchclamp.errors import DataError, UnknownName
from patchclamp.statistics import average_precision, bootstrap, cohens_d, recall_at, roc_auc, welch


@given(st.integers(0, 2**31), st.integers(2, 60), st.integers(1, 6))
def test_ranking_is_that_of_scikit_learn(seed: int, items: int, levels: int) -> None:
    made = np.random.default_rng(seed)
    right = made.permutation(np.arange(items) % 3 == 0)
    score = np.column_stack([made.standard_normal(items), made.integers(levels, size=items)])
    expected = [average_precision_score(right, each) for each in score.T]
    np.testing.assert_allclose(average_precision(right, score), expected, rtol=1e-12)
    assert average_precision(right, score[:, 1]).shape == ()
    np.testing.assert_allclose(roc_auc(right, score), [roc_auc_score(right, each) for each in score.T], rtol=1e-12)


def test_recall_at_a_count() -> None:
    right = np.asarray([True, False, True, False])
    assert recall_at(right, np.asarray([4.0, 3, 2, 1])) == 0.5
    assert recall_at(right, np.asarray([4.0, 3, 2, 1]), 3) == 1.0
    assert recall_at(right, np.ones(4)) == 0.5  # two of four by chance
    assert recall_at(right, np.asarray([4.0, 1, 1, 1])) == pytest.approx(0.5 + 0.5 / 3)
    assert recall_at(right, np.zeros(4), 9) == 1.0


def test_the_interval_is_that_of_scipy() -> None:
    values = np.exp(np.random.default_rng(0).standard_normal((80, 3)))
    found = bootstrap(lambda rows: values[rows].mean(0), 80, draws=20_000, level=0.9)
    for neuron in range(3):
        theirs = scipy_bootstrap(
            (values[:, neuron],), np.mean, n_resamples=20_000, confidence_level=0.9, rng=np.random.default_rng(1)
        ).confidence_interval
        assert found.value[neuron] == pytest.approx(values[:, neuron].mean())
        assert (found.low[neuron], found.high[neuron]) == pytest.approx((theirs.low, theirs.high), rel=0.015)


@pytest.mark.parametrize("way", ["bca", "percentile"])
def test_it_holds_the_true_value_as_often_as_it_says(way: str) -> None:
    held = []
    for seed in range(40):
        values = np.random.default_rng(seed).standard_normal((60, 20)) + 3
        found = bootstrap(lambda rows, values=values: values[rows].mean(0), 60, draws=400, way=way, seed=seed)
        held += ((found.low <= 3) & (found.high >= 3)).tolist()
    assert 0.91 < np.mean(held) < 0.97


def test_each_stratum_keeps_its_size() -> None:
    strata, seen = np.repeat([0, 1], [3, 17]), []

    def statistic(rows: np.ndarray) -> np.ndarray:
        seen.append(int((strata[rows] == 0).sum()))
        return np.asarray([rows.mean()])

    bootstrap(statistic, 20, draws=200, strata=strata, way="percentile")
    assert set(seen) == {3}


def test_effect_sizes() -> None:
    made = np.random.default_rng(0)
    one, two = made.standard_normal((30, 4)) + np.arange(4), made.standard_normal((12, 4)) * 2
    facts = (one.mean(0), one.var(0), 30, two.mean(0), two.var(0), 12)
    spread = np.sqrt((29 * one.var(0, ddof=1) + 11 * two.var(0, ddof=1)) / 40)
    np.testing.assert_allclose(cohens_d(*facts, unbiased=False), (one.mean(0) - two.mean(0)) / spread)
    np.testing.assert_allclose(cohens_d(*facts), cohens_d(*facts, unbiased=False) * (1 - 3 / 159))
    expected: Any = ttest_ind(one, two, equal_var=False)
    t, p = welch(*facts)
    np.testing.assert_allclose(t, expected.statistic)
    np.testing.assert_allclose(p, expected.pvalue)


def test_neurons_that_never_change() -> None:
    zero, one = np.zeros(1), np.ones(1)
    assert cohens_d(zero, zero, 5, zero, zero, 5) == 0
    assert cohens_d(one, zero, 5, zero, zero, 5) == np.inf
    assert welch(zero, zero, 5, zero, zero, 5) == (0, 1)
    assert welch(one, zero, 5, zero, zero, 5) == (np.inf, 0)


def test_bad_input_is_said() -> None:
    with pytest.raises(DataError, match="none is right"):
        average_precision(np.zeros(3), np.zeros(3))
    with pytest.raises(DataError, match="not a finite number"):
        roc_auc(np.asarray([1, 0]), np.asarray([np.nan, 1]))
    with pytest.raises(DataError, match="all are right"):
        roc_auc(np.ones(3), np.zeros(3))
    with pytest.raises(DataError, match="have scores"):
        average_precision(np.ones(3), np.zeros(4))
    with pytest.raises(DataError, match="one score"):
        recall_at(np.ones(3), np.zeros((3, 2)))
    with pytest.raises(DataError, match="at least 1"):
        recall_at(np.ones(3), np.zeros(3), 0)
    with pytest.raises(DataError, match="at least two"):
        cohens_d(0, 1, 1, 0, 1, 5)
    with pytest.raises(DataError, match="at least two"):
        welch(0, 1, 5, 0, 1, 1)
    with pytest.raises(UnknownName, match="percentile"):
        bootstrap(lambda rows: rows, 5, way="percentiles")
    with pytest.raises(DataError, match="at least two"):
        bootstrap(lambda rows: rows, 1)
    with pytest.raises(DataError, match="at least 1000"):
        bootstrap(lambda rows: rows, 5, draws=500, level=0.99)
    with pytest.raises(DataError, match="strata are"):
        bootstrap(lambda rows: rows, 5, strata=np.zeros(4))
