"""`ablate`: silence neurons, by zero, by their mean, or by what they did on other inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch

from patchclamp.errors import DataError, unknown
from patchclamp.intervene.intervention import Intervention, checked_neurons
from patchclamp.intervene.where import Positions, Where
from patchclamp.neurons import Neurons


class _HasMoments(Protocol):
    # A Recording; this room does not import that one.
    def __getitem__(self, site: str) -> Any: ...


def ablate(
    neurons: Neurons,
    to: Literal["zero", "mean", "resample"] = "zero",
    *,
    recording: _HasMoments | None = None,
    source: Mapping[str, torch.Tensor] | Sequence[Mapping[str, torch.Tensor]] | None = None,
    positions: Positions = None,
    examples: Iterable[int] | None = None,
    seed: int = 0,
) -> Intervention:
    """Silence neurons: hold each at 0, at its mean over a recording, or at what it did elsewhere.

    Zero takes a neuron out; the mean takes out only what it says about one input as against another, and
    leaves the constant that the rest of the network is used to; resampling leaves its whole distribution.

    Args:
        neurons: the neurons.
        to: `"zero"`, `"mean"` or `"resample"`.
        recording: where the means come from (its summary `Moments`); not needed where the table has a
            column `mean`, as `atlas.neurons` and `recording.neurons()` have.
        source: for `"resample"`: activations on other inputs as `model.activations(texts, sites)` gives them: site ->
            `[..., size]`, or a list of such mappings. At each position all neurons of a site get the values of
            one position drawn from these.
        positions: numbers of tokens in each text, without padding; negative ones count from the end. Or "prompt" or
            "generated", while `generate` runs. None for all.
        examples: the rows of a batch. None for all.
        seed: of the drawing; each `with` block draws the same.

    Raises:
        DataError: `to` is none of these, or the means or the other activations are not known.
    """
    checked_neurons(neurons, "ablate")
    where = Where.of(positions, examples, "ablate")
    if to == "zero":
        return Intervention("ablate", neurons, 0.0, where=where)
    if to == "resample":
        return Intervention("ablate", neurons, 0.0, where=where, pools=_pools(neurons, source), seed=int(seed))
    if to != "mean":
        raise DataError(f'ablate(to=...) is "zero", "mean" or "resample", not {to!r}')
    if recording is not None:
        means = {site: recording[site].moments.mean[neurons.indices(site)] for site in neurons.sites}
    elif "mean" in neurons.columns:
        means = {site: neurons.at(site)["mean"].to_numpy() for site in neurons.sites}
    else:
        raise DataError(
            'ablate(to="mean") needs the means: give recording=, or neurons of atlas.neurons or recording.neurons()'
        )
    for site, values in means.items():
        if not np.isfinite(values.astype(np.float64)).all():
            raise DataError(f"the mean of a neuron of {site} is not known")
    return Intervention("ablate", neurons, 0.0, means, where)


def _pools(neurons: Neurons, source: Any) -> dict[str, torch.Tensor]:
    """Site -> `[rows, size]`, what is drawn from."""
    if source is None:
        raise DataError('ablate(to="resample") needs source=: activations on other inputs, as model.activations gives')
    several = [source] if isinstance(source, Mapping) else list(source)
    if not several or not all(isinstance(each, Mapping) for each in several):
        raise DataError("source= is a mapping from site to activations, or a list of such, with at least one in it")
    pools = {}
    for site in neurons.sites:
        indices = torch.from_numpy(neurons.indices(site).copy())
        parts = []
        for each in several:
            if site not in each:
                raise unknown("site of the source", site, each)
            values = torch.as_tensor(each[site]).detach().as_subclass(torch.Tensor)
            if values.ndim < 1 or int(indices.max()) >= values.shape[-1]:
                raise DataError(f"the source of {site} is {list(values.shape)}, which has no neuron {indices.max()}")
            parts.append(values.reshape(-1, values.shape[-1]).cpu())
        pools[site] = torch.cat(parts)
        if not len(pools[site]) or not pools[site].isfinite().all():
            raise DataError(f"the source of {site} is empty, or not finite")
    return pools
