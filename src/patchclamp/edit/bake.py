"""`bake`: write interventions into the weights of a copy, where that is exact.

    (factor * a + value) * v  =  a * (factor * v) + value * v

The row `v` of weights that reads a neuron is multiplied by the factor, and `value * v` is added to the bias of the
projection that reads it. What has no such form (a place without a bias, some positions only, values of another run) is
refused with the reason; nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from patchclamp.edit.biases import Bias
from patchclamp.edit.changes import Changes, Constant, rows_of
from patchclamp.edit.edited import EditedModel, copied
from patchclamp.edit.effects import Effect, Effects, effects_of, step_of, why_not_everywhere
from patchclamp.edit.forms import Forms
from patchclamp.edit.trial import why_not_added
from patchclamp.errors import DataError, ModelError
from patchclamp.model.model import Model
from patchclamp.model.site import Site


def bake(model: Model, *interventions: Any, weights_sha256: str | None = None) -> EditedModel:
    """Write interventions into the weights of a copy; the model itself stays as it is.

    The copy computes without any hook what the model computes inside `model.intervene(*interventions)`, up to rounding.
    `patchclamp.edit.bakeable(model)` says what is exact where. One thing differs: an intervention replaces a neuron
    that is NaN or infinite, and a weight of zero does not.

    Args:
        model: any model.
        interventions: of `ablate` (to zero or the mean), `clamp`, `scale` and `steer`; a later one acts on top.
        weights_sha256: that of the model in which the neurons were found, to be sure that it is this one.

    Returns:
        An `EditedModel`, usable wherever a model is, with `save`, `diff`, `revert` and `provenance`.

    Raises:
        ModelError: an intervention has no exact form in the weights of this model; the reason is given.
        DataError: no intervention or no neurons are given, or the weights are others than `weights_sha256`.
        UnknownName: a site or neuron that the model does not have.
    """
    if not interventions:
        raise DataError("bake() is given no intervention")
    for each in interventions:
        if why := why_not_everywhere(each):
            raise ModelError(f"{getattr(each, 'kind', type(each).__name__)} has no form in the weights: {why}")
    before = model.weights_sha256()
    if weights_sha256 is not None and weights_sha256 != before:
        raise DataError(
            f"the weights of {model.name} are not those in which the neurons were found: "
            f"their SHA-256 is {before}, not {weights_sha256}"
        )
    effects = effects_of(model, interventions)
    plan = _planned(Forms(model), effects)
    module = copied(model)
    changes = Changes(module)
    _write(plan, model, changes)
    return EditedModel(model, module, changes, [step_of(each) for each in interventions], before)


@dataclass
class _Plan:
    """What is to be written."""

    forms: Forms
    factors: list[Effect] = field(default_factory=list)
    constants: list[tuple[Effect, Bias]] = field(default_factory=list)
    vectors: list[tuple[Site, np.ndarray, Bias]] = field(default_factory=list)


def _planned(forms: Forms, effects: Effects) -> _Plan:
    """What is to be written.

    Raises:
        ModelError: with all reasons why it cannot be.
    """
    plan, reasons = _Plan(forms), []
    for name, effect in effects.neurons.items():
        why = _why_not(forms, effect)
        bias = forms.constant(effect.site) if effect.value.any() and not why else None
        why = bias if isinstance(bias, str) else why
        if why:
            reasons.append(f"{name}: {why}")
        if isinstance(bias, Bias):
            plan.constants.append((effect, bias))
        if (effect.factor != 1).any():
            plan.factors.append(effect)
    for name, vector in effects.residual.items():
        site = forms.model.site(name)
        bias = forms.into_residual(site)
        if isinstance(bias, str):
            reasons.append(f"{name}: {bias}")
        else:
            plan.vectors.append((site, vector, bias))
    if reasons:
        raise ModelError(f"{forms.model.name} cannot be edited so, exactly: {'; '.join(reasons)}")
    return plan


def _why_not(forms: Forms, effect: Effect) -> str:
    if why := forms.why_not_zero(effect.site):
        return why
    reasons = (forms.why_not_scaled(effect.site, float(factor)) for factor in np.unique(effect.factor))
    return next((why for why in reasons if why), "")


def _write(plan: _Plan, model: Model, changes: Changes) -> None:
    """Biases that are lacking, then what goes into them, made of the rows as they were, then the rows."""
    biases = [bias for _, bias in plan.constants] + [bias for *_, bias in plan.vectors]
    for bias in biases:
        if bias.flag and bias.flag not in changes.flags:
            changes.set_flag(bias.flag, True)
            changes.zero_biases(bias.added)
    added: dict[tuple[str, tuple[int, ...]], list[Constant]] = {}
    for site, vector, bias in plan.vectors:
        if why := why_not_added(model, changes.root, site, changes.tensor(bias.parameter)):
            raise ModelError(f"steering {site.name} cannot be written into {bias.parameter}: {why}")
        nobody = torch.zeros(0, dtype=torch.int64)
        constant = Constant(site.name, nobody, bias.parameter, torch.from_numpy(vector)[None])
        added.setdefault((bias.parameter, bias.index), []).append(constant)
    for effect, bias in plan.constants:
        (where,) = plan.forms.consumers(effect.site)
        rows = rows_of(changes.tensor(where.parameter), where)
        indices = torch.from_numpy(np.flatnonzero(effect.value)).to(rows.device)
        values = torch.from_numpy(effect.value).to(rows.device)[indices]
        constant = Constant(effect.site.name, indices, bias.parameter, values[:, None] * rows[indices].double())
        added.setdefault((bias.parameter, bias.index), []).append(constant)
    for (parameter, index), constants in added.items():
        changes.add_to(parameter, index, constants)
    for effect in plan.factors:
        for where in plan.forms.consumers(effect.site):
            changes.rows(effect.site.name, where, *_scaled(changes, where, effect.factor))


def _scaled(changes: Changes, where: Any, factor: np.ndarray) -> Iterator[torch.Tensor]:
    """Indices of the neurons that are multiplied, and their new rows."""
    rows = rows_of(changes.tensor(where.parameter), where)
    indices = torch.from_numpy(np.flatnonzero(factor != 1)).to(rows.device)
    yield indices
    factors = torch.from_numpy(factor).to(rows.device)[indices].reshape(-1, *[1] * (rows.ndim - 1))
    # Zero, and neither minus zero nor what zero makes of an infinite weight.
    yield (rows[indices].double() * factors).masked_fill(factors == 0, 0.0)
