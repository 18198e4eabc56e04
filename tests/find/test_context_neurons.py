"""Neurons that carry a context into the answer: a copying unit and a memory unit set by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.architectures import LLAMA, tokenizer
from tests.find.hand_built import HandBuilt
from tests.zoo import drawn

import patchclamp as pc
from patchclamp.attribution import gradients, probability
from patchclamp.find.context_neurons import context_attributions, context_neurons

EXAMPLES = [("red sky", "rose is", "red"), ("old red sky", "old rose is", "red")]


def network() -> HandBuilt:
    """The rose is blue from memory (gain 2); the context says red (gain 1). The asking token hears both."""
    made = HandBuilt(
        ["?", "pad", "rose", "is", "red", "blue", "sky", "old"],
        ["asks", "rose", "red", "heard", "context", "memory", "constant"],
        16,
        None,
    )
    for word in made.words[2:]:
        made.embed(word, constant=1.0)
    made.embed("rose", rose=1.0)
    made.embed("red", red=1.0)
    made.embed("is", asks=1.0)
    made.head(0, 0, "rose", {"rose": "memory"})
    made.head(0, 1, "red", {"red": "heard"})
    made.neuron(1, 3, "heard", "context", 1.0)
    made.neuron(1, 11, "memory", "memory", 1.0)
    made.neuron(0, 5, "constant", "constant", 0.5)
    made.says("red", "context", 3.0)
    made.says("blue", "memory", 3.0)
    return made


def answer(model: pc.Model, text: str) -> str:
    return model.tokenizer.decode([int(model.logits(text)[-1].argmax())])


# Planted --------------------------------------------------------------------------------------------


def test_the_unit_that_copies_the_context_comes_first() -> None:
    model = network().load()
    found = context_neurons(model, EXAMPLES)
    assert found.names == ["mlp.1:3"]
    assert found["count"].to_list() == [2] and found["score"].to_list() == [1.0] and found["attribution"][0] > 0.01


def test_strengthening_it_flips_the_answer_and_strengthening_memory_does_not() -> None:
    model = network().load()
    text = "red sky rose is"
    assert answer(model, text) == "blue"
    with model.intervene(pc.scale(context_neurons(model, EXAMPLES).top(1), 3.0)):
        assert answer(model, text) == "red" and answer(model, "rose is") == "blue"
    with model.intervene(pc.scale(pc.Neurons({"mlp.1": [11]}), 3.0)):
        assert answer(model, text) == "blue"


def test_a_neuron_that_many_examples_keep_comes_before_one_that_matters_once() -> None:
    values = np.zeros((4, 5))
    values[:, 1] = 0.1
    values[0, 3] = 0.9
    values[1:, 2] = -0.5
    from patchclamp.find.context_neurons import ContextAttributions

    made = ContextAttributions({"mlp.0": values}, pc.Neurons().to_polars(), np.zeros(4))
    assert made.neurons(2).names == ["mlp.0:1", "mlp.0:3"] and made.neurons(2)["count"].to_list() == [4, 1]
    assert made.neurons(2).top(1).names == ["mlp.0:1"]


# Completeness ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> pc.Model:
    return pc.load(drawn(LLAMA.new)(), tokenizer=tokenizer())


TRIPLES: list[Any] = [("the cat sat on a mat", "two dogs", "ran"), ("rained all day", "it", "sat")]


def test_attributions_add_up_to_what_the_site_changes(llama: pc.Model) -> None:
    found = context_attributions(llama, TRIPLES, steps=200)
    assert found.completeness.height == 4
    for wanted, error in found.completeness.select("wanted", "error").iter_rows():
        assert abs(error) < 0.01 * abs(wanted)
    coarse = context_attributions(llama, TRIPLES, steps=20)
    error, wanted = (coarse.completeness[column].abs().to_numpy() for column in ("error", "wanted"))
    assert error.max() < 0.02 * wanted.max()


def test_the_paper_s_rule_comes_to_the_same_with_many_points(llama: pc.Model) -> None:
    right, middle = (context_attributions(llama, TRIPLES, steps=400, rule=rule) for rule in ("right", "midpoint"))
    for site in middle.by_site:
        np.testing.assert_allclose(right.by_site[site], middle.by_site[site], atol=2e-4)
    few = context_attributions(llama, TRIPLES, steps=4, rule="right").completeness["error"].abs()
    better = context_attributions(llama, TRIPLES, steps=4).completeness["error"].abs()
    assert better.sum() < few.sum() / 2


def test_what_is_wanted_is_the_probability_with_only_that_site_held(llama: pc.Model) -> None:
    found = context_attributions(llama, TRIPLES[:1], steps=2)
    context, question, token = TRIPLES[0]
    source = llama.activations(f"{context} {question}", "mlp.0").clone()
    source[-1] = llama.activations(question, "mlp.0")[-1]
    wanted = probability(llama.tokenizer(token)["input_ids"])
    whole = gradients(llama, f"{context} {question}", wanted, "mlp.1").value
    with llama.intervene(pc.patch("mlp.0", source)):
        start = gradients(llama, f"{context} {question}", wanted, "mlp.1").value
    row = found.completeness.row(0, named=True)
    assert row["site"] == "mlp.0" and row["wanted"] == pytest.approx(float(whole - start), abs=1e-7)
    assert found.probability[0] == pytest.approx(float(whole))


def test_batches_do_not_matter(llama: pc.Model) -> None:
    whole, parts = (context_attributions(llama, TRIPLES, steps=7, batch=batch) for batch in (128, 3))
    for site in whole.by_site:
        np.testing.assert_allclose(whole.by_site[site], parts.by_site[site], atol=1e-7)


def test_the_step_s_own_point_counts_not_its_share(llama: pc.Model) -> None:
    """The authors' code weights step k by k/m, by differentiating with respect to the end: half of it all is lost."""
    found = context_attributions(llama, TRIPLES, steps=100).completeness
    assert (found["sum"] / found["wanted"]).to_numpy() == pytest.approx(np.ones(4), abs=0.02)


# What is refused ------------------------------------------------------------------------------------


def test_bad_input_is_said() -> None:
    model = network().load()
    with pytest.raises(pc.errors.DataError, match="the context of example 1 is empty"):
        context_neurons(model, [EXAMPLES[0], (" ", "rose is", "red")])
    with pytest.raises(pc.errors.DataError, match="changes no neuron"):
        context_neurons(model, [("sky sky", "rose is", "red")])
    with pytest.raises(pc.errors.DataError, match="no examples"):
        context_neurons(model, [])
    with pytest.raises(pc.errors.DataError, match="not a triple"):
        context_neurons(model, [("red sky", "rose is")])  # type: ignore[list-item]
    with pytest.raises(pc.errors.DataError, match="no token"):
        context_neurons(model, [("red sky", "rose is", "green")])
    with pytest.raises(pc.errors.DataError, match="whole number of neurons"):
        context_neurons(model, EXAMPLES, keep=0)
    with pytest.warns(UserWarning, match="the first is used"):
        found = context_neurons(model, [("red sky", "rose is", "red sky")])
    assert found.names == ["mlp.1:3"]
