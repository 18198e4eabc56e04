"""A recording on disk: the way there and back, a store used again or refused, nothing half-written, damage named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from tests.recording import tiny
from tests.recording.tiny import CASES, recorded, weight

import patchclamp as pc
from patchclamp.errors import DamagedStore, StoreError, UnknownName
from patchclamp.recording import Recording
from patchclamp.recording.batch import Batch, Setting
from patchclamp.recording.summaries.summary import _registry as known_summaries
from patchclamp.storage import write_manifest

TEXTS = tiny.texts()
KINDS = [("long" if len(text.split()) > 7 else "short") for text in TEXTS]


def model_of(name: str = "bert") -> pc.Model:
    return pc.load(CASES[name].build(), tokenizer=tiny.tokenizer(CASES[name].template))


def data(**options: Any) -> pc.Texts:
    usual: dict[str, Any] = {"labels": {"kind": KINDS}}
    return pc.Texts(TEXTS, **(usual | options))


def equal(left: Recording, right: Recording) -> None:
    """Two recordings are the same in everything that can be asked of them."""
    assert list(left) == list(right) and left.sites == right.sites
    assert left.facts == right.facts and left.labels == right.labels
    assert left.vocabulary == right.vocabulary and left.labels_of_examples == right.labels_of_examples
    for site in left:
        here, there = left[site], right[site]
        assert (here.count, here.nonfinite, list(here.summaries)) == (
            there.count,
            there.nonfinite,
            list(there.summaries),
        )
        for name, summary in here.summaries.items():
            other = there.summaries[name]
            assert type(other) is type(summary) and other.parameters() == summary.parameters()
            assert (other.site, other.size) == (summary.site, summary.size)
            state = other.state()
            assert {key: (each.dtype, each.tobytes()) for key, each in summary.state().items()} == {
                key: (each.dtype, each.tobytes()) for key, each in state.items()
            }
        if left.windows:
            equal_windows(left, right, site)
        if here.activations is None or there.activations is None:
            assert here.activations is there.activations
            continue
        for mine, other in zip(here.activations, there.activations, strict=True):
            np.testing.assert_array_equal(mine[:], other[:])


def equal_windows(left: Recording, right: Recording, site: str) -> None:
    top = left[site].top_examples
    for example, position in zip(top.example.flatten(), top.position.flatten(), strict=True):
        if example >= 0:
            mine, other = (each.window(site, example, position) for each in (left, right))
            assert (mine.example, mine.start, mine.ids.tolist()) == (other.example, other.start, other.ids.tolist())
            assert mine.counted.tolist() == other.counted.tolist() and mine.counted.dtype == other.counted.dtype
            assert left.labels_of(example) == right.labels_of(example)


# There and back -------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", [False, True])
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_everything_comes_back(name: str, activations: bool, tmp_path: Path) -> None:
    recording = recorded(model_of(name), data(), list(CASES[name].sites), activations=activations)
    recording.save(tmp_path / "a store")
    opened = pc.Recording.open(tmp_path / "a store")
    equal(recording, opened)
    assert opened.path == recording.path == tmp_path / "a store"
    assert opened.labels_of(int(opened["mlp.0" if name == "bert" else "encoder.mlp.0"].top_examples.example[0, 0]))
    opened.save(tmp_path / "again")
    equal(recording, pc.Recording.open(tmp_path / "again"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_recording_of_tensors_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    given = pc.Tensors(torch.rand(8, 5, dtype=dtype), labels={"digit": range(8)})
    recording = recorded(pc.load(tiny.mlp().to(dtype)), given, ["mlp.0", "module:1"])
    recording.save(tmp_path / "store")
    opened = pc.Recording.open(tmp_path / "store")
    equal(recording, opened)
    assert opened["module:1"].site.size == tiny.HIDDEN
    assert opened["mlp.0"].min_max.max.dtype == (np.float32 if dtype == torch.float32 else np.float64)
    assert opened.labels_of(3) == {"digit": "3"}


def test_what_was_opened_can_go_on(tmp_path: Path) -> None:
    """Accumulators that were stored can be merged with others: so a recording can be done in parts."""
    halves = [pc.Texts(TEXTS[:9], labels={"kind": KINDS[:9]}), pc.Texts(TEXTS[9:], labels={"kind": KINDS[9:]})]
    summaries = [pc.Moments(), pc.MinMax(), pc.ByLabel(of=[pc.Moments()])]
    parts = []
    for number, half in enumerate(halves):
        recorded(model_of(), half, "mlp.0", summaries).save(tmp_path / str(number))
        parts.append(pc.Recording.open(tmp_path / str(number))["mlp.0"])
    whole = recorded(model_of(), data(), "mlp.0", summaries)["mlp.0"]
    for name, summary in parts[0].summaries.items():
        summary.merge(parts[1].summaries[name])
        for key, array in whole.summaries[name].state().items():
            np.testing.assert_allclose(summary.state()[key], array, rtol=1e-5, atol=1e-6)


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something is pickled")

    model = model_of()
    assert model.sites
    for name in ("load", "loads", "Unpickler", "dump", "dumps", "Pickler"):
        monkeypatch.setattr(f"pickle.{name}", refuse)
    recorded(model, data(), activations=True).save(tmp_path / "store")
    pc.Recording.open(tmp_path / "store").with_tokens_permuted()
    files = [each for each in (tmp_path / "store").rglob("*") if each.is_file()]
    assert {each.suffix for each in files} == {".json", ".parquet", ".safetensors", ""}
    for file in files:
        # How a pickle begins, and an archive of them.
        assert not file.read_bytes().startswith((*(b"\x80" + bytes([version]) for version in range(2, 6)), b"PK"))


def test_an_older_recording_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    first, second = recorded(model_of(), TEXTS, "mlp.0"), recorded(model_of(), TEXTS, "mlp.1")
    first.save(tmp_path / "store")
    second.save(tmp_path / "store")
    assert list(pc.Recording.open(tmp_path / "store")) == ["mlp.1"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(StoreError, match=r"will not overwrite .*mine"):
        second.save(tmp_path / "mine")
    with pytest.raises(StoreError, match="has no manifest"):
        recorded(model_of(), TEXTS, store=tmp_path / "mine")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["mine", "store"]


def test_a_recording_with_activations_is_saved_over_itself(tmp_path: Path) -> None:
    recording = recorded(model_of(), TEXTS, "mlp.0", activations=True, store=tmp_path / "store")
    recording.save(tmp_path / "store")
    equal(recording, pc.Recording.open(tmp_path / "store"))


def test_a_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recording = recorded(model_of(), TEXTS, "mlp.0", store="~/store")
    monkeypatch.chdir(tmp_path)
    equal(recording, pc.Recording.open("~/store"))
    equal(recording, pc.Recording.open("store"))
    with pytest.raises(StoreError, match="another recording"):
        recorded(model_of(), TEXTS, "mlp.1", store="~/store")


# A store used again ---------------------------------------------------------------------------------


def test_the_same_recording_is_opened_instead_of_made_again(tmp_path: Path) -> None:
    first = recorded(model_of(), data(), store=tmp_path / "store")
    model, calls = model_of(), []
    assert model.sites
    model.module.register_forward_pre_hook(lambda *_: calls.append(1))
    # How large the batches are does not change a result.
    again = recorded(model, data(), store=tmp_path / "store", batch_tokens=17)
    assert not calls and again.path == tmp_path / "store"
    equal(first, again)


def changed_weight() -> pc.Model:
    model = model_of()
    weight(model, "encoder.layer.1.output.dense.weight")[0, 0] += 1e-3
    return model


def other_words() -> pc.Model:
    """The same weights behind a tokenizer that knows "loop" by another number."""
    words = tiny.tokenizer()
    words.add_tokens(["loo"])
    return pc.load(tiny.bert(), tokenizer=words)


def retold(index: int, text: str) -> pc.Texts:
    return (
        data(labels={"kind": KINDS})
        if index < 0
        else pc.Texts([*TEXTS[:index], text, *TEXTS[index + 1 :]], labels={"kind": KINDS})
    )


@pytest.mark.parametrize(
    ("build", "given", "options", "says"),
    [
        (changed_weight, data, {}, "the model"),
        (lambda: model_of("gpt2"), data, {}, "the model (there 'BertModel', here 'GPT2LMHeadModel')"),
        (lambda: pc.load(tiny.bert(hidden_act="relu"), tokenizer=tiny.tokenizer()), data, {}, "the configuration"),
        (lambda: pc.load(tiny.bert(num_attention_heads=4), tokenizer=tiny.tokenizer()), data, {}, "the configuration"),
        (other_words, data, {}, "the tokens"),
        (model_of, lambda: retold(16, "the end"), {}, "the data"),
        (model_of, lambda: pc.Texts(TEXTS[:-1], labels={"kind": KINDS[:-1]}), {}, "the data"),
        (model_of, lambda: pc.Texts(TEXTS[::-1], labels={"kind": KINDS}), {}, "the data"),
        (model_of, lambda: data(labels={"kind": KINDS[::-1]}), {}, "the data"),
        (model_of, lambda: data(labels={"sort": KINDS}), {}, "the data"),
        (model_of, lambda: data(targets=TEXTS), {}, "the data"),
        (model_of, data, {"sites": "mlp.0"}, "sites (there ['mlp.0', 'mlp.1'], here ['mlp.0'])"),
        (model_of, data, {"summaries": [pc.Moments()]}, "summaries (there"),
        (model_of, data, {"max_length": 9}, "max_length (there None, here 9)"),
        (model_of, data, {"seed": 1}, "seed (there 0, here 1)"),
        (model_of, data, {"special_tokens": True}, "special_tokens (there False, here True)"),
        (model_of, data, {"activations": True}, "activations (there False, here True)"),
    ],
)
def test_another_recording_is_refused_and_said_how_it_differs(
    build: Callable[[], pc.Model], given: Callable[[], pc.Texts], options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    first = recorded(model_of(), data(), store=tmp_path / "store")
    before = {each: each.stat().st_mtime_ns for each in tmp_path.rglob("*")}
    model, calls = build(), []
    assert model.sites
    model.module.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(StoreError, match=r"holds another recording. What differs") as caught:
        recorded(model, given(), store=tmp_path / "store", **options)
    assert says in str(caught.value) and str(tmp_path / "store") in str(caught.value)
    assert not calls and {each: each.stat().st_mtime_ns for each in tmp_path.rglob("*")} == before
    equal(first, pc.Recording.open(tmp_path / "store"))


def test_tensors_are_told_apart(tmp_path: Path) -> None:
    model, given = pc.load(tiny.mlp()), torch.rand(4, 5)
    recorded(model, given, store=tmp_path / "store")
    recorded(model, given.clone(), store=tmp_path / "store")
    for other in (given + 1e-3, given.double().float() * -1, pc.Tensors(given, labels={"a": [1, 2, 3, 4]})):
        with pytest.raises(StoreError, match="the data"):
            recorded(model, other, summaries=None, store=tmp_path / "store")


# Nothing half-written -------------------------------------------------------------------------------


def test_a_store_that_fails_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for broken in ("safetensors.numpy.save_file", "polars.DataFrame.write_parquet", "shutil.copytree", "os.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(broken, fail)
            with pytest.raises(OSError, match="No space left"):
                recorded(model_of(), data(), activations=True, store=tmp_path / "new" / "store")
        assert list(tmp_path.iterdir()) == [], broken


def test_an_older_store_outlives_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = recorded(model_of(), TEXTS, "mlp.0", store=tmp_path / "store")
    replaced, real = [], os.replace

    def fail(source: Any, target: Any) -> None:
        replaced.append(target)
        if len(replaced) == 3:  # manifest, the old store away, the new one in
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(StoreError, match=r"cannot write .*store: Input/output error"):
        recorded(model_of(), TEXTS, "mlp.1").save(tmp_path / "store")
    assert [each.name for each in tmp_path.iterdir() if not each.name.startswith(".store.old")] == ["store"]
    equal(first, pc.Recording.open(tmp_path / "store"))


def test_a_summary_that_could_not_be_opened_again_is_refused_before_the_pass(tmp_path: Path) -> None:
    model, calls = model_of(), []
    assert model.sites
    model.module.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(pc.errors.DataError, match="forgetful"):
        recorded(model, TEXTS, summaries=[Forgetful(3)], store=tmp_path / "store")
    assert not calls and list(tmp_path.iterdir()) == []


class Elsewhere(pc.Moments):
    """Defined in a notebook that was closed since."""

    name = "elsewhere"


class Forgetful(pc.Summary):
    """Its `__init__` takes something that `parameters()` does not tell."""

    name = "forgetful"

    def __init__(self, number: int) -> None:
        self.number = number

    def empty(self, setting: Setting) -> dict[str, torch.Tensor]:
        return {"count": torch.zeros(())}

    def add(self, batch: Batch) -> None: ...

    def combine(self, other: Any) -> None: ...


# Damage ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "store"
    recorded(model_of(), data(), activations=True, store=path)
    return path


def test_every_damaged_file_is_named(store: Path) -> None:
    opened = pc.Recording.open(store)
    files = sorted(each for each in store.rglob("*") if each.is_file() and not is_chunk(each))
    assert len(files) > 8
    for file in files:
        content = file.read_bytes()
        middle = len(content) // 2
        flips = (0, middle, len(content) - 1) if file.suffix != ".json" else digits(content)
        changed = [content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :] for place in flips]
        for damaged in (*changed, content[:middle], content[:-2], b""):
            file.write_bytes(damaged)
            with pytest.raises(StoreError, match=file.name.replace(".", r"\.")) as caught:
                pc.Recording.open(store)
            assert isinstance(caught.value, DamagedStore) or "format" in str(caught.value)
        file.unlink()
        with pytest.raises(StoreError, match=file.name.replace(".", r"\.")):
            pc.Recording.open(store)
        file.write_bytes(content)
    equal(opened, pc.Recording.open(store))


def digits(content: bytes) -> list[int]:
    """Places of some digits: a number that changes still reads as JSON."""
    return [place for place, byte in enumerate(content) if chr(byte).isdigit()][:: max(1, len(content) // 300)]


def is_chunk(file: Path) -> bool:
    return "activations" in file.parts and file.name != "zarr.json"


def test_a_store_of_a_newer_format_is_refused(store: Path, tmp_path: Path) -> None:
    recorded(model_of(), TEXTS).save(tmp_path / "store")
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    (tmp_path / "store" / "manifest.json").write_text(json.dumps(manifest | {"format_version": 2}))
    with pytest.raises(StoreError, match="has format version 2; this patchclamp reads up to 1: update it"):
        pc.Recording.open(tmp_path / "store")


def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    for path, says in ((tmp_path / "none", "does not exist"), (tmp_path, "has no manifest")):
        with pytest.raises(StoreError, match=says):
            pc.Recording.open(path)
    (tmp_path / "atlas").mkdir()
    write_manifest(tmp_path / "atlas", "atlas", {})
    with pytest.raises(StoreError, match=r"not a patchclamp recording: .* says 'patchclamp atlas'"):
        pc.Recording.open(tmp_path / "atlas")
    # A manifest with the right checksums that lacks what a recording has.
    (tmp_path / "odd").mkdir()
    write_manifest(tmp_path / "odd", "recording", {"sites": {}, "labels": {}})
    with pytest.raises(DamagedStore, match="odd cannot be read: KeyError: 'summaries'"):
        pc.Recording.open(tmp_path / "odd")


def test_a_summary_that_is_not_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = recorded(model_of(), TEXTS, "mlp.0", [Elsewhere()])
    recording.save(tmp_path / "store")
    monkeypatch.delitem(known_summaries, "elsewhere")
    with pytest.raises(UnknownName, match=r"'elsewhere'.*imported first"):
        pc.Recording.open(tmp_path / "store")


def test_tables_are_plain_parquet(store: Path) -> None:
    vocabulary = pl.read_parquet(store / "vocabulary.parquet")
    words = tiny.tokenizer().convert_ids_to_tokens(vocabulary["id"].to_list())
    assert [text.strip() for text in vocabulary["text"].to_list()] == words
    examples = pl.read_parquet(store / "examples.parquet")
    assert examples["kind"].to_list() == [KINDS[example] for example in examples["example"].to_list()]
