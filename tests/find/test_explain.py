"""Who wrote this token? Sums over every kind of decoder, planted neurons, and what silencing does."""

from __future__ import annotations

import html
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from tests.architectures import BERT, T5, VOCABULARY, tokenizer
from tests.find.decoders import DECODERS
from tests.find.hand_built import HandBuilt
from tests.zoo import drawn
from torch import nn
from transformers import BertForSequenceClassification, ViTConfig, ViTForImageClassification

import patchclamp as pc
from patchclamp.find.explain import explain
from patchclamp.testbed.trained import Trained, trained

TEXT = "the cat sat on a mat"


def decoder(name: str = "gpt2") -> pc.Model:
    return pc.load(drawn(DECODERS[name])(), tokenizer=tokenizer())


# Sums -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
def test_direct_parts_sum_to_the_logit(name: str) -> None:
    """`rest` is what no part accounts for: here there is none, whatever the architecture."""
    model = decoder(name)
    found = explain(model, TEXT, "home")
    logit = float(model.logits(TEXT)[-1, VOCABULARY["home"]])
    assert found.completeness is not None
    assert found.value == pytest.approx(logit, abs=1e-5)
    assert abs(found.completeness.error) < 1e-4 and abs(found.completeness.rest) < 1e-4
    direct = found.by_layer["direct"].sum()
    assert direct == pytest.approx(logit, abs=1e-4)
    summed = found.by_layer.filter(pl.col("part").is_in(["neurons", "heads"]))["direct"].sum()
    each = sum(float(table["direct"].to_numpy().sum()) for table in (found.neurons.to_polars(), found.heads))
    assert each == pytest.approx(summed, abs=1e-6) and abs(each) > 0.05


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt-neox", "opt-350m"])
def test_a_direct_part_is_what_the_logit_loses_when_only_that_is_taken_out_of_the_stream(name: str) -> None:
    """By hand for the last block: the residual stream without what one neuron wrote, norms divided as before."""
    model = decoder(name)
    found = explain(model, TEXT, "home", "mat")
    table = found.neurons.at("mlp.1").to_polars().sort("index")
    block: Any = model.module.get_submodule(model.site("resid_post.1").module)
    last = [module for module in block.modules() if "norm" in type(module).__name__.lower()][-1]
    readout = model.readout
    sizes: dict[str, torch.Tensor] = {}
    projection: Any = model.module.get_submodule(str(model.site("mlp.1").writes))
    norms = [last, *([model.module.get_submodule(readout.norm)] if readout.norm else [])]
    follows = norms if name in ("gemma2", "opt-350m") else norms[1:]
    handles = [norm.register_forward_hook(keep(sizes, str(number))) for number, norm in enumerate(follows)]
    with torch.no_grad():
        model(TEXT)
        for handle in handles:
            handle.remove()
        activation = model.activations(TEXT, "mlp.1").as_subclass(torch.Tensor)[-1]
        weights = projection.weight.T if projection.weight.shape[0] != 24 else projection.weight
        written = activation[:, None] * weights
        for number, norm in enumerate(follows):
            given, returned = sizes[f"{number}"], norm(sizes[f"{number}"])
            centres = isinstance(norm, nn.LayerNorm)
            gain = 1 + norm.weight if "Gemma" in type(norm).__name__ else norm.weight
            shift = norm.bias if centres else 0
            centred = given - given.mean() if centres else given
            size = ((centred * gain).norm() / (returned - shift).norm()).item()
            written = (written - written.mean(1, keepdim=True) if centres else written) * gain / size
        head: Any = model.module.get_submodule(readout.unembedding)
        if name == "opt-350m":
            written = model.module.get_submodule("model.decoder.project_out")(written)
        expected = written @ (head.weight[VOCABULARY["home"]] - head.weight[VOCABULARY["mat"]])
    np.testing.assert_allclose(table["direct"], expected.double(), atol=1e-5)


def keep(seen: dict[str, torch.Tensor], name: str) -> Any:
    def hook(_module: nn.Module, args: tuple, _output: Any) -> None:
        seen[name] = args[0].detach().reshape(-1, args[0].shape[-1])[-1]

    return hook


def test_gradients_are_those_of_the_whole_network() -> None:
    """Gradient times activation is the slope of the logit in a scale put onto one neuron everywhere."""
    model = decoder("llama")
    found = explain(model, TEXT, "home")
    table = found.neurons.to_polars()
    for row in table.head(3).iter_rows(named=True):
        neuron, ends = pc.Neurons({row["site"]: [row["index"]]}), []
        for factor in (1.02, 0.98):
            with model.intervene(pc.scale(neuron, factor)):
                ends.append(float(model.logits(TEXT)[-1, VOCABULARY["home"]]))
        assert row["gradient"] == pytest.approx((ends[0] - ends[1]) / 0.04, abs=2e-3)


