"""`steer`: add directions to what sites carry."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Literal

import numpy as np
import torch

from patchclamp.directions import Directions
from patchclamp.errors import DataError
from patchclamp.intervene.where import Positions, Where
from patchclamp.model.model import Model

Edit = Callable[[torch.Tensor], torch.Tensor]


def steer(
    directions: Directions,
    strength: float = 1.0,
    *,
    relative: bool = False,
    how: Literal["add", "project_out"] = "add",
    positions: Positions = None,
    examples: Iterable[int] | None = None,
) -> Steer:
    """Add directions to a site's tensor, or take out of it what lies along them.

    Args:
        directions: at each site the sum of its directions is added, times the strength.
        strength: a finite number; with `relative`, in units of the length of the tensor's own vector at each position,
            the direction being scaled to length 1.
        relative: see `strength`.
        how: `"add"`, or `"project_out"`: `strength` 1 takes the component along the directions (their span) out, 2
            mirrors it.
        positions: numbers of tokens in each text, without padding; negative ones count from the end. Or "prompt" or
            "generated", while `generate` runs. None for all.
        examples: the rows of a batch. None for all.

    Raises:
        DataError: no directions, the strength is not a finite number, or `relative` where nothing is added, or where
            the directions of a site add up to nothing.
    """
    if not isinstance(directions, Directions):
        raise DataError(f'steer takes pc.Directions({{"resid_post.3": vector}}), not {type(directions).__name__}')
    if isinstance(strength, bool) or not isinstance(strength, Real) or not math.isfinite(strength):
        raise DataError(f"steer() takes a finite strength, not {strength!r}")
    if how not in ("add", "project_out"):
        raise DataError(f'steer(how=...) is "add" or "project_out", not {how!r}')
    if relative and how == "project_out":
        raise DataError('steer(relative=True) is for how="add": what is projected out has a length of its own')
    for site, vectors in directions.items() if relative else ():
        if not np.linalg.norm(vectors.sum(0)) > 0:
            raise DataError(f"the directions at {site} add up to length 0, which cannot be scaled")
    return Steer(directions, float(strength), bool(relative), how, Where.of(positions, examples, "steer"))


@dataclass(frozen=True, eq=False)
class Steer:
    """Add directions, or project them out. Made by `steer`.

    Attributes:
        directions: by site.
        strength: what they are multiplied by.
        relative: whether the strength is in units of the length of the tensor's vectors.
        how: `"add"` or `"project_out"`.
        where: the positions and examples at which it acts; None for all.
    """

    directions: Directions = field(repr=False)
    strength: float
    relative: bool = False
    how: Literal["add", "project_out"] = "add"
    where: Where | None = None

    kind = "steer"

    def __eq__(self, other: object) -> bool:
        mine = (self.strength, self.relative, self.how, self.where)
        return (
            isinstance(other, Steer)
            and mine == (other.strength, other.relative, other.how, other.where)
            and self.directions == other.directions
        )

    __hash__ = None  # type: ignore[assignment]

    def edits(self, model: Model) -> dict[str, Edit]:
        """Site -> function from the site's tensor `[..., size]` to the changed one (a new tensor, same type).

        Raises:
            UnknownName: the model has no such site.
            DataError: directions of another width than the site.
        """
        found: dict[str, Edit] = {}
        for name, vectors in self.directions.items():
            site = model.site(name)
            if site.name in found:
                raise DataError(f"steer() is given directions twice at {site.name}, once as {name}")
            if site.size is not None and site.size != vectors.shape[1]:
                raise DataError(f"{site.name} has {site.size} neurons; the directions there have {vectors.shape[1]}")
            found[site.name] = self._edit(site.name, torch.from_numpy(vectors.copy()))
        return found

    def at_random(self, generator: np.random.Generator) -> Steer:
        """The same with directions drawn at random, as long as these are."""
        drawn = {}
        for site, vectors in self.directions.items():
            new = generator.standard_normal(vectors.shape)
            lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
            drawn[site] = new / np.linalg.norm(new, axis=1, keepdims=True) * lengths
        return replace(self, directions=Directions(drawn, self.directions.names))

    def _edit(self, name: str, vectors: torch.Tensor) -> Edit:
        if self.how == "project_out":
            basis = _span(vectors)

            def take_out(tensor: torch.Tensor) -> torch.Tensor:
                there = _fits(name, basis, tensor)
                return tensor - self.strength * ((tensor @ there.T) @ there)

            return take_out
        total = vectors.sum(0, keepdim=True)
        total = total / total.norm() if self.relative else total

        def add(tensor: torch.Tensor) -> torch.Tensor:
            added = self.strength * _fits(name, total, tensor)[0]
            return tensor + (added * tensor.norm(dim=-1, keepdim=True) if self.relative else added)

        return add


def _span(vectors: torch.Tensor) -> torch.Tensor:
    """`[rank, size]`, an orthonormal basis: directions that overlap, or are the same, are not taken out twice."""
    _, sizes, basis = torch.linalg.svd(vectors.double(), full_matrices=False)
    # The vectors are float32, and so are those of them that are sums of others.
    return basis[sizes > sizes.max() * 1e-6].to(torch.float32)


def _fits(name: str, vectors: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.shape[-1] != vectors.shape[1]:
        raise DataError(f"{name} has {tensor.shape[-1]} neurons; the directions there have {vectors.shape[1]}")
    return vectors.to(tensor)
