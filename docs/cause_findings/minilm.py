"""MiniLM: neurons for negation, number and gender, tested on pairs of sentences that differ in just that.

The neurons are ranked by gradient times activation of the similarity of a pair, on pairs of other nouns and verbs than
those of the test. Silencing the first of them should bring the two sentences of a pair together; the guards are pairs
that differ in the other two things, and how far plain sentences move.
"""

from __future__ import annotations

from typing import Any

import polars as pl

import patchclamp as pc
from patchclamp.attribution import attribute, similarity
from patchclamp.data import corpora

NEURONS, GUARDED = 30, 60

SUBJECTS = ("The door", "This answer", "The water", "My coat", "Her idea", "The train", "Our house", "The bread")
STATES = ("open", "right", "cold", "new", "good", "late", "clean", "warm")
ACTS = ("found", "bought", "sold", "painted", "lost", "carried", "hid", "counted")
THINGS = ("apples", "books", "chairs", "boxes", "shirts", "stones", "cups", "keys")
DEEDS = ("closed the window", "called a friend", "won the race", "wrote a letter", "lost the key", "cooked dinner")
WHENS = ("yesterday", "this morning", "last night", "on Sunday")


def pairs(kind: str, half: int) -> list[tuple[str, str]]:
    """Pairs that differ in one thing; the halves share no subject, verb or noun."""
    subjects, states = SUBJECTS[half::2], STATES[half::2]
    acts, things, deeds = ACTS[half::2], THINGS[half::2], DEEDS[half::2]
    if kind == "negation":
        return [(f"{one} is {state}.", f"{one} is not {state}.") for one in subjects for state in states]
    if kind == "number":
        return [(f"They {act} two {thing}.", f"They {act} nine {thing}.") for act in acts for thing in things]
    return [(f"He {deed} {when}.", f"She {deed} {when}.") for deed in deeds for when in WHENS]


KINDS = ("negation", "number", "gender")


def found(model: pc.Model, kind: str) -> pc.Neurons:
    """Neurons without which a pair would be more alike, the first first."""
    one, other = zip(*pairs(kind, 0), strict=True)
    both = [
        attribute(model, list(mine), similarity(model, list(theirs)), "mlp.*").neurons()
        for mine, theirs in ((one, other), (other, one))
    ]
    frames = [each.to_polars().select("site", "index", "score") for each in both]
    joint = frames[0].join(frames[1], on=["site", "index"])
    summed = joint.select("site", "index", (-pl.col("score") - pl.col("score_right")).alias("score"))
    return pc.Neurons.from_polars(summed.sort("score", descending=True))


def measure(controls: int = 100) -> dict[str, Any]:
    """Evidence for each kind: similarity of held-out pairs with the neurons silenced, guards, and a dose."""
    model = pc.load("all-MiniLM-L6-v2")
    plain = [each.text[:200] for each in corpora.python_docs(GUARDED, kinds=("docstring",))]
    results: dict[str, Any] = {"neurons": NEURONS, "controls": controls, "evidence": {}}
    for kind in KINDS:
        guards: dict[str, Any] = {other: pairs(other, 1) for other in KINDS if other != kind}
        guards["plain sentences"] = ("embedding_shift", plain)
        neurons = found(model, kind).top(NEURONS)
        results["evidence"][kind] = pc.verify.effect(
            model, pc.ablate(neurons), "similarity", pairs(kind, 1), controls, dose=True, guard=guards
        )
    return results
