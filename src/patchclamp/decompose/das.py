"""Distributed alignment search: the subspace of a site that carries one attribute, learned by swapping it.

A run on a base prompt is given, at one place, part of what the network had there on a source prompt. If that part is
what carries an attribute, the answer about the attribute becomes the source's, and answers about others stay:

    h  <-  h + R^T (R h_source - R h),    R [k, size] with orthonormal rows

`das` learns R from the source's answers alone (Geiger et al., 2024); `mdas` asks as well that the answers about other
attributes stay what they were (Huang et al., 2024). `dbm.py` does it with single neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from patchclamp.attribution import frozen
from patchclamp.decompose.interchange import Interchanges, Swap
from patchclamp.directions import Directions
from patchclamp.errors import DataError
from patchclamp.model import Model, Site
from patchclamp.progress import progress
from patchclamp.published import published

_part = partial(
    published,
    row="S141",
    title="RAVEL: Evaluating Interpretability Methods on Disentangling Language Model Representations",
    authors="Huang et al.",
    year=2024,
    url="https://arxiv.org/abs/2402.17700",
)


@_part(part="das")
def das(
    model: Model,
    site: str | Site,
    pairs: Iterable[Any] | Interchanges,
    attribute: str,
    k: int,
    *,
    rate: float = 1e-4,
    batch: int = 16,
    epochs: int = 3,
    seed: int = 0,
    show: bool = False,
) -> Subspace:
    """The k directions of a site whose swap makes the answer about an attribute the source's.

    Nothing asks them to leave other attributes alone: those that go with this one where they were learned may be in.
    The defaults are the paper's, for a network of 2304 dimensions; small ones want a larger rate.

    Args:
        model: the network; its weights are not changed.
        site: where to swap; usually `resid_post.<layer>`, or `module:a.b` of any torch module.
        pairs: base and source; those that ask for another attribute are left aside, as are those whose two answers
            are the same. What `Interchanges(model, site, pairs)` has prepared can be used again.
        attribute: what the base prompt asks for.
        k: how many directions.
        rate: of AdamW, without weight decay.
        batch: pairs in a step.
        epochs: how often each pair is seen.
        seed: of the first directions and the order.
        show: draw a progress bar.

    Returns:
        The subspace, with the loss (nats) of each step.

    Raises:
        DataError: a pair that cannot be used, none that asks for the attribute, more directions than the site has.
    """
    runs = Interchanges.of(model, site, pairs)
    return _aligned(runs, False, attribute, k, rate, batch, epochs, seed, show)


@_part(part="mdas")
def mdas(
    model: Model,
    site: str | Site,
    pairs: Iterable[Any] | Interchanges,
    attribute: str,
    k: int,
    *,
    rate: float = 1e-4,
    batch: int = 16,
    epochs: int = 3,
    seed: int = 0,
    show: bool = False,
) -> Subspace:
    """The k directions of a site whose swap changes the answer about one attribute, and about no other.

    Half of each batch asks for the attribute, and the source's answer is wanted; the other half asks for the others,
    equally often, and the base's answer is wanted.

    Args:
        model: as of `das`.
        site: as of `das`.
        pairs: as of `das`; those that ask for other attributes tell that these stay.
        attribute: as of `das`.
        k: as of `das`.
        rate: as of `das`.
        batch: as of `das`.
        epochs: how often each pair that asks for the attribute is seen.
        seed: as of `das`.
        show: as of `das`.

    Returns:
        The subspace, with the loss (nats) of each step.

    Raises:
        DataError: as `das`, or the pairs ask for no other attribute.
    """
    runs = Interchanges.of(model, site, pairs)
    return _aligned(runs, True, attribute, k, rate, batch, epochs, seed, show)


@dataclass(frozen=True, eq=False)
class Subspace:
    """Orthonormal directions in the space of a site, and the swap of what lies in them.

    Attributes:
        rows: `[k, size]` float32; k may be 0.
        site: whose space it is; "" where that is not said.
        losses: `[steps]` float64, nats, where the directions were learned.

    Raises:
        DataError: the rows are not orthonormal.
    """

    rows: torch.Tensor
    site: str = ""
    losses: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False)

    def __post_init__(self) -> None:
        rows = self.rows.detach().float()
        object.__setattr__(self, "rows", rows)
        off = (rows @ rows.T - torch.eye(len(rows), device=rows.device)).abs() if rows.ndim == 2 else torch.ones(1)
        if not (off < 1e-3).all():
            raise DataError(f"a subspace has orthonormal rows [k, size]; these, {list(rows.shape)}, are not")

    @classmethod
    def empty(cls, size: int, site: str = "") -> Subspace:
        """Of no directions: its swap changes nothing."""
        return cls(torch.zeros(0, size), site)

    @classmethod
    def whole(cls, size: int, site: str = "") -> Subspace:
        """Of all: its swap puts the source's state in the place of the base's."""
        return cls(torch.eye(size), site)

    @classmethod
    def of_neurons(cls, indices: Sequence[int] | np.ndarray, size: int, site: str = "") -> Subspace:
        """Of single neurons, that is coordinates of the site.

        Raises:
            DataError: an index that is none, or that comes twice.
        """
        wanted = [int(each) for each in indices]
        if len(set(wanted)) < len(wanted) or any(not 0 <= each < size for each in wanted):
            raise DataError(f"the neurons are different numbers from 0 to {size - 1}, not {wanted}")
        return cls(torch.eye(size)[wanted], site)

    @classmethod
    def spanned_by(cls, vectors: torch.Tensor, site: str = "") -> Subspace:
        """Of all that is a sum of some vectors, `[n, size]`, made orthonormal.

        Raises:
            DataError: a vector that is a sum of the others.
        """
        basis, left = torch.linalg.qr(vectors.detach().double().T)
        if len(vectors) > vectors.shape[1] or (left.diagonal().abs() < 1e-9 * left.abs().max()).any():
            raise DataError(f"the {len(vectors)} vectors do not span {len(vectors)} dimensions")
        return cls(basis.T.float().contiguous(), site)

    @classmethod
    def principal(cls, states: torch.Tensor, k: int | None = None, site: str = "") -> Subspace:
        """Of the first k principal components (None: all) of states, `[examples, size]`; the largest first.

        Raises:
            DataError: there are not so many.
        """
        most = min(states.shape)
        if k is not None and not 1 <= k <= most:
            raise DataError(f"{list(states.shape)} states have 1 to {most} principal components, not {k}")
        centred = states.detach().double() - states.detach().double().mean(0)
        return cls(torch.linalg.svd(centred, full_matrices=False)[2][:k].float().contiguous(), site)

    @property
    def k(self) -> int:
        """How many directions."""
        return len(self.rows)

    def only(self, places: Sequence[int] | np.ndarray) -> Subspace:
        """Some of the directions."""
        return Subspace(self.rows[torch.as_tensor(np.asarray(places, np.int64))], self.site)

    def swap(self, base: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """What `base` `[..., size]` becomes when its part in the subspace is that of `source`; of the type of `base`.

        Raises:
            DataError: states of another size.
        """
        if base.shape[-1] != self.rows.shape[-1]:
            raise DataError(f"a subspace of {self.rows.shape[-1]} dimensions, and states of {base.shape[-1]}")
        return swapped(base, source, self.rows)

    def angles(self, other: Subspace) -> np.ndarray:
        """Principal angles to another subspace, in degrees, the largest first: `[smaller k]` float64."""
        cosines = torch.linalg.svdvals(self.rows.double() @ other.rows.double().T)
        return np.degrees(np.arccos(np.clip(cosines.cpu().numpy(), 0, 1)))[::-1].copy()

    def directions(self, names: Sequence[str] | None = None) -> Directions:
        """The rows as `Directions`.

        Raises:
            DataError: it has none, or does not say of which site they are.
        """
        if not self.k or not self.site:
            raise DataError("an empty subspace has no directions" if not self.k else "of which site? it is not said")
        return Directions({self.site: self.rows}, names)


def swapped(base: torch.Tensor, source: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The swap itself, with gradient to `rows`; computed in float32 at least."""
    wide = torch.promote_types(base.dtype, torch.float32)
    rows = rows.to(base.device, wide)
    return (base.to(wide) + (source.to(wide) - base.to(wide)) @ rows.T @ rows).to(base.dtype)


