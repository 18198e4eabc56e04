"""What every summary does alike: templates, JSON, merging, states, sizes; and one that a user writes."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from typing import Any

import numpy as np
import pytest
import torch

from patchclamp.errors import DataError, UnknownName
from patchclamp.recording.batch import Batch, Calibration, Setting
from patchclamp.recording.summaries import (
    ByLabel,
    ByToken,
    FiringRate,
    Histogram,
    MinMax,
    Moments,
    Summary,
    TopExamples,
)
from patchclamp.recording.summaries import summary as summary_module
from patchclamp.recording.thresholds import FractionOfMaximum, OwnQuantile

SIZE = 6
TEMPLATES = [
    Moments(),
    MinMax(),
    FiringRate(),
    FiringRate(0.0, FractionOfMaximum(0.5), OwnQuantile(0.99)),
    TopExamples(3),
    TopExamples(3, context=1),
    Histogram(),
    ByLabel(),
    ByLabel("kind", of=[FiringRate(OwnQuantile(0.5)), TopExamples(2), ByToken([1, 2])]),
    ByToken(),
    ByToken([4, 2], threshold=OwnQuantile(0.9)),
]
every = pytest.mark.parametrize("template", TEMPLATES, ids=repr)


def setting_of(size: int = SIZE) -> Setting:
    maximum = np.full(size, 2, dtype=np.float32)
    labels = {"kind": ("code", "prose")}
    return Setting("mlp.0", size, np.array([1, 4, 2]), labels, Calibration(maximum, lambda q: maximum))


def batch_of(rows: int = 40, size: int = SIZE, device: str = "cpu") -> Batch:
    random = torch.Generator().manual_seed(rows)
    row = torch.arange(rows)
    return Batch(
        torch.randn(rows, size, generator=random).to(device),
        (row // 5).to(device),
        (row % 5).to(device),
        torch.randint(0, 6, (rows,), generator=random).to(device),
        {"kind": (row // 5 % 2).to(device)},
    )


def same(one: Summary, other: Summary) -> bool:
    left, right = one.state(), other.state()
    return left.keys() == right.keys() and all(np.array_equal(left[n], right[n], equal_nan=True) for n in left)


@every
def test_parameters_are_json_and_make_the_same_again(template: Summary) -> None:
    parameters = json.loads(json.dumps(template.parameters(), allow_nan=False))
    again = Summary.from_parameters(template.name, parameters)
    assert type(again) is type(template) and again.parameters() == template.parameters()
    assert repr(again) == repr(template) and again.relative == template.relative
    one, other = template.start(setting_of()), again.start(setting_of())
    one.update(batch_of())
    other.update(batch_of())
    assert same(one, other)


@every
def test_a_template_is_not_changed(template: Summary) -> None:
    one, other = template.start(setting_of()), template.start(setting_of())
    one.update(batch_of())
    assert same(other, template.start(setting_of())) and not same(one, other)
    assert not hasattr(template, "tensors")


@every
def test_a_batch_of_another_size_is_refused(template: Summary) -> None:
    started = template.start(setting_of())
    with pytest.raises(DataError, match=r"mlp\.0 has 6 neurons; the batch has 5"):
        started.update(batch_of(size=5))


@every
def test_one_neuron_and_one_row(template: Summary) -> None:
    started = template.start(setting_of(1))
    started.update(batch_of(1, 1))
    assert template.reopen(setting_of(1), started.state()).state().keys() == started.state().keys()


@every
def test_merging_refuses_what_differs(template: Summary) -> None:
    started = template.start(setting_of())
    with pytest.raises(DataError, match=r"5 neurons.* 6\b|parameters|categories"):
        started.merge(template.start(setting_of(5)))
    other = Moments() if template.name != "moments" else MinMax()
    with pytest.raises(DataError, match=f"cannot merge {type(other).__name__} into {type(template).__name__}"):
        started.merge(other.start(setting_of()))


def test_merging_names_the_parameters_and_thresholds_that_differ() -> None:
    with pytest.raises(DataError, match=r"k=4.*k=3.*parameters differ"):
        TopExamples(3).start(setting_of()).merge(TopExamples(4).start(setting_of()))
    ones = np.ones(SIZE, dtype=np.float32)
    other = Setting("mlp.0", SIZE, calibration=Calibration(ones, lambda q: ones))
    rate = FiringRate(FractionOfMaximum(0.5))
    with pytest.raises(DataError, match=r"firing_rate.*the thresholds differ"):
        rate.start(setting_of()).merge(rate.start(other))


@every
def test_a_state_that_does_not_fit_is_named_and_changes_nothing(template: Summary) -> None:
    started = template.start(setting_of())
    started.update(batch_of())
    state = started.state()
    name = next(iter(state))
    last = name.rsplit(".", 1)[-1]
    damaged: list[dict[str, Any]] = [
        {key: array for key, array in state.items() if key != name},
        state | {name: np.zeros((*state[name].shape, 2))},
        state | {name: state[name].astype(str)},
        state | {name: state[name].astype(object)},
        state | {"nonsense": np.zeros(3)},
    ]
    for each in damaged:
        with pytest.raises(DataError, match=f"{last}|nonsense"):
            started.restore(each)
        assert same(started, template.reopen(setting_of(), state))


def test_fractions_are_not_counts() -> None:
    started = Moments().start(setting_of())
    with pytest.raises(DataError, match=r"'count'.*whole numbers"):
        started.restore(started.state() | {"count": np.array(1.5)})


@every
def test_nbytes_without_data(template: Summary) -> None:
    settings = [setting_of(1536), setting_of(3)]
    held = sum(array.nbytes for each in settings for array in template.start(each).state().values())
    assert template.nbytes(settings) == pytest.approx(held, rel=0.05)
    assert template.nbytes([]) == 0


def test_nbytes_needs_no_calibration() -> None:
    assert FiringRate(FractionOfMaximum(0.5)).nbytes([Setting("mlp.0", 10)]) > 0
    assert TopExamples(10**7).nbytes([Setting("mlp.0", 10**5)]) == 12 * 10**12  # nothing of that size is made


def test_names() -> None:
    assert Summary.named("moments") is Moments
    with pytest.raises(UnknownName, match=r"'moment'.*moments.*imported"):
        Summary.from_parameters("moment", {})
    with pytest.raises(DataError, match=r"top_examples cannot be made from .*kk"):
        Summary.from_parameters("top_examples", {"kk": 3})
    with pytest.raises(DataError, match=r"firing_rate cannot be made"):
        Summary.from_parameters("firing_rate", {})
    with pytest.raises(DataError, match="called 'moments' already"):
        type("Other", (Moments,), {"name": "moments"})
    with pytest.raises(DataError, match="'my summary' cannot be its name"):
        type("Other", (Moments,), {"name": "my summary"})


@pytest.fixture
def no_other_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry of its own, without the "energy" of another test."""
    known = {name: kind for name, kind in summary_module._registry.items() if name != "energy"}
    monkeypatch.setattr(summary_module, "_registry", known)


