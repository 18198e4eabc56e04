"""Windows of long documents and packed short ones, each against texts that are run one at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.recording import tiny
from tests.recording.text_data import (
    SIDES,
    TEXTS,
    model_of,
    refuses,
    texts_in_words,
)
from tests.recording.tiny import CASES, recorded
from torch import nn

import patchclamp as pc
from patchclamp.errors import ModelError, UnknownName
from patchclamp.recording.corpus import Reading, TextCorpus, tokenize
from patchclamp.recording.packing import lines_of, packed_lines
from patchclamp.recording.record import prepare

# Windows ------------------------------------------------------------------------------------------


def windows_by_hand(ids: list[int], before: list[int], after: list[int], length: int, overlap: int) -> list[tuple]:
    """(token ids, start, first that counts, one past the last) of each window of one document."""
    room = length - len(before) - len(after)
    found, start = [], 0
    while True:
        part = ids[start : start + room]
        fresh = len(before) + (overlap if start else 0)
        found.append(([*before, *part, *after], start, fresh, len(before) + len(part)))
        if start + room >= len(ids):
            return found
        start += room - overlap


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("name", "before", "after"), [("bert", [2], [3]), ("gpt2", [], []), ("llama", [2], [])])
@pytest.mark.parametrize(("length", "overlap"), [(6, 0), (7, 3)])
def test_windows_are_texts_of_their_own(
    name: str, before: list[int], after: list[int], length: int, overlap: int, side: str
) -> None:
    case, documents = CASES[name], tiny.texts(7, 25, seed=5)
    vocabulary = {word: place for place, word in enumerate((*tiny.SPECIAL, *tiny.WORDS))}
    module = case.build()
    values: dict[str, list[np.ndarray]] = {site: [] for site in case.sites}
    places, counted = [], 0
    for number, document in enumerate(documents):
        ids = [vocabulary[word] for word in document.split()]
        for window, start, first, stop in windows_by_hand(ids, before, after, length, overlap):
            places.append((number, start))
            counted += stop - first
            for site, tensor in tiny.captured(module, case.sites, {"input_ids": torch.tensor([window])}).items():
                values[site].append(tensor.reshape(len(window), -1)[first:stop])
    options: dict[str, Any] = {"max_length": length, "long_texts": "windows", "overlap": overlap}
    model = pc.load(module, tokenizer=tiny.tokenizer(case.template, side=side))
    recording = recorded(model, documents, list(case.sites), [pc.Moments()], **options)
    assert counted == sum(len(each.split()) for each in documents), "each token counts once"
    for site, parts in values.items():
        assert recording[site].moments.count == counted
        np.testing.assert_allclose(recording[site].moments.mean, np.concatenate(parts).mean(0), rtol=1e-4, atol=1e-5)
    assert recording.facts["data"]["documents"] == len(documents)
    assert recording.facts["data"]["truncated"] == 0
    assert recording.facts["parameters"]["long_texts"] == "windows"
    found = corpus_of(model, documents, Reading(length, long_texts="windows", overlap=overlap)).documents
    assert found is not None
    assert [tuple(found.place(example)) for example in range(len(found))] == places
    assert found.examples(1).tolist() == [place for place, (number, _) in enumerate(places) if number == 1]


def corpus_of(model: pc.Model, data: Any, reading: Reading) -> TextCorpus:
    return tokenize(model, data if isinstance(data, (pc.Texts, pc.Chats)) else pc.Texts(data), reading)


def test_labels_go_with_the_document_and_with_its_tokens() -> None:
    words, tokens, labels = texts_in_words(9)
    kinds = ["even" if number % 2 == 0 else "odd" for number in range(9)]
    data = pc.Texts(words=words, labels={"kind": kinds}, token_labels={"pos": labels})
    reading = {"max_length": 5, "long_texts": "windows", "overlap": 1}
    recording = recorded(model_of("bert"), data, "mlp.0", [pc.ByLabel()], **reading)
    by_label = recording["mlp.0"].by_label
    flat = np.concatenate([np.repeat(of, times) for of, times in zip(labels, tokens, strict=True)])
    assert by_label.count("pos").tolist() == [(flat == each).sum() for each in ("DET", "NOUN", "VERB", "(none)")]
    sizes = [sum(each) for each in tokens]
    assert by_label.count("kind").tolist() == [sum(sizes[0::2]), sum(sizes[1::2])]


def test_a_short_text_is_one_window() -> None:
    model = model_of("bert")
    cut = recorded(model, TEXTS, "mlp.0", [pc.Moments()])
    whole = recorded(model, TEXTS, "mlp.0", [pc.Moments()], long_texts="windows")
    np.testing.assert_array_equal(whole["mlp.0"].moments.mean, cut["mlp.0"].moments.mean)
    assert whole.facts["data"]["examples"] == whole.facts["data"]["documents"] == len(TEXTS)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"long_texts": "window"}, "long_texts is 'cut' or 'windows', not 'window'"),
        ({"overlap": 2}, "overlap belongs to long_texts='windows'"),
        ({"long_texts": "windows", "overlap": -1}, "overlap is a number of tokens, at least 0; not -1"),
        ({"long_texts": "windows", "overlap": 1.5}, "overlap is a number of tokens, at least 0; not 1.5"),
        ({"long_texts": "windows", "overlap": 3, "max_length": 5}, "leave no room for the text of text 0"),
        ({"long_texts": "windows", "max_length": 2}, "the tokenizer adds 2 special tokens"),
        ({"long_texts": "windows", "max_length": 65}, "max_length=65 is more than"),
    ],
)
def test_windows_that_cannot_be(options: dict[str, Any], says: str) -> None:
    with refuses(says):
        recorded(model_of("bert"), ["the list of items is not a list", *TEXTS], "mlp.0", **options)


def test_windows_need_a_length_and_have_no_targets() -> None:
    model = pc.load(tiny.Words(), tokenizer=tiny.tokenizer("$A", max_length=10**30))
    with refuses("neither model nor tokenizer says how long a window is; max_length does"):
        recorded(model, TEXTS, "mlp.0", long_texts="windows")
    with refuses("a window of a text has no target of its own"):
        recorded(model_of("t5"), pc.Texts(TEXTS, targets=TEXTS), "encoder.mlp.0", long_texts="windows")


def test_documents_and_examples_that_do_not_exist() -> None:
    found = corpus_of(model_of("bert"), TEXTS, Reading(5, long_texts="windows")).documents
    assert found is not None
    with refuses(f"there is no document {len(TEXTS)}", UnknownName):
        found.examples(len(TEXTS))
    with refuses("there is no example -1", UnknownName):
        found.place(-1)


# Packing ------------------------------------------------------------------------------------------


def lines_are_shared(model: pc.Model, data: Any, sites: Any, batch_tokens: int) -> bool:
    """Whether the recording that is prepared really has several texts on a line."""
    corpus = prepare(model, data, sites, packing=True, batch_tokens=batch_tokens, progress=False).corpus
    forwards = [corpus.forward(each) for each in corpus.batches(batch_tokens)]
    return any(each.rows is not None and each.rows.shape[0] < len(each.examples) for each in forwards)


def mistral() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    return tiny.seeded(
        MistralForCausalLM(
            MistralConfig(
                vocab_size=tiny.VOCABULARY,
                hidden_size=tiny.WIDTH,
                intermediate_size=tiny.HIDDEN,
                num_hidden_layers=tiny.LAYERS,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=64,
                sliding_window=4,
            )
        )
    )


class Masked(nn.Module):
    """A decoder that heeds a mask `[lines, 1, queries, keys]` alone, and knows of no positions but those it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(tiny.VOCABULARY, tiny.WIDTH), nn.Embedding(64, tiny.WIDTH)
        self.first, self.last = nn.Linear(tiny.WIDTH, tiny.HIDDEN), nn.Linear(tiny.HIDDEN, tiny.WIDTH)
        tiny.seeded(self)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        length = input_ids.shape[1]
        place = torch.arange(length).expand_as(input_ids) if position_ids is None else position_ids
        x = self.table(input_ids) + self.places(place)
        scores = x @ x.transpose(1, 2) / 4
        causal = torch.full((length, length), -1e9).triu(1)
        if attention_mask is not None:
            is_whole = attention_mask.ndim == 4
            causal = attention_mask[:, 0] if is_whole else causal + (attention_mask[:, None] - 1) * 1e9
        return self.last(torch.relu(self.first((scores + causal).softmax(-1) @ x)))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("build", "template", "sites"),
    [
        (tiny.gpt2, "$A", CASES["gpt2"].sites),
        (tiny.llama, "[CLS] $A", CASES["llama"].sites),
        (mistral, "$A", CASES["llama"].sites),
        (Masked, "$A", {"mlp.0": ("last", True)}),
    ],
    ids=["gpt2", "llama", "mistral with a window", "mask only"],
)
def test_packed_texts_give_what_they_give_alone(
    build: Callable[[], nn.Module], template: str, sites: dict[str, tuple[str, bool]], side: str
) -> None:
    module, words = build(), tiny.tokenizer(template, side=side)
    model = pc.load(module, tokenizer=words)
    values: dict[str, list[np.ndarray]] = {site: [] for site in sites}
    for text in TEXTS:
        read = words(text, return_special_tokens_mask=True)
        keep = ~np.asarray(read["special_tokens_mask"], bool)
        for site, tensor in tiny.captured(module, sites, {"input_ids": torch.tensor([read["input_ids"]])}).items():
            values[site].append(tensor.reshape(len(keep), -1)[keep])
    summaries = [pc.Moments(), pc.TopExamples(3)]
    packed = recorded(model, TEXTS, list(sites), summaries, batch_tokens=48, packing=True)
    apart = recorded(model, TEXTS, list(sites), summaries, batch_tokens=48)
    assert lines_are_shared(model, TEXTS, list(sites), 48)
    for site, parts in values.items():
        np.testing.assert_allclose(packed[site].moments.mean, np.concatenate(parts).mean(0), rtol=1e-4, atol=1e-5)
        assert packed[site].moments.count == sum(map(len, parts))
        # Equal texts have equal values up to the order of sums, so the values decide, not which of them it was.
        top = np.sort(np.concatenate(parts), axis=0)[::-1][:3].T
        np.testing.assert_allclose(packed[site].top_examples.values, top, rtol=1e-4, atol=1e-5)
        shown = packed[site].top_examples
        for neuron, rank in np.ndindex(shown.example.shape):
            first = int(template.startswith("[CLS]"))
            found = parts[shown.example[neuron, rank]][shown.position[neuron, rank] - first, neuron]
            np.testing.assert_allclose(found, top[neuron, rank], rtol=1e-4, atol=1e-5)
    assert packed.facts == apart.facts, "packing does not change the result"


