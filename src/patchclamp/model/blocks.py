"""`Block`: the sites of one block of a network, and which weights make and read each of their neurons.

To remove a neuron is to delete its slices from its `producers` and its `consumers`; to merge two is to write one slice
and delete the other. Both need the lists to be complete: `why_incomplete` says where they are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from patchclamp.errors import unknown
from patchclamp.model.example import Example
from patchclamp.model.site import Site
from patchclamp.model.slices import WeightSlice, Wiring
from patchclamp.model.wiring import Wirings


@dataclass(frozen=True)
class Block:
    """One block of a stack; a convolution, a recurrent layer or a pair of linear layers is a block by itself.

    It is a description: it holds names, no tensors. It was made of the network as it was then.

    Attributes:
        name: `3`, `encoder.3`; of a convolution or recurrent layer, the name of its site.
        stack: as in `Site.stack`.
        layer: as in `Site.layer`.
        sites: names of its sites.
        wiring: name of a site -> which weights make and read its neurons, and what is not known of them.
    """

    name: str
    stack: str
    layer: int | None
    sites: tuple[str, ...]
    wiring: Mapping[str, Wiring] = field(default_factory=dict, repr=False, hash=False)

    def producers(self, site: str | Site) -> tuple[WeightSlice, ...]:
        """The slices of weights that make each neuron: rows of the projections before it, and their biases.

        Raises:
            UnknownName: the block has no such site.
        """
        return self._of(site).producers

    def consumers(self, site: str | Site) -> tuple[WeightSlice, ...]:
        """The slices of weights that read each neuron: columns of the projection that it enters.

        Raises:
            UnknownName: the block has no such site.
        """
        return self._of(site).consumers

    def why_incomplete(self, site: str | Site) -> str:
        """Why `producers` or `consumers` are not all that touches a neuron; empty where they are.

        Raises:
            UnknownName: the block has no such site.
        """
        found = self._of(site)
        parts = (("producers", found.unknown_producers), ("consumers", found.unknown_consumers))
        return "; ".join(f"{which}: {why}" for which, why in parts if why)

    def why_inexact(self, site: str | Site) -> str:
        """Why setting a neuron's `consumers` to zero is not what ablating it to zero does; empty where it is the same.

        Raises:
            UnknownName: the block has no such site.
        """
        return self._of(site).inexact

    def _of(self, site: str | Site) -> Wiring:
        name = site.name if isinstance(site, Site) else site
        if name not in self.wiring:
            raise unknown(f"site of block {self.name}", name, self.sites)
        return self.wiring[name]


def blocks_of(root: nn.Module, sites: Mapping[str, Site], example: Example | None = None) -> list[Block]:
    """The blocks of a network, in the order of their sites.

    Args:
        root: the network. An MLP with a fused gate and up projection is tried by itself on a few numbers; for
            convolutions outside of an `nn.Sequential` the network is run on the example, a few times for each.
        sites: its sites by name.
        example: images to try it on; without one, what reads such a convolution is not known.
    """
    wirings = Wirings(root, sites, example)
    members: dict[tuple[str, str, int | None], list[Site]] = {}
    for site in sites.values():
        # Their layers are those of one module, and a network may have several.
        single = site.kind in ("conv", "recurrent") or site.layer is None
        prefix = f"{site.stack}." if site.stack else ""
        key = (site.name, site.stack, site.layer) if single else (f"{prefix}{site.layer}", site.stack, site.layer)
        members.setdefault(key, []).append(site)
    return [
        Block(*key, tuple(site.name for site in there), {site.name: wirings.of(site) for site in there})
        for key, there in members.items()
    ]
