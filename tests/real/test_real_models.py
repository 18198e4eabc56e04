"""The proofs on real weights: a sentence encoder of 6 layers and a small decoder that writes stories."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.raw import assert_same, call, hooks_of, plain_weights, watching

import patchclamp as pc

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Return the first item of the list, or raise an exception if it is empty.",
    "Why?",
]
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw "
    "a big, red ball. She wanted to play with it, but it was too high."
)


@pytest.fixture(scope="module")
def stories(data_folder: Path) -> pc.Model:
    """Trained on TinyStories: 5 layers of 172 gated neurons. Shared: leave it as it is."""
    folder = data_folder / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist")
    return pc.load(folder)


def prove(model: pc.Model, inputs: dict[str, Any], name: str) -> None:
    """Recorded neurons times output weights give the projection's output, and each neuron its share of it."""
    writes = model.site(name).writes
    assert writes is not None
    with watching(model.module, [writes]) as seen:
        recorded = model.activations(inputs, name)
        before = seen[writes][1]
        weights = model.output_weights(name)
        assert_same(recorded @ weights + plain_weights(model.module, writes)[1], before)
        loudest = int(recorded.abs().flatten(0, -2).amax(0).argmax())
        for neuron in (loudest, 0):
            with model.intervene(pc.ablate(pc.Neurons({name: [neuron]}))), torch.no_grad():
                model.module(**inputs)
            change = seen[writes][1] - before
            expected = -recorded[..., neuron, None] * weights[neuron]
            torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-5 * float(before.abs().max()))
    assert recorded[..., loudest].any()


def numbers_of_tokens(model: pc.Model) -> list[int]:
    return [len(model.tokens(text)) for text in SENTENCES]


# all-MiniLM-L6-v2 -------------------------------------------------------------------------------------


def test_the_encoder_has_the_sites_it_should(minilm: pc.Model) -> None:
    kinds = ["resid_pre", "pattern", "attn", "resid_mid", "mlp", "resid_post"]
    assert list(minilm.sites) == [f"{kind}.{layer}" for layer in range(6) for kind in kinds]
    assert {(site.size, site.activation) for site in minilm.select("mlp.*")} == {(1536, "gelu")}
    assert {(site.size, site.heads) for site in minilm.select("attn.*")} == {(384, 12)}


@pytest.mark.parametrize("layer", range(6))
@pytest.mark.parametrize("kind", ["mlp", "attn"])
def test_the_proofs_on_the_encoder(minilm: pc.Model, kind: str, layer: int) -> None:
    prove(minilm, minilm.inputs(SENTENCES), f"{kind}.{layer}")


def test_activations_of_a_batch_are_those_of_one_text_at_a_time(minilm: pc.Model) -> None:
    inputs = minilm.inputs(SENTENCES)
    batch = minilm.activations(inputs, "mlp.5")
    for number, text in enumerate(SENTENCES):
        alone = minilm.activations(text, "mlp.5")
        assert alone.tokens == minilm.tokens(text) and alone.tokens[0] == "[CLS]"
        assert_same(batch[number][inputs["attention_mask"][number].bool()], torch.as_tensor(alone.clone()))
    assert "".join(minilm.tokens("Return the unhappy value.")[1:-1]).strip() == "return the unhappy value ."


def test_embeddings_tell_near_from_far(minilm: pc.Model) -> None:
    near, same, far = minilm.embed(["A cat sleeps.", "A kitten is asleep.", "The court raised the interest rate."])
    assert float(near @ same) > 0.6 > 0.2 > float(near @ far)


def test_the_encoder_is_as_before_after_an_intervention(minilm: pc.Model) -> None:
    before, weights = call(minilm.module, minilm.inputs(SENTENCES)), minilm.weights_sha256()
    with minilm.intervene(pc.ablate(minilm.neurons("mlp.[1-3]"))):
        inside = call(minilm.module, minilm.inputs(SENTENCES))
    assert not torch.allclose(inside, before, atol=1e-2)
    assert torch.equal(call(minilm.module, minilm.inputs(SENTENCES)), before)
    assert not any(hooks_of(minilm.module).values()) and minilm.weights_sha256() == weights


# stories260K --------------------------------------------------------------------------------------------


def test_the_decoder_has_the_sites_it_should(stories: pc.Model) -> None:
    kinds = ["resid_pre", "pattern", "attn", "resid_mid", "gate", "mlp", "resid_post"]
    assert list(stories.sites) == [f"{kind}.{layer}" for layer in range(5) for kind in kinds]
    assert {(site.size, site.activation) for site in stories.select(["mlp.*", "gate.*"])} == {(172, "silu")}
    assert {(site.size, site.heads) for site in stories.select("attn.*")} == {(64, 8)}
    assert len(stories.neurons()) == 860


@pytest.mark.parametrize("layer", range(5))
def test_the_proofs_on_the_decoder(stories: pc.Model, layer: int) -> None:
    inputs = stories.inputs([STORY, "Tom had a dog."])
    prove(stories, inputs, f"mlp.{layer}")
    prove(stories, inputs, f"attn.{layer}")
    up = stories.site(f"mlp.{layer}").reads["up"]
    with watching(stories.module, [up]) as seen:
        read = stories.activations(inputs, [f"gate.{layer}", f"mlp.{layer}"])
    assert_same(torch.as_tensor((read[f"gate.{layer}"] * seen[up][1]).clone()), read[f"mlp.{layer}"].clone())


def perplexity(model: pc.Model, text: str) -> float:
    ids = model.inputs(text)["input_ids"][0]
    return math.exp(float(torch.nn.functional.cross_entropy(model.logits(text)[:-1], ids[1:])))


def test_a_typical_story_is_expected_and_less_so_without_its_neurons(stories: pc.Model) -> None:
    assert "".join(stories.tokens(STORY)).replace("<s>", "").strip() == STORY
    assert perplexity(stories, STORY) < 2
    with stories.intervene(pc.ablate(stories.neurons("mlp.2"))):
        assert perplexity(stories, STORY) > 2
    assert perplexity(stories, STORY) < 2


def test_it_writes_on_and_writes_otherwise_under_ablation(stories: pc.Model) -> None:
    written = stories.generate("Once upon a time", max_new_tokens=30)
    assert "there was a" in written and stories.generate("Once upon a time", max_new_tokens=30) == written
    with stories.intervene(pc.ablate(stories.neurons("mlp.[1-4]"))):
        inside = stories.generate("Once upon a time", max_new_tokens=30)
        without_cache = stories.generate("Once upon a time", max_new_tokens=30, use_cache=False)
    assert inside != written and inside == without_cache
    assert stories.generate("Once upon a time", max_new_tokens=30) == written
