"""CULNIG: neurons for knowledge that belongs to groups, beside those for the format of a question or for a name.

Questions have options, of which one token is the right answer. With P its probability at the end of the question, a
neuron's score on one question is

    s = P * max over tokens of (a dP/da)

its gradient times activation where that is largest. Three things are told apart by three sets of questions: `target`
asks for the knowledge, `control` has the same options without the question (what favours an option as such scores
there too, and is subtracted), `confound` names the group and can be answered by reading (what reacts to the name
scores there, and is excluded). What is left is general, or specific to a group in which it scores highest.

As published the target's scores are signed and the control's are cut off at 0, so that what is subtracted is no mean
of the same quantity. In the published code dropout is on, and padding counts as 0 in the maximum, which makes a score
depend on the other texts of its batch; here neither is so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch

from patchclamp.attribution import Target, gradients
from patchclamp.attribution.batches import batches
from patchclamp.attribution.targets import OfExamples, class_probability, probability
from patchclamp.errors import DataError, warn
from patchclamp.model.hooks import first_tensor
from patchclamp.model.model import Model
from patchclamp.model.site import Site
from patchclamp.neurons import Neurons
from patchclamp.published import published


@dataclass(frozen=True, eq=False)
class Questions:
    """Questions whose answer is one token, or one class.

    Attributes:
        inputs: texts, `pc.Texts`, a tensor, or keyword arguments; the answer follows the end of each.
        answers: the right option of each: a text of one token, its id, or the number of a class.
        groups: the group of each (a country); None where there are none.
    """

    inputs: Any
    answers: Sequence[str | int]
    groups: Sequence[str] | None = None


@published(
    row="S006",
    title="Neuron-Level Analysis of Cultural Understanding in Large Language Models",
    authors="Yamamoto, Kumon, Bollegala, Yanaka",
    year=2025,
    url="https://arxiv.org/abs/2510.08284",
)
def culnig(
    model: Model,
    target: Questions,
    control: Questions | None = None,
    confound: Questions | None = None,
    sites: str | Site | Iterable[str | Site] = "mlp.*",
    *,
    share: float = 0.01,
    attention_share: float = 0.002,
    excluded_share: float = 0.01,
    specific_share: float = 0.003,
    least_z: float = 0.5,
    batch: int = 32,
) -> Neurons:
    """Neurons for knowledge of groups, general and specific, without those for format and names (CULNIG, 2025).

    The paper takes what leaves the projections of gate, query, key and value: `"module:model.layers.0.mlp.gate_proj"`,
    ...; these can be named like any others.

    Args:
        model: a model that gives logits for each token, or for each class.
        target: questions for the knowledge; with groups for neurons that are specific.
        control: the same options without the questions. None: nothing is subtracted, and a warning says so.
        confound: passages that name the group, answered by reading. None: nothing is excluded, and a warning says so.
        sites: sites by name or glob.
        share: of the neurons outside attention, those that are general.
        attention_share: the same of attention (sites `attn`, and modules whose path says so).
        excluded_share: of either, those that score highest on `confound` and are excluded.
        specific_share: of all, those that may be specific to a group.
        least_z: standard deviations (over groups) by which a group's score exceeds the mean over groups.
        batch: how many questions are run at once.

    Returns:
        All neurons, the highest `score` (target less control) first: `kind`, "general", "specific", "excluded" (among
        the highest on `confound`, and chosen otherwise) or ""; `group`, to which it is specific, several with commas
        between; `confound`, its score there; with groups `score_<group>` and `z_<group>`. A neuron may be general and
        specific: `kind` is "general" then.

    Raises:
        DataError: an answer that is not one token, not as many answers or groups as questions, shares out of range.
    """
    _check(share=share, attention_share=attention_share, excluded_share=excluded_share, specific_share=specific_share)
    for name, given, what in (("control", control, "format"), ("confound", confound, "the groups' names")):
        if given is None:
            warn(f"no {name} questions are given: what is found includes neurons for {what}")
    chosen = model.select(sites)
    scores = _scored(model, target, chosen, batch)
    sizes = scores.sizes
    of_control = None if control is None else _scored(model, control, chosen, batch).values.clip(min=0)
    of_confound = None if confound is None else _scored(model, confound, chosen, batch).values
    general = scores.values.mean(0) - (0.0 if of_control is None else of_control.mean(0))
    attention = np.repeat([_is_attention(site) for site in chosen], list(sizes.values()))
    named = np.zeros(len(general)) if of_confound is None else of_confound.mean(0)
    out = np.zeros(len(general), bool)
    if of_confound is not None:
        out = _top(named, ((~attention, excluded_share), (attention, excluded_share)))
    candidate = _top(general, ((~attention, share), (attention, attention_share)))
    columns: dict[str, Any] = {}
    owners: list[list[str]] = [[] for _ in general]
    barred = candidate & out
    everyone = np.ones(len(general), bool)
    for group, score, z, of_group in _of_groups(target, scores.values, control, of_control, confound, of_confound):
        columns |= {f"score_{group}": score, f"z_{group}": z}
        best = _top(score, ((everyone, specific_share),)) & (z >= least_z)
        hidden = out if of_group is None else _top(of_group, ((everyone, excluded_share),))
        barred |= best & hidden
        for place in np.flatnonzero(best & ~hidden):
            owners[place].append(group)
    frame = {
        "site": np.repeat(list(sizes), list(sizes.values())),
        "index": np.concatenate([np.arange(size) for size in sizes.values()]),
        "score": general,
        "kind": _kinds(candidate & ~out, np.asarray([bool(each) for each in owners]), barred),
        "group": [", ".join(each) for each in owners],
        "confound": named,
        **columns,
    }
    return Neurons.from_polars(pl.DataFrame(frame)[np.argsort(-general, kind="stable")])


# Helpers --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Scores:
    values: np.ndarray  # [questions, neurons]
    sizes: dict[str, int]


def _scored(model: Model, questions: Questions, sites: list[Site], batch: int) -> _Scores:
    rows: list[np.ndarray] = []
    sizes: dict[str, int] = {}
    for call, goal, _ in batches(model, questions.inputs, _right_answer(model, questions), batch):
        seen = gradients(model, call, goal, sites)
        parts = []
        for site, slope in seen.gradients.items():
            effect = seen.activations[site] * slope
            mask = seen.masks.get(site)
            if mask is not None:
                effect = effect.masked_fill(~mask.reshape(*mask.shape, *[1] * (effect.ndim - 2)), -torch.inf)
            largest = effect.flatten(1, -2).amax(1) if effect.ndim > 2 else effect
            parts.append(largest * seen.value[:, None])
            sizes[site] = slope.shape[-1]
        rows.append(torch.cat(parts, 1).double().cpu().numpy())
    return _Scores(np.concatenate(rows), sizes)


def _right_answer(model: Model, questions: Questions) -> Target:
    """The probability of the right answer: of a token at the end, or of a class."""
    numbers = [_token(model, each) if isinstance(each, str) else int(each) for each in questions.answers]
    if questions.groups is not None and len(questions.groups) != len(numbers):
        raise DataError(f"{len(numbers)} answers are given, and {len(questions.groups)} groups")

    def measure(output: Any, inputs: Any, given: Any) -> torch.Tensor:
        logits = getattr(output, "logits", None)
        logits = first_tensor(output) if logits is None else logits
        of_class = logits is not None and logits.ndim == 2
        return (class_probability(given) if of_class else probability(given))(output, inputs)

    return OfExamples(measure, (numbers,))


def _token(model: Model, answer: str) -> int:
    if model.tokenizer is None:
        raise DataError(f"the answer {answer!r} is a text, and the model has no tokenizer: give the number of a class")
    ids = list(model.tokenizer(answer, add_special_tokens=False)["input_ids"])
    if len(ids) != 1:
        raise DataError(f"the answer {answer!r} is {len(ids)} tokens, and one is wanted")
    return int(ids[0])


def _of_groups(
    target: Questions,
    values: np.ndarray,
    control: Questions | None,
    of_control: np.ndarray | None,
    confound: Questions | None,
    of_confound: np.ndarray | None,
) -> list[tuple[str, np.ndarray, np.ndarray, np.ndarray | None]]:
    """Each group with its score, its z over groups, and its score on the confound."""
    if target.groups is None:
        return []
    groups = sorted(set(map(str, target.groups)))
    if len(groups) < 2:
        raise DataError(f"at least two groups are wanted, and all questions are of {', '.join(groups)!r}")
    scores = []
    for group in groups:
        score = _mean_of(values, target.groups, group)
        if of_control is not None and control is not None:
            score = score - _mean_of(of_control, control.groups, group)
        scores.append(score)
    stacked = np.stack(scores)
    spread = stacked.std(0)
    z = np.where(spread > 0, (stacked - stacked.mean(0)) / np.where(spread > 0, spread, 1.0), 0.0)
    named = [
        None if of_confound is None or confound is None else _mean_of(of_confound, confound.groups, group)
        for group in groups
    ]
    return list(zip(groups, stacked, z, named, strict=True))


def _mean_of(values: np.ndarray, groups: Sequence[str] | None, group: str) -> np.ndarray:
    """The mean over a group's questions; over all where questions have no groups."""
    if groups is None:
        return values.mean(0)
    here = np.asarray([str(each) == group for each in groups])
    if not here.any():
        raise DataError(f"the group {group!r} has questions in the target, and none in control or confound")
    return values[here].mean(0)


def _kinds(general: np.ndarray, specific: np.ndarray, excluded: np.ndarray) -> list[str]:
    return np.select([general, specific, excluded], ["general", "specific", "excluded"], "").tolist()


def _top(score: np.ndarray, shares: Sequence[tuple[np.ndarray, float]]) -> np.ndarray:
    """`[neurons]` bool: those with the largest scores of each part, at least one of a part that has any."""
    found = np.zeros(len(score), bool)
    for part, share in shares:
        places = np.flatnonzero(part)
        if len(places) and share > 0:
            number = max(1, round(share * len(places)))
            found[places[np.argsort(-score[places], kind="stable")[:number]]] = True
    return found


def _is_attention(site: Site) -> bool:
    return site.kind in ("attn", "pattern") or (site.kind == "module" and "attn" in site.module.lower())


def _check(**shares: float) -> None:
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise DataError(f"{name} is a share of neurons between 0 and 1, not {share}")
