"""Edges between heads and MLPs: exact in a linear network and near one, a planted induction head, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from tests.find.induction import PLANTED, TOKENS, gpt2, induction, pairs, without_norms

import patchclamp as pc
from patchclamp.attribution import logit, logit_difference
from patchclamp.errors import DataError, ModelError
from patchclamp.find.edge_attribution import EdgeAttribution, eap_ig, head_neurons


def llama(seed: int = 0, **options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": TOKENS, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "initializer_range": 0.4, **options})).eval()


def effects(found: EdgeAttribution) -> np.ndarray:
    """What the metric changes if one edge alone carries what it does on the corrupt inputs, `[examples, edges]`."""
    edges = np.arange(found.scores.shape[1])
    return np.stack([found.values(np.delete(edges, each)) - found.clean for each in edges], 1)


# Exact ----------------------------------------------------------------------------------------------


@torch.no_grad()
def linear_network() -> Any:
    """No norms, attention that looks at all tokens alike, MLPs without a nonlinearity."""
    module = without_norms(gpt2(activation_function="linear", initializer_range=0.3)).double()
    for block in module.transformer.h:
        block.attn.c_attn.weight[:, :72] = 0
        block.attn.c_attn.bias[:72] = 0
    return module


def test_in_a_linear_network_every_score_is_the_exact_effect_of_patching_the_edge() -> None:
    module = linear_network()
    clean, corrupt, right, wrong = pairs(3)
    target = logit_difference(right, wrong)
    one, five = (eap_ig(pc.load(module), clean, corrupt, target, steps=each) for each in (1, 5))
    exact = effects(five)
    np.testing.assert_allclose(five.scores, exact, atol=1e-5 * np.abs(exact).max())
    np.testing.assert_allclose(one.scores, five.scores, atol=1e-5 * np.abs(exact).max())
    # The direct edge, by hand: the difference of the embeddings, read by the unembedding.
    embedding = module.transformer.wte.weight.detach()
    difference = embedding[corrupt["input_ids"][:, -1]] - embedding[clean["input_ids"][:, -1]]
    direction = module.lm_head.weight.detach()[right] - module.lm_head.weight.detach()[wrong]
    direct = five.edges.filter((pl.col("sender") == "embedding") & (pl.col("receiver") == "logits"))["score"][0]
    assert direct == pytest.approx(float((difference * direction).sum(1).mean()), rel=1e-9)
    assert abs(direct) > 0.01
    # What enters queries and keys does nothing where they are 0.
    assert five.edges.filter(pl.col("receiver").str.contains("query|key"))["score"].abs().max() == 0


# The norms of a Llama compute in float32 whatever they are given: its inputs may not lie as close.
@pytest.mark.parametrize(("make", "apart", "tolerance"), [(gpt2, 1e-5, 1e-3), (llama, 1e-3, 1e-2)])
def test_close_to_the_clean_input_every_score_is_the_effect_of_patching_the_edge(
    make: Any, apart: float, tolerance: float
) -> None:
    """Embeddings of the two inputs differ by little: the first order is all. With norms, rotations, shared keys."""
    module = make(initializer_range=0.4).double()
    embedding = module.get_input_embeddings().weight
    with torch.no_grad():
        embedding[4:] = embedding[:4] + apart * torch.randn_like(embedding[:4])
    clean = torch.randint(0, 4, (2, 6), generator=torch.Generator().manual_seed(1))
    found = eap_ig(pc.load(module), {"input_ids": clean}, {"input_ids": clean + 4}, logit_difference(1, 2), steps=1)
    exact = effects(found)
    np.testing.assert_allclose(found.scores, exact, atol=tolerance * np.abs(exact).max())
    assert (np.abs(exact).max(0) > 0).mean() > 0.9
    names = [each.name for each in found.graph.receivers[:4]]
    shared = ["attn.0.0.query", "attn.0.1.query", "attn.0.2.query"]
    assert names == ([*shared, "attn.0.0.key"] if make is gpt2 else [*shared, "attn.0.3.query"])
    if make is llama:
        assert "attn.1.2-3.key" in [each.name for each in found.graph.receivers]


@pytest.mark.parametrize("make", [gpt2, llama])
def test_all_edges_give_the_clean_run_and_none_the_corrupt_one(make: Any) -> None:
    clean, corrupt, right, wrong = pairs(4)
    found = eap_ig(pc.load(make(initializer_range=0.4)), clean, corrupt, logit_difference(right, wrong))
    every = np.arange(found.scores.shape[1])
    np.testing.assert_allclose(found.values(every), found.clean, atol=1e-4)
    np.testing.assert_allclose(found.values(every[:0]), found.corrupt, atol=1e-4)
    assert found.faithfulness(len(every)) == pytest.approx(1, abs=1e-3)


# Planted --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("greedy", [False, True])
def test_the_edges_of_a_planted_induction_head_come_first_and_are_enough(greedy: bool) -> None:
    clean, corrupt, right, wrong = pairs(20)
    found = eap_ig(induction(), clean, corrupt, logit_difference(right, wrong))
    circuit = found.top(len(PLANTED), greedy=greedy)
    assert set(zip(circuit.edges["sender"], circuit.edges["receiver"], strict=True)) == PLANTED
    assert found.edges["score"].abs()[4] > 50 * found.edges["score"].abs()[5]
    assert found.faithfulness(circuit) > 0.99
    assert circuit.heads == found.heads(5, greedy=greedy) == ("attn.0.0", "attn.1.1")
    for left_out in range(5):
        assert found.faithfulness(replaced(circuit, np.delete(circuit.numbers, left_out))) < 0.7


def replaced(circuit: Any, numbers: np.ndarray) -> Any:
    return type(circuit)(circuit.edges, numbers, circuit.graph)


def test_edges_that_lead_nowhere_are_pruned() -> None:
    clean, corrupt, right, wrong = pairs(20)
    found = eap_ig(induction(), clean, corrupt, logit_difference(right, wrong))
    sender, receiver = found.graph.edges
    scores = np.zeros_like(found.scores)
    assert len(EdgeAttribution(scores, *_rest(found)).top(len(sender))) == 0
    # The edge into the logits alone has no way from the embedding; with the value edge it has.
    last = [each for each in range(len(sender)) if found.graph.receivers[receiver[each]].name == "logits"]
    head = next(each for each in last if found.graph.senders[sender[each]] == "attn.1.1")
    scores[:, head] = 3.0
    assert len(EdgeAttribution(scores, *_rest(found)).top(1)) == 0
    value = next(each for each in range(len(sender)) if found.graph.receivers[receiver[each]].name == "attn.1.1.value")
    scores[:, value] = 2.0
    both = EdgeAttribution(scores, *_rest(found)).top(2)
    assert both.edges["receiver"].to_list() == ["logits", "attn.1.1.value"] and both.heads == ("attn.1.1",)
    other = next(each for each in last if found.graph.senders[sender[each]] == "attn.1.0")
    scores[:, other] = 1.0
    assert len(EdgeAttribution(scores, *_rest(found)).top(3)) == 2
    unread = next(
        number for number, each in enumerate(receiver) if found.graph.receivers[each].name == "attn.0.0.value"
    )
    scores[:, other], scores[:, unread] = 0.0, 1.0
    assert len(EdgeAttribution(scores, *_rest(found)).top(3)) == 2
    scores[:, [head, unread]] = 0.0
    assert len(EdgeAttribution(scores, *_rest(found)).top(2)) == 0


def _rest(found: EdgeAttribution) -> tuple:
    return found.clean, found.corrupt, found.graph, found._runs


def test_ablating_the_heads_of_the_circuit_takes_the_answer_away() -> None:
    model = induction()
    clean, corrupt, right, wrong = pairs(20)
    circuit = eap_ig(model, clean, corrupt, logit_difference(right, wrong)).top(5)
    assert circuit.neurons().sites == ["attn.0", "attn.1"] and len(circuit.neurons()) == 24
    assert head_neurons(circuit.graph, ["attn.1.2"]).indices("attn.1").tolist() == list(range(24, 36))

    def right_ones() -> float:
        with torch.no_grad():
            return float((model.module(**clean).logits[:, -1].argmax(1) == torch.tensor(right)).double().mean())

    assert right_ones() == 1
    with model.intervene(pc.ablate(circuit.neurons())):
        assert right_ones() < 0.5
    with model.intervene(pc.ablate(head_neurons(circuit.graph, ["attn.0.1", "attn.1.2"]))):
        assert right_ones() == 1


def test_the_divergence_from_the_clean_prediction_finds_the_same_circuit() -> None:
    clean, corrupt, _, _ = pairs(20)
    found = eap_ig(induction(), clean, corrupt, "kl")
    assert found.clean.max() < 1e-6 < 0.1 < found.corrupt.mean()
    edges = found.top(5).edges
    assert set(zip(edges["sender"], edges["receiver"], strict=True)) == PLANTED
    assert found.faithfulness(5) > 0.98


def test_batches_are_joined_and_the_module_is_left_as_it_was() -> None:
    model = induction()
    model.module.train()
    model.module.lm_head.weight.requires_grad_(False)  # type: ignore[union-attr]
    clean, corrupt, right, wrong = pairs(6)
    whole = eap_ig(model, clean, corrupt, logit_difference(right, wrong))
    parts = []
    for rows in (slice(0, 4), slice(4, 6)):
        one, other = ({"input_ids": each["input_ids"][rows]} for each in (clean, corrupt))
        parts.append(eap_ig(model, one, other, logit_difference(right[rows], wrong[rows])))
    joined = EdgeAttribution.joined(parts)
    np.testing.assert_allclose(joined.scores, whole.scores, atol=1e-6)
    assert joined.faithfulness(5) == pytest.approx(whole.faithfulness(5), abs=1e-6)
    assert model.module.training
    wanted = {name: each.requires_grad for name, each in model.module.named_parameters()}
    assert not wanted.pop("lm_head.weight") and all(wanted.values())
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.module.modules())
    with pytest.raises(DataError, match="of one and the same model"):
        EdgeAttribution.joined([])


def test_padding_does_not_count() -> None:
    model = pc.load(llama())
    clean, corrupt, _, _ = pairs(3)
    plain = eap_ig(model, clean, corrupt, logit(1))
    for side in (0, 1):
        given = []
        for each in (clean, corrupt):
            padding = torch.full((3, 2), int(each["input_ids"][0, 0]))
            parts = [padding, each["input_ids"]]
            masks = [torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 8, dtype=torch.long)]
            order = slice(None, None, -1 if side else 1)
            given.append({"input_ids": torch.cat(parts[order], 1), "attention_mask": torch.cat(masks[order], 1)})
        padded = eap_ig(model, given[0], given[1], logit(1))
        np.testing.assert_allclose(padded.scores, plain.scores, atol=1e-4 * np.abs(plain.scores).max())


# Bad input ------------------------------------------------------------------------------------------


def test_pairs_that_are_none_are_said() -> None:
    model = pc.load(gpt2())
    clean, corrupt, _, _ = pairs(3)
    ids, other = clean["input_ids"], corrupt["input_ids"]
    with pytest.raises(DataError, match="the two of pair 1 are the same"):
        eap_ig(model, clean, {"input_ids": torch.stack([other[0], ids[1], other[2]])}, logit(1))
    with pytest.raises(DataError, match="pair 0 has 8 and 7 tokens"):
        eap_ig(model, clean, {"input_ids": other[:, :7]}, logit(1))
    with pytest.raises(DataError, match="3 clean and 2 corrupt inputs are no pairs"):
        eap_ig(model, clean, {"input_ids": other[:2]}, logit(1))
    with pytest.raises(DataError, match="1 step or more, not 0"):
        eap_ig(model, clean, corrupt, logit(1), steps=0)
    with pytest.raises(DataError, match="or \"kl\", not 'loss'"):
        eap_ig(model, clean, corrupt, "loss")
    with pytest.raises(DataError, match="1 edge or more, not 0"):
        eap_ig(model, clean, corrupt, logit(1)).top(0)
    with pytest.raises(DataError, match="the metric is the same"):
        eap_ig(model, clean, corrupt, lambda output, _: 0 * output.logits[:, -1, 0]).faithfulness(3)


def test_networks_whose_edges_are_not_separable_are_refused() -> None:
    from transformers import (
        BertConfig,
        BertLMHeadModel,
        Gemma2Config,
        Gemma2ForCausalLM,
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
    )

    sizes: dict[str, Any] = {"vocab_size": TOKENS, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2}
    bert = BertLMHeadModel(BertConfig(**sizes, is_decoder=True))
    gemma = Gemma2ForCausalLM(Gemma2Config(**sizes, num_key_value_heads=2, head_dim=8))
    neox = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes))
    clean, corrupt, _, _ = pairs(2)
    for module, match in ((bert, "no block of the GPT-2 or Llama kind"), (neox, "no block of"), (gemma, "feedforward")):
        with pytest.raises(ModelError, match=match):
            eap_ig(pc.load(module.eval()), clean, corrupt, logit(1))


def test_what_is_scaled_on_its_way_into_the_residual_stream_is_refused() -> None:
    from transformers import GraniteConfig, GraniteForCausalLM

    sizes: dict[str, Any] = {"vocab_size": TOKENS, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2}
    module = GraniteForCausalLM(GraniteConfig(**sizes, num_attention_heads=2, residual_multiplier=0.5))
    clean, corrupt, _, _ = pairs(2)
    with pytest.raises(ModelError, match="does not add up to what"):
        eap_ig(pc.load(module.eval()), clean, corrupt, logit(1))
