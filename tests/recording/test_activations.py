"""Every activation on disk: equal to brute force, readable by Zarr alone, and what is made of them."""

from __future__ import annotations

import gc
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from tests.recording import tiny
from tests.recording.tiny import CASES, Rows, alone, weight

import patchclamp as pc
from patchclamp.errors import DamagedStore, DataError
from patchclamp.recording import StoredActivations, activation_store

TEXTS = tiny.texts()


def model_of(name: str = "bert", dtype: torch.dtype = torch.float64) -> pc.Model:
    return pc.load(CASES[name].build().to(dtype), tokenizer=tiny.tokenizer(CASES[name].template))


def recorded(model: pc.Model, sites: Any, data: Any = TEXTS, **options: Any) -> pc.Recording:
    return tiny.recorded(model, data, list(sites), **({"activations": True} | options))


def equals(stored: StoredActivations, rows: Rows, tolerance: float) -> None:
    order = np.lexsort((stored.position[:], stored.example[:]))
    np.testing.assert_array_equal(stored.example[:][order], rows.example)
    np.testing.assert_array_equal(stored.position[:][order], rows.position)
    np.testing.assert_array_equal(stored.token[:][order], rows.token)
    scale = np.abs(rows.values).max()
    np.testing.assert_allclose(stored.values[:][order], rows.values, rtol=tolerance, atol=tolerance * scale)
    assert stored.values.dtype == rows.values.dtype and stored.values.shape == rows.values.shape


@pytest.mark.parametrize("in_store", [False, True])
@pytest.mark.parametrize(("name", "dtype"), [("bert", torch.float32), ("gpt2", torch.float64), ("t5", torch.float64)])
def test_equal_each_text_run_alone(
    name: str, dtype: torch.dtype, in_store: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activation_store, "_ROWS", 16)  # many chunks, the last one not full
    monkeypatch.setattr(activation_store, "_INDEX_ROWS", 50)
    model, sites = model_of(name, dtype), CASES[name].sites
    recording = recorded(model, sites, store=tmp_path / "store" if in_store else None)
    for site, rows in alone(model.module, sites, model.tokenizer, TEXTS).items():
        stored = recording[site].activations
        assert stored is not None
        equals(stored, rows, 1e-5 if dtype == torch.float32 else 1e-12)
        assert stored.values.chunks == (16, tiny.HIDDEN) and len(stored.values) % 16
    if in_store:
        assert recording.activations_folder == tmp_path / "store" / "activations"


def test_the_files_are_plain_zarr(tmp_path: Path) -> None:
    model = model_of()
    recorded(model, ["mlp.0"], store=tmp_path / "store")
    group: Any = zarr.open_group(tmp_path / "store" / "activations" / "mlp.0", mode="r")
    assert group.metadata.zarr_format == 3
    rows = alone(model.module, {"mlp.0": CASES["bert"].sites["mlp.0"]}, model.tokenizer, TEXTS)["mlp.0"]
    equals(StoredActivations(**{name: group[name] for name in StoredActivations._fields}), rows, 1e-12)


def test_parts_are_read_like_numpy() -> None:
    stored = recorded(model_of(), ["mlp.0"])["mlp.0"].activations
    assert stored is not None
    whole = np.asarray(stored.values)
    assert len(stored.values) == len(whole) == 137
    np.testing.assert_array_equal(stored.values[5:9], whole[5:9])
    np.testing.assert_array_equal(stored.values[5:9, 3], whole[5:9, 3])
    np.testing.assert_array_equal(stored.values[7], whole[7])
    with pytest.raises(IndexError):
        stored.values[137]


def test_a_site_with_an_odd_name_and_zeros(tmp_path: Path) -> None:
    """A dead layer is written too: a chunk that is missing would read as silence."""
    model = pc.load(tiny.mlp())
    weight(model, "0.weight").zero_()
    weight(model, "0.bias").fill_(-1)
    recording = recorded(model, ["mlp.0", "module:1"], torch.ones(9, 5), store=tmp_path / "store")
    for site in recording:
        stored = recording[site].activations
        assert stored is not None and (stored.token[:] == -1).all()
        assert not stored.values[:].any() and stored.values.shape == (9, tiny.HIDDEN)
        assert stored.example[:].tolist() == list(range(9))
    next((tmp_path / "store" / "activations" / "mlp.0" / "values").rglob("0/0")).unlink()
    stored = recording["mlp.0"].activations
    assert stored is not None and np.isnan(stored.values[:]).all()


def test_rows_that_are_no_numbers_are_written_as_they_are() -> None:
    model = model_of()
    weight(model, "embeddings.word_embeddings.weight")[20] = float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        site = recorded(model, ["mlp.0"])["mlp.0"]
    assert site.activations is not None and site.nonfinite["rows"] > 0
    values = site.activations.values[:]
    assert len(values) == site.count + site.nonfinite["rows"] == 137
    assert (~np.isfinite(values).all(1)).sum() == site.nonfinite["rows"]


def test_they_last_as_long_as_anyone_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = model_of()
    values = recorded(model, ["mlp.0"])["mlp.0"].activations.values  # type: ignore[union-attr]
    gc.collect()
    assert np.isfinite(values[:]).all() and len(list(tmp_path.iterdir())) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        del values
        gc.collect()
    assert list(tmp_path.iterdir()) == []


