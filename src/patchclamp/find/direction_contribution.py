"""The direction of a class free of its context, and the neurons and heads that write it.

Each group holds one example of every class and is alike but for it (the same scenario told in every mood):

    centred = h - mean over the classes of its group         at the last token; what the group shares is gone
    difference of a class = mean over groups of centred
    contribution of a neuron = mean over the examples of the class of  activation * <output weights, direction>

A head's contribution is the sum of those of its neurons, those that enter the output projection: it is exactly how much
less of the direction the residual stream behind the attention would hold with the head at zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import nn

from patchclamp.directions import Directions
from patchclamp.errors import DataError, ModelError, SiteNotReached, unknown, warn
from patchclamp.model import Model, Site, load
from patchclamp.model.hooks import reading
from patchclamp.neurons import Neurons
from patchclamp.published import published

Examples = Sequence[str] | torch.Tensor | Mapping[str, torch.Tensor]
_TITLE = 'Do LLMs "Feel"? Emotion Circuits Discovery and Control'
_URL = "https://arxiv.org/abs/2510.11328"
_FEWEST_GROUPS = 10
_AT_ONCE = 64
_STREAMS = ("resid_mid.*", "resid_post.*")


@published(row="S033", title=_TITLE, authors="Wang et al.", year=2025, url=_URL, part="class directions")
def class_directions(
    model: Model | nn.Module,
    examples: Examples,
    classes: Sequence[Any],
    groups: Sequence[Any],
    sites: str | Site | Iterable[str | Site] = _STREAMS,
    *,
    least_groups: int = _FEWEST_GROUPS,
) -> Directions:
    """What tells each class from the others at the last token, free of what a group shares (Wang et al., 2025).

    Args:
        model: the model.
        examples: texts, a tensor `[examples, ...]`, or keywords. Give only those that are of their class indeed: the
            paper lets a judge read what the model writes to them.
        classes: `[examples]`, the class of each.
        groups: `[examples]`, its group: examples that differ in the class alone. A group that lacks a class, or has
            one twice, is left out with a warning.
        sites: where: the residual stream after attention (if the model lists that) and after the MLP for directions;
            `mlp.*` and `attn.*` for what a circuit is moved by.
        least_groups: fewer whole groups are an error.

    Returns:
        At each site the differences of the classes, in their order, not scaled: `.unit()` gives directions.

    Raises:
        DataError: one class, too few whole groups, not one class and group for each example.
        SiteNotReached: a pass never called a site.
    """
    model = model if isinstance(model, Model) else load(model)
    read = last_tokens(model, examples, _listed(model, sites))
    return grouped_differences(read, classes, groups, least_groups=least_groups)


def grouped_differences(
    values: Mapping[str, Any], classes: Sequence[Any], groups: Sequence[Any], *, least_groups: int = _FEWEST_GROUPS
) -> Directions:
    """`class_directions` of activations that are at hand: site -> `[examples, size]`.

    Raises:
        DataError: as `class_directions`.
    """
    names, which, rows = _whole_groups(classes, groups, least_groups)
    found = {}
    for site, each in values.items():
        given = np.asarray(each, np.float64)
        if len(given) != len(which):
            raise DataError(f"{site} has {len(given)} examples; there are {len(which)} classes")
        centred = given[rows] - given[rows].mean(1, keepdims=True)  # [groups, classes, size]
        found[site] = centred.mean(0)  # these sum to 0 over the classes
    return Directions(found, names)


@published(row="S033", title=_TITLE, authors="Wang et al.", year=2025, url=_URL, part="neurons")
def direction_contribution(
    model: Model | nn.Module,
    examples: Examples,
    classes: Sequence[Any],
    directions: Directions,
    sites: str | Site | Iterable[str | Site] = "mlp.*",
) -> Neurons:
    """Neurons by how much of the direction of a class they write at the last token (Wang et al., 2025).

    Args:
        model: the model.
        examples: texts, a tensor or keywords.
        classes: `[examples]`.
        directions: of the classes, by residual stream: those of `class_directions`, scaled to length 1 here. Neurons
            of an MLP are compared with those of `resid_post` of their layer, of attention with `resid_mid`, or with
            `resid_post` where there is none in the middle.
        sites: of neurons that write into the residual stream. A norm between the projection and the stream is left out
            of the account.

    Returns:
        All neurons: `score_<class>`; `score`, the largest of them, and `label`, its class. Best first.

    Raises:
        ModelError: neurons that write nowhere, or no directions where they write.
        DataError: a direction without length, not one class for each example.
        UnknownName: a class that has no direction.
    """
    model = model if isinstance(model, Model) else load(model)
    found = _contributions(model, examples, classes, directions, model.select(sites))
    tables = [_table(site.name, directions.names, each) for site, each in found]
    return Neurons.from_polars(pl.concat(tables).sort("score", descending=True, maintain_order=True))


@published(row="S033", title=_TITLE, authors="Wang et al.", year=2025, url=_URL, part="heads")
def head_contribution(
    model: Model | nn.Module,
    examples: Examples,
    classes: Sequence[Any],
    directions: Directions,
    sites: str | Site | Iterable[str | Site] = "attn.*",
) -> Neurons:
    """Attention heads by how much of the direction of a class they write at the last token (Wang et al., 2025).

    The paper zeroes one head after another and measures the drop before the MLP; as attention adds to that stream, the
    drop is known from one pass.

    Args:
        model: the model.
        examples: texts, a tensor or keywords.
        classes: `[examples]`.
        directions: as for `direction_contribution`.
        sites: of attention.

    Returns:
        The neurons of all heads, best head first, those of a head together: `head`, and `score`, `label`,
        `score_<class>` of the whole head. `pl.col("head") == 3` and a site choose one.

    Raises:
        ModelError: attention whose heads are not known, or as `direction_contribution`.
        DataError: as `direction_contribution`.
        UnknownName: a class that has no direction.
    """
    model = model if isinstance(model, Model) else load(model)
    chosen = model.select(sites)
    for site in chosen:
        if site.heads is None:
            raise ModelError(f"the heads of {site.name} are not known: it is of kind {site.kind!r}")
    tables = []
    for site, each in _contributions(model, examples, classes, directions, chosen):
        assert site.heads is not None
        width = len(each) // site.heads
        heads = each.reshape(site.heads, width, -1).sum(1)
        table = _table(site.name, directions.names, np.repeat(heads, width, axis=0))
        tables.append(table.with_columns(pl.Series("head", np.repeat(np.arange(site.heads), width))))
    frame = pl.concat(tables).sort("score", descending=True, maintain_order=True)
    # Heads with the same score would mix.
    order = frame.select("site", "head").unique(maintain_order=True).with_row_index("rank")
    frame = frame.join(order, on=["site", "head"], maintain_order="left").sort("rank", maintain_order=True)
    return Neurons.from_polars(frame.select("site", "index", "head", pl.exclude("site", "index", "head", "rank")))


@torch.no_grad()
def last_tokens(model: Model, examples: Examples, sites: Sequence[Site]) -> dict[str, np.ndarray]:
    """Site -> `[examples, size]` float64 at the last token that is no padding; of a plain vector, the vector.

    Raises:
        DataError: there are no examples, or a site that does not show tokens.
        SiteNotReached: the pass never called a site.
    """
    parts: dict[str, list[np.ndarray]] = {site.name: [] for site in sites}
    with model.evaluating():
        for inputs, mask in _batches(model, examples):
            with reading(model.module, sites) as captured:
                model.module(inputs) if isinstance(inputs, torch.Tensor) else model.module(**inputs)
            for site in sites:
                if not captured[site.name]:
                    raise SiteNotReached(f"the forward pass never called {site.name} ({site.module})")
                tensor = captured[site.name][-1].tensor
                if tensor.ndim not in (2, 3) or site.kind in ("pattern", "conv"):
                    raise DataError(f"{site.name} shows {list(tensor.shape)}, not [examples, tokens, neurons]")
                if tensor.ndim == 3:
                    length = tensor.shape[1]
                    at = torch.arange(length, device=tensor.device)
                    known = mask is not None and mask.shape == tensor.shape[:2]
                    last = (mask * (at + 1)).argmax(1) if mask is not None and known else length - 1
                    tensor = tensor[torch.arange(len(tensor), device=tensor.device), last]
                parts[site.name].append(tensor.double().cpu().numpy())
    found = {name: np.concatenate(each) for name, each in parts.items()}
    for name, each in found.items():
        if not np.isfinite(each).all():
            raise DataError(f"an activation at {name} is not finite")
    return found


# Helpers --------------------------------------------------------------------------------------------


def _listed(model: Model, sites: str | Site | Iterable[str | Site]) -> list[Site]:
    middle = any(site.kind == "resid_mid" for site in model.sites.values())
    return model.select("resid_post.*" if sites == _STREAMS and not middle else sites)


def _whole_groups(
    classes: Sequence[Any], groups: Sequence[Any], least: int
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names of the classes, the class of each example, and the examples of whole groups `[groups, classes]`."""
    names, which = _coded(classes)
    if len(names) < 2:
        raise DataError(f"there is one class, {', '.join(names)}: its direction is what tells it from others")
    if len(groups) != len(which):
        raise DataError(f"there are {len(which)} classes and {len(groups)} groups: one of each for an example")
    members: dict[Any, list[int]] = {}
    for place, group in enumerate(groups):
        members.setdefault(group, []).append(place)
    rows = []
    for each in members.values():
        order = sorted(each, key=lambda place: which[place])
        if [int(which[place]) for place in order] == list(range(len(names))):
            rows.append(order)
    if len(rows) < least:
        raise DataError(f"{len(rows)} of {len(members)} groups have each class once; at least {least} are needed")
    if len(rows) < len(members):
        warn(f"{len(members) - len(rows)} of {len(members)} groups do not have each class once, and are left out")
    return names, which, np.asarray(rows)


