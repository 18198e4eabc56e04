"""Recording on a Ray cluster gives what one process gives, whoever dies and whoever comes late."""

from __future__ import annotations

import copy
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.recording import tiny
from torch import nn
from transformers import BertConfig, BertModel

import patchclamp as pc
from patchclamp.errors import ClusterError, DataError, MissingExtra, ModelError
from patchclamp.recording import checkpoint
from patchclamp.recording import cluster as cluster_module
from patchclamp.recording.ragged import Ragged
from patchclamp.recording.record import prepare

BATCH_TOKENS = 256


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the workers have: another number of threads adds in another order, and a sum near 0 may change its sign."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def machines() -> Iterator[Any]:
    """A cluster of three machines with one processor each, as far as Ray can tell."""
    pytest.importorskip("ray", reason="Ray is not installed")
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_same_as_one_process(machines: Any) -> None:
    model, data = model_of(), labelled(400)
    summaries = [*pc.recording.default_summaries(True, True), pc.Correlation()]
    alone = pc.record(model, data, "mlp.*", summaries, batch_tokens=BATCH_TOKENS, progress=False)
    cluster = pc.RayCluster(batches=2)
    spread = pc.record(model, data, "mlp.*", summaries, batch_tokens=BATCH_TOKENS, progress=False, cluster=cluster)
    refuse_different(alone, spread)
    assert spread.facts["data"] == alone.facts["data"] and spread.vocabulary == alone.vocabulary
    reports = cluster.reports
    assert [each.shard for each in reports] == list(range(len(reports))) and len(reports) > 8
    assert sum(each.tokens for each in reports) == alone.facts["data"]["tokens"]
    assert [each.first for each in reports] == [2 * place for place in range(len(reports))]


def test_a_killed_worker_loses_nothing(machines: Any) -> None:
    model, data = large(), labelled(1500)
    alone = recorded(model, data)
    killed: list[int] = []

    def kill() -> None:
        working = until(readers)
        time.sleep(0.3)
        killed.append(working[0])
        os.kill(working[0], signal.SIGKILL)

    cluster = pc.RayCluster(batches=4)
    with beside(kill):
        spread = recorded(model, data, cluster=cluster)
    refuse_different(alone, spread)
    assert killed
    after = [each for each in cluster.reports if each.process not in killed]
    assert len({each.process for each in after}) >= 2
    # The weights come to a process once, however many shards it reads.
    assert len({each.process for each in cluster.reports}) < len(cluster.reports)
    for process in {each.process for each in cluster.reports}:
        assert sum(each.loading > 0 for each in cluster.reports if each.process == process) <= 1


def test_a_machine_that_comes_late_takes_part_and_one_that_goes_is_not_missed(
    machines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = large(), labelled(1500)
    alone = recorded(model, data)
    cluster, spread, delivered = pc.RayCluster(batches=2), [], threading.Event()
    here: list[int] = []  # the raylet of the late machine, which is the parent of its workers
    got = cluster_module._Reading._got

    def seen(self: Any, report: Any, number: int, size: int) -> Any:
        found = got(self, report, number, size)
        if here and parent_of(found.process) == here[0]:
            delivered.set()
        # No more is sent meanwhile, so that something is left when the machine has started its worker.
        delivered.wait(1.0)
        return found

    monkeypatch.setattr(cluster_module._Reading, "_got", seen)
    with beside(lambda: spread.append(recorded(model, data, cluster=cluster))):
        until(readers)
        late = machines.add_node(num_cpus=1)  # wants the main thread, for its signals
        here.append(late.all_processes["raylet"][0].process.pid)
        until(lambda: delivered.is_set() or spread)
        took_part = delivered.is_set()
        machines.remove_node(late, allow_graceful=False)
        delivered.set()
    assert took_part, "the machine that came late read nothing"
    refuse_different(alone, spread[0])


def test_tensors_and_images(machines: Any) -> None:
    network = tiny.seeded(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    values = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    pictures = np.random.default_rng(0).integers(0, 255, (24, 8, 8, 3), np.uint8)
    convolutional = tiny.seeded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)))
    for module, data, site in (
        (network, pc.Tensors(values, labels={"sign": ["+", "-"] * 32}), "module:1"),
        (convolutional, pc.Images(pictures, {"kind": ["a", "b"] * 12}, mean=[0.5] * 3, std=[0.5] * 3), "module:1"),
    ):
        found = [
            pc.record(pc.load(module), data, site, batch_tokens=512, progress=False, cluster=cluster)
            for cluster in (None, pc.RayCluster(batches=1))
        ]
        refuse_different(*found)