def test_without_a_target_it_is_what_the_model_says_itself() -> None:
    model = decoder()
    logits = model.logits(TEXT)[-1]
    found = explain(model, TEXT)
    assert found.target == model.reader.strings([int(logits.argmax())])[0]  # type: ignore[union-attr]
    assert found.value == pytest.approx(float(logits.max()), abs=1e-5)
    assert found.probabilities[0] == pytest.approx(float(logits.softmax(-1).max()), abs=1e-6)


def test_a_foil_takes_off_what_raises_both() -> None:
    model = decoder()
    one, two, both = explain(model, TEXT, "home"), explain(model, TEXT, "mat"), explain(model, TEXT, "home", "mat")
    assert both.value == pytest.approx(one.value - two.value, abs=1e-5) and both.foil == " mat"
    columns = [each.neurons.to_polars().sort("site", "index")["direct"] for each in (one, two, both)]
    np.testing.assert_allclose(columns[0] - columns[1], columns[2], atol=1e-6)


def test_interventions_in_force_count() -> None:
    model = decoder()
    first = explain(model, TEXT, "home").neurons.top(1)
    with model.intervene(pc.ablate(first)):
        found = explain(model, TEXT, "home")
    row = found.neurons.to_polars().filter(site=first["site"][0], index=first["index"][0])
    assert row["direct"][0] == 0 and found.completeness is not None and abs(found.completeness.error) < 1e-4


# Planted --------------------------------------------------------------------------------------------


def facts() -> HandBuilt:
    """A head fetches France, neuron 7 of layer 1 makes Paris of it; neuron 2 of layer 0 says Paris a little, always."""
    network = HandBuilt(
        ["?", "pad", "the", "capital", "of", "France", "is", "Paris", "Rome"],
        ["asks", "france", "heard", "paris", "rome", "constant", "spare"],
        20,
        None,
    )
    for word in network.words[2:]:
        network.embed(word, constant=1.0)
    network.embed("France", france=3.0)
    network.embed("is", asks=1.0)
    network.head(0, 1, "france", {"france": "heard"})
    network.neuron(1, 7, "heard", "paris", 2.0)
    network.neuron(1, 8, "heard", "rome", 0.5)
    network.neuron(0, 2, "constant", "paris", 0.3)
    network.says("Paris", "paris", 2.0)
    network.says("Rome", "rome", 2.0)
    return network


def test_the_planted_neuron_and_the_head_behind_it_come_first() -> None:
    model = facts().load()
    found = explain(model, "the capital of France is", "Paris")
    assert found.target == " Paris" and found.neurons.names[0] == "mlp.1:7"
    assert found.neurons["direct"][0] > 5 * found.neurons["direct"][1] > 0
    # The head writes nothing into the logit itself, and all of it through the neuron.
    best = found.heads.sort("gradient", descending=True).row(0, named=True)
    assert (best["site"], best["head"], best["attends_to"]) == ("attn.0", 1, " France")
    assert best["attention"] == pytest.approx(1, abs=1e-4) and abs(best["direct"]) < best["gradient"] / 3
    assert found.by_token.sort("gradient", descending=True)["token"][0] == " France"
    assert found.heads.filter(pl.col("site") == "attn.1")["gradient"].abs().max() == 0
    # "Rome" counts against it.
    assert explain(model, "the capital of France is", "Paris", "Rome").neurons.names[-1] == "mlp.1:8"


def test_nothing_is_owed_to_neurons_that_are_silent() -> None:
    found = explain(facts().load(), "the capital of", "Rome")
    assert found.neurons.to_polars().filter(pl.col("site") == "mlp.1")["direct"].abs().max() == 0
    assert "no neuron raises it" in found.sentence()


def test_planted_facts_of_a_gpt2_come_first() -> None:
    bed = pc.testbed.plant("gpt2", roles=("fact",), difficulty=0.0, layers=2, examples=200, seed=0)
    truth = bed.truth.to_polars().filter(role="fact")
    texts = [each.text for each in bed.data]  # type: ignore[union-attr]
    found_first, asked = 0, 0
    for row in truth.head(8).iter_rows(named=True):
        for text in texts:
            if (prompt := before_object(text, row["reads"], row["writes"].split())) is not None:
                asked += 1
                target = text[len(prompt) :].split()[0]
                first = explain(bed.model, prompt, target).neurons
                found_first += f"{row['site']}:{row['index']}" in first.top(3).names
                break
    assert asked >= 3 and found_first >= 0.8 * asked


def before_object(text: str, subject: str, objects: list[str]) -> str | None:
    """The text up to where one of the objects follows the subject and a relation."""
    words = text.split()
    for place in range(2, len(words)):
        if words[place] in objects and words[place - 2] == subject:
            return " ".join(words[:place])
    return None


