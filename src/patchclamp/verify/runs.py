"""`Runs`: a metric of a model without and with interventions, by as few passes as it takes.

The first run, without any, also counts how active the neurons are. Later ones begin at the first block that is
touched, and several interventions share a pass where the data is small.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from patchclamp.intervene import SideBySide
from patchclamp.model.activations import joined
from patchclamp.model.hooks import reading
from patchclamp.model.model import Model
from patchclamp.model.site import Site
from patchclamp.progress import progress as progress_bar
from patchclamp.verify.batches import Batch, read
from patchclamp.verify.matching import Activity, ActivityCount
from patchclamp.verify.metrics import Metric, compares, measured, reference_of
from patchclamp.verify.replay import Replay, without_cache

_KEPT_BYTES = 1 << 30


class Runs:
    """Runs of one metric over one data set.

    Args:
        model: the model.
        metric: see `metrics`.
        data: see `batches`.
        sites: what the interventions touch.
        batch_tokens: how many tokens are run at once.
        label: which label says the class.

    Attributes:
        clean: `[examples]` float64, the metric without interventions.
        passes: how many passes over the whole network and all of the data were made; a run of half of the blocks
            counts as half a pass.
    """

    def __init__(
        self,
        model: Model,
        metric: Metric,
        data: Any,
        sites: Sequence[Site],
        batch_tokens: int = 2048,
        label: str | None = None,
    ) -> None:
        self.model, self.metric, self._sites, self._batch_tokens = model, metric, list(sites), batch_tokens
        self._batches = [without_cache(model, batch) for batch in read(model, data, batch_tokens, label)]
        self.examples = sum(len(batch) for batch in self._batches)
        self._tokens = sum(batch.tokens for batch in self._batches)
        # A callable may run the model on other inputs than the batch: nothing that was kept would fit.
        self._replay = Replay() if callable(metric) else Replay.below(model, self._sites)
        self._kept: list[Any] = []
        self._references: list[Any] = []
        self._count = ActivityCount()
        self.passes = 0.0
        self._is_tried = self._leaves_out = False
        self.clean = self._first_run()

    def activity(self) -> Activity:
        """How active the neurons of the sites were in the first run."""
        return self._count.activity(self.model)

    def values(self, interventions: Sequence[Any], progress: bool = False) -> np.ndarray:
        """The metric under each of several interventions, `[interventions, examples]` float64.

        An intervention may be a sequence of several, which act together.
        """
        self._settle_replay(len(interventions))
        found = np.zeros((len(interventions), self.examples))
        with progress_bar("interventions", len(interventions) * len(self._batches), "runs", progress) as bar:
            for number, batch in enumerate(self._batches):
                together = max(1, self._batch_tokens // max(batch.tokens, 1))
                for start in range(0, len(interventions), together):
                    parts = interventions[start : start + together]
                    values = self._run(number, batch, parts)
                    found[start : start + len(parts), batch.examples] = values.reshape(len(parts), -1)
                    bar.advance(len(parts))
        return found

    def _first_run(self) -> np.ndarray:
        clean = np.zeros(self.examples)
        kept_bytes = 0
        for batch in self._batches:
            with ExitStack() as stack:
                stack.enter_context(self.model.evaluating())
                stack.enter_context(torch.no_grad())
                captured = stack.enter_context(reading(self.model.module, self._sites))
                kept = stack.enter_context(self._replay.keeping())
                output: list[Any] = []
                handle = self.model.module.register_forward_hook(lambda _m, _a, out, output=output: output.append(out))
                stack.callback(handle.remove)
                values = _of_itself(self.model, self.metric, batch)
                self._references.append(reference_of(self.metric, output[-1], batch) if output else None)
            clean[batch.examples] = values
            for site in self._sites:
                if captured[site.name]:
                    self._count.update(site.name, _real_rows(site, captured[site.name], batch))
            self._kept.append(list(kept))
            kept_bytes += sum(_bytes(each) for each in kept)
            self.passes += batch.tokens / self._tokens
            if kept_bytes > _KEPT_BYTES:
                self._replay, self._kept = Replay(), []
        return clean

    def _settle_replay(self, runs: int) -> None:
        """Lower blocks are left out only where that gives the network's own numbers on the first batch.

        And only where so many runs save more than this trial costs.
        """
        batch, part = self._batches[0], self._replay.fraction
        if self._is_tried or not self._replay:
            return
        self._leaves_out = runs * (1 - part) >= part * batch.tokens / self._tokens
        if not self._leaves_out:
            return
        self._is_tried = True
        values = self._run(0, batch, [None])[0]
        wanted = self.clean[batch.examples]
        if compares(self.metric):
            wanted = np.zeros(len(batch))
        if not np.allclose(values, wanted, rtol=1e-4, atol=1e-5):
            self._replay, self._kept = Replay(), []

    def _run(self, number: int, batch: Batch, parts: Sequence[Any]) -> np.ndarray:
        model, times = self.model, len(parts)
        repeated = batch.repeated(times)
        with ExitStack() as stack:
            stack.enter_context(model.evaluating())
            stack.enter_context(torch.no_grad())
            if self._replay and self._leaves_out:
                stack.enter_context(self._replay.replaying(self._kept[number], batch, times))
            alone = parts[0] if isinstance(parts[0], (list, tuple)) else [parts[0]]
            chosen = [SideBySide(parts)] if times > 1 else [each for each in alone if each is not None]
            stack.enter_context(model.intervene(*chosen))
            values = measured(model, self.metric, repeated, self._references[number])
        fraction = self._replay.fraction if self._leaves_out else 1.0
        self.passes += times * fraction * batch.tokens / self._tokens
        return values.double().cpu().numpy().reshape(times, -1)


def touched(model: Model, interventions: Iterable[Any]) -> list[Site]:
    """The sites that interventions touch, in the order of the model."""
    names: dict[str, Site] = {}
    for intervention in interventions:
        edits = getattr(intervention, "seen_edits", intervention.edits)(model)
        for name in edits:
            site = model.site(name)
            names[site.name] = site
    order = {name: place for place, name in enumerate(model.sites)}
    return sorted(names.values(), key=lambda site: order.get(site.name, len(order)))


def _of_itself(model: Model, metric: Metric, batch: Batch) -> np.ndarray:
    if compares(metric):
        batch.run(model)
        return np.zeros(len(batch))
    return measured(model, metric, batch).double().cpu().numpy()


def _real_rows(site: Site, captured: Any, batch: Batch) -> torch.Tensor:
    """`[rows, size]`, what a site showed at real positions."""
    mask = batch.mask
    if captured[0].place is not None:
        rows, place = captured[0].tensor, captured[0].place
        return rows if mask is None or captured[0].length is not None else rows[mask.flatten()[place]]
    tensor = joined(site, captured).tensor
    if mask is not None and tensor.ndim >= 3 and tensor.shape[:2] == mask.shape:
        return tensor[mask].reshape(-1, tensor.shape[-1])
    return tensor.reshape(-1, tensor.shape[-1])


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(_bytes(each) for each in value) if isinstance(value, tuple) else 0