def test_packing_with_labels_of_tokens_windows_and_positions() -> None:
    words, _, labels = texts_in_words(12)
    data = pc.Texts(words=words, labels={"kind": ["a", "b", "c"] * 4}, token_labels={"pos": labels})
    options: dict[str, Any] = {
        "max_length": 6,
        "long_texts": "windows",
        "overlap": 2,
        "positions": lambda example, tokens: [place % 3 != 1 for place in range(len(tokens))],
        "summaries": [pc.ByLabel(), pc.Moments()],
    }
    packed = recorded(model_of("llama"), data, "mlp.1", **options, packing=True)["mlp.1"]
    apart = recorded(model_of("llama"), data, "mlp.1", **options)["mlp.1"]
    assert packed.count == apart.count > 0
    for label in ("kind", "pos"):
        assert packed.by_label.count(label).tolist() == apart.by_label.count(label).tolist()
        np.testing.assert_allclose(packed.by_label.mean(label), apart.by_label.mean(label), rtol=1e-4, atol=1e-5)


def bloom() -> nn.Module:
    from transformers import BloomConfig, BloomForCausalLM

    return tiny.seeded(BloomForCausalLM(BloomConfig(vocab_size=tiny.VOCABULARY, hidden_size=16, n_layer=2, n_head=2)))


