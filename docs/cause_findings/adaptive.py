"""S156 on the decoder of four languages: from any of two languages to its relative, which want different shifts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import patchclamp as pc
from patchclamp.directions import Directions
from patchclamp.intervene.steer import steer
from patchclamp.steer import AdaptiveSteering
from patchclamp.steer.pooling import prepared, read_pooled
from patchclamp.testbed import languages
from patchclamp.testbed.trained import trained

# Prompts of these are to be continued in their relatives.
FROM = ("ardi", "coth")
PROMPTS, TRIED, TOKENS = 120, 80, 10
STRENGTHS = (0.5, 1.0, 1.5, 2.0, 3.0)
MOST = 0.5  # nats per word above the plain continuations


def measure() -> dict[str, Any]:
    """Share of words written in the relative, and surprise at what is written, by strength; adaptive and one vector."""
    net = trained("four_languages")
    model = net.model
    without, with_ = pairs(PROMPTS, 31)
    prompts, _ = pairs(TRIED, 32)
    texts = [text for _, text in with_], [text for _, text in without]
    shared = read_difference(model, with_, without)
    everywhere = AdaptiveSteering.fit(model, *texts)
    plain = outcome(model, prompts)
    found: dict[str, Any] = {
        "clusters": everywhere.directions.count,
        "silhouettes": dict(everywhere.silhouettes),
        "probe accuracy": dict(everywhere.accuracy),
        "share of each language in the first cluster": {
            each: float((everywhere.labels[[name == each for name, _ in without]] == 0).mean()) for each in FROM
        },
        "length of the one vector, of that of the clusters": {
            site: float(np.linalg.norm(shared[site][0]) / np.linalg.norm(everywhere.directions[site], axis=1).mean())
            for site in shared
        },
        "plain": plain,
        "at": {},
    }
    for where in (*([site] for site in shared), list(shared)):
        fitted = AdaptiveSteering.fit(model, *texts, where)
        found["at"][", ".join(where)] = {
            "adaptive": {each: outcome(model, prompts, fitted.strength(each)) for each in STRENGTHS},
            "one vector": {each: outcome(model, prompts, steer(shared.at(*where), each)) for each in STRENGTHS},
        }
    for what in ("adaptive", "one vector"):
        allowed = [
            {"at": where, "strength": strength, **each}
            for where, results in found["at"].items()
            for strength, each in results[what].items()
            if each["nats per word"] < plain["nats per word"] + MOST
        ]
        found[f"best {what} below the limit"] = max(allowed, key=lambda each: each["relative"], default=None)
    return found


def pairs(count: int, seed: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Language and first sentence of a document, and one of its relative; by turns of both languages.

    All end with a full stop, so that the last token says nothing but for what it has read.
    """
    documents = languages.documents(8 * count, seed=seed)
    texts: dict[str, list[str]] = {name: [] for name in languages.NAMES}
    for each in documents:
        if "." in each.text:
            texts[each.labels["language"]].append(each.text.partition(".")[0] + ".")
    without, with_ = [], []
    for place in range(count):
        name = FROM[place % 2]
        relative = languages.RELATIVES[name]
        without.append((name, texts[name][place]))
        with_.append((relative, texts[relative][place]))
    return without, with_


def read_difference(model: pc.Model, with_: list[tuple[str, str]], without: list[tuple[str, str]]) -> Directions:
    """The mean difference of all prompts, at the last token."""
    sites = model.select("resid_post.*")
    means = [
        {
            name: each.mean(0)
            for name, each in read_pooled(
                model, prepared(model, [text for _, text in given], "prompts"), sites, "last"
            ).items()
        }
        for given in (with_, without)
    ]
    return Directions({name: (means[0][name] - means[1][name])[None] for name in means[0]}, ["difference"])


@torch.no_grad()
def outcome(model: pc.Model, prompts: list[tuple[str, str]], *interventions: Any) -> dict[str, float]:
    """Of words that one language alone has: the share of the relative's; and nats per word of what is written.

    The surprise is that of the model as it is, which has read what was written, but not the prompt.
    """
    module: Any = model.module
    inputs = model.inputs([text for _, text in prompts])
    tokenizer = model.tokenizer
    with model.intervene(*interventions):
        ids = []
        for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            given = row[mask.bool()][None]
            ids.append(
                module.generate(
                    given,
                    attention_mask=torch.ones_like(given),
                    max_new_tokens=TOKENS,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                )[0, given.shape[1] :]
            )
    hits, total, texts = 0, 0, []
    for (name, _), each in zip(prompts, ids, strict=True):
        words = tokenizer.decode(each, skip_special_tokens=True).split()
        owned = [languages.owners(word) for word in words]
        total += sum(len(each) == 1 for each in owned)
        hits += sum(each == (languages.RELATIVES[name],) for each in owned)
        texts.append(" ".join(words))
    given = model.inputs([each for each in texts if each])
    logits = module(**given).logits[:, :-1]
    wanted = given["input_ids"][:, 1:].masked_fill(given["attention_mask"][:, 1:] == 0, -100)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
    return {"relative": hits / max(total, 1), "nats per word": float(loss)}