# Helpers --------------------------------------------------------------------------------------------


def _aligned(
    runs: Interchanges,
    isolate: bool,
    attribute: str,
    k: int,
    rate: float,
    batch: int,
    epochs: int,
    seed: int,
    show: bool,
) -> Subspace:
    if not 1 <= k <= runs.size:
        raise DataError(f"k lies between 1 and the {runs.size} dimensions of {runs.site.name}; not {k}")
    drawn = torch.randn(runs.size, k, generator=torch.Generator().manual_seed(seed))
    free = nn.Parameter(torch.linalg.qr(drawn).Q.to(runs.states.device))

    def rows() -> torch.Tensor:
        # PyTorch's parametrization fills up the directions that are not wanted from the global generator.
        return torch.linalg.qr(free).Q.T

    losses = learned(
        runs,
        attribute,
        [free],
        lambda base, source: swapped(base, source, rows()),
        *(isolate, rate, batch, epochs, seed, show),
    )
    return Subspace(rows().detach().cpu().contiguous(), runs.site.name, losses)


def learned(
    runs: Interchanges,
    attribute: str,
    parameters: list[nn.Parameter],
    swap: Swap,
    isolate: bool,
    rate: float,
    batch: int,
    epochs: int,
    seed: int,
    show: bool,
    extra: Callable[[float], torch.Tensor | float] = lambda done: 0.0,
) -> np.ndarray:
    """Fit what a swap is made of; `extra` is told the share of the steps that is done, and adds to the loss.

    Returns:
        `[steps]` float64, the loss of each.
    """
    if batch < 2 or epochs < 1 or rate <= 0:
        raise DataError(f"batch is at least 2, epochs at least 1, rate above 0; not {batch}, {epochs}, {rate}")
    cause, others = runs.cause(attribute), runs.isolate(attribute) if isolate else {}
    generator = np.random.default_rng(seed)
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    each = batch // 2 if others else batch
    total, losses = epochs * -(-len(cause) // each), []
    with frozen(runs.model.module), torch.enable_grad(), progress("swapping", total, "steps", show) as bar:
        for _ in range(epochs):
            for part in np.array_split(generator.permutation(cause), -(-len(cause) // each)):
                asked = generator.permutation(list(others) * -(-len(part) // max(1, len(others))))[: len(part)]
                stay = np.asarray([generator.choice(others[name]) for name in asked], np.int64)
                want = np.repeat(["source", "base"], [len(part), len(stay)])
                added = extra(len(losses) / max(1, total - 1))
                loss = runs.losses(np.concatenate([part, stay]), want, swap).mean() + added
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                losses.append(loss.item())
                bar.advance(1)
    return np.asarray(losses)
