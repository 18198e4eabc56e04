"""What a worker of a cluster does: read some batches and give what was accumulated, or merge two of these.

A worker is a process that is used again: the model comes to it once, and stays for all shards of a recording.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

import patchclamp
from patchclamp.errors import ModelError
from patchclamp.model.model import Model
from patchclamp.recording.accumulation import Accumulation, Plan
from patchclamp.recording.corpus import Corpus
from patchclamp.recording.fused import available
from patchclamp.recording.stream import stream

# What `Accumulation.state` gives: it crosses from process to process.
State = tuple[dict[str, np.ndarray], dict[str, Any]]


@dataclass(frozen=True)
class ShardReport:
    """Which worker read which batches, and how long it took.

    Attributes:
        shard: number of the shard.
        first, batches: its first batch, and how many there are.
        tokens: tokens that count in it.
        host, process: who read it.
        began, seconds: when, in seconds since 1970, and for how long, without loading the model.
        loaded: how many times this process has been given a model so far.
        loading: seconds that this took before this shard; 0 where the model was there already.
    """

    shard: int
    first: int
    batches: int
    tokens: int
    host: str
    process: int
    began: float
    seconds: float
    loaded: int
    loading: float


@dataclass(frozen=True)
class Job:
    """What all shards of a recording have in common.

    Attributes:
        name: of this recording, another one each time.
        module, tokenizer, processor, model_name: of the model.
        plan: what is accumulated.
        shell: the corpus, without what is stored of its examples.
        version: of patchclamp, where the recording was asked for.
        device: where the model is put; None: it stays on the processor.
    """

    name: str
    module: nn.Module
    tokenizer: Any
    processor: Any
    model_name: str
    plan: Plan
    shell: Corpus
    version: str
    device: str | None


@dataclass(frozen=True)
class Shard:
    """Some batches that come one after the other.

    Attributes:
        number, first: of the shard, and of its first batch.
        batches: ids of the examples of each batch.
        part: what is stored of these examples.
        threads: how many a worker uses.
    """

    number: int
    first: int
    batches: Sequence[np.ndarray]
    part: Mapping[str, Any]
    threads: int


def read_shard(name: str, fetch: Callable[[], Job], shard: Shard) -> tuple[State, ShardReport]:
    """Read the batches of a shard.

    Args:
        name: of the recording.
        fetch: gives what its shards have in common; it is called only where this process has not got it yet.
        shard: the batches.

    Raises:
        ModelError: this machine has another version of patchclamp.
        Others: as `stream`.
    """
    torch.set_num_threads(shard.threads)
    loading = _HERE.take(name, fetch)
    job, model = _HERE.job, _HERE.model
    assert job is not None and model is not None
    corpus = job.shell.filled(shard.part, model)
    held = Accumulation(job.plan)
    taker = held.take_early if available() else None
    tokens, begun = 0, time.time()
    for read in stream(model, corpus, job.plan.sites, shard.batches, taker):
        held.take(read)
        tokens += read.tokens
    seconds, who = time.time() - begun, (socket.gethostname(), os.getpid())
    said = ShardReport(
        shard.number, shard.first, len(shard.batches), tokens, *who, begun, seconds, _HERE.times, loading
    )
    return held.state(), said


def merged(plan: Plan, left: State, right: State) -> State:
    """What two neighbours have accumulated, together."""
    both, other = Accumulation(plan), Accumulation(plan)
    both.restore(*left)
    other.restore(*right)
    both.merge(other)
    return both.state()


@dataclass
class _Here:
    """What this process has been given, and how often."""

    job: Job | None = None
    model: Model | None = None
    times: int = 0

    def take(self, name: str, fetch: Callable[[], Job]) -> float:
        """Get what the shards of this recording have in common, if it is not here; gives the seconds it took."""
        if self.job is not None and self.job.name == name:
            return 0.0
        begun = time.time()
        self.job = self.model = None  # two models may be more than there is room for
        job = fetch()
        if job.version != patchclamp.__version__:
            raise ModelError(
                f"{socket.gethostname()} has patchclamp {patchclamp.__version__}, and the recording was asked for with "
                f"{job.version}: all machines of a cluster need one version"
            )
        module = job.module if job.device is None else job.module.to(job.device)
        self.job, self.model = job, Model(module, job.tokenizer, job.processor, job.model_name)
        self.times += 1
        return time.time() - begun


_HERE = _Here()
