"""S033 on the decoder of four languages: the class is the language that a text goes on in."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import patchclamp as pc
from patchclamp.find.direction_contribution import class_directions, direction_contribution, head_contribution
from patchclamp.intervene.steer import steer
from patchclamp.steer import Circuit, modulate, sublayer_importance
from patchclamp.testbed import languages
from patchclamp.testbed.trained import trained

GROUPS, PROMPTS, TOKENS = 60, 48, 8
NEURONS, HEADS = 16, 1
STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
RANDOM = 4


def measure() -> dict[str, Any]:
    """How often a neutral beginning goes on in the language that is asked for; nats per word of what is written."""
    net = trained("four_languages")
    model = net.model
    texts, classes, groups = told(model)
    directions = class_directions(model, texts, classes, groups)
    differences = class_directions(model, texts, classes, groups, ["mlp.*", "attn.*"])
    importance = sublayer_importance(model, neutral(40, 5), directions)
    neurons = direction_contribution(model, texts, classes, directions)
    heads = head_contribution(model, texts, classes, directions)
    circuit = Circuit.build(
        importance, differences, neurons=neurons, neuron_count=NEURONS, heads=heads, head_count=HEADS
    )
    everyone = model.neurons(["mlp.*", "attn.*"])
    prompts = neutral(PROMPTS, 6)
    plain = {name: outcome(model, prompts, name) for name in languages.NAMES}
    found: dict[str, Any] = {
        "units, share of all": {name: len(each) / len(everyone) for name, each in circuit.units.items()},
        "importance": {name: importance.of(name) for name in importance.names},
        "settled": importance.settled,
        "same sign of importance at all strengths": float(
            np.mean([(np.sign(each) == np.sign(each[:1])).all(0).mean() for each in importance.by_strength.values()])
        ),
        "plain": mean(plain),
        "circuit": {
            each: mean({name: outcome(model, prompts, name, modulate(circuit, {name: each})) for name in plain})
            for each in STRENGTHS
        },
    }
    end = importance.settled[-1]
    found["one residual vector"] = {
        each: mean({name: outcome(model, prompts, name, steer(directions.at(end).only(name), each)) for name in plain})
        for each in STRENGTHS
    }
    found["random units"] = {
        each: mean(
            {
                (name, seed): outcome(
                    model, prompts, name, modulate(drawn(circuit, everyone, name, seed), {name: each})
                )
                for name in plain
                for seed in range(RANDOM)
            }
        )
        for each in STRENGTHS[-2:]
    }
    return found


def told(model: pc.Model) -> tuple[list[str], list[str], list[int]]:
    """Sentences of all languages with the same ending; a group is an ending."""
    texts: list[str] = []
    classes: list[str] = []
    groups: list[int] = []
    sentences: dict[str, list[str]] = {name: [] for name in languages.NAMES}
    for each in languages.documents(8 * GROUPS, seed=41):
        if "." in each.text:
            sentences[each.labels["language"]].append(each.text.partition(".")[0] + ".")
    endings = neutral(GROUPS, 4)
    for group in range(GROUPS):
        for name in languages.NAMES:
            texts.append(f"{sentences[name][group]} {endings[group]}")
            classes.append(name)
            groups.append(group)
    return texts, classes, groups


def neutral(count: int, seed: int) -> list[str]:
    """Beginnings of words that all languages share."""
    made = np.random.default_rng(seed)
    return [
        " ".join([*made.choice(languages.NUMBERS, int(made.integers(1, 4))), str(made.choice(languages.PUNCTUATION))])
        for _ in range(count)
    ]


@torch.no_grad()
def outcome(model: pc.Model, prompts: list[str], name: str, *interventions: Any) -> dict[str, float]:
    """Share of prompts most of whose words with one owner are of the language; nats per word to the plain model."""
    module: Any = model.module
    tokenizer = model.tokenizer
    with model.intervene(*interventions):
        ids = []
        for prompt in prompts:
            given = model.inputs(prompt)["input_ids"]
            out = module.generate(
                given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
            ids.append(out[0, given.shape[1] :])
    said, texts = [], []
    for each in ids:
        words = tokenizer.decode(each, skip_special_tokens=True).split()
        owned = [owner[0] for word in words if len(owner := languages.owners(word)) == 1]
        said.append(bool(owned) and 2 * sum(each == name for each in owned) > len(owned))
        texts.append(" ".join(words))
    given = model.inputs([each for each in texts if each])
    logits = module(**given).logits[:, :-1]
    wanted = given["input_ids"][:, 1:].masked_fill(given["attention_mask"][:, 1:] == 0, -100)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
    return {"in the language": float(np.mean(said)), "nats per word": float(loss)}


def mean(results: dict[Any, dict[str, float]]) -> dict[str, float]:
    """Over languages; and the worst of them."""
    listed = list(results.values())
    found = {key: float(np.mean([each[key] for each in listed])) for key in listed[0]}
    return found | {"worst language": min(each["in the language"] for each in listed)}


def drawn(circuit: Circuit, everyone: pc.Neurons, name: str, seed: int) -> Circuit:
    """As many other units at the same sites, moved by their own differences."""
    return Circuit({name: everyone.sample(like=circuit.units[name], seed=seed)}, circuit.differences)
