"""Hold activations while a network learns, to see which part of it a behaviour waits for.

    with clamped(network, Clamp("pattern.0", previous_token, neurons=[0])):
        for batch in batches: ...                                         # your own loop

In every forward pass the held activations are what was given, and the rest of the network learns beside them. What
is held does not depend on its own weights, which so get a gradient of zero; a value that is computed with gradients
passes them on. If the behaviour comes earlier with a part held as if it were already learned, it was waiting for that
part.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from patchclamp.errors import DataError, SiteNotReached, UnknownName
from patchclamp.model import Model, Site, load
from patchclamp.model.hooks import Edit, hooked, reading
from patchclamp.neurons import Neurons
from patchclamp.published import published

Value = float | torch.Tensor | Callable[[torch.Tensor], torch.Tensor]


@published(
    row="S044",
    title="What needs to go right for an induction head? A mechanistic study of in-context learning circuits and "
    "their formation",
    authors="Singh et al.",
    year=2024,
    url="https://arxiv.org/abs/2404.07129",
    part="clamp",
)
class Clamp:
    """Hold activations at given values at every step of training (Singh et al., 2024).

    A value for `clamped`; `model.intervene` takes it too, where the model lists the site.

    Args:
        where: `Neurons`, or a site by name or as `Site`, or several of them.
        value: what is put there. A number; a tensor; or a function that is given the activations of the held neurons,
            `[batch, tokens, neurons]` (of a pattern `[batch, heads, queries, keys]`), at each call, and returns what
            replaces them. A tensor has that shape, or one that broadcasts to it: `[tokens, neurons]`, or of a pattern
            `[queries, keys]` for all examples and heads alike, `[heads, queries, keys]`, `[batch, 1, queries, keys]`.
            Gradients flow into a tensor or a function's weights that ask for them.
        neurons: indices at the site, where only some are held; of a pattern they are heads. None: all.
        positions: indices of the tokens (of a pattern: of the queries) that are held; negative ones count from the
            end. None: all.

    Raises:
        DataError: a number or tensor that is not finite, indices that are no whole numbers, `neurons` beside `Neurons`.
    """

    def __init__(
        self,
        where: Neurons | str | Site | Iterable[str | Site],
        value: Value,
        *,
        neurons: Sequence[int] | None = None,
        positions: Sequence[int] | None = None,
    ) -> None:
        if isinstance(where, Neurons):
            if neurons is not None:
                raise DataError("Clamp(neurons=...) chooses at sites; the table that is given says which already")
            self.places: dict[str | Site, tuple[int, ...] | None] = {
                site: tuple(where.indices(site).tolist()) for site in where.sites
            }
        else:
            listed: list[str | Site] = [where] if isinstance(where, (str, Site)) else list(where)
            chosen = None if neurons is None else _whole(neurons, "neurons")
            self.places = dict.fromkeys(listed, chosen)
        if not self.places or any(each == () for each in self.places.values()):
            raise DataError("Clamp() holds nothing: there are no neurons")
        self.value = value if callable(value) else _finite(value)
        self.positions = None if positions is None else _whole(positions, "positions")

    def __repr__(self) -> str:
        names = ", ".join(str(getattr(each, "name", each)) for each in self.places)
        return f"Clamp({names}, {'a function' if callable(self.value) else list(self.value.shape) or 'a number'})"

    def edits(self, model: Model) -> dict[str, Edit]:
        """Site -> function from the site's tensor `[..., size]` to the changed one.

        Raises:
            UnknownName: the model has no such site, or the site no such neuron or head.
        """
        return {site.name: self._edit(site, indices) for site, indices in self.held(model)}

    def held(self, model: Model) -> list[tuple[Site, tuple[int, ...] | None]]:
        """The sites, and which neurons of each; None for all.

        Raises:
            UnknownName: as `edits`.
        """
        found: list[tuple[Site, tuple[int, ...] | None]] = []
        for place, indices in self.places.items():
            for site in model.select(place):
                if indices is not None and site.size is not None and max(indices) >= site.size:
                    what = "heads" if site.kind == "pattern" else "neurons"
                    raise UnknownName(f"{site.name}:{max(indices)} does not exist: there are {site.size} {what}")
                found.append((site, indices))
        return found

    def _edit(self, site: Site, indices: tuple[int, ...] | None) -> Edit:
        pattern = site.kind == "pattern"

        def edit(tensor: torch.Tensor) -> torch.Tensor:
            size = tensor.shape[-1]
            columns = torch.arange(size) if indices is None else torch.tensor(indices)
            if int(columns.max()) >= size:
                raise UnknownName(f"{site.name}:{int(columns.max())} does not exist: there are {size} neurons")
            columns = columns.to(tensor.device)
            old = tensor[..., columns]
            given = self._given(site, old.movedim(-1, 1) if pattern else old)
            new = given.movedim(1, -1) if pattern else given
            if self.positions is not None:
                new = torch.where(_at(site, self.positions, old), new, old)
            return tensor.index_copy(-1, columns, new)

        return edit

    def _given(self, site: Site, old: torch.Tensor) -> torch.Tensor:
        """The value in the shape of what it replaces."""
        value = self.value(old) if callable(self.value) else self.value
        if not isinstance(value, torch.Tensor):
            raise DataError(f"the function of a clamp at {site.name} returned {type(value).__name__}, not a tensor")
        try:
            return value.to(old.device, old.dtype).expand(old.shape)
        except RuntimeError as error:
            raise DataError(
                f"the value to hold at {site.name} is {list(value.shape)}, but there it computes {list(old.shape)}: "
                "was it made for sequences of another layout?"
            ) from error


@contextmanager
def clamped(network: Model | nn.Module, *clamps: Clamp) -> Iterator[None]:
    """While the block runs, hold activations in every call of the network; then take everything off again.

    Args:
        network: what learns; its mode and its weights are left as they are.
        clamps: what is held.

    Raises:
        DataError: two clamps hold the same neuron.
        UnknownName: a site, neuron or head that is not there.
        SiteNotReached: the network was called, but a held site never was.
    """
    model = network if isinstance(network, Model) else load(network)
    edits: list[tuple[Site, Edit]] = []
    reached: set[str] = set()
    calls: list[None] = []
    for site, edit in _without_overlap(model, clamps):
        edits.append((site, _noting(edit, site.name, reached)))
    with hooked(model.module, edits):
        counting = model.module.register_forward_hook(lambda *_: calls.append(None) if not calls else None)
        try:
            yield
        finally:
            counting.remove()
    missed = [site.name for site, _ in edits if site.name not in reached]
    if calls and missed:
        raise SiteNotReached(f"the clamp had no effect at {missed[0]}: the network was called, but never this site")


def preserved(
    network: Model | nn.Module, inputs: Any, sites: str | Site | Iterable[str | Site], *, gradient: bool = False
) -> list[Clamp]:
    """Clamps that hold sites at what they are on these inputs now: beside an ablation, they stop its further effects.

    A head that is ablated changes what later heads look at, and what they copy. With their patterns preserved, only the
    second remains; with their values preserved, only the first. Sites of another network of the same shape graft that
    network's activations.

    Args:
        network: what is run once, outside of any ablation.
        inputs: a tensor, or a mapping of keywords.
        sites: what is held.
        gradient: whether the held values pass gradients on to this first run.

    Raises:
        SiteNotReached: the pass never called a site.
    """
    model = network if isinstance(network, Model) else load(network)
    chosen = model.select(sites)
    with torch.set_grad_enabled(gradient and torch.is_grad_enabled()), reading(model.module, chosen) as captured:
        model.module(**inputs) if isinstance(inputs, Mapping) else model.module(inputs)
    held = []
    for site in chosen:
        if not captured[site.name]:
            raise SiteNotReached(f"the forward pass never called {site.name}")
        tensor = captured[site.name][-1].tensor
        held.append(Clamp(site, tensor.movedim(-1, 1) if site.kind == "pattern" else tensor))
    return held


# Helpers --------------------------------------------------------------------------------------------


def _without_overlap(model: Model, clamps: Sequence[Clamp]) -> list[tuple[Site, Edit]]:
    edits: list[tuple[Site, Edit]] = []
    taken: list[tuple[str, tuple[int, ...] | None, tuple[int, ...] | None]] = []
    for clamp in clamps:
        for site, indices in clamp.held(model):
            for name, others, positions in taken:
                if name == site.name and _meet(indices, others) and _meet(clamp.positions, positions):
                    raise DataError(f"two clamps hold the same neurons of {name}: which of the values is meant?")
            taken.append((site.name, indices, clamp.positions))
            edits.append((site, clamp._edit(site, indices)))
    return edits


def _meet(some: tuple[int, ...] | None, others: tuple[int, ...] | None) -> bool:
    """Whether they share an index; None is all. Positions from both ends may be the same: they count as such."""
    if some is None or others is None or (min(some) < 0) != (min(others) < 0):
        return True
    return bool(set(some) & set(others))


def _at(site: Site, positions: tuple[int, ...], tensor: torch.Tensor) -> torch.Tensor:
    """Bool `[1, tokens, 1, ...]`: which positions are held."""
    if tensor.ndim < 3:
        raise DataError(f"{site.name} has no positions to choose from: its tensor here is {list(tensor.shape)}")
    length = tensor.shape[1]
    for each in positions:
        if not -length <= each < length:
            raise DataError(f"Clamp(positions=...): there is no position {each} at {site.name}; there are {length}")
    held = torch.zeros(length, dtype=torch.bool, device=tensor.device)
    held[[each % length for each in positions]] = True
    return held.reshape(1, length, *[1] * (tensor.ndim - 2))


def _whole(given: Any, what: str) -> tuple[int, ...]:
    try:
        if isinstance(given, str) or any(isinstance(each, bool) for each in given):
            raise TypeError
        found = tuple(operator.index(each) for each in given)
    except TypeError as error:
        raise DataError(f"Clamp({what}=...) is a list of whole numbers, not {given!r:.60}") from error
    if len(set(found)) < len(found) or (what == "neurons" and any(each < 0 for each in found)):
        raise DataError(f"Clamp({what}=...): {given!r:.60} names one twice, or one below 0")
    return found


def _finite(value: Any) -> torch.Tensor:
    try:
        given = value if isinstance(value, torch.Tensor) else torch.as_tensor(value, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"Clamp() takes a number, a tensor or a function, not {value!r:.60}") from error
    if not given.is_floating_point() or not bool(given.isfinite().all()):
        raise DataError("Clamp() holds finite numbers; the tensor has a NaN, an infinity, or is of whole numbers")
    return given


def _noting(edit: Edit, name: str, reached: set[str]) -> Edit:
    def wrapped(tensor: torch.Tensor) -> torch.Tensor:
        reached.add(name)
        return edit(tensor)

    return wrapped
