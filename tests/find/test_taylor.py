"""Taylor awareness: exact where the loss is linear, planted owners, and that the size of a loss owns nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.architectures import GPT2, padded, tokenizer
from torch import nn

import patchclamp as pc
from patchclamp.errors import DataError, ModelError, UnknownName
from patchclamp.find.taylor import taylor

NAMES = ("aru", "bel", "cor", "dun")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(into: torch.Tensor, out: torch.Tensor) -> pc.Model:
    module = nn.Sequential(nn.Linear(into.shape[1], len(into), bias=False), nn.ReLU(), nn.Linear(len(into), 1))
    with torch.no_grad():
        module[0].weight.copy_(into)  # type: ignore[union-attr, operator]
        module[2].weight.copy_(out[None])  # type: ignore[union-attr, operator]
    return pc.load(module)


def planted(examples: int = 240, seed: int = 0) -> tuple[pc.Model, torch.Tensor, list[str]]:
    """Four labels, a marker of each, one input that all have. Neuron 3 reads the marker of "dun"; neuron 5 what all
    have; neuron 7 reads the marker of "aru" and writes nothing. The others read noise and write a little."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.arange(examples) % 4
    inputs = torch.cat([torch.eye(4)[codes], torch.ones(examples, 1), torch.randn(examples, 6, generator=generator)], 1)
    into, out = 0.3 * torch.randn(12, 11, generator=generator), 0.3 * torch.randn(12, generator=generator)
    into[:, :5] = 0
    into[[3, 5, 7]] = 0
    into[3, 3], into[5, 4], into[7, 0] = 2, 2, 5
    out[3], out[5], out[7] = 1, 1, 0
    return network(into, out), inputs, [NAMES[each] for each in codes.tolist()]


def loss(output: Any, _inputs: Any) -> torch.Tensor:
    return output[:, 0]


# What it says ---------------------------------------------------------------------------------------


def test_of_a_linear_loss_it_is_what_removing_the_neuron_does() -> None:
    model, inputs, labels = planted()
    found = taylor(model, inputs, labels, "mlp.0", target=loss, normalise=False)
    which = np.asarray(labels)
    with torch.no_grad():
        plain = model.module(inputs)[:, 0]
        for index in range(12):
            with model.intervene(pc.ablate(pc.Neurons({"mlp.0": [index]}))):
                change = (model.module(inputs)[:, 0] - plain).abs().numpy()
            row = found.to_polars().filter(index=index).row(0, named=True)
            for name in NAMES:
                assert row[f"score_{name}"] == pytest.approx(change[which == name].mean(), abs=1e-6)


def test_a_neuron_of_one_label_is_specific_and_one_of_all_is_general() -> None:
    model, inputs, labels = planted()
    found = taylor(model, pc.Tensors(inputs, labels={"language": labels}), "language", "mlp.0", target=loss)
    first = found.to_polars().row(0, named=True)
    assert (first["index"], first["label"], first["kind"]) == (3, "dun", "specific")
    assert found["kind"].to_list().count("specific") == 1  # a tenth of 12
    general = found.to_polars().filter(index=5).row(0, named=True)
    assert general["kind"] == "general" and general["awareness"] > found["awareness"].median()  # type: ignore[operator]
    assert found["awareness"].mean() == pytest.approx(1.0)
    silent = found.to_polars().filter(index=7).row(0, named=True)
    assert silent["score"] == silent["awareness"] == 0  # it fires on its label alone, and does nothing


def test_a_louder_loss_owns_nothing_unless_it_is_asked_to() -> None:
    model, inputs, labels = planted()
    loud = torch.tensor([10.0 if each == "bel" else 1.0 for each in labels])[:, None]

    def louder(output: Any, _inputs: Any) -> torch.Tensor:
        return output[:, 0] * loud[:, 0]

    def owners(target: Any, normalise: bool) -> dict[int, str]:
        table = taylor(model, inputs, labels, "mlp.0", target=target, normalise=normalise, batch=500)
        return dict(zip(table["index"], table["label"], strict=True))

    fair, published = owners(louder, True), owners(louder, False)
    assert fair == owners(loss, True)
    assert [published[each] for each in range(12) if each not in (3, 7)] == ["bel"] * 10


