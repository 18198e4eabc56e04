"""Increase of a token's log probability, and what of it an ablated head takes away: a circuit set by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.architectures import GEMMA2, GPT2, LLAMA, NEOX, OPT_POST, VOCABULARY, Architecture, tokenizer
from tests.find.hand_built import HandBuilt
from tests.zoo import drawn
from torch import nn

import patchclamp as pc
from patchclamp.find.comparative import comparative
from patchclamp.find.logprob_increase import head_importance, logprob_increase

PROMPT = "3 + 5 ="


def circuit(norm: nn.Module | None = None) -> HandBuilt:
    """Head 1 of layer 0 fetches the digit; neuron 7 makes "8" of it; neuron 9 says "8" whatever the head does."""
    network = HandBuilt(
        ["?", "pad", "3", "+", "5", "=", "8", "9"], ["asks", "digit", "sum", "eight", "constant", "nine"], 12, norm
    )
    for word in ("3", "+", "5", "=", "8", "9"):
        network.embed(word, constant=1.0)
    network.embed("5", digit=1.0)
    network.embed("=", asks=1.0)
    network.head(0, 1, "digit", {"digit": "sum"})
    network.neuron(1, 7, "sum", "eight", 2.0)
    network.neuron(1, 9, "constant", "eight", 1.5)
    network.says("8", "eight")
    network.says("9", "nine")
    return network


def the_head(model: pc.Model) -> Any:
    return pc.ablate(pc.Neurons({"attn.0": model.site("attn.0").head(1)}))


def random_model(architecture: Architecture, **options: Any) -> pc.Model:
    return pc.load(drawn(architecture.new)(), tokenizer=tokenizer(), **options)


# A circuit that is known ------------------------------------------------------------------------------


def test_the_neurons_that_write_the_token_come_first() -> None:
    found = logprob_increase(circuit().load(), PROMPT, "8")
    assert set(found.top(2).names) == {"mlp.1:7", "mlp.1:9"}
    assert found["score"][1] > 1 and found["score"][2:].abs().max() == 0
    # By hand: logits 0 but for 2 of token "8", among 8 tokens.
    assert found["score"][0] == pytest.approx(2 - np.log((7 + np.exp(2)) / 8), abs=1e-6)
    assert logprob_increase(circuit().load(), PROMPT, "9")["score"].max() <= 0


def test_what_the_head_is_needed_for_comes_first() -> None:
    model = circuit().load()
    found = comparative(model, PROMPT, "8", the_head(model))
    by_name = dict(zip(found.names, found["score"], strict=True))
    assert found.names[0] == "mlp.1:7" and by_name["mlp.1:7"] > 1
    assert abs(by_name["mlp.1:9"]) < 1e-6
    increase = dict(zip(found.names, found["increase"], strict=True))
    assert increase["mlp.1:9"] > 1 > 0 == dict(zip(found.names, found["increase_changed"], strict=True))["mlp.1:7"]


def test_the_head_that_fetches_the_digit_is_found() -> None:
    found = head_importance(circuit().load(), [PROMPT, "5 + 3 ="], "8")
    assert found.row(0)[:2] == ("attn.0", 1) and found["drop"][0] > 0.3
    assert np.abs(found["drop"][1:].to_numpy()).max() < 1e-6 and found.height == 4


def test_an_intervention_that_does_nothing_takes_nothing_away() -> None:
    model = random_model(LLAMA)
    silent = pc.scale(pc.Neurons({"attn.0": range(6)}), 1.0)
    assert comparative(model, "the cat sat", "mat", silent)["score"].abs().max() == 0


def test_each_run_has_its_own_size_unless_told_otherwise() -> None:
    """Under a norm, a run without the head has another size; shared, neuron 9 is divided by the original one."""
    model = circuit(nn.RMSNorm(6, eps=1e-6)).load()
    own = comparative(model, PROMPT, "8", the_head(model))
    shared = comparative(model, PROMPT, "8", the_head(model), shared_size=True)
    nine = [dict(zip(each.names, each["score"], strict=True))["mlp.1:9"] for each in (own, shared)]
    assert nine[0] < -0.05 and abs(nine[1]) < 1e-6


# Any network ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [GPT2, LLAMA, GEMMA2, NEOX], ids=lambda each: each.name)
def test_increases_are_those_of_the_definition(architecture: Architecture) -> None:
    """Added one by one, through the whole unembedding, with the norm's divisor of the last layer's output."""
    model = random_model(architecture)
    texts, tokens = ["the cat sat on a mat", "it sat"], ["home", "dogs"]
    found = logprob_increase(model, texts, tokens)
    expected = np.mean([by_hand(model, text, VOCABULARY[token]) for text, token in zip(texts, tokens, strict=True)], 0)
    got = np.concatenate([found.at(site).top(99, by="score").to_polars().sort("index")["score"] for site in SITES])
    np.testing.assert_allclose(got, expected.reshape(-1), atol=1e-5)


SITES = ("mlp.0", "mlp.1")


@torch.no_grad()
def by_hand(model: pc.Model, text: str, token: int) -> np.ndarray:
    """`[layers, neurons]`: the branch is the projection, through the norm after it where there is one (Gemma 2)."""
    readout, module = model.readout, model.module
    seen = model.activations(text, ["resid_post.*", "mlp.*"])
    last: Any = {name: torch.as_tensor(each).as_subclass(torch.Tensor)[-1].double() for name, each in seen.items()}
    final = last["resid_post.1"]
    linear = readout.linear_part
    centred = final - final.mean() if linear.centres else final
    size = (centred.pow(2).mean() + epsilon(module.get_submodule(readout.norm))).sqrt()

    def lp(x: torch.Tensor) -> float:
        centred = x - x.mean() if linear.centres else x
        hidden = centred / size * linear.gain.double() + linear.shift.double()
        logits = readout.scale * hidden @ module.get_submodule(readout.unembedding).weight.double().T
        if readout.softcap is not None:
            logits = readout.softcap * torch.tanh(logits / readout.softcap)
        return float(logits.log_softmax(-1)[token])

    rows = []
    for layer in range(2):
        site = model.site(f"mlp.{layer}")
        weights, bias = (
            model.output_weights(site).double(),
            getattr(module.get_submodule(str(site.writes)), "bias", None),
        )
        each = last[site.name][:, None] * weights
        whole = each.sum(0) + (0 if bias is None else bias.double())
        if site.norm is not None:
            after: Any = module.get_submodule(site.norm)
            gain = (1 + after.weight.double()) / (whole.pow(2).mean() + epsilon(after)).sqrt()
            each, whole = each * gain, whole * gain
        before = last[f"resid_post.{layer}"] - whole
        rows.append([lp(before + one) - lp(before) for one in each])
    return np.asarray(rows)


def epsilon(norm: Any) -> float:
    return next(getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name))


def test_one_neuron_that_is_the_whole_mlp_makes_the_log_probability_of_the_network() -> None:
    """The card's sum check: at the last layer the held divisor is the true one."""
    module: Any = drawn(GPT2.new)()
    last = module.transformer.h[1].mlp
    model, text, token = pc.load(module, tokenizer=tokenizer()), "two dogs ran", VOCABULARY["home"]
    loudest = int(model.activations(text, "mlp.1")[-1].argmax())
    module.requires_grad_(False)
    last.c_proj.bias.zero_()
    last.c_proj.weight[torch.arange(24) != loudest] = 0
    found = logprob_increase(model, text, token, "mlp.1")
    increase = float(found.to_polars().filter(index=loudest)["score"][0])
    with_it = float(model.logits(text)[-1].double().log_softmax(-1)[token])
    before = model.activations(text, "resid_mid.1")[-1].as_subclass(torch.Tensor)
    after = model.activations(text, "resid_post.1")[-1].as_subclass(torch.Tensor)
    norm: Any = module.transformer.ln_f
    scale = (after.var(correction=0) + norm.eps).sqrt()
    hidden = (before - before.mean()) / scale * norm.weight + norm.bias
    without = float((module.lm_head.weight @ hidden).double().log_softmax(-1)[token])
    assert increase == pytest.approx(with_it - without, abs=1e-5)
    assert abs(increase) > 0.05 and found["score"].abs().sort(descending=True)[1] < 1e-12