# The null -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reopened", [False, True])
def test_tokens_are_paired_anew(reopened: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_store, "_ROWS", 16)
    recording = recorded(model_of(), CASES["bert"].sites, store=tmp_path / "store" if reopened else None)
    null, again, other = (recording.with_tokens_permuted(seed) for seed in (0, 0, 1))
    for site in recording:
        stored, before, after = recording[site].activations, recording[site].by_token, null[site].by_token
        assert stored is not None
        token, values = stored.token[:], stored.values[:]
        assert after.count == before.count == 137
        np.testing.assert_array_equal(after.tokens, before.tokens)
        np.testing.assert_array_equal(after.threshold, before.threshold)
        np.testing.assert_array_equal(after.occurrences, before.occurrences)
        np.testing.assert_array_equal(after.fired_total, before.fired_total)
        # The permutation is that of numpy's generator, so the whole table can be made again here.
        paired = token[np.random.default_rng(0).permutation(len(token))]
        for slot, each in enumerate(after.tokens):
            np.testing.assert_array_equal(after.fired[slot], (values[paired == each] > after.threshold).sum(0))
        assert not np.array_equal(after.fired, before.fired)
        np.testing.assert_array_equal(after.fired, again[site].by_token.fired)
        assert not np.array_equal(after.fired, other[site].by_token.fired)
        # The rest is what it was, and the recording itself is not touched.
        assert null[site].moments is recording[site].moments
        assert null[site].activations is None
    assert null.facts["parameters"]["tokens_permuted"] == 0
    assert "tokens_permuted" not in recording.facts["parameters"]


def test_a_null_recording_can_be_kept_but_is_never_taken_for_the_real_one(tmp_path: Path) -> None:
    model = model_of()
    null = recorded(model, ["mlp.0"]).with_tokens_permuted(5)
    null.save(tmp_path / "null")
    opened = pc.Recording.open(tmp_path / "null")
    np.testing.assert_array_equal(opened["mlp.0"].by_token.fired, null["mlp.0"].by_token.fired)
    with pytest.raises(OSError, match=r"tokens_permuted \(there 5, here not said\)"):
        recorded(model, ["mlp.0"], activations=False, store=tmp_path / "null")
    with pytest.raises(DataError, match="activations=True"):
        null.with_tokens_permuted()


def test_the_null_leaves_out_rows_that_are_no_numbers() -> None:
    model = model_of()
    weight(model, "embeddings.word_embeddings.weight")[20] = float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recording = recorded(model, ["mlp.0"])
    null = recording.with_tokens_permuted()
    assert null["mlp.0"].by_token.count == recording["mlp.0"].count < 137
    np.testing.assert_array_equal(null["mlp.0"].by_token.fired_total, recording["mlp.0"].by_token.fired_total)


def test_tokens_by_label_cannot_be_paired_anew() -> None:
    data = pc.Texts(TEXTS, labels={"parity": [index % 2 for index in range(17)]})
    recording = recorded(model_of(), ["mlp.0"], data, summaries=[pc.ByLabel(of=[pc.ByToken(threshold=0.1)])])
    with pytest.raises(DataError, match="labels of all examples"):
        recording.with_tokens_permuted()


# Damage ---------------------------------------------------------------------------------------------


def test_a_damaged_chunk_is_named_when_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashing all activations would make opening slow: each chunk has its own checksum instead."""
    monkeypatch.setattr(activation_store, "_ROWS", 16)
    recorded(model_of(), ["mlp.0"], store=tmp_path / "store")
    files = [each for each in (tmp_path / "store" / "activations").rglob("*") if each.is_file()]
    chunks = [each for each in files if each.name != "zarr.json"]
    assert len(chunks) == 9 + 3
    for chunk in chunks:
        content = chunk.read_bytes()
        for damaged in (content[:-1], content[: len(content) // 2], b"", flipped(content, 0), flipped(content, -7)):
            chunk.write_bytes(damaged)
            stored = pc.Recording.open(tmp_path / "store")["mlp.0"].activations
            assert stored is not None
            column = next(each for each in stored._fields if f"/{each}/" in chunk.as_posix())
            for other in set(stored._fields) - {column}:
                getattr(stored, other)[:]
            with pytest.raises(DamagedStore, match=chunk.relative_to(tmp_path).as_posix().replace(".", r"\.")):
                getattr(stored, column)[:]
        chunk.unlink()
        with pytest.raises(DamagedStore, match="is missing"):
            pc.Recording.open(tmp_path / "store")
        chunk.write_bytes(content)
    pc.Recording.open(tmp_path / "store").with_tokens_permuted()


def test_a_damaged_description_of_an_array_is_found_on_opening(tmp_path: Path) -> None:
    recorded(model_of(), ["mlp.0"], store=tmp_path / "store")
    file = tmp_path / "store" / "activations" / "mlp.0" / "values" / "zarr.json"
    said = json.loads(file.read_text())
    said["shape"][0] -= 1
    file.write_text(json.dumps(said))
    with pytest.raises(DamagedStore, match=r"values/zarr\.json is damaged"):
        pc.Recording.open(tmp_path / "store")


def flipped(content: bytes, place: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1
    return bytes(changed)
