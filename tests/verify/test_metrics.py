"""Metrics and batches: each by hand in plain PyTorch, on both sides of padding."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from tests.architectures import BERT, GPT2, LLAMA, T5, VIT, Architecture, tokenizer
from torch.nn import functional

import patchclamp as pc
from patchclamp.errors import DataError, ModelError, UnknownName
from patchclamp.verify.batches import Batch, first_token, read
from patchclamp.verify.metrics import measured, per_example, reference_of

TEXTS = ["the cat sat on a mat", "two dogs ran home", "it sat", "they stayed in all day long"]


@cache
def loaded(architecture: Architecture) -> pc.Model:
    return pc.load(architecture.build(), tokenizer=tokenizer())


@torch.no_grad()
def alone(model: pc.Model, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and ids of one text, without padding."""
    inputs = model.inputs(text)
    return model.module(**inputs).logits[0], inputs["input_ids"][0]


@pytest.mark.parametrize("architecture", [GPT2, LLAMA], ids=str)
def test_loss_and_accuracy_of_next_tokens(architecture: Architecture) -> None:
    model = loaded(architecture)
    losses, hits = [], []
    for text in TEXTS:
        logits, ids = alone(model, text)
        losses.append(float(functional.cross_entropy(logits[:-1], ids[1:])))
        hits.append(float((logits[:-1].argmax(-1) == ids[1:]).double().mean()))
    for batch_tokens in (1, 12, 2048):
        assert per_example(model, "loss", TEXTS, batch_tokens) == pytest.approx(losses, rel=1e-4)
        assert per_example(model, "accuracy", TEXTS, batch_tokens) == pytest.approx(hits)


def test_loss_of_a_decoder_with_an_encoder() -> None:
    model = loaded(T5)
    for text, found in zip(TEXTS, per_example(model, "loss", TEXTS), strict=True):
        inputs = model.inputs(text)
        with torch.no_grad():
            logits = model.module(**inputs).logits[0]
        ids = inputs["decoder_input_ids"][0]
        assert found == pytest.approx(float(functional.cross_entropy(logits[:-1], ids[1:])), rel=1e-4)


@pytest.mark.parametrize("architecture", [GPT2, LLAMA], ids=str)
def test_prompts_with_answer_and_foil(architecture: Architecture) -> None:
    model = loaded(architecture)
    prompts = [("the cat sat", " on", " in"), ("two dogs ran", " home", " day"), ("it", " sat", " rained")]
    differences, losses = [], []
    for text, answer, foil in prompts:
        given = read(model, [(text, answer, foil)])[0]
        with torch.no_grad():
            logits = model.module(**given.inputs).logits[0, -1]
        ids = [model.tokenizer(each, add_special_tokens=False)["input_ids"][0] for each in (answer, foil)]
        differences.append(float(logits[ids[0]] - logits[ids[1]]))
        losses.append(float(-logits.log_softmax(-1)[ids[0]]))
    assert per_example(model, "logit_difference", prompts) == pytest.approx(differences, rel=1e-4, abs=1e-5)
    assert per_example(model, "loss", prompts) == pytest.approx(losses, rel=1e-4)
    assert set(per_example(model, "accuracy", prompts)) <= {0.0, 1.0}


def test_similarity_and_shift() -> None:
    model = loaded(BERT)
    pairs = [(TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[3]), (TEXTS[1], TEXTS[1])]
    wanted = [float((model.embed(one) * model.embed(other)).sum()) for one, other in pairs]
    assert per_example(model, "similarity", pairs) == pytest.approx(wanted, abs=1e-5)
    batch = read(model, TEXTS)[0]
    with model.evaluating(), torch.no_grad():
        reference = reference_of("embedding_shift", batch.run(model), batch)
        before = model.embed(batch.texts or [])
        with model.intervene(pc.ablate(pc.Neurons({"mlp.0": range(12)}))):
            found = measured(model, "embedding_shift", batch, reference)
            after = model.embed(batch.texts or [])
    assert found.tolist() == pytest.approx((1 - (before * after).sum(-1)).tolist(), abs=1e-5)
    assert float(found.min()) > 1e-6


