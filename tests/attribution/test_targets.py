"""Targets by hand: at which token, of which token, padding left out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.architectures import BERT, GPT2, T5, TEXTS, padded, tokenizer
from torch.nn import functional

import patchclamp as pc
from patchclamp import attribution
from patchclamp.errors import DataError, ModelError

LENGTHS = [len(text.split()) for text in TEXTS]


def output(rows: int = 4, tokens: int = 11, vocabulary: int = 23) -> Any:
    made = torch.randn(rows, tokens, vocabulary, generator=torch.Generator().manual_seed(0))
    return SimpleNamespace(logits=made)


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_count_real_tokens(side: str) -> None:
    given, inputs = output(), padded(side=side)
    for position in (-2, -1, 0, 1):
        texts = [number for number, length in enumerate(LENGTHS) if length >= (2 if position in (-2, 1) else 1)]
        part = {name: each[texts] for name, each in inputs.items()}
        found = attribution.logit(7, position)(SimpleNamespace(logits=given.logits[texts]), part)
        begin = [11 - LENGTHS[text] if side == "left" else 0 for text in texts]
        places = [
            first + (position if position >= 0 else LENGTHS[text] + position)
            for first, text in zip(begin, texts, strict=True)
        ]
        assert torch.equal(found, given.logits[texts, places, 7])
    with pytest.raises(DataError, match="example 1 has 1 tokens, and no position 1"):
        attribution.logit(7, 1)(given, inputs)


def test_without_a_mask_all_tokens_are_real() -> None:
    given = output()
    assert torch.equal(attribution.logit(7)(given, {}), given.logits[:, -1, 7])
    assert torch.equal(attribution.logit(7)(given.logits, {}), given.logits[:, -1, 7])


def test_each_is_what_its_name_says() -> None:
    given, tokens = output(), [3, 1, 4, 1]
    last = given.logits[:, -1]
    rows = range(4)
    for target, expected in [
        (attribution.logit(tokens), last[rows, tokens]),
        (attribution.probability(tokens), last.softmax(1)[rows, tokens]),
        (attribution.log_probability(9), last.softmax(1)[:, 9].log()),
        (attribution.logit_difference(tokens, 9), last[rows, tokens] - last[:, 9]),
        (attribution.logit_difference(9, tokens), last[:, 9] - last[rows, tokens]),
    ]:
        torch.testing.assert_close(target(given, {}), expected)
    torch.testing.assert_close(attribution.class_logit(tokens)(last, {}), last[rows, tokens])
    torch.testing.assert_close(attribution.class_probability(2)(last, {}), last.softmax(1)[:, 2])


def test_some_of_the_examples() -> None:
    given, tokens = output(), [3, 1, 4, 1]
    target: Any = attribution.logit_difference(tokens, 9)
    chosen = [2, 0, 2]
    part = SimpleNamespace(logits=given.logits[chosen])
    assert torch.equal(target.rows(chosen, 4)(part, {}), target(given, {})[chosen])
    with pytest.raises(DataError, match="each of 4 examples, and there are 5"):
        target.rows(chosen, 5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_is_that_of_each_text_alone(side: str) -> None:
    given, inputs = output(), padded(side=side)
    found = attribution.next_token_loss()(given, inputs)
    for number, length in enumerate(LENGTHS):
        begin = 11 - length if side == "left" else 0
        logits = given.logits[number, begin : begin + length]
        ids = inputs["input_ids"][number, begin : begin + length]
        expected = functional.cross_entropy(logits[:-1], ids[1:]) if length > 1 else torch.tensor(0.0)
        torch.testing.assert_close(found[number], expected)


def test_the_loss_of_a_decoder_is_of_what_the_decoder_reads() -> None:
    module, inputs = T5.build(), T5.inputs()
    with torch.no_grad():
        given = module(**inputs)
    found = attribution.next_token_loss()(given, inputs)
    ids, real = inputs["decoder_input_ids"], inputs["decoder_attention_mask"].sum(1)
    for number, length in enumerate(real.tolist()):
        if length > 1:
            expected = functional.cross_entropy(given.logits[number, : length - 1], ids[number, 1:length])
            torch.testing.assert_close(found[number], expected)


def test_similarity_is_the_cosine_of_embeddings() -> None:
    model = pc.load(BERT.build(), tokenizer=tokenizer(special=True))
    call = model.inputs(TEXTS)
    with torch.no_grad():
        given = model.module(**call)
    mine, others = model.embed(TEXTS), model.embed(TEXTS[::-1])
    torch.testing.assert_close(attribution.similarity(model, TEXTS[2])(given, call), mine @ mine[2])
    torch.testing.assert_close(attribution.similarity(model, TEXTS[2:3])(given, call), mine @ mine[2])
    torch.testing.assert_close(attribution.similarity(model, TEXTS[::-1])(given, call), (mine * others).sum(1))


def test_what_a_network_does_not_give_is_said() -> None:
    call = padded()
    with torch.no_grad():
        hidden, logits = BERT.build()(**call), GPT2.build()(**call)
    with pytest.raises(ModelError, match="no logits of a next token"):
        attribution.next_token_loss()(hidden, call)
    with pytest.raises(ModelError, match="no last hidden state"):
        attribution.similarity(pc.load(BERT.build(), tokenizer=tokenizer()), "the cat")(logits, call)
    with pytest.raises(ModelError, match="no logits of classes"):
        attribution.class_logit(0)(logits, call)
    with pytest.raises(ModelError, match="no logits for each token"):
        attribution.logit(0)(torch.zeros(4, 3), {})
    with pytest.raises(DataError, match="no token or class 99"):
        attribution.logit(99)(logits, call)
    with pytest.raises(DataError, match="no token or class -1"):
        attribution.class_logit([0, -1])(torch.zeros(2, 3), {})
    with pytest.raises(DataError, match=r"each of 4 examples, not \[2\]"):
        attribution.logit([1, 2])(logits, call)
