"""The attribute world's decoder: neurons of each of four relations, and what silencing them does to all.

A prompt asks for one attribute of an entity. Neurons are ranked by their expertise (average precision) at telling which
attribute is asked for, on half of the entities, and silenced on the other half: cumulativity, versatility and
interference of Liu et al. (2025), with random sets of the same layers beside them. What is measured is the margin
of the answer, its logit less that of the likeliest other token: the network is so sure that its accuracy hardly moves.
"""

from __future__ import annotations

from typing import Any

import polars as pl
import torch

import patchclamp as pc
from patchclamp.attribution.targets import logits_at
from patchclamp.testbed.attribute_world import trained_attribute_world

NEURONS = 40


def margin(model: pc.Model, batch: Any) -> torch.Tensor:
    """Of each answer: its logit less that of the likeliest other token."""
    logits = logits_at(batch.run(model), batch.inputs)
    own = logits.gather(1, batch.answers[:, None])[:, 0]
    return own - logits.scatter(1, batch.answers[:, None], float("-inf")).max(1).values


def measure() -> dict[str, Any]:
    """The transfer matrix of the margin, and its growth."""
    trained = trained_attribute_world()
    world, model = trained.world, trained.model
    halves: list[list[tuple[str, str, str]]] = [[], []]
    for place, entity in enumerate(world.entities[:120]):
        for attribute, templates in world.templates.items():
            text, _ = world.prompt(entity, templates[place % len(templates)])
            halves[place % 2].append((attribute, text, world.value(entity, attribute)))
    texts = pc.Texts([text for _, text, _ in halves[0]], labels={"relation": [each for each, _, _ in halves[0]]})
    recording = pc.record(model, texts, "mlp.*", [pc.Pooled("max")], progress=False)
    ranked = pc.find.expertise(recording, "relation")
    sets = {each: ranked.top(NEURONS, by=f"score_{each}") for each in world.attributes}
    tasks = {
        each: [pc.verify.Prompt(text, f" {value}") for relation, text, value in halves[1] if relation == each]
        for each in world.attributes
    }
    found = pc.verify.transfer_matrix(model, sets, tasks, margin)
    accuracy = {task: float(pc.verify.per_example(model, "accuracy", data).mean()) for task, data in tasks.items()}
    rows = [
        {"silenced": name, **{task: float(found.change[row, column]) for column, task in enumerate(found.tasks)}}
        for row, name in enumerate(found.sets)
    ]
    random = [
        {"silenced": f"random, as {name}", **{t: float(found.random[row, c]) for c, t in enumerate(found.tasks)}}
        for row, name in enumerate(found.sets)
    ]
    largest = sum(int(found.change[row].argmin()) == row for row in range(len(found.sets)))
    return {
        "neurons_of_each": NEURONS,
        "neurons_in_all": len(model.neurons("mlp.*")),
        "accuracy_before": accuracy,
        "margin_before": dict(zip(found.tasks, found.clean.tolist(), strict=True)),
        "rows_whose_own_task_loses_most": f"{largest} of {len(found.sets)}",
        "cumulativity": found.cumulativity,
        "change_of_margin": rows,
        "change_with_random_sets": random,
        "versatility": found.versatility,
        "interference": found.interference,
        "growth": found.curve.filter(pl.col("set") == pl.col("task")),
    }
