"""`record_over`: every checkpoint as `record` records it, one in memory at a time, interrupted and taken up again."""

from __future__ import annotations

import functools
import json
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.recording import tiny
from tests.recording.tiny import recorded

import patchclamp as pc
from patchclamp.errors import DamagedStore, DataError, ModelError, StoreError, UnknownName

TEXTS = tiny.texts(8)
NAMES = ["step0", "step100", "step200"]
WORDS = tiny.tokenizer()


def network(name: str, **options: Any) -> Any:
    """A model that is another one for each name."""
    return tiny.seeded(tiny.bert(**options), seed=NAMES.index(name))


def simple() -> list[Any]:
    return [pc.Moments, pc.MinMax, pc.FiringRate]


def over(checkpoints: Any, data: Any = TEXTS, sites: Any = "mlp.*", **options: Any) -> pc.RecordingSeries:
    usual: dict[str, Any] = {"batch_tokens": 40, "progress": False, "loading": {"tokenizer": WORDS}}
    usual |= {"summaries": simple()}
    return pc.record_over(checkpoints, data, sites, **(usual | options))


@functools.cache
def alone(name: str, usual: bool = False) -> pc.Recording:
    """What `record` gives of a checkpoint, with the usual summaries or the simple ones."""
    return recorded(pc.load(network(name), tokenizer=WORDS), TEXTS, "mlp.*", None if usual else simple())


class Loaders:
    """Functions that load checkpoints; they remember the calls, and one of them may fail."""

    def __init__(self, failing: str | None = None) -> None:
        self.calls: list[str] = []
        self.failing = failing

    def of(self, name: str) -> Callable[[], Any]:
        def load() -> Any:
            self.calls.append(name)
            if name == self.failing:
                raise ConnectionError("the hub is away")
            return network(name)

        return load

    @property
    def all(self) -> dict[str, Callable[[], Any]]:
        return {name: self.of(name) for name in NAMES}


def equals_each_alone(series: pc.RecordingSeries, usual: bool = False) -> None:
    assert series.names == list(series) == NAMES and len(series) == 3
    for name, found in series.items():
        expected = alone(name, usual)
        assert found.facts == expected.facts and list(found) == list(expected)
        for site in expected:
            for summary, each in expected[site].summaries.items():
                for key, array in each.state().items():
                    np.testing.assert_array_equal(found[site].summaries[summary].state()[key], array, strict=True)


@pytest.mark.parametrize("how", ["modules", "models", "functions", "pairs", "iterator"])
@pytest.mark.parametrize("stored", [False, True])
def test_each_is_what_record_gives(how: str, stored: bool, tmp_path: Path) -> None:
    checkpoints: Any = {
        "modules": lambda: {name: network(name) for name in NAMES},
        "models": lambda: {name: pc.load(network(name), tokenizer=WORDS) for name in NAMES},
        "functions": lambda: Loaders().all,
        "pairs": lambda: [(name, network(name)) for name in NAMES],
        "iterator": lambda: ((name, network(name)) for name in NAMES),
    }[how]()
    usual = how == "functions"
    series = over(checkpoints, store=tmp_path / "series" if stored else None, summaries=None if usual else simple())
    equals_each_alone(series, usual)
    assert (series.path == tmp_path / "series") if stored else series.path is None
    assert series.facts["calibration"] == "each checkpoint by itself"
    assert series.facts["data"] == series["step0"].facts["data"]


def test_folders_are_their_own_names(tmp_path: Path) -> None:
    folders = []
    for name in NAMES:
        network(name).save_pretrained(tmp_path / name)
        WORDS.save_pretrained(tmp_path / name)
        folders.append(tmp_path / name)
    series = pc.record_over(folders, TEXTS, summaries=simple(), progress=False, store=tmp_path / "series")
    assert series.names == [str(each) for each in folders]
    expected = alone("step100")["mlp.1"].moments.mean
    np.testing.assert_allclose(series[str(folders[1])]["mlp.1"].moments.mean, expected, rtol=1e-4, atol=1e-6)
    assert pc.RecordingSeries.open(tmp_path / "series").names == series.names