def test_chunks_do_not_matter() -> None:
    model = random_model(LLAMA)
    whole = logprob_increase(model, "the cat", "sat")
    assert whole.names == logprob_increase(model, "the cat", "sat", memory=1).names
    np.testing.assert_allclose(whole["score"], logprob_increase(model, "the cat", "sat", memory=1)["score"], atol=1e-7)


def test_large_changes_do_not_overflow() -> None:
    network = circuit()
    network.neuron(1, 7, "sum", "eight", 500.0)
    network.neuron(1, 9, "constant", "eight", -500.0)
    network.neuron(1, 3, "constant", "nine", 500.0)
    found = logprob_increase(network.load(), PROMPT, "8")
    scores = dict(zip(found.names, found["score"], strict=True))
    assert scores["mlp.1:7"] == pytest.approx(np.log(8), abs=1e-4)
    assert scores["mlp.1:3"] == pytest.approx(-500 + np.log(8), abs=1e-3)


def test_a_head_that_shares_keys_and_values_is_silenced_alone() -> None:
    """Llama with grouped queries: zeroing columns of the output projection by hand."""
    model = random_model(LLAMA)
    found = head_importance(model, ["the cat sat", "two dogs"], "mat")
    assert found.height == 8
    projection: Any = model.module.get_submodule("model.layers.1.self_attn.o_proj")
    given = model.inputs(["the cat sat", "two dogs"])
    with torch.no_grad():
        places = (torch.arange(2), given["attention_mask"].sum(1) - 1)
        token = VOCABULARY["mat"]
        plain = model(**given).logits[places].double().softmax(-1)[:, token].mean()
        projection.weight[:, 12:18] = 0
        without = model(**given).logits[places].double().softmax(-1)[:, token].mean()
    row = found.filter(site="attn.1", head=2)
    assert row["drop"][0] == pytest.approx(float(plain - without), abs=1e-7)


