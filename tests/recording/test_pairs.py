"""`CoFiring` and `Correlation` from recordings: against all activations of each text, saved and opened, and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.recording import tiny
from tests.recording.tiny import CASES, alone, recorded
from torch import nn

import patchclamp as pc
from patchclamp.errors import DataError, UnknownName
from patchclamp.recording import Partners
from patchclamp.recording.batch import Batch, Setting
from patchclamp.recording.summaries import CoFiring, Correlation, Summary, pairs

TEXTS = tiny.texts()
CASE = CASES["bert"]


def model(dtype: torch.dtype = torch.float32) -> pc.Model:
    return pc.load(CASE.build().to(dtype), tokenizer=tiny.tokenizer(CASE.template))


def test_a_recording_says_which_neurons_fire_together() -> None:
    network = model()
    recording = recorded(network, TEXTS, list(CASE.sites), [pc.CoFiring(0.05, partners=3)])
    for site, rows in alone(network.module, CASE.sites, network.tokenizer, TEXTS).items():
        found = recording[site].co_firing
        fires = (rows.values > 0.05).astype(np.float64)
        np.testing.assert_array_equal(found.both, fires.T @ fires)
        assert found.count == len(fires) and found.partners().indices.shape == (tiny.HIDDEN, 3)


@pytest.mark.parametrize("with_", [None, "mlp.0"])
def test_a_recording_says_which_neurons_are_correlated(with_: str | None) -> None:
    network = model(torch.float64)  # in single precision, texts alone and in batches differ by more than the summary
    recording = recorded(network, TEXTS, list(CASE.sites), [pc.Correlation(with_)])
    rows = alone(network.module, CASE.sites, network.tokenizer, TEXTS)
    for site in CASE.sites:
        other = rows[with_ or site].values.astype(np.float64)
        both = np.corrcoef(rows[site].values.astype(np.float64), other, rowvar=False)
        np.testing.assert_allclose(
            recording[site].correlation.r, both[: tiny.HIDDEN, tiny.HIDDEN :], rtol=0, atol=1e-10
        )


def test_a_relative_threshold_is_calibrated() -> None:
    network = model()
    recording = recorded(network, TEXTS, list(CASE.sites), [pc.CoFiring(), pc.MinMax()])
    for site, rows in alone(network.module, CASE.sites, network.tokenizer, TEXTS).items():
        found = recording[site].co_firing
        np.testing.assert_allclose(found.threshold, np.maximum(recording[site].min_max.max, 0) / 2, rtol=1e-6)
        np.testing.assert_array_equal(found.fired, (rows.values > found.threshold).sum(0))


@pytest.mark.parametrize("summary", [pc.CoFiring(0.0, block=(3, 9)), pc.Correlation("mlp.1", block=(0, 5))], ids=repr)
def test_it_comes_back_from_disk(summary: Summary, tmp_path: Path) -> None:
    recording = recorded(model(), TEXTS, list(CASE.sites), [summary])
    recording.save(tmp_path / "store")
    opened = pc.Recording.open(tmp_path / "store")
    for site in CASE.sites:
        here, there = (each[site].summaries[summary.name] for each in (recording, opened))
        assert there.parameters() == here.parameters() == summary.parameters()
        for name, array in here.state().items():
            np.testing.assert_array_equal(there.state()[name], array, strict=True)
        for mine, other in zip(partners_of(here), partners_of(there), strict=True):
            np.testing.assert_array_equal(mine, other, strict=True)


def partners_of(summary: Any) -> Partners:
    return summary.partners()


def test_neurons_that_do_the_same_find_each_other() -> None:
    """Neuron 7 of the second site copies neuron 2 of the first, and neuron 5 turns it upside down."""
    torch.manual_seed(0)
    second = nn.Linear(8, 8)
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), second, nn.Identity(), nn.Linear(8, 1))
    with torch.no_grad():
        for neuron, sign in ((7, 2.0), (5, -1.0)):
            second.weight[neuron] = 0.0
            second.weight[neuron, 2] = sign
    sites = ["module:1", "module:3"]
    recording = recorded(pc.load(network.eval()), torch.randn(300, 4), sites, [pc.Correlation("module:1", partners=1)])
    partners = recording["module:3"].correlation.partners()
    assert partners.indices[7] == partners.indices[5] == 2
    np.testing.assert_allclose(partners.scores[[7, 5], 0], [1, -1], atol=1e-6)
    itself = recording["module:1"].correlation.partners()
    assert (itself.indices[:, 0] != np.arange(8)).all()


def test_sites_of_a_size_that_only_a_pass_tells() -> None:
    """A module's output has no size before the first forward pass."""
    network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    data = torch.randn(50, 4)
    recording = recorded(pc.load(network.eval()), data, ["module:1", "module:2"], [pc.Correlation("module:2")])
    values = torch.tanh(network[0](data)), network(data)
    expected = np.corrcoef(*(each.detach().double().numpy() for each in values), rowvar=False)[:6, 6:]
    np.testing.assert_allclose(recording["module:1"].correlation.r, expected, rtol=0, atol=5e-6)


