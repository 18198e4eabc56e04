"""Circuits of classes: importance in a linear network is known, allocation by hand, and units that move together."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import patchclamp as pc
from patchclamp.directions import Directions
from patchclamp.model.hooks import reading
from patchclamp.neurons import Neurons
from patchclamp.steer.circuit import Circuit, SublayerImportance, _shares, modulate, sublayer_importance

SIZE = 10


class Residual(nn.Module):
    """x + W x."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(0.4 * torch.randn(SIZE, SIZE, generator=made, dtype=torch.float64))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values + values @ self.weight.T


def linear() -> nn.Sequential:
    return nn.Sequential(Residual(0), Residual(1), Residual(2))


def directions(seed: int = 5) -> Directions:
    made = np.random.default_rng(seed)
    return Directions({f"module:{layer}": made.standard_normal((2, SIZE)) for layer in range(3)}, ["joy", "anger"])


def test_importance_in_a_linear_network_is_known_and_does_not_depend_on_the_strength() -> None:
    module, given = linear(), directions()
    values = torch.randn(7, SIZE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = sublayer_importance(module, values, given, settled=["module:1", "module:2"])
    unit = given.unit()
    # The reference by hand: the first is turned round where it points against the last.
    one, two = unit["module:1"].astype(np.float64), unit["module:2"].astype(np.float64)
    sign = np.where((one * two).sum(1, keepdims=True) < 0, -1, 1)
    reference = (sign * one + two) / np.linalg.norm(sign * one + two, axis=1, keepdims=True)
    np.testing.assert_allclose(found.reference["module:2"], reference, atol=1e-6)
    after = torch.eye(SIZE, dtype=torch.float64)
    with torch.no_grad():
        for layer in (2, 1, 0):
            pushed = torch.tensor(unit[f"module:{layer}"]).double() @ after
            wanted = (pushed.numpy() * reference).sum(1)
            assert found.by_strength[f"module:{layer}"].shape == (4, 2)
            np.testing.assert_allclose(
                found.by_strength[f"module:{layer}"], np.tile(wanted, (4, 1)), rtol=1e-4, atol=1e-6
            )
            block: Any = module[layer]
            after = (torch.eye(SIZE, dtype=torch.float64) + block.weight.T) @ after
    assert found.of("anger")["module:0"] == pytest.approx(found.by_strength["module:0"][:, 1].mean())


def test_at_the_end_the_importance_is_the_cosine_with_the_reference() -> None:
    found = sublayer_importance(linear(), torch.ones(3, SIZE, dtype=torch.float64), directions(), settled=["module:2"])
    np.testing.assert_allclose(found.by_strength["module:2"], 1, atol=1e-5)


def test_only_the_last_real_token_is_pushed() -> None:
    model = llama()
    made = np.random.default_rng(0)
    sites = [f"{kind}.{layer}" for layer in (0, 1) for kind in ("resid_mid", "resid_post")]
    given = Directions({site: made.standard_normal((2, 16)) for site in sites}, ["joy", "anger"])
    ids = torch.randint(3, 30, (6, 4), generator=torch.Generator().manual_seed(0))
    plain = sublayer_importance(model, {"input_ids": ids}, given)
    padded = {"input_ids": torch.cat([ids, torch.full((6, 2), 1)], 1)}
    padded["attention_mask"] = torch.cat([torch.ones(6, 4), torch.zeros(6, 2)], 1).long()
    again = sublayer_importance(model, padded, given)
    assert list(plain.by_strength) == sites and plain.settled == ["resid_post.1"]
    for site in sites:
        np.testing.assert_allclose(again.by_strength[site], plain.by_strength[site], atol=1e-3)
    # By hand, at one site behind which there is attention: the push at the last token alone.
    stream, end = model.site("resid_post.0"), model.site("resid_post.1")

    def last(push: torch.Tensor | None) -> torch.Tensor:
        class Push:
            def edits(self, model: pc.Model) -> dict[str, Any]:
                assert push is not None
                return {stream.name: lambda now: torch.cat([now[:, :-1], now[:, -1:] + push], 1)}

        with (
            torch.no_grad(),
            model.intervene(*([] if push is None else [Push()])),
            reading(model.module, [end]) as seen,
        ):
            model(input_ids=ids)
        return seen[end.name][0].tensor[:, -1]

    sigma = float(model.activations(ids, "resid_post.0")[:, -1].square().mean(1).sqrt().mean())
    push = 0.5 * sigma * torch.tensor(given.unit()["resid_post.0"][0])
    toward = torch.tensor(given.unit()["resid_post.1"][0])
    wanted = float(((last(push) - last(None)) @ toward).mean()) / (0.5 * sigma)
    assert plain.by_strength["resid_post.0"][2, 0] == pytest.approx(wanted, rel=1e-3)


def test_layers_that_have_settled_are_found() -> None:
    """The direction turns by a right angle, then hardly at all over three layers, then again."""
    turned = np.eye(SIZE)[[0, 1, 1, 1, 2]] + 0.05 * np.random.default_rng(0).standard_normal((5, SIZE))
    module = nn.Sequential(*(Residual(each) for each in range(5)))
    given = Directions({f"module:{layer}": turned[layer] for layer in range(5)}, ["joy"])
    found = sublayer_importance(module, torch.ones(2, SIZE, dtype=torch.float64), given, strengths=[0.5])
    assert found.settled == ["module:1", "module:2", "module:3"]


# Circuits -------------------------------------------------------------------------------------------


def test_shares_are_proportional_and_within_what_there_is() -> None:
    assert _shares({"a": 3.0, "b": 1.0, "c": 0.0}, {"a": 99, "b": 99, "c": 99}, 8) == {"a": 6, "b": 2, "c": 0}
    assert _shares({"a": 3.0, "b": 1.0}, {"a": 2, "b": 99}, 8) == {"a": 2, "b": 6}
    assert _shares({"a": 3.0, "b": 1.0}, {"a": 2, "b": 1}, 8) == {"a": 2, "b": 1}
    assert _shares({"a": 0.5, "b": 0.4, "c": 0.1}, {"a": 9, "b": 9, "c": 9}, 2) == {"a": 1, "b": 1, "c": 0}
    assert _shares({"a": 0.0}, {"a": 9}, 3) == {"a": 0}


def llama() -> pc.Model:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return pc.load(LlamaForCausalLM(config))


def tables() -> tuple[SublayerImportance, Neurons, Neurons, Directions]:
    strength = {"resid_mid.0": 1.0, "resid_post.0": 3.0, "resid_mid.1": 1.0, "resid_post.1": 1.0}
    importance = SublayerImportance(
        ["joy"], {site: np.full((1, 1), each) for site, each in strength.items()}, directions(), []
    )
    score = np.concatenate([np.arange(8, 0, -1) - 4.5, np.arange(8) - 1.5])
    neurons = pl.DataFrame({"site": ["mlp.0"] * 8 + ["mlp.1"] * 8, "index": [*range(8)] * 2, "score_joy": score})
    of_head = np.repeat([2.0, 5.0, -1.0, 0.5, 9.0, -1.0, -1.0, -1.0], 4)
    heads = pl.DataFrame(
        {
            "site": ["attn.0"] * 16 + ["attn.1"] * 16,
            "index": [*range(16)] * 2,
            "head": np.tile(np.repeat(np.arange(4), 4), 2),
            "score_joy": of_head,
        }
    )
    made = np.random.default_rng(0)
    sizes = {"mlp.0": 8, "mlp.1": 8, "attn.0": 16, "attn.1": 16}
    differences = Directions({site: made.standard_normal((1, size)) for site, size in sizes.items()}, ["joy"])
    return importance, Neurons.from_polars(neurons), Neurons.from_polars(heads), differences


def test_each_sublayer_gives_its_best_units_by_its_share() -> None:
    importance, neurons, heads, differences = tables()
    found = Circuit.build(importance, differences, neurons=neurons, neuron_count=4, heads=heads, head_count=2)
    units = found.units["joy"]
    # Three to one: the best of mlp.0 are its first, of mlp.1 its last.
    assert units.at("mlp.0").names == ["mlp.0:0", "mlp.0:1", "mlp.0:2"] and units.at("mlp.1").names == ["mlp.1:7"]
    # One head each: whole heads, all of their neurons.
    assert units.indices("attn.0").tolist() == [4, 5, 6, 7] and units.indices("attn.1").tolist() == [0, 1, 2, 3]
    # Of attn.1 only one head writes along the class: the second of its two goes to the other layer.
    more = Circuit.build(importance, differences, heads=heads, head_count=4).units["joy"]
    assert sorted(more.indices("attn.0").tolist()) == [0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 14, 15]
    assert more.indices("attn.1").tolist() == [0, 1, 2, 3]


def test_modulation_shifts_the_units_and_nothing_else() -> None:
    model = llama()
    importance, neurons, heads, differences = tables()
    circuit = Circuit.build(importance, differences, neurons=neurons, neuron_count=4, heads=heads, head_count=2)
    ids = torch.arange(8).reshape(2, 4)
    sites = ["mlp.0", "attn.0"]

    def seen(*interventions: Any) -> dict[str, torch.Tensor]:
        with model.intervene(*interventions):
            return model.activations(ids, sites)

    plain, moved = seen(), seen(modulate(circuit, {"joy": 1.5}))
    at = circuit.units["joy"].indices("attn.0").copy()
    change = moved["attn.0"] - plain["attn.0"]
    wanted = torch.zeros(16)
    wanted[at] = 1.5 * torch.tensor(differences["attn.0"][0, at])
    torch.testing.assert_close(change, wanted.expand_as(change), atol=1e-6, rtol=1e-5)
    with model.intervene(modulate(circuit, {"joy": 0.0})), torch.no_grad():
        still = model(input_ids=ids).logits
    with torch.no_grad():
        torch.testing.assert_close(still, model(input_ids=ids).logits)


def test_bad_input_is_said() -> None:
    importance, neurons, _, differences = tables()
    values, given = torch.ones(2, SIZE, dtype=torch.float64), directions()
    flat = Directions({"module:0": np.zeros((1, SIZE))}, ["joy"])
    circuit = Circuit.build(importance, differences, neurons=neurons, neuron_count=1)
    none = Neurons.from_polars(neurons.to_polars().with_columns(score_joy=pl.lit(-1.0)))
    error, missing = pc.errors.DataError, pc.errors.UnknownName
    for make, kind, match in [
        (lambda: sublayer_importance(linear(), values, given, strengths=[]), error, "strengths are finite"),
        (lambda: sublayer_importance(linear(), values, given, strengths=[0.0]), error, "strengths are finite"),
        (lambda: sublayer_importance(linear(), values, flat), error, "length 0"),
        (lambda: sublayer_importance(linear(), values[:0], given), error, "0 examples"),
        (lambda: sublayer_importance(linear(), values, given, settled=["module:9"]), missing, "module:9"),
        (lambda: importance.of("calm"), missing, "calm"),
        (lambda: Circuit.build(importance, differences), error, "neuron_count"),
        (lambda: Circuit.build(importance, differences, neurons=none, neuron_count=2), error, "its circuit is empty"),
        (lambda: Circuit.build(importance, differences, heads=neurons, head_count=2), missing, "head"),
        (lambda: Circuit.build(importance, differences.at("mlp.1"), neurons=neurons, neuron_count=4), missing, "mlp.0"),
        (lambda: modulate(circuit, {"calm": 1.0}), missing, "calm"),
        (lambda: modulate(circuit, {"joy": math.nan}), error, "finite"),
    ]:
        with pytest.raises(kind, match=match):
            make()
    with pytest.raises(missing), pc.load(linear()).intervene(modulate(circuit, {"joy": 1.0})):
        pass
