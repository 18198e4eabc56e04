"""Take neurons out of a network: their rows and columns are deleted, and what is left is smaller.

A neuron that is ablated to zero contributes nothing to what reads it, so the network computes the same without the
weights that make it and those that read it. A network that is built from a configuration (Hugging Face) has one width
for many layers: there each of them must keep as many neurons, or be filled up with neurons that are zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import polars as pl
from torch import nn

from patchclamp.edit.edited import Edit, EditedModel, Step, copied
from patchclamp.edit.removal import Removal, say_widths
from patchclamp.edit.widths import Setting, built, is_configured, settings_of, shapes, take_over_numbers
from patchclamp.errors import DataError, ModelError, unknown
from patchclamp.intervene import ablate
from patchclamp.model import Model, Site
from patchclamp.model.blocks import Block
from patchclamp.model.slices import WeightSlice
from patchclamp.neurons import Neurons

_KINDS = ("mlp", "expert", "conv")
_SHOWN = 8


def prune(model: Model, neurons: Neurons, *, uneven: Literal["refuse", "pad"] = "refuse") -> PrunedModel:
    """Take neurons out of a copy of a model; the matrices that make and read them become smaller.

    The copy computes what the model computes inside `model.intervene(pc.ablate(neurons))`, up to rounding. Neurons of
    feed-forward pairs (`mlp`, plain and gated), of fused experts, and channels between the layers of an `nn.Sequential`
    can be taken out.

    In a Hugging Face model one setting (`intermediate_size`, `n_inner`, `d_ff`, ...) says how many neurons all layers
    have. It is set on the copy, and the saved folder loads with transformers alone.

    Args:
        model: any model. It stays as it is.
        neurons: the neurons. At least one of each site must be left.
        uneven: what happens where layers that share a setting keep different numbers: "refuse"; or "pad", where all
            keep as many as the layer that keeps most, and in the others some neurons stay with weights of zero.

    Returns:
        A `PrunedModel`. `neurons.at("mlp.3")[5]` of the model is another index in it: `kept` says which.

    Raises:
        ModelError: neurons of a kind that cannot be taken out, weights that are not known, uneven widths, or a
            configuration that has no setting for them; the reason is given.
        DataError: no neurons.
        UnknownName: a site or neuron that the model does not have, or another word for `uneven`.
    """
    if uneven not in ("refuse", "pad"):
        raise unknown("way with uneven widths", uneven, ("refuse", "pad"))
    ablate(neurons).edits(model)  # refuses neurons that are not there
    if not len(neurons):
        raise DataError("prune() is given no neurons")
    before = model.weights_sha256()
    plan = _Plan.of(model, neurons, uneven)
    module = copied(model)
    parameters = sum(each.numel() for each in module.parameters())
    removal = Removal(module, model.edits if isinstance(model, EditedModel) else ())
    for site, chosen in plan.zeroed.items():
        removal.zero(site, plan.wired[site], chosen)
    removal.delete({site: (plan.wired[site], chosen) for site, chosen in plan.deleted.items()})
    for path, value in plan.settings.items():
        removal.set_flag(path, value)
    _fit(module, plan)
    left = sum(each.numel() for each in module.parameters())
    details = {
        "parameters_before": parameters,
        "parameters_after": left,
        "widths": {site: [plan.sizes[site], plan.sizes[site] - len(gone)] for site, gone in plan.deleted.items()},
        "zeroed": {site: chosen.tolist() for site, chosen in plan.zeroed.items()},
    }
    words = f"Took out {len(neurons)} neurons: {parameters:,} parameters became {left:,}."
    if plan.zeroed:
        words += (
            f" {sum(map(len, plan.zeroed.values()))} of them are still there with weights of zero, as one setting says "
            "the width of all layers."
        )
    kept = {site: np.setdiff1d(np.arange(plan.sizes[site]), gone) for site, gone in plan.deleted.items()}
    return PrunedModel(model, module, removal, [Step.on(words, neurons, **details)], before, kept)


class PrunedModel(EditedModel):
    """A model without some of its neurons. Made by `prune`.

    `revert` gives the model before all of its edits: those before the pruning are taken back with it.

    Attributes:
        kept: site -> `[neurons left]` int64, which neurons of the model before they are, ascending; those that stay
            with weights of zero are among them. A site from which none was taken out is not named.
    """

    def __init__(
        self,
        base: Model,
        module: nn.Module,
        changes: Removal,
        steps: Sequence[Step],
        before: str,
        kept: Mapping[str, np.ndarray],
    ) -> None:
        super().__init__(base, module, changes, steps, before)
        self.kept = dict(kept)
        # What was kept of earlier edits has the shapes of the larger network: all of them are one edit from now on.
        *earlier, last = self.edits
        if earlier:
            done = tuple(step for edit in self.edits for step in edit.steps)
            flags = {name: flag for edit in earlier for name, flag in edit.changes.flags.items()}
            changes.flags |= {name: (old, changes.flags.get(name, (old, new))[1]) for name, (old, new) in flags.items()}
            self.edits = (Edit(done, changes, earlier[0].before, last.after),)

    def diff(self, by: Literal["parameter", "neuron"] = "parameter") -> pl.DataFrame:
        """What the pruning took out, against the model that was pruned.

        The columns are those of `EditedModel.diff` and, by parameter, `shape_before`. `changed` counts the numbers that
        were deleted or set to zero, `largest_change` is the largest of them in size.

        Raises:
            DataError: `by` is neither.
        """
        if by not in ("parameter", "neuron"):
            raise DataError(f'diff(by=...) is "parameter" or "neuron", not {by!r}')
        removal = self.edits[0].changes
        assert isinstance(removal, Removal)
        return removal.by_parameter() if by == "parameter" else removal.by_neuron()


# What is to be done -----------------------------------------------------------------------------------------


@dataclass
class _Plan:
    """Which neurons are deleted, which stay there as zeros, and which settings say so.

    Attributes:
        sizes: site -> how many neurons it has.
        wired: site -> all slices that make or read its neurons.
        deleted: site -> `[number]`, indices of neurons whose slices go away.
        zeroed: site -> `[number]`, indices of neurons whose slices become zero.
        settings: path of a setting -> its new value.
    """

    sizes: dict[str, int]
    wired: dict[str, tuple[WeightSlice, ...]]
    deleted: dict[str, np.ndarray]
    zeroed: dict[str, np.ndarray] = field(default_factory=dict)
    settings: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Model, neurons: Neurons, uneven: str) -> _Plan:
        """The plan for these neurons, or the reason why there is none."""
        blocks = {name: block for block in model.blocks for name in block.sites}
        doomed = {model.site(name).name: np.sort(neurons.indices(name)) for name in neurons.sites}
        configured = is_configured(model.module)
        kinds = {model.site(name).kind for name in doomed}
        # Those that share a setting with them are wanted too.
        listed = [site for site in model.sites.values() if site.name in doomed or (configured and site.kind in _KINDS)]
        why = {site.name: _why_not(site, blocks.get(site.name), model.module) for site in listed}
        if refused := [f"{name}: {why[name]}" for name in doomed if why.get(name, "it is no site of a block")]:
            raise ModelError(f"neurons cannot be taken out of {_some(refused, '; ')}")
        wired = {s.name: _slices(blocks[s.name], s) for s in listed if not why[s.name]}
        plan = cls({name: model.site(name).size or 0 for name in wired}, wired, doomed)
        for name, chosen in doomed.items():
            if len(chosen) == plan.sizes[name]:
                raise ModelError(f"all {len(chosen)} neurons of {name} would be taken out: at least one must be left")
        if configured:
            plan._by_setting(model, uneven)
        elif "expert" in kinds:
            raise ModelError(f"{model.name} has experts and no configuration that says how many neurons they have")
        return plan

    def _by_setting(self, model: Model, uneven: str) -> None:
        """Settle how many neurons the sites keep that share a setting."""
        parameters = {site: frozenset(each.parameter for each in slices) for site, slices in self.wired.items()}
        settings = settings_of(model.module, self.sizes, parameters)
        kind = type(model.module.config).__name__
        wanted = list(self.deleted)
        while wanted:
            setting = next((each for each in settings if wanted[0] in each.sites), None)
            if setting is None:
                raise ModelError(
                    f"{wanted[0]} cannot become smaller: no setting of {kind} says how many neurons it has, so a saved "
                    "folder could not be loaded. pc.edit.bake(model, pc.ablate(neurons)) sets their weights to zero"
                )
            self._even(setting, model.module, uneven)
            wanted = [site for site in wanted if site not in setting.sites]

    def _even(self, setting: Setting, root: nn.Module, uneven: str) -> None:
        doomed = {site: self.deleted.get(site, np.zeros(0, np.int64)) for site in setting.sites}
        left = {site: self.sizes[site] - len(gone) for site, gone in doomed.items()}
        most, step = max(left.values()), self._step(setting, root)
        widest = -(-most // step) * step
        one = f"{type(root.config).__name__} has one {setting.path} for all"
        if uneven == "refuse" and min(left.values()) < most:
            said = _some([f"{site}: {number}" for site, number in left.items()], ", ")
            raise ModelError(
                f"layers would keep different numbers of neurons ({said}), and {one}: "
                'take as many from each, or prune(..., uneven="pad") to fill up with zeros'
            )
        if uneven == "refuse" and widest > most:
            raise ModelError(
                f"experts would keep {most} neurons: torch multiplies them together only where their number is a "
                f'multiple of {step}. Take out fewer or more, or prune(..., uneven="pad") to keep {widest}'
            )
        if widest >= max(self.sizes[site] for site in setting.sites):
            which = max(left, key=lambda site: left[site])
            raise ModelError(
                f"nothing would become smaller: {which} keeps {left[which]} of {self.sizes[which]} neurons, and {one}. "
                "pc.edit.bake(model, pc.ablate(neurons)) sets their weights to zero"
            )
        for site, gone in doomed.items():
            number = self.sizes[site] - widest
            self.deleted[site] = gone[:number]
            if len(gone) > number:
                self.zeroed[site] = gone[number:]
        self.settings[setting.path] = widest

    def _step(self, setting: Setting, root: nn.Module) -> int:
        """What the number of neurons has to be a multiple of: rows of stacked experts begin every 16 bytes."""
        of_experts = [site for site in setting.sites if any(each.index for each in self.wired[site])]
        if not of_experts:
            return 1
        step = max(1, 16 // root.get_parameter(self.wired[of_experts[0]][0].parameter).itemsize)
        return step if self.sizes[of_experts[0]] % step == 0 else 1


def _why_not(site: Site, block: Block | None, root: nn.Module) -> str:
    """Why neurons of a site cannot be taken out; empty where they can."""
    if site.kind == "gate":
        return f"a gate has no output of its own: name the neurons of {site.name.replace('gate', 'mlp')}"
    if site.kind in ("attn", "pattern"):
        return "how wide a head is is the same for queries, keys and values: heads are not taken out here"
    if site.kind not in _KINDS or block is None:
        return (
            f"of kind {site.kind!r}; neurons of mlp and expert sites and channels of an nn.Sequential can be taken out"
        )
    if why := block.why_incomplete(site) or block.why_inexact(site):
        return why
    if site.kind == "conv":
        module: Any = root.get_submodule(site.reads.get("in", site.module))
        if module.groups > 1:
            return "a convolution in groups has as many channels in each"
    return ""


def _slices(block: Block, site: Site) -> tuple[WeightSlice, ...]:
    return tuple(dict.fromkeys((*block.producers(site), *block.consumers(site))))


def _some(listed: Sequence[str], between: str) -> str:
    more = len(listed) - _SHOWN
    return between.join(listed[:_SHOWN]) + (f"{between}... ({more} more)" if more > 0 else "")


def _fit(module: nn.Module, plan: _Plan) -> None:
    """Tell modules how wide they are now; of a configured network, check that the same comes out when it is loaded."""
    for parameter in {each.parameter for slices in plan.wired.values() for each in slices}:
        say_widths(module.get_submodule(parameter.rpartition(".")[0]))
    if not plan.settings:
        return
    other = built(module, {})
    own = shapes(module)
    wrong = None if other is None else next((n for n, s in shapes(other).items() if n in own and own[n] != s), None)
    if other is None or wrong is not None:
        what = "it could not be built" if wrong is None else f"{wrong} would be built otherwise than it is now"
        raise ModelError(f"a {type(module).__name__} with {plan.settings} cannot be saved: {what}")
    take_over_numbers(module, other)