def test_rows_that_are_not_finite_at_either_site_are_left_out() -> None:
    """The first site is infinite on three rows, the second NaN on them and on others where the first is finite."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Identity(), nn.Identity()

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return self.second(torch.log(self.first(1 / given)))

    data = torch.randn(60, 3).abs() + 0.5
    data[:3] = 0.0  # 1 / 0 and its logarithm are infinite
    data[3:8, 1] = -1.0  # the logarithm is NaN
    kept = data[8:].double().numpy()
    sites = ["module:first", "module:second"]
    with pytest.warns(UserWarning, match="rows were left out"):
        recording = recorded(pc.load(Network().eval()), data, sites, [pc.Correlation("module:second")])
    found = recording["module:first"].correlation
    assert found.count == 52 and recording["module:first"].count == 57
    expected = np.corrcoef(1 / kept, np.log(1 / kept), rowvar=False)[:3, 3:]
    np.testing.assert_allclose(found.r, expected, rtol=0, atol=5e-6)


def test_sites_without_the_same_rows_are_refused() -> None:
    class Network(nn.Module):
        """The second site has a row for each example where the first has four."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Identity(), nn.Identity()

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(given).mean(1))

    with pytest.raises(DataError, match=r"module:first has 4 rows where module:second has 1, .*same rows"):
        recorded(
            pc.load(Network().eval()),
            torch.randn(10, 4, 3),
            ["module:first", "module:second"],
            [pc.Correlation("module:second")],
        )


def test_a_site_that_is_not_recorded_is_named() -> None:
    with pytest.raises(UnknownName, match=r"'mlp\.9'.*mlp\.1.*sites="):
        recorded(model(), TEXTS, "mlp.*", [pc.Correlation("mlp.9")])


def test_too_many_pairs_are_refused_before_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "MOST_PAIRS", 10 * tiny.HIDDEN)
    network = model()
    network.select("mlp.*")  # may run the model to see how it works
    passes = []
    network.module.register_forward_pre_hook(lambda *_: passes.append(1))
    for summary in (pc.CoFiring(0.0), pc.Correlation()):
        with pytest.raises(DataError, match=r"24 x 24 pairs of neurons at mlp\.0 .*block=\(0, 10\)"):
            recorded(network, TEXTS, "mlp.*", [summary])
    assert not passes
    recorded(network, TEXTS, "mlp.*", [pc.CoFiring(0.0, block=(0, 10)), pc.Correlation(block=(14, 24))])


@pytest.mark.parametrize("kind", [CoFiring, Correlation])
def test_bad_parameters(kind: Any) -> None:
    name = kind.__name__
    for block in ((3,), (3, 3), (-1, 2), (5, 2), "ab", (0, 2.5), 7):
        with pytest.raises(DataError, match=rf"{name}: .*block"):
            kind(block=block)
    for partners in (0, -1, 2.5, True):
        with pytest.raises(DataError, match=rf"{name}: the number of partners"):
            kind(partners=partners)
    with pytest.raises(DataError, match=rf"{name}: block=\(2, 9\), and mlp\.0 has 4 neurons"):
        kind(block=(2, 9)).start(Setting("mlp.0", 4, calibration=None) if kind is Correlation else no_threshold(4))


def no_threshold(size: int) -> Setting:
    from patchclamp.recording.batch import Calibration

    return Setting("mlp.0", size, calibration=Calibration(np.ones(size), lambda q: np.ones(size)))


def test_correlation_needs_the_other_sites_values() -> None:
    with pytest.raises(DataError, match=r"'mlp\.3', not 3"):
        Correlation(3)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"mlp\.0 with mlp\.1: that site's size is not known"):
        Correlation("mlp.1").start(Setting("mlp.0", 4))
    started = Correlation("mlp.1").start(Setting("mlp.0", 4, sizes={"mlp.1": 2}))
    index = torch.arange(3)
    with pytest.raises(DataError, match=r"needs the values of mlp\.1"):
        started.update(Batch(torch.zeros(3, 4), index, index))
    with pytest.raises(DataError, match=r"mlp\.1 has 2 neurons; the batch has 5"):
        started.update(Batch(torch.zeros(3, 4), index, index, others={"mlp.1": torch.zeros(3, 5)}))
    with pytest.raises(DataError, match=r"mlp\.1: 3 neurons|3 neurons of mlp\.1 there, 2 here"):
        started.merge(Correlation("mlp.1").start(Setting("mlp.0", 4, sizes={"mlp.1": 3})))
    with pytest.raises(DataError, match=r"3 rows has mlp\.1 of shape \[2, 2\]"):
        Batch(torch.zeros(3, 4), index, index, others={"mlp.1": torch.zeros(2, 2)})