def test_a_revision_follows_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is not at hand: what the module asks of `load` is looked at, and `load` gives a model."""
    asked = []

    def load(source: Any, **keywords: Any) -> pc.Model:
        asked.append((source, keywords.pop("revision", None)))
        return pc.load(network("step0") if isinstance(source, str) else source, tokenizer=WORDS)

    # The name in the package is the function, not its module.
    monkeypatch.setattr(sys.modules["patchclamp.recording.record_over"], "load", load)
    over(["lab/model@step100", "lab/model@step200", "lab/model"])
    assert asked == [("lab/model", "step100"), ("lab/model", "step200"), ("lab/model", None)]


# One at a time --------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_a_circle", [False, True])
@pytest.mark.parametrize("how", ["functions", "pairs"])
def test_one_model_at_a_time_is_in_memory(how: str, in_a_circle: bool) -> None:
    """Also a model whose parts refer to each other, which counting references does not free."""
    alive: list[int] = []
    made: list[weakref.ref[Any]] = []

    def build(name: str) -> Any:
        alive.append(sum(each() is not None for each in made))
        built = network(name)
        built.itself = [built] if in_a_circle else None
        made.append(weakref.ref(built))
        return built

    def pairs() -> Iterator[tuple[str, Any]]:
        for name in NAMES:
            yield name, build(name)

    over({name: lambda name=name: build(name) for name in NAMES} if how == "functions" else pairs())
    assert alive == [0, 0, 0]


# Interrupted and taken up again ---------------------------------------------------------------------


def test_an_interrupted_series_goes_on_where_it_stopped(tmp_path: Path) -> None:
    first = Loaders(failing="step100")
    with pytest.raises(ConnectionError, match="the hub is away") as caught:
        over(first.all, store=tmp_path / "series")
    assert caught.value.__notes__ == ["checkpoint 'step100'"]
    assert first.calls == ["step0", "step100"]
    so_far = pc.RecordingSeries.open(tmp_path / "series")
    assert so_far.names == ["step0"] and sorted(each.name for each in (tmp_path / "series").iterdir()) == [
        "series.json",
        "step0",
    ]
    written = (tmp_path / "series" / "step0" / "manifest.json").read_bytes()
    second = Loaders()
    series = over(second.all, store=tmp_path / "series")
    assert second.calls == ["step100", "step200"]
    equals_each_alone(series)
    assert (tmp_path / "series" / "step0" / "manifest.json").read_bytes() == written
    third = Loaders(failing="step0")
    equals_each_alone(over(third.all, store=tmp_path / "series"))
    assert not third.calls
    equals_each_alone(pc.RecordingSeries.open(tmp_path / "series"))


def test_a_recording_without_an_entry_in_the_index_is_checked_before_it_is_used(tmp_path: Path) -> None:
    """As after a crash between the two; or one that was put there under the name of another checkpoint."""
    alone("step0").save(tmp_path / "step0")
    alone("step0").save(tmp_path / "step100")
    with pytest.raises(StoreError, match=r"step100 holds another recording.* the model"):
        over(Loaders().all, store=tmp_path)
    assert pc.RecordingSeries.open(tmp_path).names == ["step0"]


def test_models_in_memory_are_always_checked(tmp_path: Path) -> None:
    over({"step0": network("step0")}, store=tmp_path)
    over({"step0": network("step0")}, store=tmp_path)
    with pytest.raises(StoreError, match=r"another recording"):
        over({"step0": network("step100")}, store=tmp_path)


def test_a_folder_that_was_deleted_is_recorded_again(tmp_path: Path) -> None:
    over(Loaders().all, store=tmp_path)
    (tmp_path / "step100").rename(tmp_path.with_name("elsewhere"))
    with pytest.raises(DamagedStore, match=r"step100 is missing"):
        pc.RecordingSeries.open(tmp_path)
    again = Loaders()
    equals_each_alone(over(again.all, store=tmp_path))
    assert again.calls == ["step100"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"data": tiny.texts(18)}, "data"),
        ({"summaries": None}, "summaries"),
        ({"sites": "mlp.0"}, "sites"),
        ({"max_length": 9}, "options"),
    ],
)
def test_a_store_of_another_series_is_refused(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    over({"step0": network("step0")}, store=tmp_path)
    loaders = Loaders()
    with pytest.raises(StoreError, match=rf"another series of recordings. What differs: {named} \(there"):
        over(loaders.all, store=tmp_path, **change)
    assert not loaders.calls
    over(loaders.all, store=tmp_path, batch_tokens=100)  # this changes no recording


def test_another_checkpoint_under_the_same_name_is_refused(tmp_path: Path) -> None:
    for name in NAMES[:2]:
        network(name).save_pretrained(tmp_path / name)
    over({"first": tmp_path / "step0"}, store=tmp_path / "series")
    with pytest.raises(StoreError, match=r"holds another recording.* the model .*step0.*step100"):
        over({"first": tmp_path / "step100"}, store=tmp_path / "series")


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "naïve: step 3?", "100%"])
def test_any_name_becomes_a_folder(name: str, tmp_path: Path) -> None:
    over({name: network("step0")}, store=tmp_path / "series")
    opened = pc.RecordingSeries.open(tmp_path / "series")
    assert opened.names == [name] and opened[name]["mlp.0"].count > 0
    assert len(list((tmp_path / "series").iterdir())) == 2 and len(list(tmp_path.iterdir())) == 1


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no series of recordings at .*series\.json"):
        pc.RecordingSeries.open(tmp_path)
    over({"step0": network("step0")}, store=tmp_path)
    good = json.loads((tmp_path / "series.json").read_text())
    for damaged, error in (
        ("{", DamagedStore),
        ("[]", DamagedStore),
        (json.dumps(good | {"checkpoints": 3}), DamagedStore),
        (json.dumps({key: each for key, each in good.items() if key != "facts"}), DamagedStore),
        (json.dumps(good | {"format_version": 2}), StoreError),
    ):
        (tmp_path / "series.json").write_text(damaged)
        with pytest.raises(error, match=r"series\.json"):
            pc.RecordingSeries.open(tmp_path)
        with pytest.raises(error, match=r"series\.json"):
            over({"step0": network("step0")}, store=tmp_path)


# Reading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [False, True])
def test_trajectories(stored: bool, tmp_path: Path) -> None:
    series = over(Loaders().all, store=tmp_path if stored else None)
    of = [series[name]["mlp.1"] for name in NAMES]
    expected = {
        "mean": [each.moments.mean for each in of],
        "std": [each.moments.std for each in of],
        "min": [each.min_max.min for each in of],
        "max": [each.min_max.max for each in of],
        "firing_rate": [each.firing_rate.rate[:, 0] for each in of],
    }
    for measurement, rows in expected.items():
        found = series.trajectory("mlp.1", measurement)
        assert found.shape == (3, tiny.HIDDEN) and found.dtype == np.float64
        np.testing.assert_array_equal(found, np.stack(rows).astype(np.float64))
    with pytest.raises(UnknownName, match=r"'meen'.*mean.*Its summary must be asked for"):
        series.trajectory("mlp.1", "meen")
    with pytest.raises(UnknownName, match=r"'mlp\.7'.*mlp\.0"):
        series.trajectory("mlp.7")


def test_comparing_and_asking(tmp_path: Path) -> None:
    series = over(Loaders().all, summaries=[pc.Histogram], store=tmp_path)
    assert series.compare() == series["step0"].compare(series["step200"])
    assert series.compare("step100", "step0") == series["step100"].compare(series["step0"])
    with pytest.raises(UnknownName, match=r"no checkpoint is called 'step10'.*step100"):
        series["step10"]
    assert "step0" in series and "step10" not in series and series.get("step10") is None
    held = series["step0"]
    assert series["step0"] is held and "3 checkpoints: step0, step100, step200" in repr(series)


def test_relative_thresholds_are_calibrated_on_each_checkpoint() -> None:
    series = over(Loaders().all, summaries=[pc.FiringRate(pc.FractionOfMaximum(0.5)), pc.MinMax])
    for name in NAMES:
        site = series[name]["mlp.0"]
        np.testing.assert_allclose(site.firing_rate.thresholds[:, 0], np.maximum(site.min_max.max, 0) / 2, rtol=1e-6)


# What is refused ------------------------------------------------------------------------------------


def test_data_that_can_be_read_once_is_refused() -> None:
    loaders = Loaders()
    for data in ((text for text in TEXTS), pc.Texts(text for text in TEXTS)):
        with pytest.raises(DataError, match=r"once only.*pass a list or a file"):
            over(loaders.all, data)
    assert not loaders.calls
    over(loaders.all, Again(TEXTS))


class Again:
    """An iterable that can be read as often as one likes."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)