@pytest.mark.parametrize("build", [bloom, tiny.bert], ids=["bloom", "bert"])
def test_packing_is_refused_where_texts_would_see_each_other(build: Callable[[], nn.Module]) -> None:
    model = pc.load(build(), tokenizer=tiny.tokenizer("$A"))
    before = tiny.state_of(model.module)
    with pytest.raises(ModelError, match=r"do not give what they give alone\. Told by positions.*differs by 0\.\d+"):
        recorded(model, TEXTS, "mlp.*", [pc.Moments()], packing=True)
    assert tiny.state_of(model.module) == before
    recorded(model, TEXTS, "mlp.*", [pc.Moments()])


def test_packing_an_encoder_decoder_is_refused() -> None:
    with refuses("T5ForConditionalGeneration has an encoder and a decoder", ModelError):
        recorded(model_of("t5"), TEXTS, "encoder.mlp.0", packing=True)


@pytest.mark.parametrize("seed", range(6))
def test_lines_hold_what_fits_and_are_found_again(seed: int) -> None:
    draw = np.random.default_rng(seed)
    lengths, longest = draw.integers(1, 20, 60), int(draw.integers(20, 40))
    order = np.lexsort((np.arange(60), -lengths))
    lines = packed_lines(order, lengths, longest)
    assert sorted(np.concatenate(lines).tolist()) == list(range(60))
    assert all(lengths[line].sum() <= longest for line in lines)
    assert len(lines) <= 2 * -(-int(lengths.sum()) // longest)
    flat = np.concatenate(lines[2:5])
    again = [flat[line].tolist() for line in lines_of(lengths[flat], longest)]
    assert again == [line.tolist() for line in lines[2:5]]


def test_batches_of_packed_lines_stay_within_the_limit() -> None:
    model = model_of("llama")
    corpus = prepare(model, TEXTS, "mlp.0", packing=True, batch_tokens=64, progress=False).corpus
    batches = corpus.batches(64)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(TEXTS)))
    for examples in batches:
        rows = corpus.forward(examples).rows
        assert rows is not None and rows.shape[0] * rows.shape[1] <= 64