def test_counts_widen_where_32_bits_do_not_hold_them() -> None:
    summary = CoFiring(0.0)
    started = summary.start(Setting("mlp.0", 2))
    index = torch.arange(4)
    started.update(Batch(torch.tensor([[1.0, 1], [1, 0], [0, 1], [1, 1]]), index, index))
    state = started.state()
    state = {name: each if name == "threshold" else each * 2**29 for name, each in state.items()}
    parts = [summary.reopen(Setting("mlp.0", 2), state) for _ in range(2)]
    parts[0].merge(parts[1])
    assert parts[0].count == 2**32
    np.testing.assert_array_equal(parts[0].both, np.array([[3, 2], [2, 3]]) * 2**30)


@pytest.mark.parametrize("how", ["autocast", "lower precision"])
def test_it_is_as_exact_where_torch_may_multiply_less_exactly(how: str) -> None:
    values = torch.randn(600, 20, generator=torch.Generator().manual_seed(0))
    index, setting = torch.arange(600), Setting("mlp.0", 20)
    started: list[Any] = [CoFiring(0.0).start(setting), Correlation().start(setting)]
    before = torch.get_float32_matmul_precision()
    try:
        if how == "lower precision":
            torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            for each in started:
                each.update(Batch(values, index, index))
    finally:
        torch.set_float32_matmul_precision(before)
    fires = (values > 0).double()
    np.testing.assert_array_equal(started[0].both, (fires.T @ fires).numpy())
    expected = np.corrcoef(values.double().numpy(), rowvar=False)
    # What torch may round is not left to it: such values are multiplied in float64.
    np.testing.assert_allclose(started[1].r, expected, rtol=0, atol=1e-6 if how == "autocast" else 1e-12)


def test_of_equal_partners_the_smaller_index_comes_first() -> None:
    """Among so many that a sort which is not stable would mix them."""
    values = (torch.arange(120) % 3 == torch.arange(3)[:, None]).float()  # three groups of 40 that fire alike
    index, setting = torch.arange(3), Setting("mlp.0", 120)
    for template in (CoFiring(0.5, partners=None), Correlation(partners=39)):
        started: Any = template.start(setting)
        started.update(Batch(values, index, index))
        found = started.partners(39).indices
        for neuron in range(120):
            assert found[neuron].tolist() == [each for each in range(neuron % 3, 120, 3) if each != neuron]


def test_constant_neurons_have_no_correlation_and_no_partners() -> None:
    """Also in float64, where the mean of equal numbers may differ from them by rounding."""
    values = torch.randn(1000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values[:, 2] = 0.7
    index = torch.arange(1000)
    started = Correlation(partners=None).start(Setting("mlp.0", 4, dtype=torch.float64))
    started.update(Batch(values[:963], index[:963], index[:963]))
    started.update(Batch(values[963:], index[963:], index[963:]))
    assert started.array("row_deviation")[2] > 0  # by rounding alone
    assert np.isnan(started.r[2]).all() and np.isnan(started.r[:, 2]).all()
    partners = started.partners()
    assert (partners.indices[2] == -1).all() and np.isnan(partners.scores[2]).all()
    assert (partners.indices[0, :2] != 2).all() and partners.indices[0, 2] == -1
    assert np.isnan(Correlation().start(Setting("mlp.0", 3)).r).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: torch.cuda.is_available() is False")
@pytest.mark.parametrize("template", [CoFiring(0.1), Correlation(), Correlation("mlp.1")], ids=repr)
def test_on_a_gpu_the_result_is_the_same(template: Summary) -> None:
    random = torch.Generator().manual_seed(0)
    setting = Setting("mlp.0", 30, sizes={"mlp.1": 20})
    here, there = template.start(setting), template.start(setting)
    for rows in (40, 1700, 33):
        values, others = torch.randn(rows, 30, generator=random), torch.randn(rows, 20, generator=random)
        index = torch.arange(rows)
        here.update(Batch(values, index, index, others={"mlp.1": others}))
        on = [each.cuda() for each in (values, index, others)]
        there.update(Batch(on[0], on[1], on[1], others={"mlp.1": on[2]}))
    there.merge(here)
    here.merge(template.reopen(setting, here.state()))
    for name, array in here.state().items():
        np.testing.assert_allclose(there.state()[name], array, rtol=1e-5, atol=2e-3)
