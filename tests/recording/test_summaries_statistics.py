"""Moments, MinMax, FiringRate and Histogram: planted corner cases, compared with numpy on the full matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from patchclamp.errors import DataError, UnknownName
from patchclamp.recording import thresholds as thresholds_module
from patchclamp.recording.batch import Batch, Calibration, Setting
from patchclamp.recording.summaries import FiringRate, Histogram, MinMax, Moments
from patchclamp.recording.thresholds import FractionOfMaximum, OwnQuantile, resolve


def batch_of(values: np.ndarray | list[list[float]], dtype: torch.dtype = torch.float32) -> Batch:
    tensor = torch.as_tensor(np.asarray(values), dtype=dtype)
    rows = torch.arange(len(tensor))
    return Batch(tensor, rows // 7, rows % 7)


def setting_of(size: int, calibration: Calibration | None = None) -> Setting:
    return Setting("mlp.0", size, calibration=calibration)


# Moments --------------------------------------------------------------------------------------------


def test_moments_do_not_cancel_far_from_zero() -> None:
    random = np.random.default_rng(0)
    values = random.normal([1e4, -1e4, 0, 1e6], [0.1, 0.1, 1e-4, 10], size=(9000, 4)).astype(np.float32)
    moments = Moments().start(setting_of(4))
    for part in np.array_split(values, 11):
        moments.update(batch_of(part))
    wide = values.astype(np.float64)
    np.testing.assert_allclose(moments.mean, wide.mean(0), rtol=1e-12, atol=1e-18)
    np.testing.assert_allclose(moments.variance, wide.var(0), rtol=1e-10)
    np.testing.assert_allclose(moments.std, wide.std(0), rtol=1e-10)


def test_moments_when_the_data_drifts_by_many_deviations() -> None:
    random = np.random.default_rng(1)
    values = (random.normal(size=(4000, 3)) + np.linspace(-1e5, 1e5, 4000)[:, None]).astype(np.float32)
    moments = Moments().start(setting_of(3))
    for part in np.array_split(values, 40):
        moments.update(batch_of(part))
    np.testing.assert_allclose(moments.variance, values.astype(np.float64).var(0), rtol=1e-10)


@pytest.mark.parametrize("constant", [0.0, 0.1, -3.0e7, 1e-30])
def test_a_constant_neuron_has_variance_zero(constant: float) -> None:
    moments = Moments().start(setting_of(1))
    for rows in (1, 1000, 3):
        moments.update(batch_of(np.full((rows, 1), constant, dtype=np.float32)))
    exact = float(np.float32(constant))
    np.testing.assert_allclose(moments.mean, exact, rtol=1e-14)
    np.testing.assert_allclose(moments.variance, 0, atol=(1e-13 * exact) ** 2)


def test_moments_of_very_large_and_very_small_float32() -> None:
    values = np.array([[1e30, 1e-30], [3e30, 5e-30]], dtype=np.float32)
    moments = Moments().start(setting_of(2))
    moments.update(batch_of(values))
    np.testing.assert_allclose(moments.variance, values.astype(np.float64).var(0), rtol=1e-12)


def test_nothing_seen_is_not_a_number() -> None:
    moments, extremes = Moments().start(setting_of(2)), MinMax().start(setting_of(2))
    rate = FiringRate(0.0, 1.0).start(setting_of(2))
    for each in (moments, extremes, rate):
        each.update(batch_of(np.empty((0, 2))))
    assert moments.count == 0 and np.isnan(moments.mean).all() and np.isnan(moments.variance).all()
    assert np.isnan(extremes.min).all() and np.isnan(extremes.max).all()
    assert rate.count == 0 and rate.rate.shape == (2, 2) and np.isnan(rate.rate).all()
    moments.merge(Moments().start(setting_of(2)))
    moments.update(batch_of([[1.0, 2.0]]))
    np.testing.assert_array_equal(moments.mean, [1, 2])


# MinMax ---------------------------------------------------------------------------------------------


def test_min_max_keeps_the_dtype_and_knows_no_negative_zero() -> None:
    extremes = MinMax().start(setting_of(2))
    extremes.update(batch_of([[-0.0, -5.0], [-0.0, -7.0]]))
    assert extremes.min.dtype == np.float32 and extremes.max.tolist() == [0.0, -5.0]
    assert not np.signbit([extremes.min[0], extremes.max[0]]).any()
    third = 1 / 3
    extremes.update(batch_of([[third, third]], torch.float64))
    assert extremes.max.tolist() == [third, third] and extremes.max.dtype == np.float64


# FiringRate -----------------------------------------------------------------------------------------


def test_a_neuron_at_its_threshold_does_not_fire() -> None:
    rate = FiringRate().start(setting_of(3))
    rate.update(batch_of([[0.0, -0.0, 1e-40], [0.0, -1.0, -1e-40], [2.0, 0.0, 1e-40]]))
    assert rate.fired.tolist() == [[1], [0], [2]] and rate.fired.dtype == np.int64
    np.testing.assert_array_equal(rate.rate[:, 0], [1 / 3, 0, 2 / 3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_number_is_compared_as_torch_compares_it(dtype: torch.dtype) -> None:
    near = np.array([[np.float32(0.1)], [0.1], [np.nextafter(0.1, 1)], [np.nextafter(np.float32(0.1), np.float32(1))]])
    batch = batch_of(near, dtype)
    rate = FiringRate(0.1).start(setting_of(1))
    rate.update(batch)
    assert rate.fired[0, 0] == int((batch.values > 0.1).sum())


def test_relative_thresholds() -> None:
    maximum = np.array([4.0, -1.0], dtype=np.float32)
    calibration = Calibration(maximum, lambda q: np.array([q, -q], dtype=np.float32))
    template = FiringRate(FractionOfMaximum(0.5), OwnQuantile(0.9), 1.0)
    assert template.relative and not FiringRate(1.0).relative
    rate = template.start(setting_of(2, calibration))
    expected = np.array([[2, 0.9, 1], [0, 0, 1]], dtype=np.float32)
    np.testing.assert_array_equal(rate.thresholds, expected, strict=True)
    with pytest.raises(DataError, match=r"FractionOfMaximum.*mlp\.0.*not been calibrated"):
        template.start(setting_of(2))
    wrong = Calibration(np.array([1, np.nan], dtype=np.float32), lambda q: maximum[:1])
    for each in (FractionOfMaximum(0.5), OwnQuantile(0.5)):
        with pytest.raises(DataError, match="one finite number for each of 2 neurons"):
            resolve(each, setting_of(2, wrong))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "0", None, True, [0.0]])
def test_a_bad_threshold_is_refused(bad: object) -> None:
    with pytest.raises(DataError, match=r"threshold is a finite number|without brackets"):
        FiringRate(bad)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("kind", [FractionOfMaximum, OwnQuantile])
@pytest.mark.parametrize("bad", [-0.1, 1.1, "half", True])
def test_a_bad_share_is_refused(kind: type, bad: object) -> None:
    with pytest.raises(DataError, match=r"in \[0, 1\]"):
        kind(bad)


def test_thresholds_as_json() -> None:
    for each in (0.5, FractionOfMaximum(0.25), OwnQuantile(0.99)):
        assert thresholds_module.from_json(thresholds_module.to_json(each)) == each
    with pytest.raises(UnknownName, match="fraction_of_maximum"):
        thresholds_module.from_json({"fraction_of_max": 0.5})
    with pytest.raises(DataError, match="not a threshold"):
        thresholds_module.from_json({})


# Histogram ------------------------------------------------------------------------------------------


def histogram_of(values: np.ndarray, dtype: torch.dtype = torch.float32) -> Histogram:
    histogram = Histogram().start(setting_of(values.shape[1]))
    for part in np.array_split(values, 3):
        histogram.update(batch_of(part, dtype))
    return histogram


def test_bins_are_an_eighth_of_an_octave() -> None:
    edges = Histogram().start(setting_of(1)).edges
    assert len(edges) == 452 and edges[0] == -np.inf and edges[-1] == np.inf
    assert (np.diff(edges) > 0).all()
    inner = edges[1:-1]
    np.testing.assert_array_equal(inner, -inner[::-1])
    positive = inner[inner > 0]
    assert positive[0] == 2.0**-14 and positive[-1] == 2.0**14 and len(positive) == 28 * 8 + 1
    assert (np.diff(positive) <= positive[:-1] / 8).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_edge_belongs_to_the_bin_above_it(dtype: torch.dtype) -> None:
    number = np.float32 if dtype == torch.float32 else np.float64
    edges = Histogram().start(setting_of(1)).edges
    inner = edges[1:-1].astype(number)
    largest = np.finfo(np.float32).max
    values = np.concatenate([
        inner, np.nextafter(inner, number(np.inf)), np.nextafter(inner, number(-np.inf)),
        np.array([0.0, -0.0, 1e-45, -1e-45, largest, -largest], dtype=number),
    ])  # fmt: skip
    histogram = histogram_of(values[:, None], dtype)
    places = np.searchsorted(edges, values.astype(np.float64), side="right") - 1
    np.testing.assert_array_equal(histogram.counts[0], np.bincount(places, minlength=451))
    assert histogram.counts.dtype == np.int64


def test_quantiles_are_within_an_eighth() -> None:
    random = np.random.default_rng(3)
    values = np.stack([
        random.normal(size=5000),
        np.exp(random.normal(size=5000) * 2),
        -np.exp(random.normal(size=5000)),
        np.maximum(random.normal(size=5000), 0),
        np.full(5000, 0.3),
        random.choice([1.0, 1000.0], size=5000),
    ], axis=1).astype(np.float32)  # fmt: skip
    histogram = histogram_of(values)
    wanted = [0, 0.001, 0.01, 0.05, 0.25, 0.5, 0.77, 0.95, 0.99, 0.9999, 1]
    truth = np.quantile(values.astype(np.float64), wanted, axis=0).T
    found = histogram.quantile(wanted)
    assert found.shape == (6, len(wanted))
    assert (np.abs(found - truth) <= np.maximum(np.abs(truth) / 8, 2.0**-14)).all()
    assert (np.diff(found, axis=1) >= 0).all()
    np.testing.assert_array_equal(histogram.quantile(0.95), found[:, 7])
    # The zeros of a ReLU are zeros, not small numbers.
    assert found[3, 3] == 0


def test_quantiles_of_a_few_values_fall_between_them_as_in_numpy() -> None:
    values = np.array([[1.0], [2.0], [16.0]], dtype=np.float32)
    histogram = histogram_of(values)
    for q in (0.0, 0.25, 0.5, 0.6, 0.75, 1.0):
        truth = np.quantile(values, q)
        assert abs(histogram.quantile(q)[0] - truth) <= truth / 8


def test_quantiles_outside_the_range_and_of_nothing() -> None:
    histogram = histogram_of(np.array([[1e6, -1e6, 1e-6]] * 3, dtype=np.float32))
    np.testing.assert_array_equal(histogram.quantile(0.5), [2.0**14, -(2.0**14), 0])
    empty = Histogram().start(setting_of(2))
    assert np.isnan(empty.quantile(0.5)).all() and np.isnan(empty.probability_above(0.0)).all()
    for bad in (-0.1, 1.5, float("nan")):
        with pytest.raises(DataError, match=r"q in \[0, 1\]"):
            histogram.quantile(bad)


def test_probability_above() -> None:
    random = np.random.default_rng(4)
    values = np.stack([random.normal(size=8000), np.maximum(random.normal(size=8000), 0)], axis=1).astype(np.float32)
    histogram = histogram_of(values)
    for x in (-3.0, -1.0, -0.3, 0.0, 0.5, 0.51, 1.0, 1.9, 3.0):
        truth = (values > x).mean(0)
        place = np.searchsorted(histogram.edges, x, side="right") - 1
        in_bin = histogram.counts[:, place] / 8000
        found = histogram.probability_above(x)
        assert (np.abs(found - truth) <= in_bin).all()
        assert np.abs(found - truth).max() < 0.01
    assert histogram.probability_above(0.0)[1] == (values[:, 1] > 2.0**-14).mean()
    assert histogram.probability_above(-1e-9)[1] == 1
    assert histogram.probability_above(1e9).tolist() == [0, 0]
    assert histogram.probability_above(np.inf).tolist() == [0, 0]
    assert histogram.probability_above(-np.inf).tolist() == [1, 1]
    with pytest.raises(DataError, match="NaN"):
        histogram.probability_above(float("nan"))
