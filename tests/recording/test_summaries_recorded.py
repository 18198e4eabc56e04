"""ByPosition, NGrams, Exemplars and Pooled through `record`: against each text run alone, saved, opened, on disk."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.recording import tiny
from tests.recording.tiny import CASES, Rows, alone

import patchclamp as pc
from patchclamp.errors import DataError
from patchclamp.recording import Batch, Setting, Summary, activation_store
from patchclamp.recording.mapped import mapped

TEXTS = tiny.texts()
SITES = CASES["bert"].sites


def model_of() -> pc.Model:
    return pc.load(CASES["bert"].build(), tokenizer=tiny.tokenizer())


@pytest.fixture(scope="module")
def truth() -> dict[str, Rows]:
    model = model_of()
    return alone(model.module, SITES, model.tokenizer, TEXTS)


def summaries() -> list[Summary]:
    return [
        pc.ByPosition(4, 0.05),
        pc.NGrams(2, 400, 0.05),
        pc.ByToken(threshold=0.05),
        pc.Exemplars(3, context=2),
        pc.Pooled("max", dtype="float32"),
    ]


@pytest.mark.parametrize("way", ["in memory", "in a store", "on disk"])
def test_equals_each_text_run_alone(way: str, tmp_path: Path, truth: dict[str, Rows]) -> None:
    options: dict[str, Any] = {"store": tmp_path / "store"} if way == "in a store" else {}
    if way == "on disk":
        settings = [Setting(name, tiny.HIDDEN, np.arange(40), examples=len(TEXTS)) for name in SITES]
        rest = sum(each.nbytes(settings) for each in summaries() if not each.large)
        options["memory"] = rest + pc.Pooled(dtype="float32").nbytes(settings[:1])  # room for one of the two
    recording = tiny.recorded(model_of(), TEXTS, SITES, summaries(), **options)
    on_disk = [recording[site].pooled.on_disk for site in SITES]
    assert on_disk == {"in memory": [False, False], "in a store": [True, True], "on disk": [False, True]}[way]
    for site, rows in truth.items():
        agrees(recording, site, rows)


def agrees(recording: pc.Recording, site: str, rows: Rows) -> None:
    found = recording[site]
    for place in range(4):
        here = rows.values[rows.position == place]
        assert found.by_position.count[place] == len(here)
        if len(here):
            np.testing.assert_allclose(found.by_position.mean[:, place], here.mean(0), atol=1e-6)
            np.testing.assert_array_equal(found.by_position.rate[:, place], (here > 0.05).mean(0))
    follows = np.flatnonzero((rows.example[1:] == rows.example[:-1]) & (np.diff(rows.position) == 1)) + 1
    assert found.ngrams.count == len(follows) and not found.ngrams.error.any()
    np.testing.assert_array_equal(found.ngrams.fired_total, (rows.values[follows] > 0.05).sum(0))
    neuron = int(found.ngrams.fired_total.argmax())
    first, second = found.ngrams.tokens[neuron, 0]
    mine = follows[(rows.token[follows - 1] == first) & (rows.token[follows] == second)]
    assert found.ngrams.counts[neuron, 0] == (rows.values[mine, neuron] > 0.05).sum() > 0
    strongest = np.stack([rows.values[rows.example == example].max(0) for example in range(len(TEXTS))])
    np.testing.assert_allclose(found.pooled.values, strongest, atol=1e-6)
    for fold in (0, 1):
        mine = np.flatnonzero(recording.folds == fold)
        assert found.by_token.fold(fold).count == np.isin(rows.example, mine).sum()
        top = found.exemplars.top(fold)
        np.testing.assert_allclose(top.values, -np.sort(-strongest[mine], axis=0)[:3].T, atol=1e-6)
        assert np.isin(top.example, mine).all()
        # The band is that of all examples, since the sample holds them all; a bin is an eighth of a value wide.
        low, high = np.quantile(strongest, [0.25, 0.75], axis=0)
        np.testing.assert_allclose(found.exemplars.band, np.stack([low, high], axis=1), rtol=0.13, atol=1e-4)
        for neuron in range(tiny.HIDDEN):
            low, high = found.exemplars.band[neuron]
            inside = mine[(strongest[mine, neuron] >= low) & (strongest[mine, neuron] <= high)]
            middle = found.exemplars.middle(fold).example[neuron]
            assert set(middle) <= {-1, *inside} and (middle >= 0).sum() == min(3, len(inside))
            for group in (top, found.exemplars.middle(fold), found.exemplars.random(fold)):
                shows(recording, site, rows, group, neuron)


def shows(recording: pc.Recording, site: str, rows: Rows, group: Any, neuron: int) -> None:
    """What is shown of one neuron: the value at the place, its window, and the text there."""
    for place, (example, position) in enumerate(zip(group.example[neuron], group.position[neuron], strict=True)):
        if example < 0:
            continue
        there = rows.at(example, position)[neuron]
        np.testing.assert_allclose(group.values[neuron, place], there, atol=1e-6)
        np.testing.assert_allclose(group.window[neuron, place, 2], there, rtol=1e-3, atol=1e-6)
        window = recording.window(site, example, position, context=0)
        (row,) = np.flatnonzero((rows.example == example) & (rows.position == position))
        assert window.ids.tolist() == [rows.token[row]]
        assert all(recording.text(window.ids))


def test_a_store_is_mapped_and_not_altered(tmp_path: Path) -> None:
    model = model_of()
    recording = tiny.recorded(model, TEXTS[:9], ["mlp.0"], [pc.Pooled()], store=tmp_path / "store")
    (file,) = (tmp_path / "store" / "summaries").glob("*large*")
    before = file.read_bytes()
    values = recording["mlp.0"].pooled.values
    assert isinstance(values, np.memmap) and recording["mlp.0"].pooled.held_bytes() == 8 * tiny.HIDDEN
    np.testing.assert_array_equal(mapped(file)["pooled/values"], values)
    held = recording["mlp.0"].pooled
    held._array[0] = np.nan
    more = pc.Pooled().start(Setting("mlp.0", tiny.HIDDEN, examples=9))
    more.update(Batch(torch.ones(1, tiny.HIDDEN), torch.zeros(1).long(), torch.zeros(1).long()))
    held.merge(more)
    assert (held.values[0] == 1).all() and file.read_bytes() == before
    recording.save(tmp_path / "other")
    assert (pc.Recording.open(tmp_path / "other")["mlp.0"].pooled.values[0] == 1).all()
    file.write_bytes(before[:-2] + b"xx")
    with pytest.raises(pc.errors.DamagedStore, match="large"):
        pc.Recording.open(tmp_path / "store")


def test_what_grows_goes_with_the_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    memory = pc.Moments().nbytes([Setting("mlp.0", tiny.HIDDEN)])
    recording = tiny.recorded(model_of(), TEXTS, ["mlp.0"], [pc.Moments(), pc.Pooled()], memory=memory)
    assert len(list(tmp_path.glob("patchclamp-*"))) == 1 and recording["mlp.0"].pooled.on_disk
    recording.save(tmp_path / "kept")
    del recording
    gc.collect()
    assert not list(tmp_path.glob("patchclamp-*")) and np.isfinite(values_of(tmp_path / "kept")).all()
    with pytest.raises(DataError, match="would take"):
        tiny.recorded(model_of(), TEXTS, ["mlp.0"], [pc.Moments(), pc.Pooled()], memory=memory - 1)


def values_of(store: Path) -> np.ndarray:
    return pc.Recording.open(store)["mlp.0"].pooled.values


def test_ngrams_can_be_paired_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_store, "_ROWS", 16)  # many chunks, which end within examples
    recording = tiny.recorded(
        model_of(), TEXTS, ["mlp.0"], [pc.NGrams(2, 400, 0.05), pc.Exemplars(1)], activations=True
    )
    before, after = recording["mlp.0"].ngrams, recording.with_tokens_permuted()["mlp.0"].ngrams
    assert after.count == before.count
    np.testing.assert_array_equal(after.fired_total, before.fired_total)
    assert not np.array_equal(after.tokens, before.tokens)


def test_a_site_with_a_row_for_each_example() -> None:
    kept = [pc.ByPosition(2), pc.NGrams(), pc.Exemplars(2), pc.Pooled()]
    site = tiny.recorded(model_of(), TEXTS, ["mlp.0", "module:pooler"], kept)["module:pooler"]
    assert list(site.summaries) == ["by_position", "exemplars", "pooled"]
    assert site.by_position.count[0] == site.by_position.count.sum() == len(TEXTS)
    np.testing.assert_array_equal(site.exemplars.top(0).position, 0)


def test_tops_of_categories_are_shown_too() -> None:
    data = pc.Texts(TEXTS, labels={"parity": [index % 2 for index in range(len(TEXTS))]})
    recording = tiny.recorded(model_of(), data, ["mlp.0"], [pc.ByLabel(of=[pc.TopExamples(1)])])
    top = recording["mlp.0"].by_label.of("parity", "1").top_examples
    assert recording.window("mlp.0", top.example[3, 0], top.position[3, 0]).example % 2 == 1
    assert recording.labels_of(top.example[3, 0]) == {"parity": "1"}


def test_masks_of_the_maps_of_channels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.Flatten(), torch.nn.Linear(300, 2)).eval()
    images = torch.randn(30, 3, 8, 12)
    kept = [pc.Exemplars(4, quantile=0.9), pc.Pooled("mean", dtype="float32")]
    with torch.no_grad():
        maps = network[0](images).numpy()
    recording = pc.record(network, images, "conv.0", kept, store=tmp_path, batch_tokens=600, progress=False)
    found = recording["conv.0"].exemplars
    assert found.grid == (6, 10)
    np.testing.assert_allclose(found.threshold, np.quantile(maps, 0.9, axis=(0, 2, 3)), rtol=0.13)
    np.testing.assert_allclose(recording["conv.0"].pooled.values, maps.mean((2, 3)), rtol=1e-5, atol=1e-6)
    for fold in (0, 1):
        mine = np.flatnonzero(recording.folds == fold)
        for neuron in range(5):
            best = mine[np.argsort(-maps[mine, neuron].max((1, 2)))][:4]
            top = found.top(fold)
            assert top.example[neuron].tolist() == best.tolist()
            expected = maps[best, neuron] > found.threshold[neuron]
            np.testing.assert_array_equal(top.mask[neuron], expected)
            assert 0 < expected.mean() < 0.5
            np.testing.assert_array_equal(top.position[neuron], maps[best, neuron].reshape(4, -1).argmax(1))


def test_mapped_reads_what_safetensors_wrote(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    given = {"a": np.arange(6, dtype=np.float16).reshape(2, 3), "b": np.arange(5), "c": np.ones((2, 2), np.float32)}
    save_file(given, tmp_path / "file", {"said": "something"})
    found = mapped(tmp_path / "file")
    assert found.keys() == given.keys()
    for name, array in given.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
    save_file({"a": np.zeros(3, bool)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"a in BOOL of shape \[3\]"):
        mapped(tmp_path / "other")
    (tmp_path / "text").write_text("no such file")
    with pytest.raises(ValueError, match="text is no safetensors file"):
        mapped(tmp_path / "text")
