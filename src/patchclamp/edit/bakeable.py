"""`bakeable`: which interventions can be written into the weights of a model, and why not the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import polars as pl

from patchclamp.edit.biases import Bias
from patchclamp.edit.forms import Forms
from patchclamp.model.kinds import groups_of
from patchclamp.model.model import Model
from patchclamp.model.site import Site

EXACT = "exact"


def bakeable(model: Model) -> pl.DataFrame:
    """For each kind of site: whether an intervention has an exact form in the weights.

    Returns:
        A row for each kind of site, with columns `sites` (a glob), `number` (of sites), `zero` (`ablate` to zero),
        `scale`, and `value` (`ablate` to the mean, `clamp`, and `steer` at these neurons). Each says `"exact"`, `"exact
        with a config flag (mlp_bias)"`, or `"impossible: ..."` with the reason.
    """
    forms = Forms(model)
    rows = [
        (
            name,
            len(sites),
            _summed(sites, lambda site: _said(forms.why_not_zero(site))),
            _summed(sites, lambda site: _scale(forms, site)),
            _summed(sites, lambda site: _value(forms, site)),
        )
        for name, sites in groups_of(model.sites).items()
    ]
    schema = {"sites": pl.String, "number": pl.Int64, "zero": pl.String, "scale": pl.String, "value": pl.String}
    return pl.DataFrame(rows, schema=schema, orient="row")


def _said(why: str) -> str:
    return f"impossible: {why}" if why else EXACT


def _scale(forms: Forms, site: Site) -> str:
    louder, turned = forms.why_not_scaled(site, 2.0), forms.why_not_scaled(site, -1.0)
    return f"{EXACT} for factors above 0" if turned and not louder else _said(louder)


def _value(forms: Forms, site: Site) -> str:
    found = forms.constant(site)
    if isinstance(found, Bias):
        return f"{EXACT} with a config flag ({found.flag})" if found.flag else EXACT
    return _said(found)


def _summed(sites: Sequence[Site], say: Callable[[Site], str]) -> str:
    """One answer for all; where they differ, how many have the best one, and the first reason of the others."""
    answers = [say(site) for site in sites]
    if len(set(answers)) == 1:
        return answers[0]
    able = [each for each in answers if not each.startswith("impossible")]
    parts = [f"{able.count(each)} of {len(sites)} {each}" for each in dict.fromkeys(able)]
    return "; ".join([*parts, *[each for each in answers if each not in able][:1]])
