"""Heads that emerge when a small decoder that copies learns to add: what ablating them costs either task.

A GPT-2 with three layers of four heads first learns to copy five digits, then to add two digits as well,
with copying kept up. The circuit of addition is found before and after; heads that are in nearly all circuits of the
later model and in nearly none of the earlier one's are ablated. For comparison each other head is ablated alone.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import patchclamp as pc
from patchclamp.attribution import logit_difference
from patchclamp.find.edge_attribution import EdgeAttribution, eap_ig, head_neurons
from patchclamp.verify.circuit_diff import circuit_diff

DIGITS, COPY, AGAIN, ADD, EQUALS = 10, 19, 20, 21, 22  # tokens 0 to 18 are numbers
LENGTH, EDGES, SEEDS = 5, (20, 30, 40), (0, 1, 2, 3)
Batch = tuple[torch.Tensor, torch.Tensor]


def measure() -> dict[str, Any]:
    """Train and look, once for each seed, at circuits of several sizes.

    Returns:
        For each seed and number of edges the faithfulness of the later circuit, the emergent heads and what accuracy
        is lost without them, and without as many other heads; `summary`: for each number of edges in how many seeds
        heads emerge, and in how many of these they cost the new task more than the old, and more than others do.
    """
    started = time.process_time()
    runs = [each for seed in SEEDS for each in _run(seed)]
    summary = []
    for edges in EDGES:
        found = [each for each in runs if each["edges"] == edges and each["emergent"]]
        costs = [(each["cost_of_emergent"], each["cost_of_others"]) for each in found]
        summary.append(
            {
                "edges": edges,
                "seeds": len(SEEDS),
                "with_emergent_heads": len(found),
                "new_task_loses_more_than_old": sum(one["add"] > one["copy"] for one, _ in costs),
                "new_task_loses_more_than_with_others": sum(one["add"] > other["add"] for one, other in costs),
            }
        )
    return {"summary": summary, "runs": runs, "seconds": round(time.process_time() - started, 1)}


def _run(seed: int) -> list[dict[str, Any]]:
    module = _network(seed)
    generator = torch.Generator().manual_seed(seed)
    _train(module, {_copying: 64}, 300, generator)
    base = pc.load(copy.deepcopy(module).eval())
    _train(module, {_adding: 96, _copying: 32}, 600, generator)
    later = pc.load(module.eval())
    before, after = _attribution(base), _attribution(later)
    facts = {"seed": seed, "accuracy_before": _accuracies(base), "accuracy_after": _accuracies(later)}
    return [facts | _compared(later, before, after, edges, seed) for edges in EDGES]


def _compared(
    later: pc.Model, before: EdgeAttribution, after: EdgeAttribution, edges: int, seed: int
) -> dict[str, Any]:
    diff = circuit_diff(before, after, edges, seed=seed)
    others = [each for each in after.graph.senders if each.startswith("attn.") and each not in diff.emergent]
    # What other heads cost, in the mean over them, times how many emerged.
    singly = [_cost(later, after, [each]) for each in others]
    return {
        "edges": edges,
        "faithfulness_after": round(after.faithfulness(edges), 3),
        "jaccard_before": round(diff.jaccard_before, 3),
        "jaccard_after": round(diff.jaccard_after, 3),
        "emergent": list(diff.emergent),
        "kept": list(diff.kept),
        "lost": list(diff.lost),
        "cost_of_emergent": _cost(later, after, list(diff.emergent)),
        "cost_of_others": {
            task: round(len(diff.emergent) * float(np.mean([each[task] for each in singly])), 3)
            for task in ("copy", "add")
        },
    }


def _network(seed: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=23,
        n_positions=2 * LENGTH + 2,
        n_embd=64,
        n_layer=3,
        n_head=4,
        n_inner=128,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=COPY,
        eos_token_id=COPY,
        tie_word_embeddings=False,
    )
    return GPT2LMHeadModel(config)


def _copying(count: int, generator: torch.Generator) -> Batch:
    """Digits, and the same again; what is to be said at the tokens that are asked, elsewhere -100."""
    digits = torch.randint(DIGITS, (count, LENGTH), generator=generator)
    ids = torch.cat([torch.full((count, 1), COPY), digits, torch.full((count, 1), AGAIN), digits[:, :-1]], 1)
    wanted = torch.full_like(ids, -100)
    wanted[:, -LENGTH:] = digits
    return ids, wanted


def _adding(count: int, generator: torch.Generator) -> Batch:
    """Two digits, and their sum."""
    pair = torch.randint(DIGITS, (count, 2), generator=generator)
    ids = torch.cat([torch.full((count, 1), ADD), pair, torch.full((count, 1), EQUALS)], 1)
    wanted = torch.full_like(ids, -100)
    wanted[:, -1] = pair.sum(1)
    return ids, wanted


def _train(module: Any, tasks: dict[Callable[..., Batch], int], steps: int, generator: torch.Generator) -> None:
    module.train()
    optimiser = torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, steps, pct_start=0.1)
    for _ in range(steps):
        loss = torch.zeros(())
        for task, count in tasks.items():
            ids, wanted = task(count, generator)
            loss = loss + nn.functional.cross_entropy(module(input_ids=ids).logits.flatten(0, 1), wanted.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


@torch.no_grad()
def _accuracies(model: pc.Model) -> dict[str, float]:
    found = {}
    for name, task in (("copy", _copying), ("add", _adding)):
        ids, wanted = task(500, torch.Generator().manual_seed(1000))
        right = model.module(input_ids=ids).logits.argmax(-1) == wanted
        found[name] = round(float(right[wanted != -100].double().mean()), 3)
    return found


def _attribution(model: pc.Model) -> EdgeAttribution:
    """Edges of addition: the sum of the clean digits against that of the corrupt ones."""
    generator = torch.Generator().manual_seed(2000)
    (clean, right), (corrupt, wrong) = _adding(150, generator), _adding(150, generator)
    kept = right[:, -1] != wrong[:, -1]
    target = logit_difference(right[kept, -1].tolist(), wrong[kept, -1].tolist())
    return eap_ig(model, {"input_ids": clean[kept]}, {"input_ids": corrupt[kept]}, target)


def _cost(model: pc.Model, found: EdgeAttribution, heads: list[str]) -> dict[str, float]:
    """What accuracy is lost on each task without these heads."""
    before = _accuracies(model)
    if not heads:
        return dict.fromkeys(before, 0.0)
    with model.intervene(pc.ablate(head_neurons(found.graph, heads))):
        after = _accuracies(model)
    return {task: round(before[task] - after[task], 3) for task in before}


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