@pytest.fixture(scope="module")
def python_docs() -> Trained:
    return trained("python_docs")


def test_without_its_neurons_the_logit_falls_far_more_than_without_random_ones(python_docs: Trained) -> None:
    model, falls, chance = python_docs.model, [], []
    everyone = model.neurons("mlp.*")
    for text in ("Return the number of", "If the file does not", "Raises a ValueError if the"):
        found = explain(model, text)
        token = int(model.logits(text)[-1].argmax())
        assert found.completeness is not None and abs(found.completeness.error) < 1e-4 * abs(found.value)
        top = found.neurons.top(10)
        with model.intervene(pc.ablate(top)):
            falls.append(found.value - float(model.logits(text)[-1, token]))
        for seed in range(5):
            with model.intervene(pc.ablate(everyone.sample(like=top, seed=seed))):
                chance.append(found.value - float(model.logits(text)[-1, token]))
    assert min(falls) > 0.5 and np.mean(falls) > 10 * abs(np.mean(chance))


# Encoders and classifiers -----------------------------------------------------------------------------


def test_a_similarity_has_gradients_only() -> None:
    model = pc.load(drawn(BERT.new)(), tokenizer=tokenizer(special=True))
    found = explain(model, TEXT, "two dogs ran")
    cosine = float(model.embed(TEXT)[0] @ model.embed("two dogs ran")[0])
    assert found.what == "similarity" and found.value == pytest.approx(cosine, abs=1e-6)
    assert found.completeness is None and found.neurons["direct"].null_count() == len(found.neurons)
    assert found.neurons["gradient"].is_sorted(descending=True) and found.by_token.height == len(model.tokens(TEXT))
    best, ends, fixed = found.neurons.top(1, by="gradient"), [], model.embed("two dogs ran")[0]
    for factor in (1.02, 0.98):
        with model.intervene(pc.scale(best, factor)):
            ends.append(float(model.embed(TEXT)[0] @ fixed))
    assert best["gradient"][0] == pytest.approx((ends[0] - ends[1]) / 0.04, abs=1e-3)
    with pytest.raises(pc.errors.DataError, match="give another text as target"):
        explain(model, TEXT)
    with pytest.raises(pc.errors.DataError, match="no foil"):
        explain(model, TEXT, "it sat", "rained")


class Convolutions(nn.Module):
    """Two convolutions, a mean over the image, a linear head."""

    def __init__(self, flatten: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 3, padding=1)
        self.flatten, self.relu = flatten, nn.ModuleList([nn.ReLU(), nn.ReLU()])
        self.head = nn.Linear(5 * 64 if flatten else 5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.relu[1](self.second(self.relu[0](self.first(x))))
        return self.head(hidden.flatten(1) if self.flatten else hidden.mean((2, 3)))


@pytest.mark.parametrize("flatten", [False, True])
def test_what_a_linear_head_reads_has_a_direct_part(flatten: bool) -> None:
    torch.manual_seed(0)
    module = Convolutions(flatten).eval()
    image = torch.randn(1, 3, 8, 8)
    module.requires_grad_(False)
    model = pc.load(module, example=image)
    found = explain(model, image, 2, 1)
    logits = module(image)[0]
    assert found.what == "class" and found.value == pytest.approx(float(logits[2] - logits[1]), abs=1e-6)
    assert found.completeness is not None and abs(found.completeness.error) < 1e-5
    table = found.neurons.to_polars()
    assert table.filter(pl.col("direct").is_not_null())["site"].unique().to_list() == ["conv.second"]
    # Nothing else lies between these channels and the logit: both answers are one.
    there = table.drop_nulls("direct")
    np.testing.assert_allclose(there["direct"], there["gradient"], atol=1e-5)
    assert found.by_layer.filter(part="biases")["direct"][0] == pytest.approx(
        float(module.head.bias[2] - module.head.bias[1])
    )


def test_classes_have_names() -> None:
    config = ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4
    )
    config.id2label = {0: "cat", 1: "dog", 2: "mat"}
    model = pc.load(drawn(lambda: ViTForImageClassification(config))())
    image = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = explain(model, image, "dog")
    assert found.target == "dog" and found.completeness is None and found.heads.height == 8
    assert found.value == pytest.approx(float(model(image).logits[0, 1]), abs=1e-6)
    assert "no direct part" in found.sentence()
    with pytest.raises(pc.errors.UnknownName, match=r"no class is called 'dogs'\. The nearest: dog"):
        explain(model, image, "dogs")


def test_a_classifier_of_texts_names_classes() -> None:
    made = BertForSequenceClassification(BERT.new().config)  # type: ignore[arg-type]
    model = pc.load(drawn(lambda: made)(), tokenizer=tokenizer(special=True))
    found = explain(model, TEXT, 1)
    assert found.what == "class" and found.target == "LABEL_1" and found.by_token.height == 8