def test_other_sites_and_sizes_are_refused_with_the_checkpoints_name() -> None:
    for odd, message in (
        (network("step100", num_hidden_layers=1), r"'step100' has no site 'mlp\.1', and 'step0' has"),
        (network("step100", num_hidden_layers=3), r"'step100' has the site 'mlp\.2', and 'step0' has not"),
        (network("step100", intermediate_size=30), r"mlp\.0 has 30 neurons in checkpoint 'step100', and 24 in 'step0'"),
    ):
        passes: list[int] = []
        model = pc.load(odd, tokenizer=WORDS)
        model.select("mlp.*")  # may run the model to see how it works
        odd.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        with pytest.raises(DataError, match=message):
            over({"step0": network("step0"), "step100": model})
        assert not passes
    with pytest.raises(UnknownName, match=r"checkpoint 'step0': .*'mlp\.7'"):
        over(Loaders().all, sites="mlp.7")


def test_sizes_that_only_a_pass_tells_are_compared_after_it() -> None:
    def plain(width: int) -> Any:
        return torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.Tanh(), torch.nn.Linear(width, 1)).eval()

    with pytest.raises(DataError, match=r"module:1 has 6 neurons in checkpoint 'b', and 5 in 'a'"):
        over({"a": plain(5), "b": plain(6)}, torch.randn(20, 3), "module:1", loading={})


