"""ByPosition, NGrams, Exemplars and Pooled: what they do alike, by hand, and what they refuse."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import patchclamp as pc
from patchclamp.errors import DataError, UnknownName
from patchclamp.recording import Batch, Calibration, Setting, Summary
from patchclamp.recording.summaries import pooled as pooled_module

SIZE, EXAMPLES = 6, 8
TEMPLATES = [
    pc.ByPosition(3),
    pc.ByPosition(threshold=pc.OwnQuantile(0.9)),
    pc.NGrams(2, 4, threshold=0.5),
    pc.NGrams(),
    pc.Exemplars(2, context=1),
    pc.Exemplars(3, 0.9, 0, (0.1, 0.2), 5),
    pc.Pooled(),
    pc.Pooled("fired", pc.FractionOfMaximum(0.5), "float32"),
]
every = pytest.mark.parametrize("template", TEMPLATES, ids=repr)


def setting_of(size: int = SIZE, **more: Any) -> Setting:
    maximum = np.full(size, 2, dtype=np.float32)
    calibration = Calibration(maximum, lambda q: maximum, lambda q: maximum * np.float32(q - 0.5))
    return replace(Setting("mlp.0", size, calibration=calibration, examples=EXAMPLES), **more)


def batch_of(rows: int = 40, size: int = SIZE, first: int = 0) -> Batch:
    random = torch.Generator().manual_seed(rows + first)
    row = torch.arange(rows)
    values, token = torch.randn(rows, size, generator=random), torch.randint(0, 6, (rows,), generator=random)
    return Batch(values, first + row // 5, row % 5, token)


def same(one: Summary, other: Summary) -> bool:
    left, right = one.state(), other.state()
    return left.keys() == right.keys() and all(np.array_equal(left[n], right[n], equal_nan=True) for n in left)


# Alike ----------------------------------------------------------------------------------------------


@every
def test_parameters_are_json_and_make_the_same_again(template: Summary) -> None:
    parameters = json.loads(json.dumps(template.parameters(), allow_nan=False))
    again = Summary.from_parameters(template.name, parameters)
    assert type(again) is type(template) and again.parameters() == template.parameters()
    assert repr(again) == repr(template) and again.relative == template.relative
    one, other = template.start(setting_of()), again.start(setting_of())
    one.update(batch_of())
    other.update(batch_of())
    assert same(one, other) and not same(one, template.start(setting_of()))
    assert not hasattr(template, "tensors")


@every
def test_one_neuron_and_one_row(template: Summary) -> None:
    started = template.start(setting_of(1))
    started.update(batch_of(1, 1))
    again = template.reopen(Setting("mlp.0", 1), started.state())
    assert same(again, started)
    started.update(batch_of(0, 1))
    assert same(again, started)


@every
def test_merging_refuses_what_differs(template: Summary) -> None:
    started = template.start(setting_of())
    with pytest.raises(DataError, match=r"mlp\.0, 5 neurons, into mlp\.0, 6"):
        started.merge(template.start(setting_of(5)))
    with pytest.raises(DataError, match=f"cannot merge Moments into {type(template).__name__}"):
        started.merge(pc.Moments().start(setting_of()))
    other = (
        type(template)(**({"how": "last"} if template.name == "pooled" else {"threshold": 7.0}))
        if template.name != "exemplars"
        else pc.Exemplars(9)
    )
    with pytest.raises(DataError, match="parameters differ"):
        started.merge(other.start(setting_of()))


@every
def test_a_state_that_does_not_fit_is_named_and_changes_nothing(template: Summary) -> None:
    started = template.start(setting_of())
    started.update(batch_of())
    state = started.state()
    for name in state:
        damaged: list[dict[str, Any]] = [
            {key: array for key, array in state.items() if key != name},
            state | {name: np.zeros((*state[name].shape, 2))},
            state | {name: state[name].astype(str)},
            state | {name: state[name].astype(object)},
            state | {"nonsense": np.zeros(3)},
        ]
        for each in damaged:
            with pytest.raises(DataError, match=f"{name}|nonsense"):
                started.restore(each)
            assert same(started, template.reopen(setting_of(), state))


@every
def test_nbytes_without_data(template: Summary) -> None:
    settings = [setting_of(1536), setting_of(3)]
    held = sum(array.nbytes for each in settings for array in template.start(each).state().values())
    assert template.nbytes(settings) == held
    assert template.nbytes([]) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: torch.cuda.is_available() is False")
@every
@pytest.mark.parametrize("grid", [None, (1, 5)])
def test_on_a_gpu_the_result_is_the_same(template: Summary, grid: tuple[int, int] | None) -> None:
    here, there = template.start(setting_of(grid=grid)), template.start(setting_of(grid=grid))
    for first in (0, 2):
        batch = replace(batch_of(10, first=first), grid=grid)
        here.update(batch)
        columns = (batch.values, batch.example, batch.position, batch.token)
        there.update(Batch(*(each if each is None else each.cuda() for each in columns), grid=grid))  # pyright: ignore
    assert all(each.device.type == "cuda" for each in there.tensors.values())
    more = template.start(setting_of(grid=grid))
    more.update(replace(batch_of(10, first=4), grid=grid))
    for each in (here, there):
        each.merge(more)
    for name, array in here.state().items():
        np.testing.assert_allclose(there.state()[name], array, rtol=1e-3 if array.dtype == np.float16 else 1e-9)


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (pc.ByPosition, {"positions": 0}, "positions is a whole number >= 1"),
        (pc.ByPosition, {"positions": 1 << 17}, "at most 65536 positions"),
        (pc.ByPosition, {"threshold": "high"}, "'high'"),
        (pc.NGrams, {"n": 0}, "n is a whole number >= 1"),
        (pc.NGrams, {"slots": 2.5}, "slots is a whole number >= 1"),
        (pc.NGrams, {"threshold": None}, "None"),
        (pc.Exemplars, {"k": 0}, "k is a whole number >= 1"),
        (pc.Exemplars, {"context": -1}, "context is a whole number >= 0"),
        (pc.Exemplars, {"seed": True}, "seed is a whole number >= 0"),
        (pc.Exemplars, {"quantile": 99}, "99"),
        (pc.Exemplars, {"middle": 0.5}, "middle is two quantiles"),
        (pc.Exemplars, {"middle": (0.1, 0.2, 0.3)}, "middle is two quantiles"),
        (pc.Exemplars, {"middle": (0.75, 0.25)}, "begins at its lower"),
        (pc.Exemplars, {"middle": (0.5, 2)}, r"middle is two quantiles.*\(0\.5, 2\)"),
        (pc.Pooled, {"threshold": float("nan")}, "nan"),
    ],
)
def test_bad_parameters(kind: type[Summary], wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        kind(**wrong)


# One by one -----------------------------------------------------------------------------------------


def column(values: list[float], example: list[int], position: list[int], token: list[int] | None = None) -> Batch:
    """One neuron."""
    ids = None if token is None else torch.tensor(token)
    return Batch(torch.tensor(values)[:, None], torch.tensor(example), torch.tensor(position), ids)


def test_by_position_shares_the_later_bins() -> None:
    found = pc.ByPosition(2).start(setting_of(1))
    assert found.edges[:5].tolist() == [0, 1, 2, 4, 8] and found.edges[-1] == 2**31 and len(found.edges) == 33
    found.update(column([1.0, -1.0, 3.0, 5.0, -7.0], [0] * 5, [0, 1, 2, 3, 2**31 - 1]))
    assert found.count[:4].tolist() == [1, 1, 2, 0] and found.count[-1] == 1
    assert found.mean[0, :3].tolist() == [1, -1, 4] and found.std[0, 2] == 1 and found.mean[0, -1] == -7
    assert found.rate[0, :3].tolist() == [1, 0, 1] and found.fired[0, -1] == 0
    for position in (-1, 2**31):
        with pytest.raises(DataError, match=f"this batch has {position}"):
            found.update(column([1.0], [0], [position]))


def test_an_ngram_is_broken_by_a_gap_and_by_the_end_of_an_example() -> None:
    found = pc.NGrams(2, 4, threshold=0.0).start(setting_of(1))
    found.update(column([1.0] * 6, [3, 3, 3, 3, 5, 5], [1, 2, 4, 5, 6, 7], [7, 8, 9, 7, 8, 7]))
    # 8 9 has a special token between its two, 7 8 ends one example and begins another.
    assert found.tokens[0].tolist() == [[7, 8], [8, 7], [9, 7], [-1, -1]]
    assert found.counts[0].tolist() == [1, 1, 1, 0] and found.count == found.fired_total[0] == 3
    found.update(column([1.0, -1.0, 1.0], [0, 0, 0], [0, 1, 2], [9, 7, 8]))
    assert found.tokens[0, 0].tolist() == [7, 8] and found.counts[0].tolist() == [2, 1, 1, 0]
    assert found.count == 5 and found.fired_total[0] == 4


def test_what_an_ngram_without_a_slot_costs() -> None:
    found = pc.NGrams(1, 1, threshold=0.0).start(setting_of(1))
    found.update(column([1.0] * 5, [0] * 5, list(range(5)), [7, 7, 7, 8, 8]))
    assert found.tokens[0].tolist() == [[7]] and found.counts[0].tolist() == [1] and found.error.tolist() == [2]


def test_long_ngrams_of_large_ids() -> None:
    token = [2**31 - 1, 0, 2**31 - 2, 2**31 - 1, 0, 2**31 - 2, 5]
    found = pc.NGrams(5, 8, threshold=0.0).start(setting_of(1))
    found.update(column([1.0] * 7, [0] * 7, list(range(7)), token))
    assert sorted(found.tokens[0, :3].tolist()) == sorted(token[start : start + 5] for start in range(3))
    for wrong in (-1, 2**31):
        with pytest.raises(DataError, match=f"this batch has {wrong}"):
            found.update(column([1.0], [0], [0], [wrong]))
    with pytest.raises(DataError, match="needs token ids"):
        found.update(column([1.0], [0], [0]))


def test_exemplars_need_a_sample_of_examples() -> None:
    ones = np.ones(SIZE, np.float32)
    for calibration in (None, Calibration(ones, lambda q: ones)):
        with pytest.raises(DataError, match=r"mlp\.0 has not been calibrated"):
            pc.Exemplars().start(setting_of(calibration=calibration))
    for wrong in (np.full(SIZE, np.nan), np.ones(3)):
        setting = setting_of(calibration=Calibration(ones, lambda q: ones, lambda q, given=wrong: given))
        with pytest.raises(DataError, match="one finite number for each neuron"):
            pc.Exemplars().start(setting)
    assert pc.Exemplars().relative


def test_an_example_in_pieces_is_refused() -> None:
    scattered = column([1.0, 2.0, 3.0], [4, 5, 4], [0, 0, 1])
    for template in (pc.Exemplars(), pc.Pooled()):
        with pytest.raises(DataError, match="rows of example 4 are not adjacent"):
            template.start(setting_of(1)).update(scattered)


def test_exemplars_say_what_they_do_not_show() -> None:
    text, maps = pc.Exemplars(2).start(setting_of()), pc.Exemplars(2).start(setting_of(grid=(1, 5)))
    with pytest.raises(DataError, match="lie on no grid"):
        _ = text.top(0).mask
    with pytest.raises(DataError, match=r"maps: see \.mask"):
        _ = maps.top(0).window
    with pytest.raises(DataError, match=r"context="):
        _ = pc.Exemplars(2, context=0).start(setting_of()).top(0).window
    with pytest.raises(DataError, match="folds 0 and 1, not 2"):
        text.random(2)
    with pytest.raises(DataError, match="the grid differ"):
        text.merge(maps)
    with pytest.raises(DataError, match=r"one, two or three dimensions.*\(1, 1, 1, 5\)"):
        pc.Exemplars().start(setting_of(grid=(1, 1, 1, 5)))


def test_the_ends_of_the_band_are_in_the_middle() -> None:
    found = pc.Exemplars(5).start(setting_of(1))
    assert found.band.tolist() == [[-0.5, 0.5]]
    values = [-0.5, 0.5, np.nextafter(np.float32(0.5), 1), np.nextafter(np.float32(-0.5), -1), 0.0]
    found.update(column(values, list(range(5)), [0] * 5))
    shown = np.concatenate([found.middle(fold).example.ravel() for fold in (0, 1)])
    assert sorted(shown[shown >= 0]) == [0, 1, 4]


def test_a_grid_may_show_with_the_first_batch() -> None:
    batch = replace(batch_of(), grid=(1, 5))
    early, late = pc.Exemplars(2).start(setting_of(grid=(1, 5))), pc.Exemplars(2).start(setting_of())
    early.update(batch)
    late.update(batch)
    assert same(early, late) and late.grid == (1, 5)
    for other in (batch_of(), replace(batch_of(), grid=(5, 1))):
        with pytest.raises(DataError, match=r"maps of mlp\.0 are \(1, 5\)"):
            late.update(other)


def test_a_fold_is_0_or_1() -> None:
    found = pc.ByToken([1], threshold=0.0).start(setting_of(tokens=np.array([1])))
    found.update(batch_of())
    assert found.fold(0).count + found.fold(1).count == found.count == 40
    with pytest.raises(DataError, match="folds 0 and 1, not 2"):
        found.fold(2)


def test_pooled_takes_each_example_once() -> None:
    one, other = pc.Pooled().start(setting_of()), pc.Pooled().start(setting_of())
    one.update(batch_of(10))
    before = one.state()
    with pytest.raises(DataError, match=r"mlp\.0 shows example 1 twice"):
        one.update(batch_of(10, first=1))
    other.update(batch_of(15, first=1))
    with pytest.raises(DataError, match=r"mlp\.0 shows example 1 twice"):
        one.merge(other)
    np.testing.assert_array_equal(one.values, before["values"])
    for first, outside in ((7, 8), (-1, -1)):
        with pytest.raises(DataError, match=f"sees 8 examples; this batch has example {outside}"):
            one.update(batch_of(10, first=first))
    with pytest.raises(DataError, match=r"7 examples, into that of mlp\.0, 8"):
        one.merge(pc.Pooled().start(setting_of(examples=7)))


def test_pooled_by_hand() -> None:
    batch = column([-1e9, 3.0, 0.5, 2.0, -4.0], [4, 4, 4, 1, 1], [0, 2, 3, 0, 1])
    expected = {"max": (2.0, 3.0), "last": (-4.0, 0.5), "mean": (-1.0, -65504.0), "fired": (0.5, 1 / 3)}
    for how, (first, second) in expected.items():
        found = pc.Pooled(how, threshold=1.0).start(setting_of(1))
        found.update(batch)
        assert found.values[[1, 4], 0].tolist() == [first, np.float16(second)]
        assert np.isnan(found.values[[0, 2, 3, 5, 6, 7]]).all()
        with pytest.raises(ValueError, match="read-only"):
            found.values[0, 0] = 1.0


def test_pooled_refuses() -> None:
    with pytest.raises(DataError, match=r"how many mlp\.0 sees is not known"):
        pc.Pooled().start(setting_of(examples=None))
    with pytest.raises(DataError, match="not known"):
        pc.Pooled().nbytes([setting_of(examples=None)])
    with pytest.raises(UnknownName, match=r"'median'.*mean"):
        pc.Pooled("median")
    with pytest.raises(UnknownName, match=r"'bfloat16'.*float16"):
        pc.Pooled(dtype="bfloat16")
    with pytest.raises(DataError, match="pooled keeps every example by itself"):
        pc.ByLabel(of=[pc.Pooled])
    gone = pc.Pooled().start(setting_of(scratch="/nowhere/at/all"))
    with pytest.raises(DataError, match="cannot write in /nowhere/at/all"):
        gone.update(batch_of())


def test_a_full_disk_is_found_before_it_is_written_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pooled_module.os, "posix_fallocate", full, raising=False)
    with pytest.raises(DataError, match=r"no room for Pooled, 0 MB.*No space left"):
        pc.Pooled().start(setting_of(scratch=str(tmp_path))).update(batch_of())
    assert list(tmp_path.iterdir()) == []


def test_pooled_on_disk_holds_no_memory_and_leaves_no_file(tmp_path: Path) -> None:
    there, here = pc.Pooled().start(setting_of(scratch=str(tmp_path))), pc.Pooled().start(setting_of())
    for each in (there, here):
        each.update(batch_of(20))
    assert there.on_disk and not here.on_disk and len(list(tmp_path.iterdir())) == 1
    assert here.held_bytes() - there.held_bytes() == 2 * EXAMPLES * SIZE
    assert same(there, here)
    again = pc.Pooled().reopen(setting_of(), there.state())  # a copy
    there.update(batch_of(20, first=4))
    assert same(again, here) and not same(there, here)
    values = there.values
    del there
    gc.collect()
    assert not np.isnan(values).any()
    del values
    gc.collect()
    assert list(tmp_path.iterdir()) == []
