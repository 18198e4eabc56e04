"""`record` on padded batches against each text run alone, for every family of networks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from tests.recording import tiny
from tests.recording.tiny import CASES, Rows, alone
from torch import nn

import patchclamp as pc
from patchclamp.recording import SiteRecording

TEXTS = tiny.texts()
TARGETS = tiny.texts(len(TEXTS), longest=9, seed=1)
THRESHOLD = 0.05
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def summaries() -> list[pc.Summary]:
    return [
        pc.Moments(),
        pc.MinMax(),
        pc.FiringRate(0.0, THRESHOLD),
        pc.TopExamples(5),
        pc.Histogram(),
        pc.ByToken(threshold=THRESHOLD),
    ]


def recorded(model: pc.Model, data: Any, sites: Iterable[str], **options: Any) -> pc.Recording:
    return tiny.recorded(model, data, list(sites), summaries(), **options)


def agrees(site: SiteRecording, rows: Rows, tolerance: float) -> None:
    """Every figure of a recorded site equals that of the rows, which were read one text at a time."""
    values, close = rows.values.astype(np.float64), {"rtol": tolerance, "atol": tolerance * np.abs(rows.values).max()}
    assert site.count == site.moments.count == len(values) > 100
    np.testing.assert_allclose(site.moments.mean, values.mean(0), **close)
    np.testing.assert_allclose(site.moments.variance, values.var(0), **close)
    np.testing.assert_allclose(site.min_max.min, values.min(0), **close)
    np.testing.assert_allclose(site.min_max.max, values.max(0), **close)
    for column, threshold in enumerate((0.0, THRESHOLD)):
        np.testing.assert_array_equal(site.firing_rate.fired[:, column], (values > threshold).sum(0))
    bins = np.searchsorted(site.histogram.edges, values, side="right") - 1
    for neuron, counts in enumerate(site.histogram.counts):
        np.testing.assert_array_equal(counts, np.bincount(bins[:, neuron], minlength=len(counts)))
    agrees_on_top(site, rows, close)
    agrees_on_tokens(site, rows)


def agrees_on_top(site: SiteRecording, rows: Rows, close: dict[str, Any]) -> None:
    top = site.top_examples
    np.testing.assert_allclose(top.values, -np.sort(-rows.values, axis=0)[: top.k].T, **close)
    for neuron in range(rows.values.shape[1]):
        places = list(zip(top.example[neuron].tolist(), top.position[neuron].tolist(), strict=True))
        assert len(set(places)) == top.k
        found = [rows.at(example, position)[neuron] for example, position in places]
        np.testing.assert_allclose(top.values[neuron], found, **close)


def agrees_on_tokens(site: SiteRecording, rows: Rows) -> None:
    if "by_token" not in site.summaries:
        return
    by_token = site.by_token
    np.testing.assert_array_equal(by_token.fired_total, (rows.values > THRESHOLD).sum(0))
    assert len(by_token.tokens) > 10
    for slot, token in enumerate(by_token.tokens):
        mine = rows.token == token
        assert by_token.occurrences[slot] == mine.sum()
        np.testing.assert_array_equal(by_token.fired[slot], (rows.values[mine] > THRESHOLD).sum(0))


def model_of(name: str, dtype: torch.dtype = torch.float64, side: str = "right") -> pc.Model:
    case = CASES[name]
    # BERT's tokenizer has a padding token, those of the others have none.
    words = tiny.tokenizer(case.template, pad=name == "bert", side=side)
    return pc.load(case.build().to(dtype), tokenizer=words)


# Texts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", CASES)
def test_equals_each_text_run_alone(name: str, side: str) -> None:
    model, case = model_of(name, side=side), CASES[name]
    recording = recorded(model, TEXTS, case.sites)
    for site, rows in alone(model.module, case.sites, model.tokenizer, TEXTS).items():
        agrees(recording[site], rows, TOLERANCE[torch.float64])


@pytest.mark.parametrize("name", CASES)
def test_equals_each_text_run_alone_in_single_precision(name: str) -> None:
    model, case = model_of(name, torch.float32), CASES[name]
    recording = recorded(model, TEXTS, case.sites)
    for site, rows in alone(model.module, case.sites, model.tokenizer, TEXTS).items():
        assert recording[site].min_max.max.dtype == np.float32
        agrees(recording[site], rows, TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "opt"])
def test_the_batches_are_padded_on_the_tokenizers_side(name: str) -> None:
    """Otherwise the tests of left padding would prove nothing."""
    for side, padded in (("left", 0), ("right", -1)):
        model, masks = model_of(name, side=side), []
        model.module.register_forward_pre_hook(
            lambda _, __, given, masks=masks: masks.append(given["attention_mask"]), with_kwargs=True
        )
        assert model.sites and masks.clear() is None
        recorded(model, TEXTS, ["mlp.0"])
        assert len(masks) > 3
        assert any(not mask[:, padded].all() for mask in masks)
        assert all(mask[:, -1 - padded].all() for mask in masks)


@pytest.mark.parametrize("name", CASES)
def test_special_tokens_count_when_asked_for(name: str) -> None:
    model, case = model_of(name), CASES[name]
    recording = recorded(model, TEXTS, case.sites, special_tokens=True)
    every = alone(model.module, case.sites, model.tokenizer, TEXTS, special=True)
    without = alone(model.module, case.sites, model.tokenizer, TEXTS)
    for site, rows in every.items():
        agrees(recording[site], rows, TOLERANCE[torch.float64])
        assert len(rows.values) > len(without[site].values) or case.template == "$A"
        assert "decoder" in site or recording.facts["data"]["tokens"] == len(rows.values)


@pytest.mark.parametrize("template", ["$A [SEP]", "[CLS] $A [SEP]"])
def test_the_decoder_reads_the_targets(template: str) -> None:
    """Special tokens inside what the decoder reads do not count either."""
    case = CASES["t5"]
    words = tiny.tokenizer(template, pad=False)
    model = pc.load(case.build().double(), tokenizer=words)
    recording = recorded(model, pc.Texts(TEXTS, targets=TARGETS), case.sites)
    for site, rows in alone(model.module, case.sites, words, TEXTS, TARGETS).items():
        assert recording[site].count == len(rows.values)
        agrees_on_tokens(recording[site], rows)
        np.testing.assert_allclose(recording[site].moments.mean, rows.values.mean(0), rtol=1e-10, atol=1e-12)
        agrees_on_top(recording[site], rows, {"rtol": 1e-10, "atol": 1e-12})


def test_long_targets_do_not_make_large_batches() -> None:
    model, sizes = model_of("t5"), []
    assert model.sites
    model.module.register_forward_pre_hook(
        lambda _, __, given: sizes.append(given["decoder_input_ids"].numel()), with_kwargs=True
    )
    short = ["the list"] * len(TARGETS)
    recorded(model, pc.Texts(short, targets=TARGETS), ["decoder.mlp.0"])
    assert max(sizes) <= 40


@pytest.mark.parametrize("name", CASES)
def test_a_position_indexes_the_examples_own_tokens(name: str) -> None:
    model, case = model_of(name, side="left"), CASES[name]
    recording = recorded(model, TEXTS, case.sites)
    for site in case.sites:
        top = recording[site].top_examples
        for example, position in zip(top.example.flatten(), top.position.flatten(), strict=True):
            ids = model.tokenizer(TEXTS[example])["input_ids"]
            if site.startswith("decoder"):
                ids = [0, *ids[:-1]]
            window = recording.window(site, example, position, context=2)
            start = max(0, position - 2)
            assert (window.example, window.start) == (example, start)
            assert window.ids.tolist() == ids[start : position + 3]
            assert window.counted[position - start]
            words = model.tokenizer.convert_ids_to_tokens(ids[start : position + 3])
            assert [each.strip() for each in recording.text(window.ids)] == words


@pytest.mark.parametrize("batch_tokens", [1, 17, 4096])
def test_the_size_of_the_batches_does_not_matter(batch_tokens: int) -> None:
    model, case = model_of("bert"), CASES["bert"]
    recording = recorded(model, TEXTS, case.sites, batch_tokens=batch_tokens)
    for site, rows in alone(model.module, case.sites, model.tokenizer, TEXTS).items():
        agrees(recording[site], rows, TOLERANCE[torch.float64])


def test_the_users_tokenizer_is_left_alone() -> None:
    model = model_of("gpt2")
    before = model.tokenizer.backend_tokenizer.to_str()
    recorded(model, TEXTS, ["mlp.0"], max_length=5)
    assert model.tokenizer.pad_token is None
    assert model.tokenizer.backend_tokenizer.to_str() == before


def test_a_feed_forward_in_pieces_is_read_whole() -> None:
    texts = [text for text in tiny.texts(60) if len(text.split()) % 2 == 0]
    words, sites = tiny.tokenizer(), CASES["bert"].sites
    model = pc.load(tiny.bert(chunk_size_feed_forward=2).double(), tokenizer=words)
    recording = recorded(model, texts, sites)
    for site, rows in alone(tiny.bert().double(), sites, words, texts).items():
        agrees(recording[site], rows, TOLERANCE[torch.float64])


# Tensors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_tokens", [1, 300, 4096])
def test_images_equal_each_one_run_alone(batch_tokens: int) -> None:
    module = tiny.vit().double()
    images = torch.rand(30, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sites = {f"mlp.{layer}": (f"layers.{layer}.mlp.fc2", True) for layer in range(tiny.LAYERS)}
    rows = tensors_alone(module, sites, images)
    model = pc.load(module)
    recording = pc.record(model, images, list(sites), summaries()[:-1], batch_tokens=batch_tokens, progress=False)
    for site in sites:
        assert recording[site].count == 30 * 5  # four patches and the one in front of them
        agrees(recording[site], rows[site], 1e-12)
    assert recording.facts["data"]["tokens"] == 150


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_plain_network_on_tensors(dtype: torch.dtype) -> None:
    module = tiny.mlp().to(dtype)
    given = torch.randn(150, 5, generator=torch.Generator().manual_seed(0), dtype=dtype)
    sites = {"mlp.0": ("2", True), "mlp.1": ("4", True), "module:0": ("0", False)}
    rows = tensors_alone(module, sites, given)
    recording = pc.record(module, given, list(sites), summaries()[:-1], batch_tokens=7, progress=False)
    for site in sites:
        assert recording[site].top_examples.position.max() == 0
        agrees(recording[site], rows[site], TOLERANCE[dtype])


def test_ids_without_a_tokenizer_are_tokens() -> None:
    module = tiny.bert().double()
    ids = torch.randint(4, tiny.VOCABULARY, (20, 7), generator=torch.Generator().manual_seed(0))
    sites = CASES["bert"].sites
    rows = tensors_alone(module, sites, ids)
    recording = recorded(pc.load(module), pc.Tensors(ids), sites)
    for site in sites:
        agrees(recording[site], rows[site], 1e-12)
    top = recording["mlp.0"].top_examples
    window = recording.window("mlp.0", top.example[0, 0], top.position[0, 0])
    assert window.ids.tolist() == ids[window.example].tolist()
    assert recording.text(window.ids) == [f" {each}" for each in window.ids]  # a token without words is its number


def test_a_row_for_each_example() -> None:
    """The pooler gives one vector a text, beside MLPs that give one a token."""
    model = model_of("bert")
    sites = ["mlp.0", "module:pooler"]
    recording = pc.record(model, TEXTS, sites, batch_tokens=40, progress=False)
    with torch.no_grad():
        truth = torch.cat([model.module(**model.inputs(text)).pooler_output for text in TEXTS]).numpy()
    site = recording["module:pooler"]
    assert (site.count, site.site.size) == (len(TEXTS), tiny.WIDTH)
    np.testing.assert_allclose(site.moments.mean, truth.mean(0), rtol=1e-12)
    np.testing.assert_array_equal(site.top_examples.example[:, : len(TEXTS)], np.argsort(-truth, axis=0).T)
    assert "by_token" not in site.summaries and "by_token" in recording["mlp.0"].summaries


def tensors_alone(module: nn.Module, sites: dict[str, tuple[str, bool]], given: torch.Tensor) -> dict[str, Rows]:
    parts: dict[str, list[tuple[np.ndarray, ...]]] = {site: [] for site in sites}
    for example in range(len(given)):
        for site, values in tiny.captured(module, sites, given[example : example + 1]).items():
            values = values.reshape(-1, values.shape[-1])
            position = np.arange(len(values))
            is_ids = not given.is_floating_point()
            token = given[example].numpy() if is_ids else np.full(len(values), -1)
            parts[site].append((values, np.full(len(values), example), position, token))
    return {site: Rows(*(np.concatenate(each) for each in zip(*found, strict=True))) for site, found in parts.items()}


# What else it keeps ---------------------------------------------------------------------------------


def test_labels_are_kept_apart() -> None:
    model = model_of("bert")
    kinds = [("long" if len(text.split()) > 7 else "short") for text in TEXTS]
    data = pc.Texts(TEXTS, labels={"kind": kinds, "parity": [index % 2 for index in range(len(TEXTS))]})
    recording = pc.record(model, data, "mlp.1", batch_tokens=40, progress=False)
    rows = alone(model.module, {"mlp.1": CASES["bert"].sites["mlp.1"]}, model.tokenizer, TEXTS)["mlp.1"]
    by_label = recording["mlp.1"].by_label
    assert by_label.labels == ("kind", "parity") and by_label.categories("parity") == ("0", "1")
    for label, given in (("kind", kinds), ("parity", ["01"[index % 2] for index in range(len(TEXTS))])):
        for place, category in enumerate(by_label.categories(label)):
            mine = np.asarray([given[example] == category for example in rows.example])
            assert by_label.count(label)[place] == mine.sum()
            np.testing.assert_allclose(by_label.mean(label)[:, place], rows.values[mine].mean(0), rtol=1e-10)
            np.testing.assert_allclose(by_label.rate(label)[:, place, 0], (rows.values[mine] > 0).mean(0))
    example = int(recording["mlp.1"].top_examples.example[0, 0])
    assert recording.labels_of(example) == {"kind": kinds[example], "parity": str(example % 2)}


def test_tokens_are_kept_by_label_too() -> None:
    data = pc.Texts(TEXTS, labels={"parity": [index % 2 for index in range(len(TEXTS))]})
    model = model_of("bert")
    templates = [pc.ByLabel(of=[pc.ByToken(threshold=THRESHOLD)]), pc.ByToken([7, 8], threshold=THRESHOLD)]
    recording = pc.record(model, data, "mlp.0", templates, progress=False)
    rows = alone(model.module, {"mlp.0": CASES["bert"].sites["mlp.0"]}, model.tokenizer, TEXTS)["mlp.0"]
    odd = recording["mlp.0"].by_label.of("parity", "1").by_token
    for slot, token in enumerate(odd.tokens):
        mine = (rows.token == token) & (rows.example % 2 == 1)
        np.testing.assert_array_equal(odd.fired[slot], (rows.values[mine] > THRESHOLD).sum(0))
    assert len(odd.tokens) > 10
    assert recording["mlp.0"].by_token.tokens.tolist() == [7, 8]
    assert [each.strip() for each in recording.text([7, 8])] == model.tokenizer.convert_ids_to_tokens([7, 8])


def test_the_usual_summaries() -> None:
    recording = pc.record(model_of("bert"), TEXTS, progress=False)
    usual = ["moments", "firing_rate", "min_max", "histogram", "top_examples", "by_token"]
    assert list(recording["mlp.0"].summaries) == usual
    assert recording["mlp.0"].top_examples.k == 20
    labelled = pc.record(model_of("bert"), pc.Texts(TEXTS, labels={"a": TEXTS}), progress=False)
    assert list(labelled["mlp.0"].summaries) == [*usual, "by_label"]
    tensors = pc.record(tiny.mlp(), torch.ones(3, 5), progress=False)
    assert list(tensors["mlp.0"].summaries) == usual[:-1]


def test_half_of_the_maximum_is_that_of_a_sample() -> None:
    model = model_of("bert")
    recording = pc.record(model, TEXTS, "mlp.0", progress=False)
    rates, half = recording["mlp.0"].firing_rate, recording["mlp.0"].min_max.max.clip(0) / 2
    np.testing.assert_allclose(rates.thresholds, np.stack([np.zeros_like(half), half], axis=1), rtol=1e-6)
    np.testing.assert_allclose(recording["mlp.0"].by_token.threshold, half, rtol=1e-6)