@pytest.mark.usefixtures("no_other_energy")
def test_the_recipe_of_the_docstring_makes_a_summary() -> None:
    """The example in the docstring of `Summary`, run as it stands."""
    recipe = re.search(r"```python\n(.*?)```", inspect.getdoc(Summary) or "", re.DOTALL)
    assert recipe is not None
    space: dict[str, Any] = {"Summary": Summary, "torch": torch, "__name__": "notebook"}
    for _ in range(2):  # a notebook cell may be run twice
        exec(textwrap.dedent(recipe[1]), space)
    template = Summary.from_parameters("energy", {})
    one, other = template.start(setting_of()), template.start(setting_of())
    one.update(batch_of(40))
    other.update(batch_of(7))
    one.merge(template.reopen(setting_of(), other.state()))
    seen = torch.cat([batch_of(40).values, batch_of(7).values]).double()
    np.testing.assert_allclose(one.mean_square, seen.square().mean(0))  # pyright: ignore[reportAttributeAccessIssue]
    assert template.nbytes([setting_of()]) == 8 + 8 * SIZE


def test_a_summary_without_its_three_methods_says_which() -> None:
    half = type("Half", (Summary,), {"name": "half", "empty": lambda self, setting: {}})
    with pytest.raises(TypeError, match=r"add.*combine|combine.*add"):
        half()


# Batch ----------------------------------------------------------------------------------------------


def test_a_batch_checks_its_shapes() -> None:
    three, four = torch.zeros(3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(DataError, match=r"\[rows, size\], not \[3\]"):
        Batch(torch.zeros(3), three, three)
    with pytest.raises(DataError, match="float16"):
        Batch(torch.zeros(3, 2, dtype=torch.float16), three, three)
    with pytest.raises(DataError, match=r"3 rows has position of shape \[4\]"):
        Batch(torch.zeros(3, 2), three, four)
    with pytest.raises(DataError, match=r"3 rows has label 'kind' of shape \[4\]"):
        Batch(torch.zeros(3, 2), three, three, three, {"kind": four})


@pytest.mark.parametrize("rows", [0, 1, 31, 32, 33, 100])
def test_what_a_batch_computes_once(rows: int) -> None:
    batch = batch_of(rows)
    parts = [batch.values[start : start + 32] for start in range(0, rows, 32)]
    assert torch.equal(batch.group_maximum, torch.stack([each.amax(0) for each in parts]) if parts else batch.values)
    assert batch.group_maximum is batch.group_maximum
    assert torch.equal(torch.cat([batch.values[:0], *batch.blocks()]), batch.values)
    assert torch.equal(batch.rank.argsort(), torch.arange(rows))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: torch.cuda.is_available() is False")
@every
def test_on_a_gpu_the_result_is_the_same(template: Summary) -> None:
    here, there = template.start(setting_of()), template.start(setting_of())
    for rows in (40, 700, 33):
        here.update(batch_of(rows))
        there.update(batch_of(rows, device="cuda"))
    assert all(each.device.type == "cuda" for each in there.tensors.values())
    there.merge(here)
    here.merge(template.reopen(setting_of(), here.state()))
    for name, array in here.state().items():
        if array.dtype.kind == "f":
            np.testing.assert_allclose(there.state()[name], array, rtol=1e-9, atol=1e-12)
        else:
            np.testing.assert_array_equal(there.state()[name], array)
