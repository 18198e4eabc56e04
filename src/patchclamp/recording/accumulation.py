"""`Accumulation`: what the summaries of some sites hold, of all the data or of a part of it.

It is all that a pass learns: it takes what each forward pass showed, can be written down and taken up again
(`state`, `restore`), and merged with that of another part of the data.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from patchclamp.errors import DataError, unknown
from patchclamp.model.site import Site
from patchclamp.recording.batch import Batch, Calibration, Setting
from patchclamp.recording.fused import Fused
from patchclamp.recording.pass_rows import PassRows
from patchclamp.recording.stream import Read, finite_rows
from patchclamp.recording.summaries import Summary

_NONE_FOUND = {"nan": 0, "infinite": 0, "rows": 0}


@dataclass
class Plan:
    """What is to be accumulated: the same for every part of the data. It can be sent to another process.

    Attributes:
        sites: the sites.
        templates: the summaries that were asked for, by name.
        tokens: `[slots]` int64, the tokens that `ByToken` has slots for; None for data without tokens.
        labels: label -> categories.
        examples: how many examples the data has.
        calibration: site -> what a sample of the data showed; empty where no threshold is relative.
    """

    sites: list[Site]
    templates: dict[str, Summary]
    tokens: np.ndarray | None
    labels: dict[str, tuple[str, ...]]
    examples: int
    calibration: dict[str, Calibration] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.wanted = _wanted(self.templates, self.sites)

    def setting(self, site: Site, size: int, dtype: torch.dtype = torch.float32) -> Setting:
        """What a summary knows of a site before the first batch."""
        return Setting(
            site.name,
            size,
            tokens=self.tokens,
            labels=dict(self.labels),
            calibration=self.calibration.get(site.name),
            dtype=dtype,
            examples=self.examples,
            sizes={each.name: each.size for each in self.sites if each.size is not None},
        )

    def settings(self) -> list[Setting]:
        """Those of all sites; 0 stands for a size that only a forward pass shows."""
        return [self.setting(site, site.size or 0) for site in self.sites]

    def usable(self, has_tokens: bool) -> list[Summary]:
        """The summaries that can be kept at a site with or without a row for each token."""
        return [each for each in self.templates.values() if has_tokens or not each.needs_tokens]


class Accumulation:
    """What the summaries hold.

    Args:
        plan: what is accumulated.
        room: bytes of memory for what grows with the data; the rest goes to files.
        scratch: folder for these files; None: that for temporary files.

    Attributes:
        summaries: site -> summary -> accumulator; empty before the first batch.
        counts: site -> rows that the summaries hold.
        passed: site -> positions that count and went by.
        nonfinite: site -> how many activations were NaN, how many infinite, how many rows were left out for it.
    """

    def __init__(self, plan: Plan, room: int = 1 << 62, scratch: Path | None = None) -> None:
        self.plan, self.scratch, self._room = plan, scratch, room
        self.summaries: dict[str, dict[str, Summary]] = {}
        self.counts: dict[str, int] = {}
        self.passed: dict[str, int] = {}
        self.nonfinite: dict[str, dict[str, int]] = {}
        self._fused: dict[str, Fused] = {}
        self._learned: dict[str, frozenset[str]] = {}

    def take_early(self, site: Site, values: torch.Tensor, rows: PassRows) -> bool:
        """Learn what compiled loops can of a site while the forward pass goes on; `take` is then given the rest.

        Args:
            site: the site.
            values: [positions, size], all positions of the pass.
            rows: which of them count.

        Returns:
            Whether nothing else is wanted of this site, so that `take` need not be given a batch of it.
        """
        if self.plan.wanted:  # what pairs sites wants them, and their sizes, at the same time
            return False
        if site.name not in self.summaries:
            setting = self.plan.setting(site, values.shape[1], values.dtype)
            self._start(site, setting, rows.rows.token is not None)
        if site.name not in self._fused:
            self._fused[site.name] = Fused(self.summaries[site.name])
        fused = self._fused[site.name]
        if not fused.names or not fused.take(values, rows):
            return False
        self._learned[site.name] = fused.names
        return len(fused.names) == len(self.summaries[site.name])

    def take(self, read: Read) -> None:
        """Take in what one forward pass showed.

        Raises:
            DataError: a summary cannot be kept at a site, or pairs sites that do not have the same rows.
        """
        for site in self.plan.sites:
            learned = self._learned.pop(site.name, frozenset())
            passed = read.passed[site.name]
            count = self._take(site, read.batches, learned) if site.name in read.batches else passed
            self.counts[site.name] += count
            self.passed[site.name] += passed

    def _take(self, site: Site, batches: Mapping[str, Batch], learned: frozenset[str]) -> int:
        """Show a batch to the summaries that have not learned it yet; gives the number of rows that they hold."""
        whole = self._with_others(site, batches)
        batch, found = finite_rows(whole)
        if site.name not in self.summaries:
            setting = self.plan.setting(site, whole.size, whole.values.dtype)
            sizes = {**setting.sizes, **{name: values.shape[1] for name, values in whole.others.items()}}
            self._start(site, replace(setting, grid=whole.grid, sizes=sizes), whole.token is not None)
        for kind, number in found.items():
            self.nonfinite[site.name][kind] += number
        for name, accumulator in self.summaries[site.name].items():
            if name not in learned:
                accumulator.update(batch)
        return len(batch)

    def merge(self, other: Accumulation) -> None:
        """Take in what another one has seen, of other examples.

        Raises:
            DataError: they are not of the same plan.
        """
        for site in self.plan.sites:
            name = site.name
            if name not in other.summaries:
                continue
            if name not in self.summaries:
                self.summaries[name] = other.summaries[name]
                self.counts[name], self.passed[name] = other.counts[name], other.passed[name]
                self.nonfinite[name] = dict(other.nonfinite[name])
                continue
            for kind, accumulator in self.summaries[name].items():
                accumulator.merge(other.summaries[name][kind])
            self.counts[name] += other.counts[name]
            self.passed[name] += other.passed[name]
            for kind, number in other.nonfinite[name].items():
                self.nonfinite[name][kind] += number

    def held_bytes(self) -> int:
        """Bytes of the accumulators, without what grows with the data."""
        every = [each for of_site in self.summaries.values() for each in of_site.values()]
        return sum(each.held_bytes() for each in every if not each.large)

    # Written down -----------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """All of it: arrays by `site/summary/name`, and the rest as JSON. `restore` takes both."""
        arrays = {
            f"{site}\n{name}\n{key}": np.asarray(array, order="C")
            for site, of_site in self.summaries.items()
            for name, summary in of_site.items()
            for key, array in summary.state().items()
        }
        sites = {
            site: {
                "size": next(iter(of_site.values())).size,
                "summaries": list(of_site),
                "count": self.counts[site],
                "passed": self.passed[site],
                "nonfinite": self.nonfinite[site],
            }
            for site, of_site in self.summaries.items()
        }
        return arrays, {"sites": sites}

    def restore(self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        """Become what had this `state()`.

        Raises:
            DataError: it does not fit the plan.
        """
        self._fused = {}
        states: dict[str, dict[str, dict[str, np.ndarray]]] = {}
        for key, array in arrays.items():
            site, name, inner = key.split("\n")
            states.setdefault(site, {}).setdefault(name, {})[inner] = array
        for site in self.plan.sites:
            said = facts["sites"].get(site.name)
            if said is None:
                continue
            setting = self.plan.setting(site, said["size"])
            self.summaries[site.name] = {
                name: self.plan.templates[name].reopen(setting, states.get(site.name, {}).get(name, {}))
                for name in said["summaries"]
            }
            self.counts[site.name], self.passed[site.name] = said["count"], said["passed"]
            self.nonfinite[site.name] = dict(said["nonfinite"])

    # Helpers ----------------------------------------------------------------------------------------

    def _with_others(self, site: Site, batches: Mapping[str, Batch]) -> Batch:
        """The batch of a site, with what the sites that some summary pairs it with did on the same rows."""
        whole, wanted = batches[site.name], self.plan.wanted
        for name in wanted:
            same = [torch.equal(a, b.to(a.device)) for a, b in zip(_places(whole), _places(batches[name]), strict=True)]
            if not all(same):
                raise DataError(
                    f"{site.name} has {len(whole)} rows where {name} has {len(batches[name])}, or others: two sites "
                    "can be paired only if they have the same rows (examples and positions)"
                )
        return replace(whole, others={name: batches[name].values for name in wanted}) if wanted else whole

    def _start(self, site: Site, setting: Setting, has_tokens: bool) -> None:
        usable = self.plan.usable(has_tokens)
        if not usable:
            names = ", ".join(type(each).__name__ for each in self.plan.templates.values())
            raise DataError(
                f"{site.name} gives a row for each example, not for each token: {names} cannot be kept there"
            )
        self.summaries[site.name] = {
            each.name: each.start(replace(setting, scratch=self._scratch_of(each, setting))) for each in usable
        }
        self.counts[site.name] = self.passed[site.name] = 0
        self.nonfinite[site.name] = dict(_NONE_FOUND)

    def _scratch_of(self, template: Summary, setting: Setting) -> str | None:
        """The folder for what grows with the data; None for memory, as long as there is room."""
        needed = template.nbytes([setting]) if template.large else 0
        if needed <= self._room:
            self._room -= needed
            return None
        return str(self.scratch or tempfile.gettempdir())


def _wanted(templates: Mapping[str, Summary], sites: Sequence[Site]) -> list[str]:
    """The sites whose values some summary of another site asks for."""
    names, wanted = [site.name for site in sites], []
    for each in templates.values():
        for name in getattr(each, "wants_sites", ()):
            if name not in names:
                raise unknown("recorded site", name, names, f"{each!r} pairs it with others: name it in sites= too.")
            wanted.append(name)
    return list(dict.fromkeys(wanted))


def _places(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    return batch.example, batch.position
