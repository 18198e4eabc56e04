"""Taylor awareness in the decoder of four languages: do the neurons that a language owns cost that language most?"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import polars as pl

import patchclamp as pc
from patchclamp.find.taylor import taylor
from patchclamp.testbed import languages
from patchclamp.testbed.silencing import loss_by_label, loss_increase

SHOWN, HELD_OUT, OWNED, RANDOM_SETS = 240, 120, 12, 10


def measure(seed: int = 0) -> dict[str, Any]:
    """Find the neurons of each language, silence them, and see which language suffers.

    Returns:
        `increase`: `[sets, languages]` rise of the loss in nats; `own_is_largest`: for how many sets the own language
        suffers most; `own_share`: what part of all rise is on the set's own language, for Taylor's sets, for those of
        `find.lape` of the same size, and for random ones (mean); `owners` with normalised awareness and as published.
    """
    net = pc.testbed.trained("four_languages")
    shown, held_out = languages.documents(SHOWN, seed=2), languages.documents(HELD_OUT, seed=3)
    found = taylor(net.model, shown, "language")
    published = taylor(net.model, shown, "language", normalise=False)
    sets = [_owned(found, name) for name in languages.NAMES]
    increase = loss_increase(net.model, held_out, "language", sets)
    recording = pc.record(net.model, shown, "gate.*", [pc.ByLabel()], progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lape = pc.find.lape(recording, "language")
    theirs = []
    for name, mine in zip(languages.NAMES, sets, strict=True):
        best = lape.to_polars().sort(f"score_{name}", descending=True, maintain_order=True).head(len(mine))
        theirs.append(pc.Neurons.from_polars(best.with_columns(pl.col("site").str.replace("gate", "mlp"))))
    of_lape = loss_increase(net.model, held_out, "language", theirs)
    everyone = net.model.neurons("mlp.*")
    chance = [
        loss_increase(net.model, held_out, "language", [everyone.sample(like=each, seed=seed + draw) for each in sets])
        for draw in range(RANDOM_SETS)
    ]
    return {
        "languages": list(languages.NAMES),
        "loss": loss_by_label(net.model, held_out, "language").tolist(),
        "neurons_of_each": [len(each) for each in sets],
        "neurons": len(everyone),
        "increase": increase.round(3).tolist(),
        "increase_lape": of_lape.round(3).tolist(),
        "increase_random": np.mean(chance, 0).round(3).tolist(),
        "own_is_largest": int((increase.argmax(1) == np.arange(len(sets))).sum()),
        "own_is_largest_lape": int((of_lape.argmax(1) == np.arange(len(sets))).sum()),
        "own_share": _own_share(increase),
        "own_share_lape": _own_share(of_lape),
        "own_share_random": float(np.mean([_own_share(each) for each in chance])),
        "owners": _owners(found),
        "owners_as_published": _owners(published),
    }


def _owned(found: pc.Neurons, name: str) -> pc.Neurons:
    """The most specific neurons that a language owns."""
    return found.where((pl.col("kind") == "specific") & (pl.col("label") == name)).top(OWNED)


def _own_share(increase: np.ndarray) -> float:
    """Of the rise on all languages, each where it is one, the part on the own one: mean over sets."""
    rise = increase.clip(min=0)
    return float((rise.diagonal() / np.maximum(rise.sum(1), 1e-9)).mean())


def _owners(found: pc.Neurons) -> dict[str, int]:
    specific = found.where(pl.col("kind") == "specific")
    return {name: int((specific["label"] == name).sum()) for name in languages.NAMES}


if __name__ == "__main__":
    print(measure())
