"""Do finders of causes rank planted causes above decoys, and do finders of correlates?

A decoy fires where a planted neuron fires and writes nothing, or only punctuation. As they are planted, decoys fire
less reliably than the cause, so that even its activations tell the cause; therefore decoys are made of ordinary
neurons too that read what the cause reads, so that nothing but what they write tells them from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch

import patchclamp as pc
from patchclamp import attribution
from patchclamp.testbed.planted import Planted

ROLES = ("relation", "safety", "fact", "context_copy", "token", "ngram")
CAUSAL = ("gradient_x_activation", "patching", "conductance")
CORRELATIONAL = ("expertise", "activation_profiles", "lape")
STEPS = 10
NOISE = 0.02


@dataclass(frozen=True, eq=False)
class Task:
    """What planted neurons of one kind are for.

    Attributes:
        role: of the neurons.
        causes: which they are.
        decoys: kind of decoy -> which.
        which: numbers of the documents in which they are needed.
        prompts: these, up to where they are needed.
        others: the same with the word replaced that makes them fire.
        answers: the word that is right after each.
    """

    role: str
    causes: pc.Neurons
    decoys: dict[str, pc.Neurons]
    which: list[int]
    prompts: list[str]
    others: list[str]
    answers: list[str]


def measure(seeds: Sequence[int] = (0, 1, 2), **options: Any) -> dict[str, Any]:
    """Race on planted GPT-2s.

    Returns:
        `rows`: one for each seed, role, kind of decoy and finder, with `pairs` and `above`, the share of pairs of a
        decoy and a cause in which the decoy ranks above (a tie is half); `summary`: means over roles of each kind of
        decoy and finder, with the worst seed.
    """
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        planted = pc.testbed.plant("gpt2", roles=ROLES, seed=seed, **options)
        tasks = with_equals(planted, tasks_of(planted), seed)
        recordings: dict[str, pc.Recording] = {}
        for task in tasks:
            for name in (*CAUSAL, *CORRELATIONAL):
                score = (
                    causal(planted, task, name) if name in CAUSAL else correlational(planted, task, name, recordings)
                )
                for kind, decoys in task.decoys.items():
                    mine, theirs = (
                        np.asarray([score[each] for each in which.names]) for which in (task.causes, decoys)
                    )
                    above = (theirs[:, None] > mine).mean() + 0.5 * (theirs[:, None] == mine).mean()
                    rows.append(
                        {"seed": seed, "role": task.role, "decoys": kind, "finder": name, "causal": name in CAUSAL}
                        | {"pairs": len(mine) * len(theirs), "above": float(above)}
                    )
    frame = pl.DataFrame(rows)
    by_seed = frame.group_by("decoys", "causal", "finder", "seed", maintain_order=True).agg(pl.col("above").mean())
    summary = by_seed.group_by("decoys", "causal", "finder", maintain_order=True).agg(
        pl.col("above").mean(), pl.col("above").max().alias("worst_seed"), pl.col("above").min().alias("best_seed")
    )
    return {"rows": frame, "summary": summary}


# What neurons are needed for ------------------------------------------------------------------------


def tasks_of(planted: Planted) -> list[Task]:
    """The tasks of the neurons that have decoys, with these."""
    truth = planted.truth.to_polars()
    data: Any = planted.data
    documents = [each.text.split() for each in data]
    found = []
    keys = truth.filter(pl.col("decoy_of") != "").select("decoy_of", "label", "reads").unique(maintain_order=True)
    for role, label, reads in keys.sort("decoy_of", "label").iter_rows():
        same = (pl.col("label") == label) & (pl.col("reads") == reads)
        causes = truth.filter((pl.col("role") == role) & same)
        decoys = truth.filter((pl.col("decoy_of") == role) & same)
        which, prompts, others, answers = [], [], [], []
        for number, words in enumerate(documents):
            place = _needed(role, label, reads, words)
            if place is None:
                continue
            before = words[: place + 1]
            which.append(number)
            prompts.append(" ".join(before))
            others.append(" ".join(_otherwise(role, before)))
            answers.append(_answer(role, causes["writes"][0], words, place))
        if which:
            neurons = (pc.Neurons.from_polars(each) for each in (causes, decoys))
            mine, theirs = neurons
            found.append(Task(role, mine, {"as planted": theirs}, which, prompts, others, answers))
    return found


def _needed(role: str, label: str, reads: str, words: list[str]) -> int | None:
    """The place of the word after which the neurons are needed."""
    for place, word in enumerate(words):
        before = words[place - 1] if place else ""
        if role == "relation" and _class(word) == label:
            return place
        if role == "safety" and word == "?" and words[place + 1] == "refuse":
            return place
        if role == "fact" and before == reads and _class(word) in ("capital", "dish", "river"):
            return place
        if role in ("context_copy", "token") and word == reads:
            return place
        if role == "ngram" and f"{before} {word}" == reads:
            return place
    return None


def _otherwise(role: str, words: list[str]) -> list[str]:
    if role == "safety":
        return ["shared0" if _class(each) == "harmful" else each for each in words]
    if role in ("fact", "ngram"):
        return [*words[:-2], "shared0", words[-1]]
    return [*words[:-1], "shared0"]


def _answer(role: str, writes: str, words: list[str], place: int) -> str:
    return writes if role in ("token", "ngram", "safety") else words[place + 1]


def _class(word: str) -> str:
    return word.rstrip("0123456789")


def with_equals(planted: Planted, tasks: list[Task], seed: int) -> list[Task]:
    """The same tasks, with decoys besides that read what a cause reads: two ordinary neurons of its layer each."""
    made = np.random.default_rng([seed, 11])
    taken = set(planted.truth.names)
    module: Any = planted.model.module
    form = _format_write(planted)
    found = []
    for task in tasks:
        names = []
        for neuron in task.causes:
            mlp = module.transformer.h[int(neuron.site.split(".")[1])].mlp
            size = mlp.c_fc.weight.shape[1]
            free = [each for each in made.permutation(size) if f"{neuron.site}:{each}" not in taken][:2]
            for place, writes in zip(free, (None, form), strict=True):
                taken.add(f"{neuron.site}:{place}")
                names.append(f"{neuron.site}:{place}")
                with torch.no_grad():
                    read = mlp.c_fc.weight[:, neuron.index]
                    noise = torch.from_numpy(made.standard_normal(len(read))).to(read)
                    noise *= NOISE * read.norm() / noise.norm()
                    mlp.c_fc.weight[:, place] = read + noise
                    mlp.c_fc.bias[place] = mlp.c_fc.bias[neuron.index]
                    length = mlp.c_proj.weight[neuron.index].norm()
                    mlp.c_proj.weight[place] = 0.0 if writes is None else length * writes
        decoys = task.decoys | {"reading the same": pc.Neurons(names)}
        found.append(Task(task.role, task.causes, decoys, task.which, task.prompts, task.others, task.answers))
    return found


def _format_write(planted: Planted) -> torch.Tensor:
    """The direction that makes punctuation likelier, of a decoy that was planted."""
    row = planted.truth.where(pl.col("role") == "decoy_format").top(1)
    module: Any = planted.model.module
    write = module.transformer.h[int(row["site"][0].split(".")[1])].mlp.c_proj.weight[row["index"][0]].detach()
    return write / write.norm()


# Finders --------------------------------------------------------------------------------------------


def causal(planted: Planted, task: Task, name: str) -> dict[str, float]:
    """Neuron -> how much it does for the logit of the right answer, mean over documents.

    Not for its probability: where another neuron has settled the matter, what favours all objects of a relation takes
    away from the right one.
    """
    model = planted.model
    ids = [int(model.tokenizer(each, add_special_tokens=False)["input_ids"][0]) for each in task.answers]
    more: dict[str, Any] = {"method": name, "steps": STEPS}
    if name == "patching":
        more["baseline"] = task.others
    found = attribution.attribute(model, task.prompts, attribution.logit(ids), "mlp.*", **more)
    sign = -1.0 if name == "patching" else 1.0  # what is lost where the activation of the other text is put there
    return {each: sign * score for each, score in _scores(found.neurons()).items()}


def correlational(planted: Planted, task: Task, name: str, recordings: dict[str, pc.Recording]) -> dict[str, float]:
    """Neuron -> how well it tells documents of the task from others."""
    how = {"expertise": "max", "activation_profiles": "mean", "lape": "fired"}[name]
    if how not in recordings:
        summary = pc.Pooled(how, dtype="float32")  # type: ignore[arg-type]
        recordings[how] = pc.record(planted.model, planted.data, "mlp.*", [summary], progress=False)
    labels = ["task" if number in set(task.which) else "rest" for number in range(len(planted.data))]
    finder: Callable[..., pc.Neurons] = getattr(pc.find, name)
    # A neuron that fires once in a document fires too rarely for lape's filter.
    more = {"filter_rate": 0.0} if name == "lape" else {}
    return _scores(finder(recordings[how], labels, "task", **more), "score_task")


def _scores(found: pc.Neurons, column: str = "score") -> dict[str, float]:
    return dict(zip(found.names, found[column].to_list(), strict=True))


if __name__ == "__main__":
    with pl.Config(tbl_rows=100, tbl_width_chars=160):
        result = measure()
        print(result["summary"])
        print(
            result["rows"]
            .group_by("decoys", "role", "finder", maintain_order=True)
            .agg(pl.col("above").mean(), pl.len())
        )