# What is refused ------------------------------------------------------------------------------------


def test_bad_input_is_said() -> None:
    model = circuit().load()
    with pytest.raises(pc.errors.DataError, match="2 tokens for 1 examples"):
        logprob_increase(model, PROMPT, ["8", "9"])
    with pytest.raises(pc.errors.DataError, match="no token of this vocabulary"):
        logprob_increase(model, PROMPT, "eleven")
    with pytest.raises(pc.errors.DataError, match="no texts"):
        logprob_increase(model, [], [])
    with pytest.raises(pc.errors.UnknownName, match="no token id"):
        logprob_increase(model, PROMPT, 8)
    with pytest.raises(pc.errors.DataError, match="takes an intervention"):
        comparative(model, PROMPT, "8", "attn.0")
    with pytest.raises(pc.errors.ModelError, match="does not write into the residual stream"):
        logprob_increase(model, PROMPT, "8", "resid_post.0")
    with pytest.raises(pc.errors.ModelError, match="has no readout"):
        logprob_increase(random_model(OPT_POST), "the cat", "sat")
    with pytest.warns(UserWarning, match=r"'8 9' is not one token: it becomes ' 8', ' 9'; the first is used"):
        assert logprob_increase(model, PROMPT, "8 9") == logprob_increase(model, PROMPT, "8")


def test_a_block_that_normalises_its_sums_has_no_stream_before_its_mlp() -> None:
    from tests.find.decoders import opt_decoder

    model = pc.load(drawn(lambda: opt_decoder(before=False))(), tokenizer=tokenizer())
    with pytest.raises(pc.errors.ModelError, match="normalises its sums"):
        logprob_increase(model, "the cat", "sat")