def _coded(classes: Sequence[Any]) -> tuple[list[str], np.ndarray]:
    named = [str(each) for each in classes]
    names = sorted(set(named))
    return names, np.asarray([names.index(each) for each in named], np.int64)


def _contributions(
    model: Model, examples: Examples, classes: Sequence[Any], directions: Directions, sites: Sequence[Site]
) -> list[tuple[Site, np.ndarray]]:
    """Each site with `[size, classes]`."""
    names, which = _coded(classes)
    for name in names:
        if name not in directions.names:
            raise unknown("direction", name, directions.names)
    wanted = {site.name: directions.at(_stream_after(model, site, directions)).unit() for site in sites}
    read = last_tokens(model, examples, sites)
    found = []
    for site in sites:
        activations = read[site.name]
        if len(activations) != len(which):
            raise DataError(f"there are {len(activations)} examples and {len(which)} classes")
        unit = next(iter(wanted[site.name].values()))
        written = model.output_weights(site).detach().double().cpu().numpy() @ unit.astype(np.float64).T
        total = np.zeros((activations.shape[1], directions.count))
        for column, name in enumerate(directions.names):
            if name in names:
                total[:, column] = activations[which == names.index(name)].mean(0) * written[:, column]
        found.append((site, total))
    return found


def _stream_after(model: Model, site: Site, directions: Directions) -> str:
    """The residual stream that the neurons of a site write into, among those that have directions."""
    prefix = f"{site.stack}." if site.stack else ""
    middle, end = f"{prefix}resid_mid.{site.layer}", f"{prefix}resid_post.{site.layer}"
    first = middle if site.kind == "attn" and middle in model.sites else end
    if first not in directions:
        raise ModelError(f"{site.name} writes into {first}; there are directions at {', '.join(directions.sites)} only")
    return first


def _table(site: str, names: Sequence[str], scores: np.ndarray) -> pl.DataFrame:
    best = scores.argmax(1)
    columns = {
        "site": [site] * len(scores),
        "index": np.arange(len(scores)),
        "score": scores.max(1),
        "label": [names[each] for each in best],
        **{f"score_{name}": scores[:, column] for column, name in enumerate(names)},
    }
    return pl.DataFrame(columns)


def _batches(
    model: Model, examples: Examples
) -> Iterable[tuple[torch.Tensor | Mapping[str, torch.Tensor], torch.Tensor | None]]:
    if isinstance(examples, torch.Tensor):
        if not len(examples):
            raise DataError("there are no examples")
        for part in examples.to(model.device).split(_AT_ONCE):
            yield part, None
    elif isinstance(examples, Mapping):
        inputs = {name: value.to(model.device) for name, value in examples.items()}
        yield inputs, inputs.get("attention_mask")
    else:
        texts = list(examples)
        if isinstance(examples, str) or not texts:
            raise DataError("examples are a list of texts, a tensor or a mapping of keywords; there are none")
        for start in range(0, len(texts), _AT_ONCE):
            inputs = model.inputs(texts[start : start + _AT_ONCE])
            yield inputs, inputs.get("attention_mask")