# What is said and shown -------------------------------------------------------------------------------


def test_the_picture_is_valid_and_escaped() -> None:
    network = facts()
    network.words[2] = "<b>&\n"
    found = explain(network.load(), "capital of France is", "Paris")
    for text in ('<script>alert("x")</script> & co', "line\nbreak \x00 漢字"):
        altered = type(found)(
            **{**vars(found), "prompt": text, "target": f"{text}\ud800", "by_token": token_table(text)}
        )
        root = ElementTree.fromstring(altered.picture())
        assert root.tag.endswith("svg") and not list(root.iter("script"))
        assert html.escape(text[:8]) in html.unescape(altered.picture()) or text[:4] in "".join(root.itertext())
        assert "<script" not in altered._repr_html_()
    words = "".join(ElementTree.fromstring(found.picture()).itertext())
    assert "mlp.1:7" in words and "attn.0 head 1" in words and "' Paris'" in words and "France" in words


def token_table(text: str) -> pl.DataFrame:
    return pl.DataFrame({"position": [0], "token": [text], "gradient": [0.5]})


def test_the_picture_is_written_and_stays_within_its_page(tmp_path: Path) -> None:
    found = explain(decoder("llama"), " ".join([TEXT] * 5), "home", "mat", k=4)
    assert found.picture(tmp_path / "why.svg") == (tmp_path / "why.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(found.picture())
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    for box in root.iter("{http://www.w3.org/2000/svg}rect"):
        if box.get("x"):
            x, y, across, down = (float(box.get(name, 0)) for name in ("x", "y", "width", "height"))
            assert 0 <= x <= x + across <= width and 0 <= y <= y + down <= height
    with pytest.raises(pc.errors.StoreError, match="cannot write"):
        found.picture(tmp_path / "nowhere" / "why.svg")


def test_the_sentence_says_what_the_tables_hold() -> None:
    found = explain(decoder(), TEXT, "home", k=3)
    said = found.sentence()
    assert f"is {found.value:.2f}" in said and "To first order" in said
    direct = found.neurons.to_polars().head(3)
    for row in direct.iter_rows(named=True):
        assert (f"{row['site']}:{row['index']} {row['direct']:+.2f}" in said) == (row["direct"] >= 0.005)
    assert len(re.findall(r"mlp\.\d+:\d+", said)) == 6


def test_the_same_call_gives_the_same() -> None:
    model = decoder()
    one, two = explain(model, TEXT), explain(model, TEXT)
    assert one.neurons == two.neurons and one.picture() == two.picture()


def test_the_model_is_left_as_it_was() -> None:
    model = decoder()
    model.module.train()
    explain(model, TEXT)
    assert model.module.training and all(each.requires_grad for each in model.module.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.module.modules())


def test_bad_input_is_said() -> None:
    model = decoder()
    with pytest.warns(UserWarning, match=r"'home mat' is not one token: it becomes ' home', ' mat'; the first is used"):
        assert explain(model, TEXT, "home mat").target == " home"
    with pytest.raises(pc.errors.DataError, match="no token of this vocabulary"):
        explain(model, TEXT, "zebra")
    with pytest.raises(pc.errors.DataError, match="foil is empty"):
        explain(model, TEXT, "mat", "")
    with pytest.raises(pc.errors.DataError, match="the same"):
        explain(model, TEXT, "mat", "mat")
    with pytest.raises(pc.errors.UnknownName, match="no token id is called '99'"):
        explain(model, TEXT, 99)
    with pytest.raises(pc.errors.DataError, match="has no tokens"):
        explain(model, "")
    with pytest.raises(pc.errors.DataError, match="k is a whole number"):
        explain(model, TEXT, k=0)
    with pytest.raises(pc.errors.DataError, match="one text"):
        explain(model, ["a", "b"])
    with pytest.raises(pc.errors.ModelError, match="encoder with a decoder"):
        explain(pc.load(drawn(T5.new)(), tokenizer=tokenizer()), TEXT)
    with pytest.raises(pc.errors.DataError, match=r"one example, a tensor \[1, ...\]"):
        explain(pc.load(Convolutions(), example=torch.zeros(1, 3, 8, 8)), torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("name", ["llama", "granite", "gemma2"])
def test_half_precision_sums_to_what_its_rounding_allows(name: str) -> None:
    model = pc.load(drawn(DECODERS[name])().to(torch.bfloat16), tokenizer=tokenizer())
    found = explain(model, TEXT, "home")
    assert found.completeness is not None
    whole = float(found.by_layer["direct"].drop_nulls().abs().to_numpy().sum())
    assert abs(found.completeness.error) + abs(found.completeness.rest) < 0.02 * whole
