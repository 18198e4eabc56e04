"""LAPE and its ternary form: closed forms, planted neurons, the null, and what is refused."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from tests.find.planted import of_values
from tests.recording import tiny
from torch import nn

import patchclamp as pc
from patchclamp.find.labelled import labelled

SIZE = 60


def recorded(rates: np.ndarray, documents: int = 40, tokens: int = 25, seed: int = 0, **how: Any) -> pc.Recording:
    """A recording whose neuron i fires on a share rates[i, k] of the `documents * tokens` examples of label k."""
    made = np.random.default_rng(seed)
    neurons, labels = rates.shape
    number = documents * tokens
    parts = []
    for label in range(labels):
        fires = np.zeros((number, neurons), np.float32)
        for neuron in range(neurons):
            fires[made.permutation(number)[: round(rates[neuron, label] * number)], neuron] = 1
        parts.append(np.where(fires > 0, made.exponential(size=fires.shape) + 0.1, -0.5))
    names = np.repeat([f"l{each}" for each in range(labels)], number).tolist()
    how = {"summaries": [pc.ByLabel(), pc.Pooled("fired")]} | how
    return of_values(np.concatenate(parts), names, "language", **how)


def planted(labels: int = 6) -> np.ndarray:
    """One neuron for each label (0.9 there, 0.01 elsewhere), the rest 0.3 everywhere."""
    rates = np.full((SIZE, labels), 0.3)
    for label in range(labels):
        rates[7 * label + 3] = 0.01
        rates[7 * label + 3, label] = 0.9
    return rates


def test_closed_forms() -> None:
    rates = np.full((8, 4), 0.3)
    rates[0] = [0.8, 0.05, 0.05, 0.05]
    rates[1] = [0.6, 0.6, 0.6, 0.6]
    rates[2] = [0.5, 0, 0, 0]
    rates[3] = 0
    found = pc.find.lape(recorded(rates, 40, 10), "language", filter_rate=0.1, top_rate=0.25)
    entropy = dict(zip(found["index"], found["entropy"], strict=True))
    assert entropy[0] == pytest.approx(0.6096, abs=5e-5)
    assert entropy[1] == pytest.approx(1.3863, abs=5e-5)
    assert entropy[2] == 0
    assert found["index"].to_list()[:2] == [2, 0]
    score = dict(zip(found["index"], found["score"], strict=True))
    assert (score[2], score[1], score[3]) == (1, pytest.approx(0, abs=1e-12), 0)
    row = found.to_polars().filter(index=0).row(0, named=True)
    assert row["score"] == pytest.approx(1 - 0.60962 / np.log(4), abs=1e-4)
    assert row["score_l0"] == row["score"] and row["score_l1"] == pytest.approx(row["score"] / 16)


def test_planted_neurons_come_first_each_with_its_label() -> None:
    found = pc.find.lape(recorded(planted()), "language", top_rate=6 / SIZE)
    top = found.top(6)
    assert sorted(top["index"]) == [7 * label + 3 for label in range(6)]
    assert [f"l{(index - 3) // 7}" for index in top["index"]] == top["label"].to_list() == top["owners"].to_list()
    assert top["selected"].all() and not found["selected"][6:].any()
    assert (found["entropy"][6:] > 0.5 * np.log(6)).all()


def test_one_category_is_scored_alone() -> None:
    found = pc.find.lape(recorded(planted()), "language", positive="l2")
    assert found["index"][0] == 17 and set(found["label"]) == {"l2"}
    assert "score_l1" not in found.columns


def test_labels_may_be_given_by_value_and_need_no_name() -> None:
    recording = recorded(planted(), 20)
    named = pc.find.lape(recording, "language")
    values = recording.categories_of_examples("language")
    given = pc.find.lape(recording, [{"l0": "x"}.get(each, each) for each in values])
    assert named["index"].to_list()[:6] == given["index"].to_list()[:6]
    np.testing.assert_allclose(named["score"], given["score"], atol=1e-6)
    alone = recorded(planted(), 20, summaries=[pc.Pooled("fired")])
    np.testing.assert_allclose(pc.find.lape(alone, "language")["score"], named["score"], atol=1e-6)


def test_rates_are_of_tokens_not_of_examples() -> None:
    """A long example counts for more than a short one."""
    texts = [" ".join(tiny.WORDS[start : start + 2 + 5 * (start % 3)]) for start in range(20)]
    data = pc.Texts(texts, labels={"kind": ["a", "b"] * 10})
    summaries = [pc.ByLabel(), pc.Pooled("fired", dtype="float32")]
    recording = tiny.recorded(pc.load(tiny.bert(), tokenizer=tiny.tokenizer()), data, "mlp.*", summaries)
    for site in recording:
        by_label = recording[site].by_label.rate("kind")[:, :, 0]
        np.testing.assert_allclose(labelled(recording, "kind").rates(site), by_label, atol=1e-6)


# The ternary form -----------------------------------------------------------------------------------


def test_ternary_closed_forms() -> None:
    """K = 10: c = 0.29290; without the weight a neuron that hardly fires comes first, with it the planted one."""
    rates = np.full((30, 10), 0.4)
    rates[0] = [1e-3, *[0.0] * 9]
    rates[1] = [0.9, *[0.0] * 9]
    recording = recorded(rates, 100, 10)
    assert np.mean(1 / np.arange(1, 11)) == pytest.approx(0.29290, abs=5e-6)
    without = pc.find.lape_ternary(recording, "language", weight=0.0)
    assert without["score"][0] == without["score"][1] == 0
    found = pc.find.lape_ternary(recording, "language", weight=0.1)
    assert found["index"][0] == 1
    assert found["score"][0] == pytest.approx(0.9 * 0.1 / 0.2928968, rel=1e-6)  # 0.307
    assert found["score"][1] == pytest.approx(1e-3 * 0.1 / 0.2928968, rel=1e-6)


def test_ternary_kinds() -> None:
    rates = np.full((40, 10), 0.3) + np.random.default_rng(0).uniform(0, 0.05, (40, 10))
    rates[4] = 0.01
    rates[4, 6] = 0.9
    rates[9] = 0.01
    rates[9, [1, 2, 3]] = 0.9
    rates[14] = 0.9
    rates[19] = 0
    found = pc.find.lape_ternary(recorded(rates, 40, 10), "language", top_rate=0.05, bar_rate=0.9)
    kind = dict(zip(found["index"], found["kind"], strict=True))
    assert [kind[each] for each in (4, 9, 14, 19)] == ["specific", "related", "general", "general"]
    assert found.to_polars().filter(index=9)["owners"].item() == "l1, l2, l3"
    assert found["label"][0] == "l6"


def test_the_weight_is_the_largest_that_keeps_general_neurons_out() -> None:
    rates = np.full((50, 4), 0.2)
    rates[0] = 0.95  # fires everywhere: a large weight would let it in
    rates[1] = [0.3, 0.2, 0.2, 0.2]
    recording = recorded(rates, 40, 10)
    found = pc.find.lape_ternary(recording, "language", top_rate=0.02, bar_rate=0.95)
    weight = found["weight"][0]
    # -0.9875 + 0.3 w / 0.5208 of the neuron of one label, -1 + 0.95 w / 0.5208 of that of all: they meet at 0.01004.
    assert weight == pytest.approx(0.010)
    assert found["index"][0] == 1
    worse = pc.find.lape_ternary(recording, "language", top_rate=0.02, weight=weight + 0.001)
    assert worse["index"][0] == 0


# Bad input ------------------------------------------------------------------------------------------


def test_bad_input_is_said() -> None:
    recording = recorded(planted(2), 4, 5)
    for call, match in [
        (lambda: pc.find.lape(recording, "languages"), "nearest: language"),
        (lambda: pc.find.lape(recording, "language", positive="l9"), "nearest: l1, l0"),
        (lambda: pc.find.lape(recording, ["a", "b"]), "2 labels were given for 40 examples"),
        (lambda: pc.find.lape(recording, ["a"] * 40), "at least two categories"),
        (lambda: pc.find.lape(recording, "language", threshold=0.7), "FiringRate"),
        (lambda: pc.find.lape(recording, "language", null="shuffle"), "permute"),
        (lambda: pc.find.lape(recording, "language", filter_rate=1.2), "share"),
        (lambda: pc.find.lape_ternary(recording, "language"), "at least three"),
    ]:
        with pytest.raises(pc.errors.PatchclampError, match=match):
            call()
    bare = recorded(planted(2), 4, 5, summaries=[pc.Moments()])
    with pytest.raises(pc.errors.DataError, match=r"pc.ByLabel\(\) and a label of the data, or pc.Pooled\('fired'\)"):
        pc.find.lape(bare, "language")


def test_a_nonlinearity_that_is_never_silent_wants_a_threshold() -> None:
    module = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2)).eval()
    data = pc.Tensors(torch.randn(20, 5), labels={"kind": ["a", "b"] * 10})
    recording = pc.record(module, data, "mlp.*", [pc.ByLabel(of=[pc.FiringRate(0.5)])], progress=False)
    with pytest.raises(pc.errors.DataError, match="Pass threshold="):
        pc.find.lape(recording, "kind")
    assert len(pc.find.lape(recording, "kind", threshold=0.5)) == 5


def test_a_label_without_tokens_is_said() -> None:
    """Examples of one label have no position that counts: `ByLabel` and `Pooled` both know of none."""
    texts = [" ".join(tiny.WORDS[start : start + 6]) for start in range(12)]
    labels = ["a", "b", "b"] * 4
    data, kinds = pc.Texts(texts, labels={"kind": labels}), dict(zip(texts, labels, strict=True))

    def of_b(example: pc.Example, tokens: list[str]) -> list[bool]:
        return [kinds[example.text] == "b"] * len(tokens)

    model = pc.load(tiny.bert(), tokenizer=tiny.tokenizer())
    for summary in (pc.ByLabel(), pc.Pooled("fired")):
        recording = tiny.recorded(model, data, "mlp.*", [summary], positions=of_b)
        with pytest.raises(pc.errors.DataError, match="the category 'a' has no position that counts"):
            pc.find.lape(recording, "kind")


def test_a_site_whose_rows_are_not_the_positions_of_the_data() -> None:
    """A decoder reads targets: how much each example weighs there is not known from what the encoder reads."""
    texts = [" ".join(tiny.WORDS[start : start + 3]) for start in range(8)]
    targets = [" ".join(tiny.WORDS[start : start + 2 + start % 4]) for start in range(8)]
    data = pc.Texts(texts, labels={"kind": ["a", "b"] * 4}, targets=targets)
    model = pc.load(tiny.t5(), tokenizer=tiny.tokenizer())
    for_both = [pc.Pooled("fired")]
    assert len(pc.find.lape(tiny.recorded(model, data, "encoder.mlp.*", for_both), "kind"))
    with pytest.raises(pc.errors.DataError, match="how many are whose is not known"):
        pc.find.lape(tiny.recorded(model, data, "decoder.mlp.*", for_both), "kind")
    assert len(pc.find.lape(tiny.recorded(model, data, "decoder.mlp.*", [pc.ByLabel()]), "kind"))


def test_rows_that_are_no_numbers_are_still_positions_of_the_data() -> None:
    texts = [" ".join(tiny.WORDS[start : start + 3]) for start in range(8)]
    module = tiny.bert()
    with torch.no_grad():
        words = module.get_parameter("embeddings.word_embeddings.weight")
        words[len(tiny.SPECIAL)] = torch.nan  # the first word, of one text only
    model = pc.load(module, tokenizer=tiny.tokenizer())
    with pytest.warns(UserWarning, match="left out"):
        recording = tiny.recorded(
            model, pc.Texts(texts, labels={"kind": ["a", "b"] * 4}), "mlp.*", [pc.Pooled("fired")]
        )
    score = pc.find.lape(recording, "kind")["score"].to_numpy()
    assert len(score) and np.isfinite(score).all()


def test_as_many_are_selected_as_asked_for_and_nothing_is_said() -> None:
    recording = recorded(np.random.default_rng(0).uniform(0.1, 0.9, (40, 4)), 20)
    with warnings.catch_warnings(action="error"):
        one = pc.find.lape(recording, "language", top_rate=0.2, filter_rate=0.5)
    other = pc.find.lape_ternary(recording, "language", top_rate=0.2)
    assert one["selected"].sum() == other["selected"].sum() == 8


def test_too_few_pass_the_filter() -> None:
    with pytest.warns(UserWarning, match="pass the filter"):
        found = pc.find.lape(recorded(planted(2), 4, 5), "language", top_rate=0.5)
    assert found["selected"].sum() < 30
