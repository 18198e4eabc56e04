"""`Forms`: how an intervention on a site can be written into weights exactly, or why it cannot.

A neuron contributes `a * v` to what reads it, `v` being its row of weights there. After an intervention it contributes
`(factor * a + value) * v`: the row is multiplied by `factor`, and `value * v` is a constant, which is a bias of the
projection that reads it, where there is one. Nothing else is exact.
"""

from __future__ import annotations

from patchclamp.edit.biases import Bias, Biases
from patchclamp.edit.trial import why_not_homogeneous
from patchclamp.model.model import Model
from patchclamp.model.site import Site
from patchclamp.model.slices import WeightSlice

_GATE = "the gate is multiplied by what is projected beside it: held at a value, it contributes no constant"
_CHANNEL = "a constant channel contributes less at the edges of an image, where the next layer reads padding"


class Forms:
    """The exact forms of one model, as its weights are now."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._blocks = {name: block for block in model.blocks for name in block.sites}
        self._biases = Biases(model.module)
        self._tied = {name: group for group in model.tied_weights for name in group}

    def consumers(self, site: Site) -> tuple[WeightSlice, ...]:
        """The weights that read each neuron of a site."""
        return self._blocks[site.name].consumers(site)

    def why_not_zero(self, site: Site) -> str:
        """Why neurons cannot be held at 0 by writing their consumers; empty where they can."""
        if site.name not in self._blocks:
            return f"which weights read {site.name} is not known"
        return self._blocks[site.name].why_inexact(site)

    def why_not_scaled(self, site: Site, factor: float) -> str:
        """Why neurons cannot be multiplied by a factor; empty where they can."""
        why = self.why_not_zero(site)
        if why or factor in (0.0, 1.0) or site.kind != "conv":
            return why
        reader = self.consumers(site)[0].parameter.rpartition(".")[0]
        return why_not_homogeneous(self.model, site, reader, factor)

    def constant(self, site: Site) -> Bias | str:
        """The bias to which a constant goes that neurons of a site contribute; or why there is none."""
        if why := self.why_not_zero(site):
            return why
        if site.kind in ("gate", "conv"):
            return _GATE if site.kind == "gate" else _CHANNEL
        if site.kind == "expert":
            found = self._biases.of_expert(site.module, site.unit)
        else:
            found = self._biases.of_projection(site.writes) if site.writes else f"{site.name} has no output projection"
        return self._untied(found)

    def into_residual(self, site: Site) -> Bias | str:
        """The bias to which a vector goes that is added to a residual stream; or why there is none.

        It is that of the last projection that writes into the stream before the site. That adding to it is the same is
        tried when it is written: a norm or a factor may come in between.
        """
        writer = self._writer(site)
        if writer is None or writer.writes is None:
            return f"no output projection writes {site.name}"
        return self._untied(self._biases.of_projection(writer.writes))

    def _writer(self, site: Site) -> Site | None:
        kinds = {"resid_post": ("mlp", "mixer", "attn"), "resid_mid": ("attn",), "resid_pre": ("mlp", "mixer", "attn")}
        layer = None if site.layer is None else site.layer - (site.kind == "resid_pre")
        there = [each for each in self.model.sites.values() if (each.stack, each.layer) == (site.stack, layer)]
        for kind in kinds.get(site.kind, ()):
            # Of two attentions the later one writes last.
            if found := [each for each in there if each.kind == kind]:
                return found[-1]
        return None

    def _untied(self, found: Bias | str) -> Bias | str:
        if isinstance(found, Bias) and found.parameter in self._tied:
            others = " and ".join(name for name in self._tied[found.parameter] if name != found.parameter)
            return f"{found.parameter} is one tensor with {others}"
        return found
