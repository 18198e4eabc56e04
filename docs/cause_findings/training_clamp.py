"""S044 on the in-context stand-in: what the phase change waits for, and how heads share the work."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from patchclamp.find.induction import induction_strength, previous_token_strength
from patchclamp.testbed.in_context import (
    LABELS,
    InContextNetwork,
    InContextTask,
    induction_pattern,
    pattern_site,
    previous_token_pattern,
)
from patchclamp.testbed.tensor_problem import TensorProblem
from patchclamp.train import Clamp, clamped

TASK = InContextTask()
SEEDS = (0, 1, 2)
RATE, BATCH, MOST, EVERY, AFTER = 3e-4, 32, 3_000, 20, 400


def measure() -> dict[str, Any]:
    """Steps to the phase change, free and held, then what the heads of the free networks do."""
    free = [learned(seed, "free", after=AFTER) for seed in SEEDS]
    found: dict[str, Any] = {"seeds": len(SEEDS), "steps": {"free": [steps for _, steps in free]}}
    for what in ("previous token", "previous token and match", "one induction head"):
        found["steps"][what] = [learned(seed, what)[1] for seed in SEEDS]
    plain = np.asarray(found["steps"]["free"])
    found["fewer with previous token"] = (1 - np.asarray(found["steps"]["previous token"]) / plain).tolist()
    found["more with one induction head"] = (np.asarray(found["steps"]["one induction head"]) / plain - 1).tolist()
    found["heads"] = [heads(network) for network, _ in free]
    found["tensor problem, steps to half"] = {", ".join(each) or "free": half_time(each) for each in TENSOR}
    return found


def learned(seed: int, what: str, after: int = 0) -> tuple[InContextNetwork, int]:
    """A network, and the first step at which three quarters of held-out sequences are right: half is without match."""
    torch.manual_seed(seed)
    network = InContextNetwork(TASK)
    made = torch.Generator().manual_seed(seed)
    held_out = TASK.batch(500, torch.Generator().manual_seed(1_000))
    optimiser = torch.optim.Adam(network.parameters(), lr=RATE)
    now = TASK.batch(BATCH, made)
    previous = Clamp(pattern_site(network, 0), previous_token_pattern(), neurons=[0])
    match = Clamp(pattern_site(network, 1), lambda _: induction_pattern(now)[:, None], neurons=[0])
    alone = Clamp(pattern_site(network, 1), 0.0, neurons=range(1, 8))
    held = {"free": [], "previous token": [previous], "previous token and match": [previous, match]}
    clamps = {**held, "one induction head": [alone]}[what]
    reached, end = MOST, MOST
    with clamped(network, *clamps) if clamps else nullcontext():
        for step in range(MOST):
            if step % EVERY == 0 and reached == MOST:
                batch, now = now, held_out
                with torch.no_grad():
                    right = network(now.inputs).argmax(1) == now.target
                now = batch
                if right.float().mean() > 0.75:
                    reached, end = step, step + after
            if step >= end:
                break
            now = TASK.batch(BATCH, made)
            optimiser.zero_grad()
            nn.functional.cross_entropy(network(now.inputs), now.target).backward()
            optimiser.step()
    return network, reached


@torch.no_grad()
def heads(network: InContextNetwork) -> dict[str, Any]:
    """Strengths of all heads, and what the output loses without each of the second layer."""
    batch = TASK.batch(1_000, torch.Generator().manual_seed(2_000))
    second = pattern_site(network, 1)
    strength = induction_strength(network, batch.inputs, batch.right, batch.wrong, sites=second)
    before = previous_token_strength(network, batch.inputs, LABELS, sites=pattern_site(network, 0))
    by_head = [float(each) for each in strength.to_polars().sort("index")["score"]]

    def shown(*off: int) -> tuple[float, float]:
        """Accuracy, and the mean logit of the right label over that of the other one shown."""
        with clamped(network, Clamp(second, 0.0, neurons=off)) if off else nullcontext():
            logits = network(batch.inputs)
        rows = torch.arange(len(logits))
        other = batch.inputs[rows, batch.wrong, TASK.features :].argmax(1)
        right = (logits.argmax(1) == batch.target).float().mean()
        return float(right), float((logits[rows, batch.target] - logits[rows, other]).mean())

    everyone = range(len(by_head))
    whole, nothing = shown(), shown(*everyone)
    losses = [whole[1] - shown(each)[1] for each in everyone]
    return {
        "induction strength": by_head,
        "previous-token strength": sorted((float(each) for each in before["score"]), reverse=True),
        "induction heads (strength above 0.1)": int(sum(each > 0.1 for each in by_head)),
        "accuracy": whole[0],
        "margin": whole[1],
        "sum of the losses of single heads, of the loss of all": sum(losses) / (whole[1] - nothing[1]),
        "accuracy with the best head alone": max(
            shown(*(each for each in everyone if each != kept))[0] for kept in everyone
        ),
        "correlation of strength and loss": float(np.corrcoef(by_head, losses)[0, 1]),
    }


TENSOR = ((), ("c",), ("b", "c"))


def half_time(held: tuple[str, ...]) -> int:
    """Steps until half of the loss is gone, with these parts at their targets."""
    problem = TensorProblem()
    optimiser = torch.optim.SGD(problem.parameters(), lr=4.0)
    with clamped(problem, *(Clamp(problem.site(part), problem.targets[part]) for part in held)):
        first = float(problem().detach())
        for step in range(2_000):
            optimiser.zero_grad()
            loss = problem()
            if float(loss.detach()) < first / 2:
                return step
            loss.backward()
            optimiser.step()
    return 2_000
