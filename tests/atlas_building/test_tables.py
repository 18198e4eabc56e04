"""Every figure of an atlas against brute force on all activations, each text run alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
import torch
from tests.recording import tiny
from tests.recording.tiny import CASES, Rows, alone, weight

import patchclamp as pc

SITES = list(CASES["bert"].sites)
CONSTANT, DEAD = 3, 5  # neurons of mlp.0


@dataclass(frozen=True)
class Built:
    """An atlas, and what it was made of."""

    atlas: pc.Atlas
    rows: dict[str, Rows]
    texts: list[str]
    labels: dict[str, list[str]]
    words: list[str]  # as each token id reads

    def of(self, table: str, site: str, index: int) -> pl.DataFrame:
        return self.atlas.table(table).filter(pl.col("site") == site, pl.col("index") == index).collect()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    texts = tiny.texts(90)
    texts += [f"{text} {text.split()[0]}" for text in texts[:30]] + texts[:20]  # nearly the same, and the very same
    labels = {
        "length": ["long" if len(text.split()) > 7 else "short" for text in texts],
        "third": [str(index % 3) for index in range(len(texts))],
    }
    model = pc.load(tiny.bert().double(), tokenizer=tiny.tokenizer())
    first = "encoder.layer.0.intermediate.dense"
    for neuron, bias in ((CONSTANT, 3.7), (DEAD, -1e3)):
        weight(model, f"{first}.weight")[neuron] = 0
        weight(model, f"{first}.bias")[neuron] = bias
    # Two neurons that answer to words, which have something in common, by the direction that best tells them apart.
    families = {7: ["return", "returns", "returned"], 8: ["item", "items"]}
    ids = {neuron: model.tokenizer.convert_tokens_to_ids(family) for neuron, family in families.items()}
    for dimension, family in enumerate(ids.values()):
        weight(model, "embeddings.word_embeddings.weight")[family, dimension] += 3
    states = alone(model.module, {"": (first, True)}, model.tokenizer, texts)[""]
    for neuron, family in ids.items():
        wanted = np.isin(states.token, family)
        direction = np.linalg.lstsq(states.values - states.values.mean(0), wanted - wanted.mean(), rcond=None)[0]
        weight(model, f"{first}.weight")[neuron] = torch.from_numpy(20 * direction)
        weight(model, f"{first}.bias")[neuron] = -20 * float(np.quantile(states.values @ direction, 0.8))
    path = tmp_path_factory.mktemp("built") / "atlas"
    atlas = pc.Atlas.build(model, pc.Texts(texts, labels=labels), path, batch_tokens=200, progress=False)
    words = model.reader.strings(range(tiny.VOCABULARY))  # type: ignore[union-attr]
    return Built(atlas, alone(model.module, CASES["bert"].sites, model.tokenizer, texts), texts, labels, words)


every = pytest.mark.parametrize("site", SITES)


def strong(rows: Rows, index: int) -> np.ndarray:
    """On which rows a neuron fires strongly: above half of its maximum."""
    values = rows.values[:, index]
    return values > np.float32(max(np.float32(values.max()) * 0.5, 0))


@every
def test_the_simple_figures(built: Built, site: str) -> None:
    table = built.atlas.neurons.to_polars().filter(pl.col("site") == site)
    values = built.rows[site].values
    maximum = values.max(0).astype(np.float32)
    threshold = np.maximum(maximum * np.float32(0.5), 0).astype(np.float64)
    layer = int(site[-1])
    assert table["neuron"].to_list() == [f"{site}:{index}" for index in range(tiny.HIDDEN)]
    assert table["index"].to_list() == list(range(tiny.HIDDEN))
    assert set(table["kind"]) == {"mlp"} and set(table["layer"]) == {layer} and set(table["count"]) == {len(values)}
    truth = {
        "firing_rate": (values > 0).mean(0),
        "strong_rate": np.stack([strong(built.rows[site], index) for index in range(tiny.HIDDEN)], axis=1).mean(0),
        "threshold": threshold,
        "mean": values.mean(0),
        "std": values.std(0),
        "min": values.min(0),
        "max": values.max(0),
    }
    for column, figures in truth.items():
        np.testing.assert_allclose(table[column].to_numpy(), figures, rtol=1e-6, atol=1e-12, err_msg=column)
    for share in (1, 5, 25, 50, 75, 95, 99):
        found = table[f"q{share:02d}"].to_numpy()
        low, high = (np.quantile(values, share / 100, axis=0, method=side) for side in ("lower", "higher"))
        off = np.maximum(np.abs(low), np.abs(high)) / 8 + 2.0**-14
        assert (low - off <= found).all() and (found <= high + off).all()


@every
def test_the_triggers(built: Built, site: str) -> None:
    rows, atlas = built.rows[site], built.atlas.neurons.to_polars()
    for index in range(tiny.HIDDEN):
        fires = strong(rows, index)
        fired = np.bincount(rows.token[fires], minlength=tiny.VOCABULARY)
        occurrences = np.bincount(rows.token, minlength=tiny.VOCABULARY)
        product = fired**2 / max(fires.sum(), 1) / np.maximum(occurrences, 1)
        table = built.of("tokens", site, index)
        assert table["rank"].to_list() == list(range(min(10, (fired > 0).sum())))
        np.testing.assert_allclose(product[table["token_id"]], np.sort(product)[::-1][: len(table)])
        assert table["token_id"].n_unique() == len(table)
        for row in table.iter_rows(named=True):
            token = row["token_id"]
            assert row["token"] == built.words[token]
            assert (row["fired"], row["occurrences"]) == (fired[token], occurrences[token])
            assert row["share_of_firings"] == pytest.approx(fired[token] / fires.sum())
            assert row["share_of_token"] == pytest.approx(fired[token] / occurrences[token])
        facts = atlas.filter(pl.col("neuron") == f"{site}:{index}").row(0, named=True)
        if table.is_empty():
            assert facts["top_token"] is None and facts["top_token_purity"] is None
        else:
            best = table.row(0, named=True)
            assert facts["top_token"] == best["token"]
            assert facts["top_token_purity"] == best["share_of_firings"]
            assert facts["top_token_coverage"] == best["share_of_token"]


@every
def test_the_families(built: Built, site: str) -> None:
    rows, words, marked = built.rows[site], [word.strip() for word in built.words], 0
    for facts in built.atlas.neurons.to_polars().filter(pl.col("site") == site).iter_rows(named=True):
        fires = strong(rows, facts["index"])
        family = facts["family"].split(", ") if facts["family"] else []
        marked += facts["striking"]
        assert facts["striking"] == (facts["score"] >= 0.3 and len(family) >= 2 and fires.sum() >= 30)
        if not family:
            assert (facts["purity"], facts["coverage"], facts["score"]) == (0, 0, 0)
            continue
        of_word = np.isin(rows.token, [words.index(word) for word in family])
        both, tokens = (fires & of_word).sum(), len(fires)
        assert of_word.sum() >= 20 and fires.sum() >= 30
        assert facts["purity"] == pytest.approx(both / fires.sum())
        assert facts["coverage"] == pytest.approx(both / of_word.sum())
        above_chance = [
            max((share - chance) / (1 - chance), 0)
            for share, chance in (
                (both / fires.sum(), of_word.sum() / tokens),
                (both / of_word.sum(), fires.sum() / tokens),
            )
        ]
        assert facts["score"] == pytest.approx(above_chance[0] * above_chance[1])
    assert marked > 0 or site == "mlp.1"


@every
def test_the_labels(built: Built, site: str) -> None:
    rows, atlas = built.rows[site], built.atlas.neurons.to_polars()
    for index in range(tiny.HIDDEN):
        table, fires, values = built.of("labels", site, index), strong(rows, index), rows.values[:, index]
        assert table.select("label", "value").rows() == [
            (label, value) for label, given in built.labels.items() for value in sorted(set(given))
        ]
        contrasts = {}
        for row in table.iter_rows(named=True):
            mine = np.asarray(built.labels[row["label"]])[rows.example] == row["value"]
            assert row["count"] == mine.sum()
            assert row["mean"] == pytest.approx(values[mine].mean())
            assert row["firing_rate"] == pytest.approx((values[mine] > 0).mean())
            assert row["strong_rate"] == pytest.approx(fires[mine].mean())
            contrasts[row["label"], row["value"]] = fires[mine].mean() - fires[~mine].mean()
        facts = atlas.filter(pl.col("neuron") == f"{site}:{index}").row(0, named=True)
        assert facts["label_contrast"] == pytest.approx(max(contrasts.values()))
        assert contrasts[facts["label"], facts["label_value"]] == pytest.approx(max(contrasts.values()))


@every
def test_the_histograms(built: Built, site: str) -> None:
    for index in range(tiny.HIDDEN):
        (row,) = built.of("histograms", site, index).iter_rows(named=True)
        values, edges = built.rows[site].values[:, index], np.asarray(row["edges"])
        assert len(edges) == len(row["counts"]) + 1 and (np.diff(edges) > 0).all()
        assert row["counts"][0] > 0 and row["counts"][-1] > 0 and sum(row["counts"]) == len(values)
        inside = [((low <= values) & (values < high)).sum() for low, high in pairwise(edges)]
        assert row["counts"] == inside


@every
def test_the_examples(built: Built, site: str) -> None:
    """Each shows what it says; none shows again what a stronger one does; none is left out for another reason."""
    encoded = [tiny.tokenizer()(text)["input_ids"] for text in built.texts]
    # Of texts that occur twice, rounding decides which comes first: so the order is that of the recording.
    top = pc.Recording.open(built.atlas.path / "recording")[site].top_examples
    rows, skipped = built.rows[site], 0
    np.testing.assert_allclose(top.values, -np.sort(-rows.values, axis=0)[:20].T, rtol=1e-9)
    for index in range(tiny.HIDDEN):
        table = {row["rank"]: row for row in built.of("examples", site, index).iter_rows(named=True)}
        seen: list[set[int]] = []
        for rank in range(20):
            example, position = int(top.example[index, rank]), int(top.position[index, rank])
            start, ids = max(0, position - 12), encoded[example]
            shown = ids[start : position + 13]
            if any(len(set(shown) & other) >= 0.7 * len(set(shown) | other) for other in seen):
                assert rank not in table
                skipped += 1
                continue
            seen.append(set(shown))
            row = table.pop(rank)
            assert (row["example"], row["position"], row["start"]) == (example, position, start)
            assert row["value"] == pytest.approx(rows.at(example, position)[index], rel=1e-9)
            assert row["tokens"] == [built.words[token] for token in shown]
            truth = [
                rows.at(example, start + step)[index] if 0 < start + step < len(ids) - 1 else np.nan
                for step in range(len(shown))
            ]
            np.testing.assert_allclose(row["values"], truth, rtol=1e-3, atol=1e-6)
            assert json.loads(row["labels"]) == {label: given[example] for label, given in built.labels.items()}
        assert not table
    assert skipped > 20


@every
def test_the_neighbors(built: Built, site: str) -> None:
    rows, other = built.rows, {"mlp.0": "mlp.1", "mlp.1": None}[site]
    for index in range(tiny.HIDDEN):
        table = built.of("neighbors", site, index)
        for relation, there in (("layer", site), ("next", other)):
            found = table.filter(pl.col("relation") == relation).sort("rank")
            if there is None or (site == "mlp.0" and index in (CONSTANT, DEAD)):
                assert found.is_empty()
                continue
            with np.errstate(invalid="ignore", divide="ignore"):
                truth = np.corrcoef(rows[site].values[:, index], rows[there].values, rowvar=False)[0, 1:]
            if there == "mlp.0":
                truth[[CONSTANT, DEAD]] = np.nan
            if relation == "layer":
                truth[index] = np.nan
            best = np.sort(np.abs(truth[~np.isnan(truth)]))[::-1][:5]
            assert found["rank"].to_list() == [0, 1, 2, 3, 4] and set(found["other_site"]) == {there}
            np.testing.assert_allclose(np.abs(found["correlation"].to_numpy()), best, atol=1e-6)
            np.testing.assert_allclose(found["correlation"], truth[found["other_index"]], atol=1e-6)
            assert found["other_index"].n_unique() == 5


def test_a_neuron_that_never_changes_is_described_as_such(built: Built) -> None:
    dead = built.atlas.neuron(f"mlp.0:{DEAD}")
    assert (dead.facts["firing_rate"], dead.facts["strong_rate"], dead.facts["max"]) == (0, 0, 0)
    assert dead.facts["std"] == 0 and dead.tokens.is_empty() and dead.neighbors.is_empty()
    assert not dead.facts["striking"] and dead.facts["label_contrast"] == 0
    assert dead.histogram["count"].to_list() == [dead.facts["count"]]
    constant = built.atlas.neuron(f"mlp.0:{CONSTANT}").facts
    assert constant["firing_rate"] == constant["strong_rate"] == 1
    assert constant["mean"] == pytest.approx(float(torch.nn.functional.gelu(torch.tensor(3.7, dtype=torch.float64))))


def test_the_manifest_says_where_it_comes_from(built: Built) -> None:
    manifest = built.atlas.manifest
    assert manifest["model"]["class"] == "BertModel" and manifest["model"]["neurons"] == 2 * tiny.HIDDEN
    assert manifest["data"]["examples"] == len(built.texts)
    assert manifest["data"]["tokens"] == len(built.rows["mlp.0"].values)
    assert manifest["labels"] == {"length": ["long", "short"], "third": ["0", "1", "2"]}
    assert [(each["name"], each["size"], each["layer"]) for each in manifest["sites"]] == [
        ("mlp.0", tiny.HIDDEN, 0),
        ("mlp.1", tiny.HIDDEN, 1),
    ]
    assert {"patchclamp", "torch", "python"} <= set(manifest["versions"])
    assert "recording/manifest.json" in manifest["files"]


def test_it_can_be_asked(built: Built) -> None:
    atlas = built.atlas
    assert len(atlas) == 2 * tiny.HIDDEN
    assert atlas.sql("select count(*) as n from neurons")["n"].to_list() == [2 * tiny.HIDDEN]
    found = atlas.search("items")
    assert len(found) and "mlp.0:8" in found.names
    opened = pc.Recording.open(atlas.path / "recording")
    np.testing.assert_array_equal(opened["mlp.1"].moments.mean, atlas.neurons.at("mlp.1")["mean"].to_numpy())
    assert pc.find.striking(opened).names == atlas.striking.names
