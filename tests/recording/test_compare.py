"""`Recording.compare`: what changed comes first, with figures that full activations confirm; the rest is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from tests.recording import tiny
from tests.recording.tiny import CASES, alone, recorded, weight

import patchclamp as pc
from patchclamp.errors import DataError

TEXTS = tiny.texts()
CASE = CASES["bert"]
SUMMARIES = (pc.Moments, pc.MinMax, pc.FiringRate, pc.Histogram, pc.TopExamples)


def model(**options: Any) -> pc.Model:
    return pc.load(CASE.build(), tokenizer=tiny.tokenizer(CASE.template), **options)


def edited(site: str = "mlp.1", neuron: int = 5, factor: float = 2.0) -> pc.Model:
    """The same model, but one neuron is given another input."""
    network = model()
    layer = site.split(".")[1]
    weight(network, f"encoder.layer.{layer}.intermediate.dense.weight")[neuron] *= -factor
    return network


def rows_of(network: pc.Model) -> dict[str, Any]:
    return alone(network.module, CASE.sites, network.tokenizer, TEXTS)


def of(table: pc.Neurons, column: str) -> np.ndarray:
    """The column in the order of the neurons of mlp.1, the only site in the table."""
    return table.to_polars().sort("index")[column].to_numpy()


@pytest.mark.parametrize("kept", [*SUMMARIES, None])
def test_the_edited_neuron_comes_first(kept: Any) -> None:
    """By whichever summary both recordings hold, and by all of them."""
    held = [kept()] if kept is not None else [each() for each in SUMMARIES]
    before, after = (recorded(each, TEXTS, "mlp.*", held) for each in (model(), edited(neuron=5)))
    table = before.compare(after)
    assert table.names[0] == "mlp.1:5" and len(table) == 2 * tiny.HIDDEN
    scores = table["score"].to_numpy()
    assert 0 < scores[0] <= 1 and (np.diff(scores) <= 0).all()
    # What comes before the edited neuron, and its neighbours in the layer, have not changed.
    others = [float(score) for name, score in zip(table.names, scores, strict=True) if name != "mlp.1:5"]
    assert max(others) < 1e-4
    assert set(table["site"]) == set(CASE.sites)


def test_every_column_is_what_the_activations_say() -> None:
    networks = (model(), edited("mlp.0", 3))  # an edit of the first layer moves all neurons of the second
    held = [pc.Moments(), pc.MinMax(), pc.FiringRate(0.0, 0.05), pc.Histogram(), pc.TopExamples(7)]
    before, after = (recorded(each, TEXTS, "mlp.1", held) for each in networks)
    table = before.compare(after)
    one, other = (rows_of(each)["mlp.1"] for each in networks)
    values = [each.values.astype(np.float64) for each in (one, other)]
    means, variances = ([getattr(each, how)(0) for each in values] for how in ("mean", "var"))
    close: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-5}
    np.testing.assert_allclose(of(table, "mean_before"), means[0], **close)
    np.testing.assert_allclose(of(table, "mean_after"), means[1], **close)
    difference = (means[1] - means[0]) / np.sqrt((variances[0] + variances[1]) / 2)
    np.testing.assert_allclose(of(table, "mean_difference"), difference, **close)
    rates = [(each > 0).mean(0) for each in values]
    for name, expected in (("before", rates[0]), ("after", rates[1]), ("difference", rates[1] - rates[0])):
        np.testing.assert_allclose(of(table, f"firing_rate_{name}"), expected, atol=1e-12)
    np.testing.assert_allclose(of(table, "max_before"), values[0].max(0), **close)
    np.testing.assert_allclose(of(table, "max_after"), values[1].max(0), **close)
    edges = before["mlp.1"].histogram.edges
    bins = [np.searchsorted(edges, each, side="right") for each in values]
    for neuron in range(tiny.HIDDEN):
        shares = [np.bincount(each[:, neuron], minlength=len(edges) + 1) / len(each) for each in bins]
        distance = np.abs(shares[1] - shares[0]).sum() / 2
        assert of(table, "histogram_distance")[neuron] == pytest.approx(distance, abs=0.02)
        places = [set(best(each, neuron, 7)) for each in (one, other)]
        assert of(table, "top_overlap")[neuron] == len(places[0] & places[1]) / len(places[0] | places[1])
    np.testing.assert_array_equal(of(table, "score"), of(table, "histogram_distance"))
    assert of(table, "histogram_distance").max() > 0.2 and of(table, "top_overlap").min() < 0.8


def best(rows: Any, neuron: int, k: int) -> list[tuple[int, int]]:
    keys = zip(-rows.values[:, neuron], rows.example.tolist(), rows.position.tolist(), strict=True)
    return [(example, position) for _, example, position in sorted(keys)[:k]]


def test_without_histograms_the_score_is_the_overlap_of_two_normal_distributions() -> None:
    before, after = (recorded(each, TEXTS, "mlp.1", [pc.Moments()]) for each in (model(), edited("mlp.0")))
    table = before.compare(after)
    d = np.abs(table["mean_difference"].to_numpy())
    np.testing.assert_allclose(table["score"].to_numpy(), 2 * norm.cdf(d / 2) - 1, atol=1e-12)
    assert d.max() > 0.01


def test_constant_neurons() -> None:
    """A neuron that stays as it is has not changed; one that is constant elsewhere is infinitely far away."""
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1)).eval()
    linear = network[0]
    assert isinstance(linear, torch.nn.Linear)
    with torch.no_grad():
        linear.weight[:2] = 0.0
        linear.bias[:2] = 1.0
    other = copy.deepcopy(network)
    with torch.no_grad():
        other[0].bias[1] = 0.5  # type: ignore[index]
    data = torch.randn(40, 3)
    before, after = (recorded(pc.load(each), data, "mlp.*", [pc.Moments()]) for each in (network, other))
    table = before.compare(after)
    assert table.names[0] == "mlp.0:1"
    assert table["mean_difference"].to_list() == [-np.inf, 0, 0, 0] and table["score"].to_list() == [1, 0, 0, 0]


def test_a_recording_that_was_saved_compares_as_the_one_in_memory(tmp_path: Path) -> None:
    before, after = (recorded(each, TEXTS, "mlp.*") for each in (model(), edited()))
    expected = before.compare(after)
    before.save(tmp_path / "before")
    assert pc.Recording.open(tmp_path / "before").compare(after) == expected
    assert (before.compare(before)["score"] == 0).all() and (before.compare(before)["top_overlap"] == 1).all()


def test_other_data_is_refused_unless_it_is_meant() -> None:
    network = model()
    here, there = (recorded(network, each, "mlp.*") for each in (TEXTS, tiny.texts(20, seed=3)))
    with pytest.raises(DataError, match=r"different data, 'texts' and 'texts'.*same_data=False"):
        here.compare(there)
    table = here.compare(there, same_data=False)
    assert "top_overlap" not in table.columns and "histogram_distance" in table.columns
    shorter = recorded(network, TEXTS, "mlp.*", max_length=6)
    with pytest.raises(DataError, match=r"read their data differently .*same_data=False"):
        here.compare(shorter)


def test_other_sites_sizes_and_summaries_are_refused() -> None:
    network = model()
    both, first = (recorded(network, TEXTS, each, [pc.Moments()]) for each in ("mlp.*", "mlp.0"))
    with pytest.raises(DataError, match=r"different sites: mlp\.1 is not in the second"):
        both.compare(first)
    with pytest.raises(DataError, match=r"different sites: mlp\.1 is not in the first"):
        first.compare(both)
    wider = pc.load(tiny.bert(intermediate_size=30), tokenizer=network.tokenizer)
    with pytest.raises(DataError, match=r"mlp\.0 has 24 neurons in the first recording and 30 in the second"):
        both.compare(recorded(wider, TEXTS, "mlp.*", [pc.Moments()]))
    for held in ([pc.MinMax()], [pc.CoFiring(0.0)]):
        with pytest.raises(DataError, match=rf"hold moments and {held[0].name}; wanted is one of Histogram, Moments"):
            both.compare(recorded(network, TEXTS, "mlp.*", held))
    rates = [recorded(network, TEXTS, "mlp.*", [pc.FiringRate(each), pc.MinMax()]) for each in (0.0, 0.1)]
    assert rates[0].compare(rates[1]).columns == ["site", "index", "score", "max_before", "max_after"]
