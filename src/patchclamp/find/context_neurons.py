"""Which neurons carry a context into the answer?

For a context c, a question q and the answer y that follows from the context: a0 is what the neurons of one site do at
the last position of q alone, a1 at that of c and q. With only that site held on the straight line between them,

    attribution = (a1 - a0) * mean over k of dP(y | c, q, site at a0 + t_k (a1 - a0)) / da

the derivative being taken at the point of the line, so that the attributions of a site add up to
P(y | site at a1) - P(y | site at a0). Each example keeps the neurons with the largest ones, over all sites; a
context-aware neuron is one that many examples keep. `pc.scale(found.top(8), beta)` makes such neurons louder.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import polars as pl
import torch

from patchclamp.attribution import gradients, probability
from patchclamp.errors import DataError
from patchclamp.find.asked import token_id
from patchclamp.model import Model, Site
from patchclamp.neurons import Neurons
from patchclamp.published import published

Example = tuple[str, str, str | int]


@published(
    row="S105",
    title="IRCAN: Mitigating Knowledge Conflicts in LLM Generation via Identifying and Reweighting "
    "Context-Aware Neurons",
    authors="Dan Shi, Renren Jin, Tianhao Shen, Weilong Dong, Xinwei Wu, Deyi Xiong",
    year=2024,
    url="https://arxiv.org/abs/2406.18406",
    part="detector",
)
def context_neurons(
    model: Model,
    examples: Iterable[Example],
    sites: str | Site | Iterable[str | Site] = "mlp.*",
    *,
    keep: int = 20,
    steps: int = 20,
    rule: Literal["midpoint", "right"] = "midpoint",
    separator: str = " ",
    batch: int = 128,
) -> Neurons:
    """Neurons that carry a context into the answer (Shi et al., 2024), those that most examples keep first.

    Args:
        model: a decoder with a tokenizer.
        examples: (context, question, answer): the answer is the token that follows from the context, as a string
            (of several tokens the first counts) or an id.
        sites: whose neurons.
        keep: how many neurons each example keeps, over all sites; only such that raise the probability.
        steps: points of the path.
        rule: where in each step the derivative is taken: in its middle, whose error falls with the square of the
            steps, or at its end, as in the paper's formula.
        separator: what stands between context and question.
        batch: how many points are run at once.

    Returns:
        The neurons that an example kept: `score`, the share of examples that did; `count`; `attribution`, the mean over
        all examples, in units of probability.

    Raises:
        DataError: no examples, an empty context or question, a context that changes nothing, an answer that is no
            token.
    """
    given = dict(steps=steps, rule=rule, separator=separator, batch=batch)
    return context_attributions(model, examples, sites, **given).neurons(keep)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class ContextAttributions:
    """What each neuron carries of each example's context.

    Attributes:
        by_site: site -> `[examples, neurons]` float64, in units of probability.
        completeness: one row for each example and site: `example`, `site`, `sum` of the attributions, `wanted`, how
            much the probability of the answer rises between the two ends of the path, and `error`, their difference.
        probability: `[examples]`, of the answer, with its context.
    """

    by_site: dict[str, np.ndarray]
    completeness: pl.DataFrame = field(repr=False)
    probability: np.ndarray = field(repr=False)

    def neurons(self, keep: int = 20) -> Neurons:
        """The neurons that examples keep; see `context_neurons`."""
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise DataError(f"each example keeps a whole number of neurons >= 1, not {keep!r}")
        values = np.concatenate(list(self.by_site.values()), axis=1)
        best = np.argsort(-values, axis=1, kind="stable")[:, :keep]
        kept = np.zeros(values.shape, bool)
        np.put_along_axis(kept, best, True, axis=1)
        count = (kept & (values > 0)).sum(0)
        frame = pl.DataFrame(
            {
                "site": [site for site, each in self.by_site.items() for _ in range(each.shape[1])],
                "index": np.concatenate([np.arange(each.shape[1]) for each in self.by_site.values()]),
                "score": count / len(values),
                "count": count,
                "attribution": values.mean(0),
            }
        )
        order = frame.filter(pl.col("count") > 0).sort(["score", "attribution"], descending=True, maintain_order=True)
        return Neurons.from_polars(order)


def context_attributions(
    model: Model,
    examples: Iterable[Example],
    sites: str | Site | Iterable[str | Site] = "mlp.*",
    *,
    steps: int = 20,
    rule: Literal["midpoint", "right"] = "midpoint",
    separator: str = " ",
    batch: int = 128,
) -> ContextAttributions:
    """What each neuron carries of each example's context, and whether it adds up.

    The arguments are those of `context_neurons`.

    Raises:
        DataError: as `context_neurons`.
    """
    listed = [_checked(model, example, number) for number, example in enumerate(examples)]
    if not listed:
        raise DataError("there are no examples: give (context, question, answer) triples")
    if steps < 1 or batch < 1 or rule not in ("midpoint", "right"):
        raise DataError('steps and batch are at least 1, and rule is "midpoint" or "right"')
    chosen = model.select(sites)
    found: dict[str, list[np.ndarray]] = {site.name: [] for site in chosen}
    rows, chances = [], []
    for number, (context, question, answer) in enumerate(listed):
        alone = _last(model, question, answer, chosen)[0]
        both, whole = _last(model, f"{context}{separator}{question}", answer, chosen)
        if all(torch.equal(alone[name], each) for name, each in both.items()):
            raise DataError(f"example {number}: the context changes no neuron at the last position: {context!r:.60}")
        path = _Path(alone, both, steps, rule)
        along = _attributed(model, f"{context}{separator}{question}", answer, chosen, path, batch)
        for name, (each, start) in along.items():
            found[name].append(each)
            rows.append((number, name, float(each.sum()), whole - start, float(each.sum()) - (whole - start)))
        chances.append(whole)
    schema = {"example": pl.Int64, "site": pl.String, "sum": pl.Float64, "wanted": pl.Float64, "error": pl.Float64}
    return ContextAttributions(
        {name: np.stack(each) for name, each in found.items()},
        pl.DataFrame(rows, schema=schema, orient="row"),
        np.asarray(chances),
    )


# Helpers --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Path:
    """From what the sites do without the context to what they do with it; site -> `[size]`."""

    start: dict[str, torch.Tensor]
    end: dict[str, torch.Tensor]
    steps: int
    rule: str

    def points(self) -> torch.Tensor:
        """`[1 + steps]`: the start, and where derivatives are taken."""
        within = torch.arange(self.steps) + (0.5 if self.rule == "midpoint" else 1.0)
        return torch.cat([torch.zeros(1), within / self.steps])


def _checked(model: Model, example: Any, number: int) -> tuple[str, str, int]:
    if isinstance(example, str) or not isinstance(example, Sequence) or len(example) != 3:
        raise DataError(f"example {number} is not a triple (context, question, answer): {example!r:.60}")
    context, question, answer = example
    for what, text in (("context", context), ("question", question)):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"the {what} of example {number} is empty")
    return context, question, token_id(model, answer, f"the answer of example {number}")


def _last(model: Model, text: str, answer: int, sites: list[Site]) -> tuple[dict[str, torch.Tensor], float]:
    """Site -> `[size]` at the last position; the probability of the answer there."""
    seen = gradients(model, text, probability(answer), sites)
    return {name: each[0, -1] for name, each in seen.activations.items()}, float(seen.value[0])


def _attributed(
    model: Model, text: str, answer: int, sites: list[Site], path: _Path, batch: int
) -> dict[str, tuple[np.ndarray, float]]:
    """Site -> attributions `[size]`, and the probability of the answer at the start of its path.

    The points of all sites are the rows of one batch, each with its own site held.
    """
    points = path.points()
    jobs = [(site, float(each)) for site in sites for each in points]
    inputs = model.inputs(text)
    slopes = {site.name: torch.zeros_like(path.start[site.name], dtype=torch.float64) for site in sites}
    starts: dict[str, float] = {}
    for first in range(0, len(jobs), batch):
        part = jobs[first : first + batch]
        there = {site.name: [row for row, (each, _) in enumerate(part) if each == site] for site, _ in part}
        before = [
            (name, _held(path.start[name], path.end[name], rows, [part[row][1] for row in rows]))
            for name, rows in there.items()
        ]
        repeated = {name: each.expand(len(part), *each.shape[1:]) for name, each in inputs.items()}
        seen = gradients(model, repeated, probability(answer), list(there), before=before)
        for name, rows in there.items():
            for row in rows:
                if part[row][1] == 0.0:
                    starts[name] = float(seen.value[row])
                else:
                    slopes[name] += seen.gradients[name][row, -1].double() / path.steps
    return {
        name: ((slope * (path.end[name] - path.start[name]).double()).cpu().numpy(), starts[name])
        for name, slope in slopes.items()
    }


def _held(start: torch.Tensor, end: torch.Tensor, rows: list[int], shares: list[float]) -> Any:
    """Sets the last position of some rows of `[rows, tokens, size]` to their points of the path."""

    def edit(tensor: torch.Tensor) -> torch.Tensor:
        share = torch.tensor(shares).to(tensor)[:, None]
        changed = tensor.clone()
        changed[rows, -1] = start.to(tensor) + share * (end - start).to(tensor)
        return changed

    return edit
