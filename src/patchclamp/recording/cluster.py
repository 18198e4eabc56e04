"""`RayCluster`: record on many processes or machines, with Ray.

The batches of a recording are cut into shards of neighbours. A worker reads a shard and gives what was accumulated;
neighbours are merged in a tree, on the workers, and what a tree gives is taken here, in the order of the batches. So
the result does not depend on who was fast, and what is taken here can be written into a checkpoint like any other.

A shard whose worker dies is read again by another. A worker that joins late gets shards from then on.

Objects travel between the processes of one Ray cluster as Ray sends them, which is by pickling: a cluster is a place
where whoever may ask for work may run any code. Nothing of that kind is read from a file or written to one.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import nn

import patchclamp
from patchclamp.errors import ClusterError, DataError, MissingExtra, PatchclampError
from patchclamp.model.model import Model
from patchclamp.recording import worker
from patchclamp.recording.accumulation import Accumulation, Plan
from patchclamp.recording.corpus import Corpus
from patchclamp.recording.worker import Job, Shard, ShardReport, State

# Neighbouring shards that are merged on the workers before what they hold comes here.
_GROUP = 8
# Shards for each worker, where the data has so many batches: what a death costs, and how evenly they end.
_SHARDS_EACH = 8
_BATCHES_AT_MOST = 64
# How often to look for workers that have joined.
_SECONDS = 1.0


@dataclass
class RayCluster:
    """Where to record: a Ray cluster, or workers on this machine.

    Args:
        address: of a running cluster, as `ray.init` takes it (`"auto"`, `"10.0.0.1:6379"`, `"ray://head:10001"`).
            None uses the one that this process is connected to, or that `RAY_ADDRESS` names, or else starts workers on
            this machine, which end with the recording.
        threads: of a worker, and the processors that Ray reserves for it. As many workers run at a time as the
            cluster has room for.
        gpus: of a worker: 0, or 1 to run the model on a GPU.
        batches: of a shard. None: eight shards for each worker, of 64 batches at most.
        retries: how often a shard is read again whose worker died.

    Attributes:
        reports: who read which batches, in the order of the shards, of the last recording.
    """

    address: str | None = None
    threads: int = 1
    gpus: float = 0
    batches: int | None = None
    retries: int = 3
    reports: list[ShardReport] = field(default_factory=list, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, least in (("threads", 1), ("retries", 0), ("batches", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise DataError(f"RayCluster: {name} is a whole number, at least {least}; not {value!r}")

    @classmethod
    def of(cls, given: RayCluster | str | None) -> RayCluster | None:
        """What a user gave as `cluster=`: "ray", an address, or a `RayCluster`.

        Raises:
            DataError: it is something else.
        """
        if given is None or isinstance(given, RayCluster):
            return given
        if isinstance(given, str) and given:
            return cls(None if given == "ray" else given)
        raise DataError(f'cluster= is "ray", the address of a Ray cluster, or a pc.RayCluster; not {given!r}')

    def read(
        self, model: Model, corpus: Corpus, plan: Plan, batches: Sequence[np.ndarray], first: int = 0
    ) -> Iterator[Part]:
        """Read batches on the workers; gives parts of them, in order, each with all that was accumulated of it.

        Args:
            model: the model; it is sent to each worker once.
            corpus: the data.
            plan: what is accumulated.
            batches: all of them.
            first: how many of them have been read before.

        Raises:
            MissingExtra: Ray is not installed.
            ClusterError: it cannot be reached, has no room for a worker, or a worker died again and again.
            Others: as reading them here.
        """
        with _connected(self.address) as ray:
            yield from _Reading(self, ray, model, corpus, plan, batches, first).parts()


class Part(NamedTuple):
    """What was accumulated of neighbouring batches.

    Attributes:
        held: what.
        batches: how many batches of the data are done with this part, those before it included.
        tokens: tokens that count in this part.
    """

    held: Accumulation
    batches: int
    tokens: int


class _Reading:
    """One recording on a cluster."""

    def __init__(
        self,
        cluster: RayCluster,
        ray: Any,
        model: Model,
        corpus: Corpus,
        plan: Plan,
        batches: Sequence[np.ndarray],
        first: int,
    ) -> None:
        self._cluster, self._ray, self._corpus, self._plan = cluster, ray, corpus, plan
        self._batches, self._first = batches, first
        cluster.reports = []
        device = "cuda" if cluster.gpus else None
        parts = (model.tokenizer, model.processor, model.name, plan, corpus.shell(), patchclamp.__version__, device)
        self._name = uuid.uuid4().hex
        self._job = ray.put(Job(self._name, _on_processor(model.module), *parts))
        self._plan_there = ray.put(plan)
        needed: dict[str, Any] = {"num_cpus": cluster.threads, "max_retries": cluster.retries}
        self._read = ray.remote(num_returns=2, num_gpus=cluster.gpus, **needed)(_read)
        self._merge = ray.remote(**needed)(worker.merged)
        # Of the shard that is read -> its number; of a group that is merged -> the group.
        self._running: dict[Any, int] = {}
        self._states: dict[int, Any] = {}
        self._merging: dict[Any, int] = {}

    def parts(self) -> Iterator[Part]:
        """See `RayCluster.read`."""
        shards, size = self._cut()
        waiting, group = iter(range(shards)), 0
        groups = [range(start, min(start + _GROUP, shards)) for start in range(0, shards, _GROUP)]
        merged: dict[int, Any] = {}
        reports: dict[int, ShardReport] = {}
        try:
            while group < len(groups):
                # A few more than can run, so that no worker waits; not all, as each holds its part of the data.
                room = 2 * self._slots() + 2 - len(self._running)
                for number in itertools.islice(waiting, max(0, room)):
                    self._send(number, size)
                ready, _ = self._ray.wait([*self._running, *self._merging], timeout=_SECONDS)
                for each in ready:
                    if each in self._merging:
                        merged[self._merging.pop(each)] = each
                        continue
                    number = self._running.pop(each)
                    reports[number] = self._got(each, number, size)
                    whole = groups[number // _GROUP]
                    if all(other in reports for other in whole):
                        self._merging[self._tree([self._states.pop(other) for other in whole])] = number // _GROUP
                while group in merged:
                    held = self._taken(merged.pop(group))
                    last = groups[group][-1]
                    done = min(self._first + (last + 1) * size, len(self._batches))
                    yield Part(held, done, sum(reports[each].tokens for each in groups[group]))
                    group += 1
        finally:
            self._cluster.reports = [reports[each] for each in sorted(reports)]
            for each in [*self._running, *self._merging]:
                self._ray.cancel(each, force=True, recursive=True)

    def _cut(self) -> tuple[int, int]:
        """How many shards, and of how many batches each."""
        left = len(self._batches) - self._first
        size = self._cluster.batches
        if size is None:
            wanted = math.ceil(left / (_SHARDS_EACH * max(1, self._slots())))
            size = max(1, min(wanted, _BATCHES_AT_MOST))
        return math.ceil(left / size), size

    def _slots(self) -> int:
        """How many workers the cluster has room for now.

        Raises:
            ClusterError: for none.
        """
        there = self._ray.cluster_resources()
        slots = int(there.get("CPU", 0) // self._cluster.threads)
        if self._cluster.gpus:
            slots = min(slots, int(there.get("GPU", 0) // self._cluster.gpus))
        if slots < 1:
            has = f"{there.get('CPU', 0):g} processors and {there.get('GPU', 0):g} GPUs"
            raise ClusterError(
                f"the cluster has no room for a worker of {self._cluster.threads} threads and {self._cluster.gpus} "
                f"GPUs: it has {has}"
            )
        return slots

    def _send(self, number: int, size: int) -> None:
        first = self._first + number * size
        batches = list(self._batches[first : first + size])
        part = self._corpus.part(np.concatenate(batches))
        shard = Shard(number, first, batches, part, self._cluster.threads)
        # In a list, so that Ray does not fetch it for a worker that has it already.
        state, report = self._read.remote(self._name, [self._job], shard)
        self._running[report] = number
        self._states[number] = state

    def _got(self, report: Any, number: int, size: int) -> ShardReport:
        first = self._first + number * size
        last = min(first + size, len(self._batches))
        return self._fetched(report, f"batches {first + 1} to {last}")

    def _tree(self, states: list[Any]) -> Any:
        while len(states) > 1:
            pairs = [states[start : start + 2] for start in range(0, len(states), 2)]
            states = [pair[0] if len(pair) == 1 else self._merge.remote(self._plan_there, *pair) for pair in pairs]
        return states[0]

    def _taken(self, state: Any) -> Accumulation:
        found: State = self._fetched(state, "a merge")
        held = Accumulation(self._plan)
        held.restore(*found)
        return held

    def _fetched(self, reference: Any, what: str) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except errors.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else None
            if isinstance(cause, PatchclampError):
                raise cause from None
            raise ClusterError(f"a worker failed in {what}: {cause or error}") from error
        except (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError) as error:
            times = self._cluster.retries + 1
            raise ClusterError(
                f"the worker died {times} times in {what}: most often it has run out of memory. Give a worker more "
                "(RayCluster(threads=...): fewer run at a time), or record fewer tokens at once (batch_tokens=...)"
            ) from error
        except errors.RayError as error:
            raise ClusterError(f"the cluster failed in {what}: {error}") from error


def _read(name: str, job: list[Any], shard: Shard) -> tuple[State, ShardReport]:
    import ray

    return worker.read_shard(name, lambda: ray.get(job[0]), shard)


def _on_processor(module: nn.Module) -> nn.Module:
    """The module, or a copy of one on a GPU: what is sent must not be tied to a device of this machine."""
    if all(each.device.type == "cpu" for each in (*module.parameters(), *module.buffers())):
        return module
    return copy.deepcopy(module).cpu()


@contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """Ray, connected for as long as the block runs; as it was before, afterwards."""
    try:
        import ray
    except ImportError as error:
        raise MissingExtra("a cluster needs Ray: pip install 'patchclamp[cluster]'") from error
    if ray.is_initialized():
        yield ray
        return
    try:
        ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        where = address or "the Ray cluster of RAY_ADDRESS, or one on this machine"
        raise ClusterError(f"cannot connect to {where}: {error}") from error
    try:
        yield ray
    finally:
        ray.shutdown()
