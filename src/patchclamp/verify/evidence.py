"""`Evidence`: what a test of an intervention found, and how far it may be believed."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl

from patchclamp.errors import DataError, StoreError
from patchclamp.statistics import bootstrap
from patchclamp.storage import existing_file, write_file

LEVEL = 0.01
VERDICTS = ("supported", "not supported", "not resolvable")


@dataclass(frozen=True, eq=False)
class Evidence:
    """The outcome of a test. Made by `verify.effect` and its relatives.

    Attributes:
        claim: what was tested, in words.
        metric: its name.
        effect: mean change of the metric over examples, edited less clean.
        low, high: its 95% interval, examples drawn anew.
        clean, edited: `[examples]` float64, the metric without and with the intervention.
        controls: `[controls]` float64, the effect of the same intervention on each matched random set.
        p: (1 + controls whose effect is at least as large in magnitude) / (controls + 1).
        level: what p has to be below.
        needed: how many controls a verdict takes.
        verdict: "supported", "not supported" or "not resolvable".
        matching: how well the controls match: `what`, of the `neurons`, of the `controls`, and their range.
        dose: effect by share of the intervention, or None.
        guards: effect on other data, or None.
        passes: passes over the network and the data that the main test took.
        further_passes: those of dose and guards.
        recipe: how to run it again: names and parameters.
    """

    claim: str
    metric: str
    effect: float
    low: float
    high: float
    clean: np.ndarray = field(repr=False)
    edited: np.ndarray = field(repr=False)
    controls: np.ndarray = field(repr=False)
    p: float
    level: float
    needed: int
    verdict: str
    matching: pl.DataFrame = field(repr=False)
    dose: pl.DataFrame | None = field(repr=False)
    guards: pl.DataFrame | None = field(repr=False)
    passes: float
    further_passes: float
    recipe: dict[str, Any] = field(repr=False)

    @property
    def control_range(self) -> tuple[float, float]:
        """The central 95% of the controls' effects; NaN without controls."""
        if not len(self.controls):
            return float("nan"), float("nan")
        low, high = np.quantile(self.controls, [0.025, 0.975])
        return float(low), float(high)

    @property
    def sentence(self) -> str:
        """What was found, in one sentence that says no more than the numbers."""
        before, after = float(self.clean.mean()), float(self.edited.mean())
        found = (
            f"{self.claim}: mean {self.metric} goes from {before:.4g} to {after:.4g}, by {self.effect:+.4g} "
            f"(95% interval {self.low:+.4g} to {self.high:+.4g}, {len(self.clean)} examples)"
        )
        number = len(self.controls)
        if not number:
            return f"{found}; there is nothing to compare it with: not resolvable."
        low, high = self.control_range
        as_large = round(self.p * (number + 1)) - 1
        beside = (
            f"; of {number} control sets {as_large} change it as much (central 95%: {low:+.4g} to {high:+.4g}), "
            f"p = {self.p:.4f}"
        )
        far = self.matching.filter(pl.col("what") == "without a near match")["neurons"]
        if len(far):
            beside += f"; {far[0]:.0f} neuron{'s have' if far[0] > 1 else ' has'} no near match"
        loud = self.matching.filter(pl.col("what") == "loudness")
        if len(loud) and loud["neurons"][0] > 1.5 * loud["controls"][0]:
            beside += f"; the controls are quieter (loudness {loud['controls'][0]:.3g}, not {loud['neurons'][0]:.3g})"
        if self.verdict == "not resolvable":
            return f"{found}{beside}: not resolvable, a verdict takes {self.needed} different controls."
        return f"{found}{beside}: {self.verdict}."

    def __repr__(self) -> str:
        return f"Evidence({self.verdict}: {self.sentence})"

    def to_dict(self) -> dict[str, Any]:
        """All of it in values that JSON knows."""
        tables = ("matching", "dose", "guards")
        arrays = ("clean", "edited", "controls")
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in (*tables, *arrays)}
        plain |= {name: getattr(self, name).tolist() for name in arrays}
        plain |= {name: None if getattr(self, name) is None else getattr(self, name).to_dicts() for name in tables}
        return plain | {"sentence": self.sentence}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a `.json` file.

        Raises:
            StoreError: the file cannot be written.
        """
        write_file(path, json.dumps(self.to_dict(), indent=1).encode("utf-8"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evidence:
        """Read what `save` wrote.

        Raises:
            StoreError: the file is missing, or holds something else.
        """
        file = existing_file(path)
        try:
            plain = json.loads(file.read_text(encoding="utf-8"))
            plain.pop("sentence")
            for name in ("clean", "edited", "controls"):
                plain[name] = np.asarray(plain[name], np.float64)
            for name in ("matching", "dose", "guards"):
                plain[name] = None if plain[name] is None else pl.DataFrame(plain[name])
            return cls(**plain)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{file} is no evidence: {error}") from error

    def _repr_html_(self) -> str:
        from html import escape

        return f"<p><b>{escape(self.verdict)}</b> {escape(self.sentence)}</p>{self.matching._repr_html_()}"


def concluded(
    claim: str,
    metric: str,
    clean: np.ndarray,
    edited: np.ndarray,
    controls: np.ndarray,
    matching: pl.DataFrame,
    recipe: dict[str, Any],
    *,
    level: float,
    seed: int,
    passes: float,
) -> Evidence:
    """The evidence that values with and without an intervention are, `controls` being the effects of the controls.

    Raises:
        DataError: an effect that is not finite.
    """
    effect, low, high = paired(edited - clean, seed)
    p, needed, verdict = judged(effect, (low, high), controls, level)
    return Evidence(
        claim=claim,
        metric=metric,
        effect=effect,
        low=low,
        high=high,
        clean=clean,
        edited=edited,
        controls=controls,
        p=p,
        level=level,
        needed=needed,
        verdict=verdict,
        matching=matching,
        dose=None,
        guards=None,
        passes=round(passes, 6),
        further_passes=0.0,
        recipe=recipe,
    )


def paired(differences: np.ndarray, seed: int) -> tuple[float, float, float]:
    """The mean of paired differences and its 95% interval, examples drawn anew."""
    mean = float(differences.mean())
    if np.ptp(differences) == 0:
        return mean, mean, mean
    interval = bootstrap(lambda rows: differences[rows].mean(keepdims=True), len(differences), seed=seed)
    return mean, float(interval.low[0]), float(interval.high[0])


def judged(effect: float, interval: tuple[float, float], controls: np.ndarray, level: float) -> tuple[float, int, str]:
    """The p value, how many controls a verdict takes, and the verdict.

    Supported: p is below the level, and the interval of the effect lies outside the central 95% of the controls.

    Raises:
        DataError: an effect that is not finite.
    """
    if not np.isfinite([effect, *interval]).all() or not np.isfinite(controls).all():
        raise DataError("an effect is not finite")
    # One more is always counted, so that p is never 0.
    p = (1 + int((np.abs(controls) >= abs(effect)).sum())) / (len(controls) + 1)
    needed = int(np.floor(1 / level + 1e-9))
    if len(controls) < needed:
        return p, needed, "not resolvable"
    low, high = np.quantile(controls, [0.025, 0.975])
    outside = interval[0] > high or interval[1] < low
    return p, needed, "supported" if p < level and outside else "not supported"
