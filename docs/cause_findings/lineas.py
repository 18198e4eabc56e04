"""S158 on the decoder of four languages: keep it from the words of one language, with 32 + 32 texts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import patchclamp as pc
from patchclamp.directions import Directions
from patchclamp.intervene.steer import steer
from patchclamp.steer import LinEAS
from patchclamp.testbed import languages
from patchclamp.testbed.silencing import loss_by_label
from patchclamp.testbed.trained import trained

BAD = "coth"
PROMPTS, WRITTEN, TOKENS = 32, 240, 12
STRENGTHS = (0.5, 0.75, 1.0, 1.5)  # above 1: beyond what was learned
SHIFTS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.5)
MOST = 0.1  # of the rise of the perplexity
# Weights of the sum of |w - 1| + |b|: none, and a few of which the sparsest that still works is told.
SPARSITIES = (0.0, 1e-2, 2e-2, 4e-2)


def measure() -> dict[str, Any]:
    """Share of bad words written, and perplexity on texts of the other languages, plain and steered."""
    net = trained("four_languages")
    model = net.model
    shown, held_out = languages.documents(400, seed=21), languages.documents(160, seed=22)
    source = [each.text for each in shown if each.labels["language"] == BAD][:PROMPTS]
    target = [each.text for each in shown if each.labels["language"] != BAD][:PROMPTS]
    plain = outcome(model, held_out)
    found: dict[str, Any] = {"plain": plain, "prompts": (len(source), len(target)), "maps": {}}
    sites = norms(model)
    total = sum(int(model.module.get_submodule(each.module).weight.numel()) for each in sites)
    for sparsity in SPARSITIES:
        fitted = LinEAS(sites, sparsity=sparsity, steps=300).fit(model, source, target)
        found["maps"][sparsity] = {
            "kept": len(fitted.neurons()) / total,
            "distance left": float(fitted.losses[-1] / fitted.losses[0]),
            "by strength": {
                each: compared(outcome(model, held_out, fitted.strength(each)), plain) for each in STRENGTHS
            },
        }
    shift = mean_difference(model, source, target)
    found["mean difference"] = {each: compared(outcome(model, held_out, steer(shift, each)), plain) for each in SHIFTS}
    allowed = [
        {"sparsity": sparsity, "strength": strength, "kept": each["kept"], **result}
        for sparsity, each in found["maps"].items()
        for strength, result in each["by strength"].items()
        if result["perplexity up"] < MOST
    ]
    found["best below the limit"] = best = max(allowed, key=lambda each: each["bad words gone"])
    few = [each for each in allowed if each["kept"] < 0.1]
    found["best below the limit with a tenth of the units"] = max(
        few, key=lambda each: each["bad words gone"], default=None
    )
    rises, gone = zip(
        *((0.0, 0.0), *(tuple(each.values())[::-1] for each in found["mean difference"].values())), strict=True
    )
    found["mean difference at the perplexity of the best"] = float(np.interp(best["perplexity up"], rises, gone))
    return found


def norms(model: pc.Model) -> list[pc.Site]:
    """The outputs of the norms before attention and before the MLP of each layer."""
    names = [path for path, _ in model.module.named_modules() if path.endswith("layernorm")]
    return [pc.Site.custom(path) for path in names]


def mean_difference(model: pc.Model, source: list[str], target: list[str]) -> Directions:
    """At the residual stream behind each layer, the mean of targets less that of sources, over all tokens."""
    found = {}
    for site in model.select("resid_post.*"):
        means = [
            torch.stack([each.mean(0) for each in model.activations(texts, site)]).mean(0) for texts in (target, source)
        ]
        found[site.name] = (means[0] - means[1])[None]
    return Directions(found, ["difference"])


def outcome(model: pc.Model, held_out: pc.Texts, *interventions: Any) -> dict[str, float]:
    """Of words written from the start, the share that only the bad language has; perplexity on the other languages."""
    with model.intervene(*interventions):
        words = written(model)
        loss = loss_by_label(model, held_out, "language")
    bad = np.mean([languages.owners(word) == (BAD,) for word in words])
    names = list(held_out.labels["language"])
    good = [each for name, each in zip(names, loss, strict=True) if name != BAD]
    return {"bad": float(bad), "perplexity": float(np.exp(np.mean(good)))}


@torch.no_grad()
def written(model: pc.Model) -> list[str]:
    """Words sampled from the start of a text, with the same chances each time."""
    module: Any = model.module
    tokenizer = model.tokenizer
    start = torch.full((WRITTEN, 1), tokenizer.bos_token_id)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ids = module.generate(
            start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=TOKENS,
            do_sample=True,
            top_k=0,
            pad_token_id=tokenizer.pad_token_id,
        )
    return [word for each in tokenizer.batch_decode(ids, skip_special_tokens=True) for word in each.split()]


def compared(changed: dict[str, float], plain: dict[str, float]) -> dict[str, float]:
    """How much of the bad words is gone, and how much the perplexity has risen, as shares."""
    return {
        "bad words gone": 1 - changed["bad"] / plain["bad"],
        "perplexity up": changed["perplexity"] / plain["perplexity"] - 1,
    }
