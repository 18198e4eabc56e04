"""`Kind`: what can be done with the sites of one kind, and why not the rest. The rows of `patchclamp sites`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from patchclamp.model.blocks import Block
from patchclamp.model.inspection import Inspection
from patchclamp.model.site import Site


@dataclass(frozen=True)
class Kind:
    """The sites of one kind in one stack, or a kind that the model has none of.

    Attributes:
        name: glob of the sites: `mlp.*`, `decoder.cross_attn.*`, `conv.*`.
        number: how many sites; 0 where the kind is not listed.
        sizes: how many neurons they have, each size once, ascending; None where only a forward pass will tell.
        read: whether the sites can be read.
        written: whether interventions can act there.
        baked: whether silencing a neuron there has an exact weight form: the weights that read it, set to zero.
        why_not: why something of this is not so; empty where all is.
    """

    name: str
    number: int
    sizes: tuple[int | None, ...]
    read: bool
    written: bool
    baked: bool
    why_not: str


def kinds_of(found: Inspection, blocks: Sequence[Block]) -> list[Kind]:
    """The kinds of a model's sites in the order of its sites, then those that are not listed."""
    of_site = {name: block for block in blocks for name in block.sites}
    listed = [_kind(name, members, of_site) for name, members in groups_of(found.sites).items()]
    missing = [Kind(name, 0, (), False, False, False, why) for name, why in found.unlisted.items()]
    return listed + missing


def groups_of(sites: Mapping[str, Site]) -> dict[str, list[Site]]:
    """Glob of a kind -> its sites."""
    groups: dict[str, list[Site]] = {}
    for site in sites.values():
        # "expert.3.1" and "mlp.3" are of one layer each; a convolution goes by the name of its module.
        by_path = site.kind in ("conv", "recurrent")
        name = f"{site.kind}.*" if by_path else re.sub(r"(\.\d+)+$", ".*", site.name)
        groups.setdefault(name, []).append(site)
    return groups


def _kind(name: str, members: Sequence[Site], of_site: Mapping[str, Block]) -> Kind:
    sizes = tuple(sorted({site.size for site in members}, key=lambda size: -1 if size is None else size))
    fixed = next((site.fixed for site in members if site.fixed), "")
    inexact = [why for site in members if (why := of_site[site.name].why_inexact(site))]
    reasons = [f"not written: {fixed}"] if fixed else []
    if inexact:
        # A chain of convolutions may be baked in its middle and not at its end.
        some = f"{len(inexact)} of {len(members)} not baked" if len(inexact) < len(members) else "not baked"
        reasons.append(f"{some}: {inexact[0]}")
    return Kind(name, len(members), sizes, True, not fixed, len(inexact) < len(members), "; ".join(reasons))
