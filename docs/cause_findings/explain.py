"""`pc.explain` on trained decoders: do the parts add up, and does the logit fall without the neurons that it names?"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import torch

import patchclamp as pc
from patchclamp.find.explain import explain
from patchclamp.testbed.trained import trained

NEURONS, RANDOM_SETS = 10, 10
PROMPTS = {
    "python_docs": (
        "Return the number of",
        "If the file does not exist, raise a",
        "Raises a ValueError if the",
        "This module provides a",
        "The default value is",
        "def __init__(self,",
    ),
    "stories260K": (
        "Once upon a time, there was a little",
        "She loved to play outside in the",
        "The dog was very",
        "One day, a little girl named",
        "They were happy and",
        'Her mom said, "You should not',
    ),
}


def measure() -> dict[str, object]:
    """Of each decoder that is there: completeness, falls of the logit, passes of time."""
    found: dict[str, object] = {"python_docs": of_model(trained("python_docs").model, PROMPTS["python_docs"])}
    data = os.environ.get("PATCHCLAMP_DATA")
    if data and (Path(data) / "stories260K").is_dir():
        found["stories260K"] = of_model(pc.load(Path(data) / "stories260K"), PROMPTS["stories260K"])
    return found


def of_model(model: pc.Model, prompts: tuple[str, ...]) -> dict[str, float]:
    """Means over prompts; `times_a_forward_pass` is the median of the whole call over that of a plain pass."""
    errors, falls, by_gradient, chance, ratios = [], [], [], [], []
    everyone = model.neurons("mlp.*")
    for prompt in prompts:
        found = explain(model, prompt)
        assert found.completeness is not None
        errors.append(abs(found.completeness.error) + abs(found.completeness.rest))
        token = int(model.logits(prompt)[-1].argmax())
        falls.append(fall(model, prompt, token, found.neurons.top(NEURONS)))
        by_gradient.append(fall(model, prompt, token, found.neurons.top(NEURONS, by="gradient")))
        chance += [
            fall(model, prompt, token, everyone.sample(like=found.neurons.top(NEURONS), seed=seed))
            for seed in range(RANDOM_SETS)
        ]
        ratios.append(seconds(lambda prompt=prompt: explain(model, prompt)) / seconds(lambda p=prompt: model.logits(p)))
    return {
        "prompts": len(prompts),
        "neurons": NEURONS,
        "largest_error": max(errors),
        "fall_direct": float(np.mean(falls)),
        "fall_gradient": float(np.mean(by_gradient)),
        "fall_random": float(np.mean(chance)),
        "fall_random_largest": max(chance),
        "times_a_forward_pass": float(np.median(ratios)),
    }


def fall(model: pc.Model, prompt: str, token: int, neurons: pc.Neurons) -> float:
    """How much the logit of a token falls when neurons are silent."""
    before = float(model.logits(prompt)[-1, token])
    with model.intervene(pc.ablate(neurons)):
        return before - float(model.logits(prompt)[-1, token])


def seconds(call: object) -> float:
    """The shortest of five."""
    times = []
    for _ in range(5):
        start = time.process_time()
        call()  # type: ignore[operator]
        times.append(time.process_time() - start)
    return min(times)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(measure())
