"""`record` under stress: interruptions, missing numbers, limits, generators, summaries of one's own."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.recording import tiny
from tests.recording.tiny import CASES, alone, recorded, state_of, weight

import patchclamp as pc
from patchclamp.errors import DataError
from patchclamp.recording import run
from patchclamp.recording.batch import Batch, Setting

TEXTS = tiny.texts()


def model_of() -> pc.Model:
    return pc.load(tiny.bert().double(), tokenizer=tiny.tokenizer())


def same(left: pc.Recording, right: pc.Recording) -> bool:
    """Whether two recordings hold the same numbers to the last bit."""
    for site in left:
        for name, summary in left[site].summaries.items():
            there = right[site].summaries[name].state()
            for key, array in summary.state().items():
                if array.tobytes() != there[key].tobytes():
                    return False
    return list(left) == list(right)


# Interruptions --------------------------------------------------------------------------------------


class Stops(pc.Summary):
    """Raises what it is told to, at its third batch."""

    name = "stops"
    error: BaseException = RuntimeError("stopped")
    batches = 0

    def empty(self, setting: Setting) -> dict[str, torch.Tensor]:
        return {"nothing": torch.zeros(())}

    def add(self, batch: Batch) -> None:
        Stops.batches += 1
        if Stops.batches >= 3:
            raise Stops.error

    def combine(self, other: Any) -> None: ...


@pytest.mark.parametrize("error", [RuntimeError("stopped"), KeyboardInterrupt()])
def test_nothing_is_left_behind_when_a_summary_fails(error: BaseException, tmp_path: Path) -> None:
    model = model_of()
    model.module.train()
    assert model.sites
    before = state_of(model.module)
    Stops.batches, Stops.error = 0, error
    with warnings.catch_warnings(), pytest.raises(type(error)) as caught:
        warnings.simplefilter("ignore")
        recorded(model, TEXTS, summaries=[Stops()], store=tmp_path / "new" / "store", activations=True)
    # While the exception lives, so do the frames it came through: they must hold on to nothing.
    assert caught.value is error and Stops.batches == 3
    assert state_of(model.module) == before
    assert torch.is_grad_enabled()
    assert list(tmp_path.iterdir()) == []


def test_a_summary_may_run_the_model_itself() -> None:
    """Between two passes the module is the user's own again: no hook, its mode, gradients."""
    model = model_of()
    model.module.train()
    assert model.sites
    before, seen = state_of(model.module), []

    class Runs(pc.Summary):
        """Runs the model on something else at each batch."""

        name = "runs"

        def empty(self, setting: Setting) -> dict[str, torch.Tensor]:
            return {"nothing": torch.zeros(())}

        def add(self, batch: Batch) -> None:
            seen.append((state_of(model.module), torch.is_grad_enabled()))
            model("the list")

        def combine(self, other: Any) -> None: ...

    with pytest.warns(UserWarning, match="training mode"):
        recording = recorded(model, TEXTS, "mlp.0", [Runs(), pc.Moments()])
    assert len(seen) > 3 and all(each == (before, True) for each in seen)
    assert same(recorded(model_of(), TEXTS, "mlp.0", [pc.Moments()]), without(recording, "runs"))


def without(recording: pc.Recording, name: str) -> pc.Recording:
    for site in recording.by_site.values():
        del site.summaries[name]
    return recording


