"""`patch`: put activations of another run in the place of the model's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from patchclamp.errors import DataError, UnknownName, unknown
from patchclamp.intervene.where import Positions, Where
from patchclamp.model.applying import SeenEdit, located, on_tensor
from patchclamp.model.calls import Call
from patchclamp.model.layout import layout_of
from patchclamp.model.model import Model
from patchclamp.model.site import Site
from patchclamp.model.taps import Seen
from patchclamp.neurons import Neurons

Edit = Callable[[torch.Tensor], torch.Tensor]


def patch(
    where: Neurons | str | Site | Iterable[str | Site],
    source: torch.Tensor | Mapping[str, torch.Tensor],
    positions: Positions = None,
    *,
    examples: Iterable[int] | None = None,
) -> Patch:
    """Put given activations in the place of the model's own, as `model.activations` gave them on another input.

    Args:
        where: neurons, or whole sites: a name, a `Site`, or several of them.
        source: site -> its activations; further sites are left aside. One tensor will do for a single site. The
            shape is that of the site in the run that is patched, `[batch, tokens, size]`, or without the batch, so that
            every example is given the same: `[tokens, size]`, as `model.activations` gives it for a text. For
            `Neurons` the last axis is the whole site, or only the neurons in the order of the table. A recurrent site
            takes `[examples, steps, size]`, or `[steps, size]`; a `pattern` site `[heads, queries, keys]`, with or
            without the batch in front. The values are copied; they are converted to the model's type and device, and
            no gradient flows into them.
        positions: numbers of the tokens of each text (of a pattern: of the queries) at which to replace, without
            padding; negative ones count from the end of the text, while generating from that of the prompt. None for
            all.
        examples: the rows of a batch in which to replace. None for all.

    Returns:
        An intervention for `model.intervene`. While it runs, each call raises `DataError` where the activations do
        not have the shape of what they replace, or a position lies outside.

    Raises:
        DataError: the activations are not finite numbers, or the positions no whole numbers.
        UnknownName: `source` has no activations for a site of `where`.
    """
    neurons = where if isinstance(where, Neurons) else None
    places = where.sites if isinstance(where, Neurons) else _places(where)
    names = [_name(place) for place in places]
    if len(set(names)) < len(names):
        raise DataError(f"patch() is given a site twice: {next(name for name in names if names.count(name) > 1)}")
    if isinstance(source, Mapping):
        given = {_name(place): each for place, each in source.items()}
    elif len(names) == 1:
        given = {names[0]: source}
    else:
        raise DataError(
            f"patch() takes one tensor for one site, not for {len(names)}: give a mapping from site to tensor"
        )
    for name in names:
        if name not in given:
            raise unknown("site of the source", name, given)
    values = {name: _checked_values(name, given[name]) for name in names}
    return Patch(tuple(places), values, neurons, Where.of(positions, examples, "patch"))


@dataclass(frozen=True, eq=False)
class Patch:
    """Replace activations by given ones. Made by `patch`.

    Attributes:
        sites: where.
        values: name of a site -> the activations that are put there.
        neurons: the neurons that are replaced; None for whole sites.
        where: the positions and examples at which they are replaced; None for all.
    """

    sites: tuple[str | Site, ...]
    values: Mapping[str, torch.Tensor] = field(repr=False)
    neurons: Neurons | None = None
    where: Where | None = None

    kind = "patch"

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Patch)
            and (self.sites, self.where) == (other.sites, other.where)
            and self.neurons == other.neurons
            and all(torch.equal(each, other.values[name]) for name, each in self.values.items())
        )

    __hash__ = None  # type: ignore[assignment]

    def edits(self, model: Model) -> dict[str, Edit]:
        """Site -> function from the site's tensor `[..., size]` to the changed one (a new tensor, same type).

        Raises:
            UnknownName: the model has no such site, or the site no such neuron.
        """
        found: dict[str, Edit] = {}
        for place in self.sites:
            site = model.site(place)
            if site.name in found:
                raise DataError(f"patch() is given a site twice: {site.name}, once as {_name(place)}")
            indices = None
            if self.neurons is not None:
                indices = torch.from_numpy(self.neurons.indices(_name(place)).copy())
                if site.size is not None and int(indices.max()) >= site.size:
                    raise UnknownName(
                        f"{site.name}:{int(indices.max())} does not exist: {site.name} has neurons 0 to {site.size - 1}"
                    )
            found[site.name] = _edit(site, self.values[_name(place)], indices)
        return found

    def seen_edits(self, model: Model) -> dict[str, SeenEdit]:
        """Name of a site -> what becomes of what it shows in a call."""
        found: dict[str, SeenEdit] = {}
        by_name = {model.site(place).name: place for place in self.sites}
        for name, edit in self.edits(model).items():
            site, values = model.site(name), self.values[_name(by_name[name])]
            if values.ndim > 1 and (site.time or site.through == "recurrent"):
                indices = None if self.neurons is None else self.neurons.indices(_name(by_name[name]))
                put = _in_steps(site, values, None if indices is None else torch.from_numpy(indices.copy()))
            else:
                put = on_tensor(edit)
            found[name] = located(site, put, self.where)
        return found

    def moved(self, neurons: Neurons, means: Mapping[str, Any]) -> Patch:
        """The same on other neurons at the same sites.

        Raises:
            DataError: whole sites are patched, or the source has the values of the patched neurons only.
        """
        if self.neurons is None:
            raise DataError("a patch of whole sites cannot be moved to other neurons: give neurons")
        for site in neurons.sites:
            if self.values[site].shape[-1] == len(self.neurons.indices(site)):
                raise DataError(f"the source of {site} has the patched neurons only: give that of the whole site")
        return replace(self, neurons=neurons)


def _places(where: str | Site | Iterable[str | Site]) -> list[str | Site]:
    listed: list[Any] = [where] if isinstance(where, (str, Site)) or not isinstance(where, Iterable) else list(where)
    for each in listed:
        if not isinstance(each, (str, Site)):
            raise DataError(f'patch() takes Neurons or sites, as in pc.patch("mlp.3", ...), not {each!r:.60}')
    return listed


def _name(place: str | Site) -> str:
    return place.name if isinstance(place, Site) else place


def _checked_values(name: str, given: Any) -> torch.Tensor:
    try:
        values = torch.as_tensor(given).detach().as_subclass(torch.Tensor).clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"patch() takes a tensor for {name}, not {type(given).__name__}") from error
    if not values.is_floating_point():
        raise DataError(f"patch() takes activations for {name}, not a tensor of {values.dtype}")
    if not values.isfinite().all():
        raise DataError(f"the activations to put at {name} hold a NaN or an infinity")
    return values


def _edit(site: Site, values: torch.Tensor, indices: torch.Tensor | None) -> Edit:
    pattern = site.through == "attention"
    if pattern and values.ndim >= 3:
        values = values.movedim(-3, -1)  # an edit has the neurons, here the heads, on its last axis

    def edit(tensor: torch.Tensor) -> torch.Tensor:
        size = tensor.shape[-1]
        columns: Any = slice(None)
        given = values
        if indices is not None:
            if int(indices.max()) >= size:
                raise UnknownName(f"{site.name}:{int(indices.max())} does not exist: {site.name} has {size} neurons")
            columns = indices.to(tensor.device)
            if values.shape[-1:] == (size,):
                given = values[..., indices.to(values.device)]
        changed = tensor.clone()
        wanted = changed[..., columns].shape
        if tuple(given.shape) not in (tuple(wanted), (1, *wanted[1:]), tuple(wanted[1:])):
            raise DataError(_misfit(site, values, tensor, pattern))
        changed[..., columns] = given.to(tensor)
        return changed

    return edit


def _in_steps(site: Site, values: torch.Tensor, indices: torch.Tensor | None) -> SeenEdit:
    """At a site that shows one time step after the other: what was given for this one."""

    def edit(seen: Seen, call: Call) -> torch.Tensor:
        layout = layout_of(site, seen, call)
        steps, width = values.shape[-2], values.shape[-1]
        missing = call.start >= steps if layout.place is None else layout.length != steps
        if missing or values.ndim > 3 or (values.ndim == 3 and values.shape[0] not in (1, layout.examples)):
            raise DataError(
                f"the activations to put at {site.name} are {list(values.shape)}, and it runs over {layout.examples} "
                f"examples for {'more' if layout.place is None else layout.length} steps: give them as "
                "[examples, steps, size], or as [steps, size] for every example alike"
            )
        if layout.place is None:
            given = values[..., call.start, :]
        else:
            given = values.expand(layout.examples, steps, width).reshape(-1, width)[layout.place.to(values.device)]
        return _edit(site, given, indices)(seen.tensor)

    return edit


def _misfit(site: Site, values: torch.Tensor, tensor: torch.Tensor, pattern: bool) -> str:
    def shape(each: torch.Tensor) -> list[int]:
        return list(each.movedim(-1, -3).shape if pattern and each.ndim >= 3 else each.shape)

    return (
        f"the activations to put at {site.name} are {shape(values)}, but there it computes {shape(tensor)}: give them "
        f"in this shape, or in {shape(tensor)[1:]} for every example alike"
    )
