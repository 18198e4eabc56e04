"""Heads that emerge: one head of a hand-set decoder learns a second task, and nothing else changes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from tests.find.induction import HEADS, TOKENS, WIDTH, gpt2, induction, pairs
from torch import nn

import patchclamp as pc
from patchclamp.attribution import logit_difference
from patchclamp.errors import DataError
from patchclamp.find.edge_attribution import EdgeAttribution, eap_ig, head_neurons
from patchclamp.verify.circuit_diff import circuit_diff, circuit_history

LEARNER = "attn.0.2"


def first_token_pairs(
    count: int, seed: int = 0
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[int], list[int]]:
    """The second task: to say the first token. Clean and corrupt inputs differ in it alone."""
    generator = np.random.default_rng(seed)
    clean = np.stack([generator.permutation(TOKENS) for _ in range(count)])
    corrupt = clean.copy()
    corrupt[:, 0] = clean[:, 3]
    given = [{"input_ids": torch.as_tensor(each)} for each in (clean, corrupt)]
    return given[0], given[1], clean[:, 0].tolist(), clean[:, 3].tolist()


def trained_head(base: pc.Model, steps: int = 150) -> pc.Model:
    """The base with one head, 0.2, trained on the second task; every other weight is as it was."""
    module: Any = copy.deepcopy(base.module)
    attention, size = module.transformer.h[0].attn, WIDTH // HEADS
    into, out = torch.zeros(3 * WIDTH), torch.zeros(WIDTH, 1)
    for part in range(3):
        into[part * WIDTH + 2 * size : part * WIDTH + 3 * size] = 1
    out[2 * size :] = 1
    masks = {attention.c_attn.weight: into, attention.c_attn.bias: into, attention.c_proj.weight: out}
    optimiser = torch.optim.Adam(masks, lr=0.05)
    for step in range(steps):
        clean, _, right, _ = first_token_pairs(64, seed=100 + step)
        loss = nn.functional.cross_entropy(module(**clean).logits[:, -1], torch.tensor(right))
        optimiser.zero_grad()
        loss.backward()
        for weight, mask in masks.items():
            weight.grad.mul_(mask)
        optimiser.step()
    return pc.load(module.eval())


@pytest.fixture(scope="module")
def base() -> pc.Model:
    return induction()


@pytest.fixture(scope="module")
def later(base: pc.Model) -> pc.Model:
    return trained_head(base)


def attribution(model: pc.Model, seed: int = 0) -> EdgeAttribution:
    clean, corrupt, right, wrong = first_token_pairs(40, seed)
    return eap_ig(model, clean, corrupt, logit_difference(right, wrong))


def accuracy(model: pc.Model, task: Any) -> float:
    clean, _, right, _ = task(60, 7)
    with torch.no_grad():
        return float((model.module(**clean).logits[:, -1].argmax(1) == torch.tensor(right)).double().mean())


def test_the_one_head_that_was_trained_has_emerged(base: pc.Model, later: pc.Model) -> None:
    changed = [
        name
        for (name, one), (_, other) in zip(base.module.named_parameters(), later.module.named_parameters(), strict=True)
        if not torch.equal(one, other)
    ]
    assert sorted(changed) == [
        f"transformer.h.0.attn.{each}" for each in ("c_attn.bias", "c_attn.weight", "c_proj.weight")
    ]
    assert accuracy(base, first_token_pairs) < 0.5 < 0.9 < accuracy(later, first_token_pairs)
    found = circuit_diff(attribution(base), attribution(later), 3)
    assert found.emergent == (LEARNER,) and found.reliable
    row = found.heads.filter(pl.col("head") == LEARNER)
    assert row["before"][0] == 0 and row["after"][0] == 1
    # The other way round it is lost.
    back = circuit_diff(attribution(later), attribution(base), 3)
    assert back.lost == (LEARNER,) and LEARNER not in back.emergent


def test_the_head_that_emerged_is_needed_for_the_new_task_and_not_for_the_old(later: pc.Model) -> None:
    heads = head_neurons(attribution(later).graph, [LEARNER])
    before = [accuracy(later, each) for each in (first_token_pairs, pairs)]
    with later.intervene(pc.ablate(heads)):
        after = [accuracy(later, each) for each in (first_token_pairs, pairs)]
    assert before[0] - after[0] > 0.4
    assert after[1] >= before[1]


def test_a_checkpoint_differs_from_itself_in_nothing(later: pc.Model) -> None:
    for n in (1, 3, 12):
        same = circuit_diff(attribution(later), attribution(later), n)
        assert same.emergent == same.lost == ()
    # On other examples as well, where the circuit is not up to chance.
    other = circuit_diff(attribution(later), attribution(later, seed=1), 3)
    assert other.emergent == other.lost == () and LEARNER in other.kept


def made_up(graph_of: EdgeAttribution, scores: np.ndarray) -> EdgeAttribution:
    return EdgeAttribution(scores, np.ones(len(scores)), np.zeros(len(scores)), graph_of.graph, ())


def edge(given: EdgeAttribution, sender: str, receiver: str) -> int:
    first, second = given.graph.edges
    for number in range(len(first)):
        names = given.graph.senders[first[number]], given.graph.receivers[second[number]].name
        if names == (sender, receiver):
            return number
    raise AssertionError((sender, receiver))


def test_circuits_that_are_up_to_the_examples_make_no_head_emerge(later: pc.Model) -> None:
    """Each example has a head of its own: which one is the largest in the mean is chance."""
    given = attribution(later)
    calm, wild = np.zeros((6, given.scores.shape[1])), np.zeros((6, given.scores.shape[1]))
    for number, head in enumerate(f"attn.{layer}.{each}" for layer in range(2) for each in range(HEADS)):
        for ends in (("embedding", f"{head}.value"), (head, "logits")):
            calm[:, edge(given, *ends)] = 1.0 if number == 4 else 0.0
            wild[number, edge(given, *ends)] = 1.0
    found = circuit_diff(made_up(given, calm), made_up(given, wild), 2)
    assert found.jaccard_before == 1 and found.jaccard_after < 0.5 and not found.reliable
    assert found.emergent == found.lost == () and set(found.heads["verdict"]) == {"unstable"}
    # Believed without a bound, no head of the wild circuit is steady enough all the same.
    bold = circuit_diff(made_up(given, calm), made_up(given, wild), 2, least_jaccard=0.0)
    assert bold.emergent == () and bold.reliable
    assert circuit_diff(made_up(given, calm), made_up(given, calm), 2).kept == ("attn.1.1",)


def test_other_seeds_of_a_training_are_drawn_from_as_well(base: pc.Model, later: pc.Model) -> None:
    one, other = attribution(base), attribution(later)
    mixed = circuit_diff(one, [one, other], 3, resamples=200)
    share = mixed.heads.filter(pl.col("head") == LEARNER)["after"][0]
    assert 0.35 < share < 0.65 and mixed.emergent == ()
    again = circuit_diff(one, [one, other], 3, resamples=200)
    assert mixed.heads.equals(again.heads) and mixed.jaccard_after == again.jaccard_after
    assert not mixed.heads.equals(circuit_diff(one, [one, other], 3, resamples=200, seed=1).heads)


def test_heads_come_and_go_over_checkpoints(base: pc.Model, later: pc.Model) -> None:
    one, other = attribution(base), attribution(later)
    n = 3
    history = circuit_history([one, one, other, one], n)
    sets = [set(each.heads(n)) for each in (one, other)]
    assert history["heads"].to_list() == [len(sets[0]), len(sets[0]), len(sets[1]), len(sets[0])]
    assert history["added"].to_list() == [len(sets[0]), 0, len(sets[1] - sets[0]), len(sets[0] - sets[1])]
    assert history["pruned"].to_list() == [0, 0, len(sets[0] - sets[1]), len(sets[1] - sets[0])]
    assert history["cumulative"][-1] == len(sets[0] | sets[1]) > len(sets[0])
    assert history["jaccard"].to_list()[:2] == [None, 1.0]


def test_bad_input_is_said(later: pc.Model) -> None:
    given = attribution(later)
    clean, corrupt, right, wrong = first_token_pairs(4)
    wider = eap_ig(pc.load(gpt2(n_layer=1)), clean, corrupt, logit_difference(right, wrong))
    with pytest.raises(DataError, match="not have the same layers and heads"):
        circuit_diff(given, wider, 3)
    with pytest.raises(DataError, match="there are no attributions"):
        circuit_diff([], given, 3)
    with pytest.raises(DataError, match="compared by attributions of their edges"):
        circuit_diff(later, given, 3)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"stable lies in \(0.5, 1\]"):
        circuit_diff(given, given, 3, stable=0.5)
    with pytest.raises(DataError, match="1 edge or more"):
        circuit_diff(given, given, 0)