def test_goes_on_from_its_checkpoint(machines: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FIRST_AFTER", 0.0)
    monkeypatch.setattr(checkpoint, "SHARE", 1e9)
    model, data = model_of(), labelled(400)
    alone = recorded(model, data)
    write, written = checkpoint.Checkpoints.write, []

    def interrupted(self: checkpoint.Checkpoints, batches: int, *rest: Any) -> None:
        write(self, batches, *rest)
        written.append(batches)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Checkpoints, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recorded(model, data, store=tmp_path / "store", cluster=pc.RayCluster(batches=1))
    cluster = pc.RayCluster(batches=1)
    refuse_different(alone, recorded(model, data, store=tmp_path / "store", cluster=cluster))
    assert cluster.reports[0].first == written[1] > 0


# What goes wrong -------------------------------------------------------------------------------------


def test_a_shard_that_kills_every_worker(machines: Any) -> None:
    model = model_of()
    here = os.getpid()

    def die(*_: object) -> None:
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ClusterError, match=r"worker died 2 times in batches \d+ to \d+.*memory.*batch_tokens"):
        handle = model.module.register_forward_hook(die)
        try:
            recorded(model, labelled(40), cluster=pc.RayCluster(retries=1))
        finally:
            handle.remove()


def test_an_error_of_a_worker_is_the_one_it_would_be_here(machines: Any) -> None:
    model = model_of()
    here = os.getpid()

    def fail(*_: object) -> None:
        if os.getpid() != here:
            raise DataError("the third text is no good")

    def odd(*_: object) -> None:
        if os.getpid() != here:
            raise KeyError("weights")

    for hook, kind, message in (
        (fail, DataError, "the third text is no good"),
        (odd, ClusterError, "worker failed in batches 1 to .*weights"),
    ):
        handle = model.module.register_forward_hook(hook)
        try:
            with pytest.raises(kind, match=message):
                recorded(model, labelled(40), cluster=pc.RayCluster())
        finally:
            handle.remove()


def test_no_room_for_a_worker(machines: Any) -> None:
    with pytest.raises(ClusterError, match=r"no room for a worker of 64 threads.*it has 3 processors"):
        recorded(model_of(), labelled(40), cluster=pc.RayCluster(threads=64))


def test_another_version_on_a_worker(machines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pc, "__version__", "99.0")
    with pytest.raises(ModelError, match=r"has patchclamp .*asked for with 99\.0"):
        recorded(model_of(), labelled(40), cluster=pc.RayCluster())


def test_what_a_cluster_cannot_do() -> None:
    with pytest.raises(DataError, match="leave out cluster="):
        recorded(model_of(), labelled(8), activations=True, cluster="ray")
    with pytest.raises(DataError, match="Pooled keeps a row for each example"):
        pc.record(model_of(), labelled(8), "mlp.*", [pc.Pooled()], progress=False, cluster="ray")
    with pytest.raises(DataError, match='cluster= is "ray"'):
        recorded(model_of(), labelled(8), cluster=3)
    with pytest.raises(DataError, match="threads is a whole number, at least 1; not 0"):
        pc.RayCluster(threads=0)


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pip install 'patchclamp\[cluster\]'"):
        recorded(model_of(), labelled(8), cluster="ray")


# A part of the data ----------------------------------------------------------------------------------