def test_divergence() -> None:
    model = loaded(GPT2)
    batch = read(model, TEXTS)[0]
    ablated = pc.ablate(pc.Neurons({"mlp.0": range(12)}))
    with model.evaluating(), torch.no_grad():
        reference = reference_of("kl", batch.run(model), batch)
        with model.intervene(ablated):
            found = measured(model, "kl", batch, reference)
    for text, value in zip(batch.texts or [], found.tolist(), strict=True):
        clean = alone(model, text)[0].log_softmax(-1)
        with model.intervene(ablated):
            edited = alone(model, text)[0].log_softmax(-1)
        assert value == pytest.approx(float((clean.exp() * (clean - edited)).sum(-1).mean()), rel=1e-3)


def test_classes() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)).eval()
    values = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    classes = torch.arange(40) % 3
    with torch.no_grad():
        logits = network(values)
    model = pc.load(network)
    for data in ((values, classes.tolist()), pc.Tensors(values, {"digit": classes.tolist()})):
        assert per_example(model, "class_score", data) == pytest.approx(logits[torch.arange(40), classes].tolist())
        losses = functional.cross_entropy(logits, classes, reduction="none")
        assert per_example(model, "loss", data) == pytest.approx(losses.tolist(), rel=1e-5)
    with pytest.raises(DataError, match="there is no class 7"):
        per_example(model, "class_score", (values, [7] * 40))


def test_images_and_names_of_classes() -> None:
    trained = pc.testbed.trained("shapes")
    images = trained.held_out
    assert isinstance(images, pc.Images)
    with pytest.raises(ModelError, match="needs the class of each example"):
        per_example(trained.model, "class_score", images)  # three labels: which?


def test_a_callable_is_given_the_batch() -> None:
    model = loaded(GPT2)
    seen: list[Batch] = []

    def lengths(given: pc.Model, batch: Batch) -> list[float]:
        assert given is model
        seen.append(batch)
        return [float(len(text)) for text in batch.texts or []]

    data = pc.Texts(TEXTS, labels={"kind": ["a", "b", "a", "b"]})
    assert per_example(model, lengths, data).tolist() == [len(text) for text in TEXTS]
    assert sorted(label for batch in seen for label in batch.labels["kind"]) == ["a", "a", "b", "b"]


def test_a_batch_repeated() -> None:
    model = loaded(BERT)
    batch = read(model, [(TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[3])])[0]
    three = batch.repeated(3)
    assert len(three) == 6 and three.inputs["input_ids"].shape[0] == 12
    assert torch.equal(three.inputs["input_ids"][4:8], batch.inputs["input_ids"])
    assert np.array_equal(three.examples, np.tile(batch.examples, 3)) and three.texts == (batch.texts or []) * 3


def test_what_is_refused() -> None:
    gpt2, bert, vit = loaded(GPT2), loaded(BERT), loaded(VIT)
    for call, error, message in (
        (lambda: per_example(gpt2, "kl", TEXTS), DataError, "compares a network with itself"),
        (lambda: per_example(gpt2, "accurate", TEXTS), UnknownName, "The nearest: accuracy"),
        (lambda: per_example(gpt2, "logit_difference", TEXTS), DataError, "needs prompts with answers"),
        (lambda: per_example(gpt2, "logit_difference", [("a", " mat", " mat")]), DataError, "are the same"),
        (lambda: per_example(gpt2, "similarity", TEXTS), DataError, "needs pairs of texts"),
        (lambda: per_example(gpt2, "similarity", [("a", "b")]), ModelError, "no last hidden state"),
        (lambda: per_example(bert, "loss", TEXTS), ModelError, "no head that gives logits"),
        (lambda: per_example(gpt2, "loss", []), DataError, "no (texts|examples)"),
        (lambda: per_example(gpt2, "loss", ["a mat", ""]), DataError, "no (tokens|next token)"),
        (
            lambda: per_example(vit, "class_score", pc.Images(np.zeros((2, 8, 8, 3), np.uint8))),
            ModelError,
            "no processor",
        ),
        (lambda: per_example(gpt2, lambda m, b: torch.zeros(2), TEXTS[:1]), DataError, r"gave \[2\]"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_the_first_token_of_a_continuation() -> None:
    model: Any = loaded(GPT2)
    assert first_token(model, "the cat", " sat") == model.tokenizer("sat", add_special_tokens=False)["input_ids"][0]
