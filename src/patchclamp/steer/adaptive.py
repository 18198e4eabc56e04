"""Adaptive steering (G-ACT): several directions at each site, and a probe that picks the one for what it sees.

    difference(x) = h(x with what is wanted) - h(x without)         at the last token, one for each prompt
    clusters of these differences -> one steering direction each, their mean
    probe: h(x without) -> cluster, linear and softmax
    h <- h + strength * direction[argmax probe(h)]

One mean difference cancels where prompts want opposite shifts. The clusters are those of all sites together, so that
direction 2 is the same cluster at every site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from patchclamp.directions import Directions
from patchclamp.errors import DataError
from patchclamp.model import Model, Site
from patchclamp.model.hooks import Edit
from patchclamp.published import published
from patchclamp.steer.pooling import Examples, as_model, prepared, read_pooled

_FEWEST = 5
_TRIED = range(2, 6)


@published(
    row="S156",
    title="Steering Conceptual Bias via Transformer Latent-Subspace Activation",
    authors="Vansh Sharma and Venkat Raman",
    year=2025,
    url="https://arxiv.org/abs/2506.18887",
)
@dataclass(frozen=True, eq=False)
class AdaptiveSteering:
    """Steer each input along the direction that a probe picks for it (Sharma and Raman, 2025). Made by `fit`.

    An intervention for `model.intervene`: at every position the probe reads what is there, and picks.

    Attributes:
        directions: the mean difference of each cluster, "cluster 0" and so on, the same clusters at each site.
        probes: the probe of each site.
        amount: what a direction is multiplied by.
        relative: whether directions have the length of the activation they are added to, instead of their own.
        mixture: whether to add the mean of all directions, weighed by the probe, instead of the likeliest.
        labels: `[prompts]` int64, the cluster of each prompt.
        silhouettes: number of clusters -> mean silhouette, where the number was chosen by it.
        accuracy: site -> share of prompts whose cluster the probe tells, on the fifth it had not seen while that was
            tried; the probe that is kept saw all.
    """

    directions: Directions
    probes: Mapping[str, Probe] = field(repr=False)
    amount: float = 1.0
    relative: bool = False
    mixture: bool = False
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64), repr=False)
    silhouettes: Mapping[int, float] = field(default_factory=dict, repr=False)
    accuracy: Mapping[str, float] = field(default_factory=dict, repr=False)

    @classmethod
    def fit(
        cls,
        model: Model | nn.Module,
        with_: Examples,
        without: Examples,
        sites: str | Site | Sequence[str | Site] = "resid_post.*",
        *,
        clusters: int | None = None,
        strength: float = 1.0,
        relative: bool = False,
        mixture: bool = False,
        seed: int = 0,
    ) -> AdaptiveSteering:
        """Find the directions and train the probes.

        Args:
            model: what is steered.
            with_: prompts with what is wanted: texts, a tensor `[prompts, ...]`, or keywords.
            without: the same prompts without it, in the same order.
            sites: where, by name or glob. The paper steers a few layers.
            clusters: how many directions; None: 2 to 5, by silhouette.
            strength: what a direction is multiplied by.
            relative: give directions the length of the activation that they are added to.
            mixture: add the mean of the directions, weighed by the probe.
            seed: of k-means and of the prompts that are held out.

        Raises:
            DataError: not as many prompts with as without, differences that are all alike, a cluster of fewer than 5.
            SiteNotReached: a pass never called a site.
        """
        model = as_model(model)
        chosen = model.select(sites)
        before, difference = _differences(model, with_, without, chosen)
        joined = np.concatenate([_unit(each) for each in difference.values()], 1)
        labels, silhouettes = _clusters(joined, clusters, seed)
        count = int(labels.max()) + 1
        means = {name: np.stack([each[labels == k].mean(0) for k in range(count)]) for name, each in difference.items()}
        probes, accuracy = {}, {}
        held_out = np.zeros(len(labels), bool)
        held_out[np.random.default_rng(seed).permutation(len(labels))[: max(1, len(labels) // 5)]] = True
        for name, values in before.items():
            tried = Probe.fit(values[~held_out], labels[~held_out], count)
            accuracy[name] = float((tried.pick(values[held_out]) == labels[held_out]).mean())
            probes[name] = Probe.fit(values, labels, count)
        directions = Directions(means, [f"cluster {k}" for k in range(count)])
        made = cls(directions, probes, 1.0, relative, mixture, labels, silhouettes, accuracy)
        return made.strength(strength)

    def strength(self, amount: float) -> AdaptiveSteering:
        """The same steering with another strength.

        Raises:
            DataError: not a finite number.
        """
        if not np.isfinite(amount):
            raise DataError(f"strength is a finite number, not {amount!r}")
        return replace(self, amount=float(amount))

    def refined(
        self,
        model: Model | nn.Module,
        with_: Examples,
        without: Examples,
        *,
        steps: int = 50,
        learning_rate: float = 0.1,
    ) -> AdaptiveSteering:
        """The same directions with probes that went on learning from new prompts, each of the cluster nearest to it.

        How the paper refines its probes while they are used is not said where it could be read; this is gradient
        descent of the same cross-entropy.

        Raises:
            DataError: as `fit`.
        """
        model = as_model(model)
        before, difference = _differences(model, with_, without, model.select(self.directions.sites))
        joined = np.concatenate([_unit(each) for each in difference.values()], 1)
        centres = np.concatenate([_unit(self.directions[name]) for name in difference], 1)
        labels = (joined @ centres.T).argmax(1)
        probes = {name: self.probes[name].learned(before[name], labels, steps, learning_rate) for name in before}
        return replace(self, probes=probes)

    def edits(self, model: Model) -> dict[str, Edit]:
        """Site -> function from the site's tensor `[..., size]` to the changed one.

        Raises:
            UnknownName: the model has no such site.
            DataError: the site is of another width there.
        """
        found: dict[str, Edit] = {}
        for name in self.directions.sites:
            site, size = model.site(name), self.directions[name].shape[1]
            if site.size not in (None, size):
                raise DataError(f"{site.name} has {site.size} neurons here; the directions were found for {size}")
            found[site.name] = self._edit(name)
        return found

    def _edit(self, name: str) -> Edit:
        directions = torch.tensor(self.directions[name])
        if self.relative:
            directions = nn.functional.normalize(directions, dim=-1)
        probe = self.probes[name]

        def edit(tensor: torch.Tensor) -> torch.Tensor:
            logits = probe.logits(tensor)
            share = logits.softmax(-1) if self.mixture else nn.functional.one_hot(logits.argmax(-1), logits.shape[-1])
            added = share.to(tensor) @ directions.to(tensor)
            if self.relative:
                added = added * tensor.norm(dim=-1, keepdim=True)
            return tensor + self.amount * added

        return edit


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear softmax probe on standardised activations.

    Attributes:
        mean: `[size]` float32, of what it was trained on.
        scale: `[size]` float32, the standard deviation.
        weight: `[clusters, size]` float32.
        bias: `[clusters]` float32.
    """

    mean: torch.Tensor
    scale: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def fit(cls, values: np.ndarray, labels: np.ndarray, clusters: int, steps: int = 200) -> Probe:
        """Train on `values` `[prompts, size]` and `labels` `[prompts]` by Adam, with a little weight decay."""
        given = torch.from_numpy(values).float()
        scale = given.std(0, correction=0)
        # What never varied in training says nothing, and must not blow up elsewhere.
        scale = torch.where(scale > 1e-6 * scale.max().clamp(min=1e-12), scale, torch.inf)
        start = cls(given.mean(0), scale, torch.zeros(clusters, given.shape[1]), torch.zeros(clusters))
        return start.learned(values, labels, steps, 0.05)

    def learned(self, values: np.ndarray, labels: np.ndarray, steps: int, learning_rate: float) -> Probe:
        """A probe that went on learning for some steps."""
        weight, bias = (each.clone().requires_grad_() for each in (self.weight, self.bias))
        optimiser = torch.optim.AdamW([weight, bias], lr=learning_rate, weight_decay=0.01)
        given = self._scaled(torch.from_numpy(values).float())
        wanted = torch.from_numpy(labels).long()
        with torch.enable_grad():
            for _ in range(steps):
                optimiser.zero_grad()
                nn.functional.cross_entropy(given @ weight.T + bias, wanted).backward()
                optimiser.step()
        return replace(self, weight=weight.detach(), bias=bias.detach())

    def logits(self, tensor: torch.Tensor) -> torch.Tensor:
        """`[..., size]` -> `[..., clusters]` float32."""
        given = self._scaled(tensor.float())
        return given @ self.weight.to(given).T + self.bias.to(given)

    def pick(self, values: np.ndarray) -> np.ndarray:
        """The likeliest cluster of each row."""
        return self.logits(torch.from_numpy(values)).argmax(-1).numpy()

    def _scaled(self, tensor: torch.Tensor) -> torch.Tensor:
        return (tensor - self.mean.to(tensor)) / self.scale.to(tensor)


