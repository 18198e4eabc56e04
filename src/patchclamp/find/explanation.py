"""`Explanation`: what `explain` found, as tables, as a sentence and as a picture."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import polars as pl
import torch

from patchclamp.attribution import Gradients
from patchclamp.errors import StoreError
from patchclamp.model import Model, Site
from patchclamp.neurons import Neurons

What = Literal["token", "class", "similarity"]


class Part(NamedTuple):
    """What one part of a network wrote into the logit: the neurons of a site, or one number."""

    kind: str  # "site", "embedding", "biases", "rest" or "soft cap"
    layer: int | None
    values: torch.Tensor | float
    site: Site | None = None

    @property
    def total(self) -> float:
        """Of all its neurons."""
        return float(self.values.sum()) if isinstance(self.values, torch.Tensor) else self.values


class Completeness(NamedTuple):
    """Whether the direct contributions sum up to what they explain."""

    value: float
    """The logit, or the difference of two."""
    sum: float
    """Of all neurons, heads, biases, the embedding and what a soft cap takes off."""
    rest: float
    """What blocks do beside that: routed experts, a layer scale."""
    error: float
    """`value - sum - rest`: rounding."""


@dataclass(frozen=True, eq=False)
class Explanation:
    """Which neurons and heads wrote a token, chose a class, or made two texts alike.

    "Direct" is what a neuron wrote into the logit at the last token, the size of every norm held as it was; null where
    that is not known. "Gradient" is gradient times activation, summed over tokens: the change to first order,
    by whatever way, if the neuron were silent, with the sign turned.

    Attributes:
        model: name of the model.
        what: "token", "class" or "similarity".
        prompt: the text; empty for an image.
        target: the token, the class, or the other text.
        foil: the other token or class, or None.
        value: the logit, the difference of two logits, or the cosine.
        probabilities: of the target, and of the foil; empty for a similarity.
        neurons: every neuron, the largest `direct` first (`gradient`, where there is none): with `direct`,
            `gradient`, `position` and `token`, where the gradient part is largest.
        heads: `site`, `head`, `direct`, `gradient`, `attends_to` (the token that the last one attends to most),
            `position` of that and `attention`, the share; in the order of the neurons.
        by_layer: `layer` (null for what belongs to none), `part` ("embedding", "heads", "neurons", "biases",
            "rest", "soft cap"), `direct`, `gradient`.
        by_token: `position`, `token`, `gradient`: of the embeddings at that token.
        completeness: `Completeness`, or None where there is no direct part.
        why_no_direct: the reason, where there is none.
        k: how many the sentence and the picture show.
    """

    model: str
    what: What
    prompt: str
    target: str
    foil: str | None
    value: float
    probabilities: tuple[float, ...]
    neurons: Neurons = field(repr=False)
    heads: pl.DataFrame = field(repr=False)
    by_layer: pl.DataFrame = field(repr=False)
    by_token: pl.DataFrame = field(repr=False)
    completeness: Completeness | None
    why_no_direct: str = field(repr=False)
    k: int = field(repr=False)

    @property
    def ranked_by(self) -> Literal["direct", "gradient"]:
        """The column that the tables are ordered by."""
        return "gradient" if self.completeness is None else "direct"

    def sentence(self) -> str:
        """What was found, in words; no more than the numbers say."""
        return _sentence(self)

    def picture(self, path: str | os.PathLike[str] | None = None) -> str:
        """An SVG: tokens shaded by what their embeddings contribute, layers, the first neurons and heads.

        Args:
            path: where to write it too.

        Raises:
            StoreError: it cannot be written.
        """
        from patchclamp.find.explanation_picture import drawn

        made = drawn(self)
        if path is not None:
            try:
                Path(path).write_text(made, encoding="utf-8")
            except OSError as error:
                raise StoreError(f"cannot write {path}: {error.strerror or error}") from error
        return made

    def _repr_html_(self) -> str:
        return f"<div>{self.picture()}<p>{html.escape(self.sentence())}</p></div>"


def assembled(
    model: Model,
    what: What,
    prompt: str,
    seen: Gradients,
    *,
    tokens: Sequence[str],
    names: Sequence[str],
    probabilities: Sequence[float],
    k: int,
    parts: Sequence[Part] = (),
    attended: Mapping[str, torch.Tensor] | None = None,
    why: str = "",
) -> Explanation:
    """The tables, of what a pass showed and of the direct parts."""
    value = float(seen.value[0])
    products = {name: (seen.activations[name][0] * slope[0]).double() for name, slope in seen.gradients.items()}
    direct = {part.site.name: part.values for part in parts if part.site is not None}
    if any(part.kind == "rest" for part in parts):
        # Experts that were not given the last token wrote nothing there.
        idle = [name for name in products if name not in direct and model.site(name).kind == "expert"]
        direct |= {name: torch.zeros(products[name].shape[-1]) for name in idle}
    ranked_by = "direct" if parts else "gradient"
    sites = [model.site(name) for name in products]
    neurons = [_of_neurons(site, products[site.name], direct, tokens) for site in sites if _has_neurons(site)]
    heads = [
        _of_heads(site, products[site.name], direct, tokens, (attended or {}).get(site.name))
        for site in sites
        if site.kind == "attn"
    ]
    table = pl.concat([*neurons, _NEURONS.clear()]).sort(ranked_by, descending=True, nulls_last=True)
    completeness = None
    if parts:
        rest = sum(part.total for part in parts if part.kind == "rest")
        total = sum(part.total for part in parts) - rest
        completeness = Completeness(value, total, rest, value - total - rest)
    return Explanation(
        model.name,
        what,
        prompt,
        names[0],
        names[1] if len(names) > 1 else None,
        value,
        tuple(probabilities),
        Neurons.from_polars(table),
        pl.concat([*heads, _HEADS.clear()]).sort(ranked_by, descending=True, nulls_last=True),
        _by_layer(sites, products, parts),
        _by_token(sites, products, tokens),
        completeness,
        why,
        k,
    )


# Helpers --------------------------------------------------------------------------------------------

_NEURONS = pl.DataFrame(
    schema={
        "site": pl.String,
        "index": pl.Int64,
        "direct": pl.Float64,
        "gradient": pl.Float64,
        "position": pl.Int64,
        "token": pl.String,
    }
)
_HEADS = pl.DataFrame(
    schema={
        "site": pl.String,
        "head": pl.Int64,
        "direct": pl.Float64,
        "gradient": pl.Float64,
        "attends_to": pl.String,
        "position": pl.Int64,
        "attention": pl.Float64,
    }
)


def _has_neurons(site: Site) -> bool:
    return site.kind != "attn" and not site.kind.startswith("resid")


def _of_neurons(
    site: Site, product: torch.Tensor, direct: Mapping[str, torch.Tensor | float], tokens: Sequence[str]
) -> pl.DataFrame:
    rows = product.reshape(-1, product.shape[-1]).cpu()
    position = rows.abs().argmax(0).tolist()
    return pl.DataFrame(
        {
            "site": [site.name] * rows.shape[1],
            "index": np.arange(rows.shape[1]),
            "direct": _listed(direct.get(site.name), rows.shape[1]),
            "gradient": rows.sum(0).tolist(),
            "position": position,
            "token": [tokens[each] if each < len(tokens) else None for each in position],
        },
        schema=_NEURONS.schema,
    )


def _of_heads(
    site: Site,
    product: torch.Tensor,
    direct: Mapping[str, torch.Tensor | float],
    tokens: Sequence[str],
    pattern: torch.Tensor | None,
) -> pl.DataFrame:
    heads = site.heads or 1
    rows = product.reshape(-1, heads, product.shape[-1] // heads).cpu()
    written = direct.get(site.name)
    share, position = (None, None) if pattern is None else pattern.float().max(0)
    place = [None] * heads if position is None else position.tolist()
    return pl.DataFrame(
        {
            "site": [site.name] * heads,
            "head": list(range(heads)) if site.heads else [None],
            "direct": _listed(written.reshape(heads, -1).sum(1) if isinstance(written, torch.Tensor) else None, heads),
            "gradient": rows.sum((0, 2)).tolist(),
            "attends_to": [tokens[each] if each is not None and each < len(tokens) else None for each in place],
            "position": place,
            "attention": [None] * heads if share is None else share.tolist(),
        },
        schema=_HEADS.schema,
    )


def _listed(values: torch.Tensor | float | None, count: int) -> list:
    return values.cpu().tolist() if isinstance(values, torch.Tensor) else [None] * count


def _by_layer(sites: Sequence[Site], products: Mapping[str, torch.Tensor], parts: Sequence[Part]) -> pl.DataFrame:
    direct: dict[tuple[int | None, str], float] = {}
    slopes: dict[tuple[int | None, str], float] = {}
    for part in parts:
        kind = part.kind if part.site is None else _kind(part.site)
        direct[part.layer, kind] = direct.get((part.layer, kind), 0.0) + part.total
    for site in sites:
        key = (None, "embedding") if site.kind == "resid_pre" else (site.layer, _kind(site))
        slopes[key] = slopes.get(key, 0.0) + float(products[site.name].sum())
    keys = sorted({*direct, *slopes}, key=_in_order)
    rows = [(*key, direct.get(key), slopes.get(key)) for key in keys]
    schema = {"layer": pl.Int64, "part": pl.String, "direct": pl.Float64, "gradient": pl.Float64}
    return pl.DataFrame(rows, schema=schema, orient="row")


def _kind(site: Site) -> str:
    return "heads" if site.kind == "attn" else "neurons"


def _in_order(key: tuple[int | None, str]) -> tuple[float, int]:
    order = ["embedding", "heads", "neurons", "biases", "rest", "soft cap"]
    layer = key[0] if key[0] is not None else -1 if key[1] == "embedding" else np.inf
    return float(layer), order.index(key[1])


def _by_token(sites: Sequence[Site], products: Mapping[str, torch.Tensor], tokens: Sequence[str]) -> pl.DataFrame:
    first = next((site.name for site in sites if site.kind == "resid_pre"), None)
    each = [] if first is None or not tokens else products[first].sum(-1).flatten().tolist()
    shown = list(tokens) if each else []
    schema = {"position": pl.Int64, "token": pl.String, "gradient": pl.Float64}
    return pl.DataFrame({"position": range(len(shown)), "token": shown, "gradient": each}, schema=schema)


def _sentence(found: Explanation) -> str:
    return " ".join([_asked(found), *_direct_words(found), _gradient_words(found)])


def _asked(found: Explanation) -> str:
    if found.what == "similarity":
        return f"The cosine of {_short(found.prompt)} and {_short(found.target)} is {found.value:.3f}."
    after = f" after {_short(found.prompt)}" if found.prompt else ""
    if found.foil is None:
        said = f"The logit of {_short(found.target)}{after} is {found.value:.2f}"
        return f"{said} (probability {found.probabilities[0]:.3g})."
    said = f"The logit of {_short(found.target)}{after} less that of {_short(found.foil)} is {found.value:+.2f}"
    return f"{said} (probabilities {found.probabilities[0]:.3g} and {found.probabilities[1]:.3g})."


def _direct_words(found: Explanation) -> list[str]:
    if found.completeness is None:
        return [f"There is no direct part: {found.why_no_direct}." if found.why_no_direct else ""]
    best = [
        f"{site}:{index} {direct:+.2f}"
        for site, index, direct in found.neurons.to_polars().select("site", "index", "direct").iter_rows()
        if direct is not None and direct >= 0.005
    ]
    totals = found.by_layer.drop_nulls("direct").group_by("part", maintain_order=True).agg(pl.col("direct").sum())
    summed = ", ".join(f"{part} {direct:+.2f}" for part, direct in totals.iter_rows() if abs(direct) >= 0.005)
    words = [f"Direct parts, with the sizes of norms held as they were, sum to it: {summed}."] if summed else []
    if best:
        words.append(f"The neurons that wrote most of it directly: {', '.join(best[: found.k])}.")
    heads = [
        f"{site} head {head} {direct:+.2f}" + (f" (looks most at {token!r})" if token is not None else "")
        for site, head, direct, token in found.heads.select("site", "head", "direct", "attends_to").iter_rows()
        if direct is not None and direct >= 0.005 and head is not None
    ]
    if heads:
        words.append(f"The heads: {', '.join(heads[: min(found.k, 5)])}.")
    return words


def _gradient_words(found: Explanation) -> str:
    table = found.neurons.top(found.k, by="gradient").to_polars().filter(pl.col("gradient") > 0)
    best = [
        f"{site}:{index} {each:+.2g}" for site, index, each in table.select("site", "index", "gradient").iter_rows()
    ]
    if not best:
        return "To first order no neuron raises it."
    return f"To first order, by gradient times activation, it owes most to: {', '.join(best)}."


def _short(text: str, most: int = 60) -> str:
    shown = text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 2 :]}"
    return repr(shown)