def test_a_long_text_counts_as_one() -> None:
    model = pc.load(GPT2.build(), tokenizer=tokenizer())
    texts = ["the cat sat on a mat", "it sat", "two dogs ran home and they stayed in all day long", "the cat ran"]
    labels = ["one", "two", "one", "two"]
    whole = taylor(model, pc.Texts(texts, {"kind": labels}), "kind", ["mlp.*", "attn.0"])
    assert set(whole["site"]) == {"mlp.0", "mlp.1", "attn.0"}
    again = taylor(model, texts, labels, ["mlp.*", "attn.0"], batch=1)
    assert again["score_one"].to_list() == pytest.approx(whole["score_one"].to_list(), rel=1e-3)
    call = padded(texts, side="left")
    left = taylor(model, call, labels, ["mlp.*", "attn.0"])
    assert left["score_two"].to_list() == pytest.approx(whole["score_two"].to_list(), rel=1e-3)
    twice = taylor(model, [*texts, texts[2]], [*labels, "one"], ["mlp.0"], normalise=False)
    alone = [taylor(model, [each, "it sat"], ["one", "two"], ["mlp.0"], normalise=False) for each in texts[::2]]
    first, second = (dict(zip(each["index"], each["score_one"], strict=True)) for each in alone)
    for index, score in zip(twice["index"], twice["score_one"], strict=True):
        assert score == pytest.approx((first[index] + 2 * second[index]) / 3, rel=1e-4)


# The null -------------------------------------------------------------------------------------------


def test_permuted_labels_find_the_planted_and_nothing_else() -> None:
    model, inputs, labels = planted()
    found = taylor(model, inputs, labels, "mlp.0", target=loss, null="permute", permutations=99)
    assert found["index"][0] == 3 and found["p"][0] < 0.05 and found["q"][0] < 0.05
    dealt = np.random.default_rng(1).permutation(labels).tolist()
    nothing = taylor(model, inputs, dealt, "mlp.0", target=loss, null="permute", permutations=99)
    assert nothing["p"].min() > 0.05  # type: ignore[operator]
    assert found == taylor(model, inputs, labels, "mlp.0", target=loss, null="permute", permutations=99)


# What is refused ------------------------------------------------------------------------------------


def test_bad_input_is_said() -> None:
    model, inputs, labels = planted()
    data = pc.Tensors(inputs, labels={"language": labels, "same": ["x"] * len(labels)})
    for given, error, match in [
        ({"labels": ["one"] * 240}, DataError, "at least two labels"),
        ({"labels": "same"}, DataError, "at least two labels"),
        ({"labels": "tongue"}, UnknownName, "language"),
        ({"labels": labels[:10]}, DataError, "10 labels were given for 240"),
        ({"specific": 0.0}, DataError, "specific is the share"),
        ({"null": "bootstrap"}, UnknownName, "permute"),
        ({"target": lambda output, _: output[:, 0] * 0}, ModelError, "no neuron"),
        ({"target": lambda output, _: output[:, 0].detach()}, ModelError, "no neuron"),
    ]:
        with pytest.raises(error, match=match):
            taylor(model, data, **{"labels": "language", "sites": "mlp.0", "target": loss, **given})
    with pytest.raises(ModelError, match="no logits of a next token"):
        taylor(model, data, "language", "mlp.0")


def test_frozen_weights_are_no_hindrance() -> None:
    model, inputs, labels = planted()
    plain = taylor(model, inputs, labels, "mlp.0", target=loss)
    model.module.requires_grad_(False)
    assert taylor(model, inputs, labels, "mlp.0", target=loss) == plain