def test_another_tokenizer_is_refused() -> None:
    other = tiny.tokenizer("[CLS] $A")
    first, second = (pc.load(network("step0"), tokenizer=each) for each in (WORDS, other))
    with pytest.raises(DataError, match=r"'second' reads the data as other tokens than 'first'.*tokenizer"):
        over({"first": first, "second": second})


def test_checkpoints_that_are_none_are_refused() -> None:
    for checkpoints, message in (
        ({}, "at least one"),
        ([], "at least one"),
        ("lab/model", "mapping from names.*not str"),
        (network("step0"), "mapping from names.*not BertModel"),
        ([network("step0")], r"give \(name, checkpoint\), not BertModel"),
        ([("a", network("step0")), ("a", network("step0"))], "two checkpoints are called 'a'"),
        ({3: network("step0")}, "is a text, not 3"),
        ({" ": network("step0")}, "is a text, not ' '"),
        ({"a": 3}, "checkpoint 'a' is a int"),
    ):
        with pytest.raises(DataError, match=message):
            over(checkpoints)
    with pytest.raises(ModelError, match="the function of checkpoint 'a' gave dict") as caught:
        over({"a": dict})
    assert caught.value.__notes__ == ["checkpoint 'a'"]
    with pytest.raises(DataError, match="3 is not a summary"):
        over(Loaders().all, summaries=[3])
    with pytest.raises(TypeError, match="unexpected keyword argument 'batch'"):
        over(Loaders().all, batch=3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'model'"):
        over(Loaders().all, model=3)