def test_a_part_of_a_corpus_reads_as_the_whole_does() -> None:
    words = [text.split() for text in tiny.texts(30)]
    lengths = [["long" if len(each) > 4 else "short" for each in text] for text in words]
    tagged = pc.Texts(words=words, token_labels={"length": lengths})
    bert = pc.load(tiny.bert(), tokenizer=tiny.tokenizer())
    cases: list[tuple[pc.Model, pc.Texts, dict[str, Any]]] = [
        (bert, tagged, {}),
        (bert, labelled(30), {"positions": "last"}),
        (bert, labelled(30), {"long_texts": "windows", "max_length": 8, "overlap": 2}),
        (pc.load(tiny.t5(), tokenizer=tiny.tokenizer("$A [SEP]")), labelled(30), {}),
    ]
    for model, data, options in cases:
        whole = prepare(model, data, "*mlp.*", batch_tokens=64, progress=False, **options).corpus
        batches = whole.batches(64)
        assert len(batches) > 2
        some = np.concatenate(batches[1:3])
        part = copy.deepcopy((whole.shell(), whole.part(some)))
        filled = part[0].filled(part[1], model)
        for each in batches[1:3]:
            expected, found = whole.forward(each), filled.forward(each)
            assert expected.tokens == found.tokens
            for name, tensor in expected.keywords.items():
                assert torch.equal(tensor, found.keywords[name]), name
            for rows in ("rows", "decoder_rows"):
                one, other = getattr(expected, rows), getattr(found, rows)
                assert (one is None) == (other is None)
                if one is not None:
                    assert torch.equal(one.example, other.example) and torch.equal(one.position, other.position)
                    assert one.labels.keys() == other.labels.keys()
                    assert all(torch.equal(each, other.labels[name]) for name, each in one.labels.items())


def test_a_part_of_sequences_knows_what_it_lacks() -> None:
    ragged = Ragged()
    for length in (3, 0, 2, 5):
        ragged.append(np.arange(length))
    ragged.finish()
    part = ragged.part([3, 1, 0])
    assert [part[index].tolist() for index in (0, 1, 3)] == [[0, 1, 2], [], [0, 1, 2, 3, 4]]
    with pytest.raises(KeyError, match="sequence 2 is not in this part"):
        part[2]


# Helpers ---------------------------------------------------------------------------------------------


def model_of() -> pc.Model:
    return pc.load(tiny.bert(), tokenizer=tiny.tokenizer())


def large() -> pc.Model:
    """So large that a shard takes a moment."""
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 512,
    }
    return pc.load(BertModel(BertConfig(vocab_size=tiny.VOCABULARY, **size)).eval(), tokenizer=tiny.tokenizer())


def labelled(number: int) -> pc.Texts:
    texts = tiny.texts(number)
    return pc.Texts(texts, labels={"kind": ["even" if len(each) % 2 == 0 else "odd" for each in texts]})


def recorded(model: pc.Model, data: pc.Texts, **options: Any) -> pc.Recording:
    return pc.record(model, data, "mlp.*", batch_tokens=BATCH_TOKENS, progress=False, **options)


def refuse_different(one: pc.Recording, other: pc.Recording) -> None:
    """Whole numbers are the same, others to 1e-6."""
    assert list(one) == list(other)
    for site in one:
        assert one[site].count == other[site].count
        for name, summary in one[site].summaries.items():
            expected, found = summary.state(), other[site].summaries[name].state()
            assert expected.keys() == found.keys()
            for key, array in expected.items():
                where = f"{site} {name} {key}"
                if array.dtype.kind in "iu":
                    np.testing.assert_array_equal(found[key], array, where)
                else:
                    np.testing.assert_allclose(found[key], array, rtol=1e-6, atol=1e-6, err_msg=where)


def readers() -> list[int]:
    """Processes that are reading a shard now: Ray gives a process the name of what it does."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(b"ray::_read"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def parent_of(process: int) -> int:
    """Its parent process; 0 for one that is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("PPid:"))


def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.02)
    return condition()


class beside:
    """Do something in a thread while the block runs; what it raises is raised at the end."""

    def __init__(self, task: Callable[[], None]) -> None:
        self._task, self._error = task, None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self._task()
        except BaseException as error:
            self._error = error

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error