# Helpers --------------------------------------------------------------------------------------------


def _differences(
    model: Model, with_: Examples, without: Examples, sites: Sequence[Site]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Site -> `[prompts, size]`: what it shows without what is wanted, and how that differs from with it."""
    wanted, neutral = prepared(model, with_, "with_"), prepared(model, without, "without")
    if wanted.count != neutral.count:
        raise DataError(f"prompts are paired: {wanted.count} with what is wanted, {neutral.count} without")
    after, before = (read_pooled(model, each, sites, "last") for each in (wanted, neutral))
    shown = {name: each.cpu().numpy() for name, each in before.items()}
    difference = {name: each.cpu().numpy() - shown[name] for name, each in after.items()}
    for name, each in difference.items():
        if np.ptp(each, 0).max() <= 1e-6 * max(np.abs(each).max(), np.abs(shown[name]).max()):
            raise DataError(
                f"at {name} all prompts differ alike ({'not at all' if not each.any() else 'by one vector'}): there is "
                "nothing to pick from"
            )
    return shown, difference


def _unit(values: np.ndarray) -> np.ndarray:
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)


def _clusters(values: np.ndarray, clusters: int | None, seed: int) -> tuple[np.ndarray, dict[int, float]]:
    """The cluster of each row, larger clusters first, and the silhouettes that were compared."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    if clusters is not None and clusters < 1:
        raise DataError(f"clusters={clusters!r}: at least one")
    found: dict[int, np.ndarray] = {}
    smallest: dict[int, int] = {}
    for count in _TRIED if clusters is None else [clusters]:
        if count > len(values):
            smallest[count] = 0
            continue
        means: Any = KMeans
        fitted = means(count, n_init=10, random_state=seed).fit_predict(values)
        sizes = np.bincount(fitted, minlength=count)
        smallest[count] = int(sizes.min())
        if sizes.min() >= _FEWEST:
            rank = np.empty(count, np.int64)
            rank[np.argsort(-sizes, kind="stable")] = np.arange(count)
            found[count] = rank[fitted]
    if not found:
        count = min(smallest)
        raise DataError(
            f"of {count} clusters one has {smallest[count]} prompts; each needs {_FEWEST}: give more prompts, or fewer "
            "clusters"
        )
    if clusters is not None:
        return found[clusters], {}
    silhouettes = {count: float(silhouette_score(values, labels)) for count, labels in found.items()}
    return found[max(silhouettes, key=silhouettes.__getitem__)], silhouettes