@pytest.mark.parametrize("error", [RuntimeError("stopped"), KeyboardInterrupt()])
def test_nothing_is_left_behind_when_the_model_fails(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = model_of(), []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise error

    assert model.sites
    model.module.get_submodule("encoder.layer.1").register_forward_hook(fail)
    before = state_of(model.module)
    with pytest.raises(type(error)):
        recorded(model, TEXTS)
    assert len(calls) == 3 and state_of(model.module) == before and torch.is_grad_enabled()


def test_a_failed_recording_leaves_no_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    Stops.batches, Stops.error = 0, RuntimeError("stopped")
    with pytest.raises(RuntimeError):
        recorded(model_of(), TEXTS, summaries=[Stops()], activations=True)
    assert list(tmp_path.iterdir()) == []
    recording = recorded(model_of(), TEXTS, activations=True)
    assert len(list(tmp_path.iterdir())) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        del recording
        gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_training_mode_is_left_and_put_back() -> None:
    still, training = model_of(), model_of()
    training.module.train()
    training.module.get_submodule("pooler").eval()
    before = state_of(training.module)
    with pytest.warns(UserWarning, match="training mode") as caught:
        recording = pc.record(training, TEXTS, batch_tokens=40, progress=False)
    assert caught[0].filename == __file__  # the user's line is blamed, not ours
    assert state_of(training.module) == before
    assert same(recording, recorded(still, TEXTS))


# Numbers that are none ------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "nan"), (float("inf"), "infinite")])
def test_numbers_that_are_none_are_counted_and_left_out(value: float, kind: str) -> None:
    """A damaged embedding of "loop" spoils every text that holds it, and no other."""
    model, sites = model_of(), CASES["bert"].sites
    spoilt = np.asarray(["loop" in text.split() for text in TEXTS])
    clean = alone(model.module, sites, model.tokenizer, TEXTS)
    weight(model, "embeddings.word_embeddings.weight")[model.tokenizer.convert_tokens_to_ids("loop")] = value
    with pytest.warns(UserWarning) as caught:
        recording = recorded(model, TEXTS)
    everything = alone(model.module, sites, model.tokenizer, TEXTS)
    assert 0 < spoilt.sum() < len(TEXTS) / 2
    for site in sites:
        values, example = everything[site].values, everything[site].example
        bad = np.asarray(~np.isfinite(values).all(1))
        assert set(example[bad]) == set(np.flatnonzero(spoilt))
        found = recording[site].nonfinite
        assert found == {"nan": np.isnan(values).sum(), "infinite": np.isinf(values).sum(), "rows": bad.sum()}
        assert recording[site].count == (~bad).sum()
        truth = clean[site].values[~bad]
        np.testing.assert_allclose(recording[site].moments.mean, truth.mean(0), rtol=1e-10)
        np.testing.assert_allclose(recording[site].min_max.max, truth.max(0), rtol=1e-10)
        assert np.isfinite(recording[site].top_examples.values).all()
        said = [str(each.message) for each in caught if str(each.message).startswith(f"{site}:")]
        assert len(said) == 1 and f"{bad.sum()} of {len(bad)} rows" in said[0]
        assert f"{found['nan']} activations are NaN and {found['infinite']} infinite" in said[0]
    assert kind == "infinite" or recording["mlp.0"].nonfinite["nan"] > 0


def test_a_site_without_a_single_number() -> None:
    model = model_of()
    weight(model, "encoder.layer.1.intermediate.dense.bias")[3] = float("nan")
    with pytest.warns(UserWarning, match=r"mlp\.1: 137 activations are NaN"):
        recording = recorded(model, TEXTS)
    assert recording["mlp.1"].nonfinite == {"nan": 137, "infinite": 0, "rows": 137}
    assert recording["mlp.1"].count == 0 and np.isnan(recording["mlp.1"].moments.mean).all()
    assert recording["mlp.0"].nonfinite == {"nan": 0, "infinite": 0, "rows": 0}
    assert recording["mlp.0"].count == 137


# Limits ---------------------------------------------------------------------------------------------


def test_texts_are_cut_at_the_models_own_limit() -> None:
    long = [" ".join(["list"] * 100), "a list"]
    for words, limit in ((tiny.tokenizer(max_length=64), 64), (tiny.tokenizer(max_length=20), 20)):
        recording = recorded(pc.load(tiny.bert(), tokenizer=words), long)
        assert recording["mlp.0"].count == limit - 2 + 2
        assert recording.facts["data"]["truncated"] == 1
        assert recording["mlp.0"].top_examples.position.max() <= limit - 2


def test_texts_are_cut_at_max_length(capsys: pytest.CaptureFixture[str]) -> None:
    model, words = model_of(), tiny.tokenizer(max_length=6)
    recording = pc.record(model, TEXTS, max_length=6, progress=True, batch_tokens=40)
    cut = sum(len(text.split()) > 4 for text in TEXTS)
    assert recording.facts["data"]["truncated"] == cut > 3
    assert f"{cut} texts are longer than the limit and were cut" in capsys.readouterr().err
    truth = recorded(pc.load(model.module, tokenizer=words), TEXTS)
    assert same(recording, truth)


@pytest.mark.parametrize(
    ("max_length", "says"),
    [(0, "at least 1"), (1, "2 special tokens"), (2, "2 special tokens"), (65, "more than the model.*64")],
)
def test_a_limit_that_cannot_be(max_length: int, says: str) -> None:
    with pytest.raises(DataError, match=f"max_length={max_length}.*{says}|max_length.*{says}"):
        recorded(model_of(), TEXTS, max_length=max_length)


def test_memory_is_estimated_and_refused() -> None:
    model = model_of()
    needed = sum(
        each.held_bytes() for site in recorded(model, TEXTS).by_site.values() for each in site.summaries.values()
    )
    recorded(model, TEXTS, memory=int(needed * 1.05))
    with pytest.raises(DataError, match=r"the summaries would take .* MB; the limit is"):
        recorded(model, TEXTS, memory=int(needed * 0.95))


def test_memory_is_refused_where_the_size_is_known_late() -> None:
    model, calls = model_of(), []
    assert model.sites
    model.module.register_forward_pre_hook(lambda *_: calls.append(1))
    sites = "module:encoder.layer.0"
    held = sum(each.held_bytes() for each in recorded(model, TEXTS, sites=sites)[sites].summaries.values())
    calls.clear()
    with pytest.raises(DataError, match="the limit is"):
        recorded(model, TEXTS, sites=sites, summaries=[pc.Moments(), pc.Histogram()], memory=held // 100)
    assert len(calls) == 1


@pytest.mark.parametrize("activations", [False, True])
def test_memory_does_not_grow_with_the_corpus(activations: bool) -> None:
    """Ten times the texts: all activations would be 130 MB more."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc: the peak of memory cannot be read")
    wide = pc.load(tiny.Words(neurons=384), tokenizer=tiny.tokenizer("$A"))

    def growth(examples: int) -> float:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = read("VmRSS")
        texts = (" ".join(tiny.WORDS[(place * 7 + offset) % 40] for offset in range(20)) for place in range(examples))
        summaries = [pc.Moments(), pc.MinMax(), pc.FiringRate(0.0), pc.TopExamples(5), pc.ByToken(threshold=0.5)]
        recording = pc.record(wide, texts, "mlp.0", summaries, activations=activations, progress=False)
        assert recording["mlp.0"].count == 20 * examples
        return read("VmHWM") - before

    def read(name: str) -> float:
        line = next(each for each in status.read_text().splitlines() if each.startswith(name))
        return int(line.split()[1]) / 1024

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        growth(400)
        few, many = growth(400), growth(4400)
    assert many < few + 30, f"{few:.0f} MB for 400 texts, {many:.0f} MB for 4,400"


def test_the_same_seed_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_CALIBRATION_TOKENS", 30)
    model = model_of()
    first, again, other = (recorded(model, TEXTS, seed=seed) for seed in (3, 3, 4))
    assert same(first, again)
    assert not np.array_equal(first["mlp.0"].firing_rate.thresholds, other["mlp.0"].firing_rate.thresholds)
    np.testing.assert_array_equal(first["mlp.0"].moments.mean, other["mlp.0"].moments.mean)


# Data and summaries of one's own --------------------------------------------------------------------


def test_a_generator_is_read_once() -> None:
    model = model_of()
    assert same(recorded(model, (text for text in TEXTS)), recorded(model, TEXTS))
    labelled = pc.Texts((text for text in TEXTS), labels={"parity": [index % 2 for index in range(17)]})
    recording = recorded(model, labelled)
    assert recording["mlp.0"].by_label.count("parity").sum() == 137


def test_a_file_is_streamed(tmp_path: Path) -> None:
    file = tmp_path / "corpus.txt"
    file.write_text("\n".join(TEXTS))
    model = model_of()
    assert same(recorded(model, file), recorded(model, TEXTS))


def test_a_summary_of_ones_own() -> None:
    class Energy(pc.Summary):
        """The mean square of each neuron."""

        name = "energy"

        def empty(self, setting: Setting) -> dict[str, torch.Tensor]:
            total = torch.zeros(setting.size, dtype=torch.float64)
            return {"count": torch.zeros((), dtype=torch.int64), "total": total}

        def add(self, batch: Batch) -> None:
            self.tensors["count"] += len(batch)
            self.tensors["total"] += batch.values.double().square().sum(0)

        def combine(self, other: Energy) -> None:
            for name, tensor in other.tensors.items():
                self.tensors[name] += tensor

        @property
        def mean_square(self) -> np.ndarray:
            return self.array("total") / int(self.tensors["count"])

    model, sites = model_of(), CASES["bert"].sites
    recording = recorded(model, TEXTS, summaries=[Energy])
    for site, rows in alone(model.module, sites, model.tokenizer, TEXTS).items():
        np.testing.assert_allclose(recording[site].energy.mean_square, (rows.values**2).mean(0), rtol=1e-10)
