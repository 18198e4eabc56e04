"""All finders on some documents, and what is left of what they found on others."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import polars as pl

import patchclamp as pc
from label_findings.tasks import SEED, Task
from patchclamp.statistics import average_precision, roc_auc

DEALS, FEW_DEALS = 100, 20  # of labels over examples; fewer where each takes long

Finder = Callable[..., pc.Neurons]
# Name: the finder, what it reads of each example, how often labels are dealt.
FINDERS: dict[str, tuple[Finder, str, int]] = {
    "lape": (pc.find.lape, "fired", DEALS),
    "expertise": (pc.find.expertise, "max", FEW_DEALS),
    "activation_profiles": (pc.find.activation_profiles, "mean", DEALS),
    "contrast": (pc.find.contrast, "mean", DEALS),
    "sparse_probe, mean_diff": (pc.find.sparse_probe, "max", DEALS),
    "sparse_probe, f": (lambda *a, **k: pc.find.sparse_probe(*a, select="f", **k), "max", DEALS),
    "sparse_probe, mutual_information": (
        lambda *a, **k: pc.find.sparse_probe(*a, select="mutual_information", **k),
        "max",
        FEW_DEALS,
    ),
    "probe_neurons": (pc.find.probe_neurons, "max", FEW_DEALS),
}
RANKED = ("mean_diff", "f", "mutual_information")
SIZES = (1, 4, 16)


@dataclass(frozen=True)
class Found:
    """What one task gave."""

    task: Task
    sha256: str
    held_out: np.ndarray  # [texts] bool
    rows: list[dict[str, object]]  # one a finder
    best: dict[str, list[str]]  # finder -> its 20 best neurons
    drawn: float  # median AUROC of a neuron on the held-out documents
    always: float  # share of the label among the texts to find in
    length: float  # AUROC of the number of tokens
    f1: dict[str, list[float]]  # way to rank -> F1 at each of SIZES
    by_layer: list[float]  # F1 of one neuron
    tokens: str


def searched(task: Task) -> Found:
    """All finders on some documents, what they found on the others."""
    held_out = outside(task.documents)
    parts = {
        (how, out): record(task, held_out == out, pc.Pooled(how, dtype="float32"))
        for how in ("max", "mean", "fired")
        for out in (False, True)
    }
    rows, best = [], {}
    for name, (finder, how, deals) in FINDERS.items():
        row, best[name] = tried(task, held_out, finder, parts[how, False], parts[how, True], deals)
        rows.append({"finder": name, "reads": how, **row})
    known, new = parts["max", False], parts["max", True]
    f1, by_layer = probes(task, ~held_out, known)
    length = float(roc_auc(task.right[held_out], new.positions.astype(np.float64)))
    return Found(
        task=task,
        sha256=known.facts["data"]["sha256"],
        held_out=held_out,
        rows=rows,
        best=best,
        drawn=of_any(known, new, task.right[~held_out], task.right[held_out]),
        always=float(task.right[~held_out].mean()),
        length=max(length, 1 - length),
        f1=f1,
        by_layer=by_layer,
        tokens=strong_tokens(task, held_out, best["expertise"][0]),
    )


def tried(
    task: Task, held_out: np.ndarray, finder: Finder, known: pc.Recording, new: pc.Recording, deals: int
) -> tuple[dict[str, object], list[str]]:
    """What one finder finds, what its best neuron is worth on documents that it has not seen; its 20 best."""
    words, tested = np.where(task.right, task.positive, "other")[~held_out], task.right[held_out]
    # Labels that have nothing to do with the texts, and still come in runs as the true ones do.
    turned = np.roll(words, len(words) // 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no probe holds is in the figures
        found = finder(known, words, task.positive, null="permute", permutations=deals, seed=SEED)
        null = finder(known, turned, task.positive, null="permute", permutations=deals, seed=SEED)
    top = found.top(1)
    # A neuron may be smaller on the label: as it was where it was found.
    sign = 1 if roc_auc(task.right[~held_out], of_neuron(known, top)) >= 0.5 else -1
    values = sign * of_neuron(new, top)
    row: dict[str, object] = {
        "neuron": top.names[0],
        "auroc": float(roc_auc(tested, values)),
        "precision": float(average_precision(tested, values)),
        "q": int((found["q"] < 0.05).sum()),
        "null": int((null["q"] < 0.05).sum()),
        "deals": deals,
    }
    return row, found.top(20).names


def probes(task: Task, which: np.ndarray, known: pc.Recording) -> tuple[dict[str, list[float]], list[float]]:
    """F1 at each of SIZES, best layer (by chance: mean over layers and draws), and of one neuron in each layer."""
    words, groups = np.where(task.right, task.positive, "other")[which], task.documents[which]

    def curve(select: str, seed: int = SEED) -> pl.DataFrame:
        found = pc.find.sparse_probe_curve(
            known, words, task.positive, k=SIZES, select=select, groups=groups, seed=seed
        )
        return found.frame

    curves = {each: curve(each) for each in RANKED}
    f1 = {each: at.group_by("k").agg(pl.col("f1").max()).sort("k")["f1"].to_list() for each, at in curves.items()}
    drawn = pl.concat([curve("random", seed) for seed in range(10)])
    f1["random"] = drawn.group_by("k").agg(pl.col("f1").mean()).sort("k")["f1"].to_list()
    return f1, curves["mean_diff"].filter(pl.col("k") == 1)["f1"].to_list()


def outside(documents: np.ndarray, share: float = 0.3) -> np.ndarray:
    """`[texts]` bool: those of a share of the documents, chosen by chance."""
    names = np.unique(documents)
    chosen = np.random.default_rng(SEED).permutation(names)[: round(share * len(names))]
    return np.isin(documents, chosen)


def record(task: Task, which: np.ndarray, summary: pc.Summary, sites: str | None = None) -> pc.Recording:
    texts = [each for each, kept in zip(task.texts, which, strict=True) if kept]
    data = pc.Texts(texts, name=task.name)
    return pc.record(task.model, data, sites or task.sites, [summary], max_length=task.max_length, progress=False)


def of_neuron(recording: pc.Recording, neuron: pc.Neurons) -> np.ndarray:
    site = neuron.sites[0]
    return np.asarray(recording[site].pooled.values[:, neuron.indices(site)[0]], np.float64)


def of_any(known: pc.Recording, new: pc.Recording, right: np.ndarray, tested: np.ndarray) -> float:
    """The median over all neurons: what one that is drawn by chance is worth."""
    pair = [np.concatenate([np.asarray(each[site].pooled.values) for site in each], axis=1) for each in (known, new)]
    which_way = np.where(roc_auc(right, pair[0]) >= 0.5, 1, -1)
    return float(np.median(roc_auc(tested, pair[1] * which_way)))


def strong_tokens(task: Task, which: np.ndarray, neuron: str) -> str:
    """The tokens on which a neuron most often exceeds half of its maximum."""
    site, _, index = neuron.rpartition(":")
    recording = record(task, which, pc.ByToken(), site)
    counted = recording[site].by_token
    fired = counted.fired[:, int(index)]
    order = [each for each in np.argsort(-fired, kind="stable")[:6] if fired[each]]
    share = fired[order].sum() / max(counted.fired_total[int(index)], 1)
    listed = ", ".join(quoted(each) for each in recording.text(counted.tokens[order]))
    return f"{share:.0%} of its firings above half of its maximum are on {listed}"


def quoted(token: str) -> str:
    token = token.replace("\n", "\\n").replace("|", "\\|")
    return f"`` {token} ``" if "`" in token else f"`{token.strip() or token}`"
