"""`Atlas.build`: the nearest neurons in hard cases, folders that are whole or absent, data without text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from rich.console import Console
from tests.architectures import tokenizer
from tests.recording import tiny
from tests.recording.tiny import CASES, Rows, alone, state_of, weight
from tests.zoo import SENTENCES, by_title

import patchclamp as pc
from patchclamp.atlas import neighbors as neighbors_module
from patchclamp.atlas.neighbors import neighbors
from patchclamp.errors import DataError, StoreError, UnknownName
from patchclamp.recording.record import prepare

TEXTS = tiny.texts(60)


def model_of(name: str = "bert") -> pc.Model:
    return pc.load(CASES[name].build().double(), tokenizer=tiny.tokenizer(CASES[name].template))


def built(model: pc.Model, data: Any, path: Path, **options: Any) -> pc.Atlas:
    return pc.Atlas.build(model, data, path, **({"batch_tokens": 100, "progress": False} | options))


def near(model: pc.Model, data: Any = TEXTS, sites: Any = "mlp.*", **options: Any) -> pl.DataFrame:
    run = prepare(model, data, sites, progress=False)
    return neighbors(model, run.corpus, run.sites, **({"batch_tokens": 100, "progress": False} | options))


def correlates(table: pl.DataFrame, rows: dict[str, Rows], kept: np.ndarray | None = None) -> None:
    """Every correlation is that of numpy, on all rows or on those `kept`; no neuron has a nearer one."""
    assert len(table)
    for (site, other), part in table.group_by("site", "other_site"):
        left, right = (rows[str(name)].values[slice(None) if kept is None else kept] for name in (site, other))
        truth = np.corrcoef(left, right, rowvar=False)[: left.shape[1], left.shape[1] :]
        if site == other:
            np.fill_diagonal(truth, 0)
        np.testing.assert_allclose(part["correlation"], truth[part["index"], part["other_index"]], atol=2e-6)
        weakest = part.group_by("index").agg(pl.col("correlation").abs().min(), pl.len().alias("number"))
        for index, weak, number in weakest.iter_rows():
            assert number == 5 and (np.abs(truth[index]) > weak + 2e-6).sum() <= 4


# Nearest neurons ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_tokens", [20, 4096])
def test_correlation_is_that_of_numpy(batch_tokens: int) -> None:
    model = model_of()
    rows = alone(model.module, CASES["bert"].sites, model.tokenizer, TEXTS)
    table = near(model, batch_tokens=batch_tokens)
    correlates(table, rows)
    assert set(table.select("site", "other_site", "relation").unique().rows()) == {
        ("mlp.0", "mlp.0", "layer"),
        ("mlp.1", "mlp.1", "layer"),
        ("mlp.0", "mlp.1", "next"),
    }


def test_the_next_layer_is_of_the_same_stack_and_kind() -> None:
    table = near(model_of("t5"), sites=["*.mlp.*", "*.gate.*"])
    following = table.filter(pl.col("relation") == "next").select("site", "other_site").unique().rows()
    stacks, kinds = ("encoder", "decoder"), ("mlp", "gate")
    assert set(following) == {(f"{stack}.{kind}.0", f"{stack}.{kind}.1") for stack in stacks for kind in kinds}


def test_a_sample_of_the_corpus() -> None:
    model = model_of()
    rows = alone(model.module, CASES["bert"].sites, model.tokenizer, TEXTS)
    tables = {}
    for seed in (0, 1):
        examples = prepare(model, TEXTS, "mlp.*", progress=False).corpus.sample(120, seed)
        read = sum(len(text.split()) + 2 for text in np.asarray(TEXTS)[examples])
        assert 100 < read <= 120  # at most so many, and not far fewer
        tables[seed] = near(model, tokens=120, seed=seed)
        correlates(tables[seed], rows, np.isin(rows["mlp.0"].example, examples))
    assert not tables[0].equals(tables[1])
    assert tables[0].equals(near(model, tokens=120, seed=0))


def test_a_sample_of_one_example_at_least() -> None:
    corpus = prepare(model_of(), TEXTS, "mlp.*", progress=False).corpus
    assert len(corpus.sample(1, 0)) == 1
    assert corpus.sample(10**9, 0).tolist() == list(range(60))
    drawn = [tuple(corpus.sample(60, seed)) for seed in range(50)]
    assert len(set(drawn)) > 45 and all(list(each) == sorted(each) for each in drawn)


def test_little_memory_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    whole, calls = near(model), []
    model.module.register_forward_pre_hook(lambda *_: calls.append(1))
    near(model)
    once = len(calls)
    monkeypatch.setattr(neighbors_module, "_MOST_BYTES", 1)
    calls.clear()
    assert near(model).equals(whole)
    assert len(calls) == 3 * once  # one pass for each pair of sites


@pytest.mark.parametrize(("dtype", "offset"), [(torch.float64, 1e6), (torch.float32, 300.0), (torch.float32, 0.0)])
def test_large_means_do_not_hide_small_changes(dtype: torch.dtype, offset: float) -> None:
    """Neurons that sit at different heights; some move by little, some not at all or by a rounding."""
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(400, 12, generator=draw, dtype=dtype)
    values[:, 1] = values[:, 0] * 0.5 + values[:, 1] * 0.5
    values = values * torch.logspace(-2, 2, 12, dtype=dtype) + offset * torch.arange(12, dtype=dtype) / 7
    still = (torch.arange(1, 9, dtype=dtype) / 7 + offset / 3).expand(400, 8)
    rounded = torch.where(values[:, :8] > 0, still, torch.nextafter(still, 2 * still))
    values = torch.cat([values, still, rounded], dim=1)
    model = pc.load(torch.nn.Sequential(torch.nn.Identity()))
    table = near(model, values, "module:0", batch_tokens=37)
    assert set(table["index"]) == set(table["other_index"]) == set(range(12))
    with np.errstate(invalid="ignore"):
        truth = np.corrcoef(values.double().numpy(), rowvar=False)
    tolerance = 2e-6 if dtype == torch.float64 or not offset else 5e-3
    np.testing.assert_allclose(table["correlation"], truth[table["index"], table["other_index"]], atol=tolerance)


def test_rows_that_are_no_numbers_are_left_out() -> None:
    model, sites = model_of(), CASES["bert"].sites
    weight(model, "embeddings.word_embeddings.weight")[model.tokenizer.convert_tokens_to_ids("loop")] = float("inf")
    rows = alone(model.module, sites, model.tokenizer, TEXTS)
    bad = np.asarray(~np.isfinite(rows["mlp.0"].values).all(1))
    assert 0 < bad.sum() < len(bad) / 2
    correlates(near(model), rows, ~bad)


def test_rows_stay_side_by_side_when_one_site_lacks_some() -> None:
    module = Reciprocal()
    values = torch.randn(200, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values[::7, 2] = 0  # its reciprocal is infinite
    first = values.numpy()
    with np.errstate(divide="ignore"):
        second = np.concatenate([1 / first[:, 2:3], first[:, ::-1]], axis=1)
    kept = np.isfinite(second).all(1)
    sites = [pc.Site(f"mlp.{layer}", "mlp", layer, 6 + layer, module=f"{layer}", tensor="output") for layer in (0, 1)]
    table = near(pc.load(module), values, sites, batch_tokens=16)
    for (site, other), part in table.group_by("site", "other_site"):
        left, right = (first if name == "mlp.0" else second for name in (site, other))
        used = slice(None) if site == other == "mlp.0" else kept
        truth = np.corrcoef(left[used], right[used], rowvar=False)[: left.shape[1], left.shape[1] :]
        np.testing.assert_allclose(part["correlation"], truth[part["index"], part["other_index"]], atol=2e-6)
    assert table["correlation"].is_finite().all()


class Reciprocal(torch.nn.Module):
    """Two layers; the second has an infinite neuron wherever the first has a zero."""

    def __init__(self) -> None:
        super().__init__()
        for layer in ("0", "1"):
            self.add_module(layer, torch.nn.Identity())
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.get_submodule("0")(x)
        return self.get_submodule("1")(torch.cat([1 / x[:, 2:3], x.flip(1)], dim=1))


def test_they_can_be_left_out(tmp_path: Path) -> None:
    atlas = built(model_of(), TEXTS, tmp_path / "atlas", correlate_tokens=0)
    assert atlas.table("neighbors").collect().is_empty()
    assert atlas.neuron("mlp.0:1").neighbors.is_empty()
    assert atlas.manifest["parameters"]["correlate_tokens"] == 0


# Folders --------------------------------------------------------------------------------------------


def test_a_folder_of_somebody_else_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    model, calls = model_of(), []
    assert model.sites
    model.module.register_forward_pre_hook(lambda *_: calls.append(1))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    tiny.recorded(model, TEXTS).save(tmp_path / "recording")
    calls.clear()
    for place in ("mine", "recording", "mine/thesis.txt", "/proc/nowhere/atlas"):
        with pytest.raises(StoreError, match=r"will not overwrite|cannot write"):
            built(model, TEXTS, tmp_path / place)
    assert not calls and sorted(each.name for each in tmp_path.iterdir()) == ["mine", "recording"]
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "words"


def test_an_older_atlas_is_replaced(tmp_path: Path) -> None:
    built(model_of(), TEXTS, tmp_path / "atlas", sites="mlp.0")
    atlas = built(model_of(), TEXTS, tmp_path / "atlas", sites="mlp.1")
    assert [site["name"] for site in atlas.manifest["sites"]] == ["mlp.1"]
    assert [each.name for each in tmp_path.iterdir()] == ["atlas"]


def fail_late(model: pc.Model, error: BaseException) -> None:
    """The model breaks in the middle of the pass."""
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 12:
            raise error

    assert model.sites
    model.module.register_forward_hook(fail)


@pytest.mark.parametrize(
    ("options", "error", "prepare_model"),
    [
        ({}, RuntimeError, lambda model: fail_late(model, RuntimeError("late"))),
        ({}, KeyboardInterrupt, lambda model: fail_late(model, KeyboardInterrupt())),
        ({"data": ["a list", ""]}, DataError, None),
        ({"data": []}, DataError, None),
        ({"sites": "mlp.9"}, UnknownName, None),
        ({"max_length": 1}, DataError, None),
    ],
)
def test_a_failure_leaves_nothing(
    tmp_path: Path,
    options: dict[str, Any],
    error: type[BaseException],
    prepare_model: Callable[[pc.Model], None] | None,
) -> None:
    model = model_of()
    if prepare_model is not None:
        prepare_model(model)
    before = state_of(model.module)
    with pytest.raises(error):
        built(model, options.pop("data", TEXTS), tmp_path / "new" / "atlas", **options)
    assert list(tmp_path.iterdir()) == [] and state_of(model.module) == before


def test_an_older_atlas_outlives_a_failure(tmp_path: Path) -> None:
    built(model_of(), TEXTS, tmp_path / "atlas")
    model = model_of()
    fail_late(model, RuntimeError("late"))
    with pytest.raises(RuntimeError, match="late"):
        built(model, TEXTS, tmp_path / "atlas")
    assert [each.name for each in tmp_path.iterdir()] == ["atlas"]
    assert len(pc.Atlas.open(tmp_path / "atlas")) == 2 * tiny.HIDDEN


def test_the_users_line_is_blamed_for_a_warning(tmp_path: Path) -> None:
    model = model_of()
    model.module.train()
    with pytest.warns(UserWarning, match="training mode") as caught:
        pc.Atlas.build(model, TEXTS, tmp_path / "atlas", progress=False)
    assert caught[0].filename == __file__


# Other data -----------------------------------------------------------------------------------------


def test_images_have_an_atlas_too(tmp_path: Path) -> None:
    images = torch.rand(25, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    data = pc.Tensors(images, labels={"half": [index % 2 for index in range(25)]})
    atlas = built(pc.load(tiny.vit()), data, tmp_path / "atlas")
    recording = pc.Recording.open(atlas.path / "recording")
    top = recording["mlp.1"].top_examples
    for index in range(tiny.HIDDEN):
        card = atlas.neuron(f"mlp.1:{index}")
        assert card.facts["count"] == 125 and card.facts["top_token"] is None and card.facts["family"] == ""
        assert not card.facts["striking"] and card.tokens.is_empty() and len(card.labels) == 2
        assert card.examples["rank"].to_list() == list(range(20))
        assert card.examples["example"].to_list() == top.example[index].tolist()
        assert card.examples["position"].to_list() == card.examples["start"].to_list() == top.position[index].tolist()
        np.testing.assert_allclose(card.examples["value"], top.values[index])
        assert card.examples["tokens"].to_list() == card.examples["values"].to_list() == [[]] * 20
        halves = [f'{{"half": "{example % 2}"}}' for example in top.example[index]]
        assert card.examples["labels"].to_list() == halves
        assert card.neighbors["relation"].to_list() == ["layer"] * 5
    assert len(atlas.striking) == len(atlas.search("return")) == 0
    assert atlas.manifest["data"]["tokens"] == 125
    with Console(record=True, width=100, file=open("/dev/null", "w")) as console:
        console.print(atlas, atlas.neuron("mlp.1:3"))
    assert f"example {top.example[3, 0]}, position {top.position[3, 0]}" in console.export_text()


@pytest.mark.parametrize(("title", "sites"), [("Mixtral", "expert.*"), ("Mamba", "mixer.*"), ("nn.GRU", "recurrent.*")])
def test_sites_of_other_kinds_have_an_atlas_too(title: str, sites: str, tmp_path: Path) -> None:
    model = pc.load(by_title(title).build(), tokenizer=tokenizer())
    atlas = built(model, SENTENCES * 8, tmp_path / "atlas", sites=sites)
    recording = pc.Recording.open(atlas.path / "recording")
    for name in recording:
        card = atlas.neuron(f"{name}:1")
        assert card.facts["count"] == recording[name].count
        assert card.facts["mean"] == pytest.approx(recording[name].moments.mean[1])
        # Experts of two layers see different tokens.
        relations = {"layer"} if title == "Mixtral" else {"layer", "next"}
        assert set(card.neighbors["relation"].to_list()) <= relations


def test_token_ids_without_a_tokenizer(tmp_path: Path) -> None:
    ids = torch.randint(4, tiny.VOCABULARY, (30, 7), generator=torch.Generator().manual_seed(0))
    atlas = built(pc.load(tiny.bert()), pc.Tensors(ids), tmp_path / "atlas")
    card = atlas.neuron("mlp.0:2")
    for row in card.examples.iter_rows(named=True):
        assert row["tokens"] == [f" {each}" for each in ids[row["example"]].tolist()]
        assert np.isfinite(row["values"]).all()
    assert card.tokens["token"].to_list() == [f" {each}" for each in card.tokens["token_id"].to_list()]
    assert len(atlas.striking) == 0


def test_a_decoder_shows_what_it_read(tmp_path: Path) -> None:
    model, targets = model_of("t5"), tiny.texts(60, seed=5)
    atlas = built(model, pc.Texts(TEXTS, targets=targets), tmp_path / "atlas")
    for site, read in (("encoder.mlp.1", TEXTS), ("decoder.mlp.1", targets)):
        for row in atlas.neuron(f"{site}:4").examples.iter_rows(named=True):
            words = [token.strip() for token in row["tokens"]]
            text = " ".join(word for word in words if not word.startswith("["))
            assert text in read[row["example"]] and len(text) > 0
            assert words[0] == "[PAD]" or site.startswith("encoder") or row["start"] > 0


def test_a_row_for_each_example_beside_one_for_each_token(tmp_path: Path) -> None:
    model = model_of()
    atlas = built(model, TEXTS, tmp_path / "atlas", sites=["mlp.0", "module:pooler"])
    table = atlas.neurons.to_polars()
    pooled = table.filter(pl.col("site") == "module:pooler")
    assert set(pooled["count"]) == {60} and pooled["layer"].null_count() == tiny.WIDTH
    assert pooled["top_token"].null_count() == tiny.WIDTH and not pooled["striking"].any()
    assert table.filter(pl.col("site") == "mlp.0")["top_token"].null_count() < tiny.HIDDEN
    found = pc.find.striking(tiny.recorded(model, TEXTS, "mlp.0")).names
    assert table.filter("striking")["neuron"].to_list() == sorted(found, key=lambda each: int(each.split(":")[1]))


def test_a_site_without_a_single_number(tmp_path: Path) -> None:
    model = model_of()
    weight(model, "encoder.layer.1.intermediate.dense.bias")[3] = float("nan")
    with pytest.warns(UserWarning, match=r"mlp\.1: .* are NaN"):
        atlas = built(model, TEXTS, tmp_path / "atlas")
    card = atlas.neuron("mlp.1:7")
    assert card.facts["count"] == 0 and card.facts["mean"] is None and card.facts["q50"] is None
    assert card.examples.is_empty() and card.histogram.is_empty() and card.neighbors.is_empty()
    assert card.headline == "No token reached it."
    assert atlas.neuron("mlp.0:7").facts["count"] > 0


def test_without_labels(tmp_path: Path) -> None:
    atlas = built(model_of(), TEXTS, tmp_path / "atlas")
    card = atlas.neuron("mlp.0:0")
    assert card.labels.is_empty() and card.facts["label"] is None and card.facts["label_contrast"] is None
    assert set(card.examples["labels"]) == {"{}"}
    assert atlas.manifest["labels"] == {}
