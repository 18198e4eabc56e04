"""A recording that was killed goes on where it was, and ends as if nothing had happened; only one process at a time."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.recording import tiny
from tests.recording.tiny import recorded, state_of

import patchclamp as pc
from patchclamp.errors import StoreError
from patchclamp.recording import checkpoint

ROOT = Path(__file__).parents[2]
THOROUGH = bool(os.environ.get("PATCHCLAMP_TEST_ALL"))


@pytest.mark.timeout(900)
def test_killed_at_any_moment_it_ends_the_same(tmp_path: Path) -> None:
    kills = 50 if THOROUGH else 5
    command = [sys.executable, "-m", "tests.recording.killing", str(tmp_path), str(kills), "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    for each in said:
        print(each)
    assert sum(each["died"] for each in said) == kills
    assert sum(each["died"] and each["writing"] for each in said) >= kills // 5
    ended = [each for each in said if "same" in each]
    assert len(ended) >= kills // 3
    for each in ended:
        assert each["same"] and not each["left"], each
        if each["again_from"]:  # 0: it had ended already
            # At most what came after the last checkpoint is done twice; one may be whole before it says so.
            assert each["written"] < each["again_from"] <= each["batch"] + 1, each


# In one process -------------------------------------------------------------------------------------


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after every batch."""
    monkeypatch.setattr(checkpoint, "FIRST_AFTER", 0.0)
    monkeypatch.setattr(checkpoint, "SHARE", 1e9)


def model_of() -> pc.Model:
    return pc.load(tiny.bert(), tokenizer=tiny.tokenizer())


class Fails(pc.Summary):
    """Raises at a given batch."""

    name = "fails"
    at = 0
    seen = 0
    error: BaseException = RuntimeError("stopped")

    def empty(self, setting: Any) -> dict[str, Any]:
        import torch

        return {"count": torch.zeros((), dtype=torch.int64)}

    def add(self, batch: Any) -> None:
        Fails.seen += 1
        if Fails.seen == Fails.at:
            raise Fails.error
        self.tensors["count"] += len(batch)

    def combine(self, other: Any) -> None:
        self.tensors["count"] += other.tensors["count"]


def failing(at: int, error: BaseException, store: Path, **options: Any) -> BaseException:
    Fails.at, Fails.seen, Fails.error = at, 0, error
    model = model_of()
    assert model.sites
    before = state_of(model.module)
    with pytest.raises(type(error)) as caught:
        recorded(model, tiny.texts(), "mlp.*", SUMMARIES, store=store, **options)
    assert state_of(model.module) == before
    return caught.value


SUMMARIES = [pc.Moments(), pc.TopExamples(3, context=2), pc.Pooled("mean"), Fails()]
# Two sites a batch: the fifth look is in the third batch.
THIRD_BATCH = 5


def same(left: pc.Recording, right: pc.Recording) -> bool:
    for site in left:
        if (left[site].count, left[site].passed) != (right[site].count, right[site].passed):
            return False
        for name, summary in left[site].summaries.items():
            there = right[site].summaries[name].state()
            if any(array.tobytes() != there[key].tobytes() for key, array in summary.state().items()):
                return False
    return list(left) == list(right)


@pytest.mark.parametrize("error", [RuntimeError("stopped"), KeyboardInterrupt(), MemoryError("no room")])
@pytest.mark.parametrize("activations", [False, True])
def test_an_error_says_that_what_was_done_is_kept(
    error: BaseException, activations: bool, tmp_path: Path, often: None
) -> None:
    store = tmp_path / "new" / "store"
    raised = failing(THIRD_BATCH, error, store, activations=activations)
    assert any("goes on after batch 2" in note for note in raised.__notes__)
    assert [each.name for each in store.parent.iterdir()] == [".store.partial"]
    Fails.at, Fails.seen = 0, 0
    again = recorded(model_of(), tiny.texts(), "mlp.*", SUMMARIES, store=store, activations=activations)
    whole = recorded(model_of(), tiny.texts(), "mlp.*", SUMMARIES, store=tmp_path / "whole", activations=activations)
    assert same(again, whole) and [each.name for each in store.parent.iterdir()] == ["store"]
    if activations:
        for site in whole:
            left, right = again[site].activations, whole[site].activations
            assert left is not None and right is not None
            assert np.array_equal(left.values[:], right.values[:]) and np.array_equal(left.token[:], right.token[:])


def test_a_chunk_that_was_half_written_leaves_nothing_behind(tmp_path: Path, often: None) -> None:
    """Zarr writes a file beside its place and moves it there; a process that is killed in that moment leaves it."""
    failing(THIRD_BATCH, RuntimeError("stopped"), tmp_path / "store", activations=True)
    work = tmp_path / ".store.partial"
    written = list(work.rglob("zarr.json"))
    assert written
    for file in written:
        file.with_suffix(f".{'5e' * 16}.partial").write_bytes(b"half")
    again = recorded(model_of(), tiny.texts(), "mlp.*", SUMMARIES, store=tmp_path / "store", activations=True)
    whole = recorded(model_of(), tiny.texts(), "mlp.*", SUMMARIES, store=tmp_path / "whole", activations=True)
    files = [
        {each.relative_to(store) for each in store.rglob("*")} for store in (tmp_path / "store", tmp_path / "whole")
    ]
    assert files[0] == files[1]
    assert same(again, whole)


KILLED_WHILE_SAVING = """
import os, signal, sys
from tests.recording import tiny
import patchclamp as pc
write = pc.Recording._write
def killed(self, folder):
    write(self, folder)
    os.kill(os.getpid(), signal.SIGKILL)
pc.Recording._write = killed
model = pc.load(tiny.bert(), tokenizer=tiny.tokenizer())
tiny.recorded(model, tiny.texts(), "mlp.*", [pc.Moments()], store=sys.argv[1])
"""


def test_a_kill_while_it_is_saved_leaves_nothing_beside_the_store(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path / "store")], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert [each.name for each in tmp_path.iterdir()] == [".store.partial"]
    again = recorded(model_of(), tiny.texts(), "mlp.*", [pc.Moments()], store=tmp_path / "store")
    assert same(again, recorded(model_of(), tiny.texts(), "mlp.*", [pc.Moments()]))
    assert [each.name for each in tmp_path.iterdir()] == ["store"]


def test_work_that_was_left_beside_a_whole_store_goes(tmp_path: Path) -> None:
    recorded(model_of(), tiny.texts(), "mlp.*", [pc.Moments()], store=tmp_path / "store")
    (tmp_path / ".store.partial").mkdir()
    (tmp_path / ".store.partial" / "checkpoint-3.safetensors").write_bytes(b"x")
    recorded(model_of(), tiny.texts(), "mlp.*", [pc.Moments()], store=tmp_path / "store")
    assert [each.name for each in tmp_path.iterdir()] == ["store"]


def test_what_is_done_is_not_done_again(tmp_path: Path, often: None) -> None:
    failing(THIRD_BATCH, RuntimeError("stopped"), tmp_path / "store")
    Fails.at, Fails.seen = 0, 0
    recorded(model_of(), tiny.texts(), "mlp.*", SUMMARIES, store=tmp_path / "store")
    again = Fails.seen
    Fails.seen = 0
    recorded(model_of(), tiny.texts(), "mlp.*", SUMMARIES, store=tmp_path / "other")
    assert again == Fails.seen - 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seed": 1}, r"seed \(there 0, here 1\)"),
        ({"batch_tokens": 41}, r"batch_tokens \(there 40, here 41\)"),
        ({"data": tiny.texts(seed=5)}, "the data"),
    ],
)
def test_the_work_of_another_recording_is_not_gone_on_with(
    options: dict[str, Any], said: str, tmp_path: Path, often: None
) -> None:
    failing(THIRD_BATCH, RuntimeError("stopped"), tmp_path / "store")
    Fails.at = 0
    data = options.pop("data", tiny.texts())
    with pytest.raises(StoreError, match=f"unfinished recording of something else.*{said}.*or delete the folder"):
        recorded(model_of(), data, "mlp.*", SUMMARIES, store=tmp_path / "store", **options)


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("name", "harm", "said"),
    [
        ("checkpoint-2.safetensors", flipped, "checksum differs"),
        ("checkpoint-2.safetensors", Path.unlink, "is missing"),
        ("checkpoint.json", lambda file: file.write_text("{"), "cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_said_and_not_used(
    name: str, harm: Callable[[Path], object], said: str, tmp_path: Path, often: None
) -> None:
    failing(THIRD_BATCH, RuntimeError("stopped"), tmp_path / "store", activations=True)
    harm(tmp_path / ".store.partial" / name)
    Fails.at = 0
    with pytest.warns(UserWarning, match=f"of no use, and the recording starts anew: .*{said}"):
        again = recorded(model_of(), tiny.texts(), "mlp.*", SUMMARIES, store=tmp_path / "store", activations=True)
    assert same(again, recorded(model_of(), tiny.texts(), "mlp.*", SUMMARIES, activations=True))


def test_checkpoints_take_a_hundredth_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    work = checkpoint.Checkpoints(tmp_path, {})
    replace = os.replace

    def slowly(*paths: Any) -> None:
        now[0] += 0.5
        replace(*paths)

    monkeypatch.setattr(checkpoint.os, "replace", slowly)
    written, spent = [], 0.0
    for batch in range(1, 2001):
        now[0] += 0.25
        if work.due():
            work.write(batch, {"x": np.zeros(3)}, {}, {})
            written.append(now[0])
            spent += work.seconds
    assert written[0] == pytest.approx(checkpoint.FIRST_AFTER + 0.5)
    assert np.diff(written).min() >= 50  # a hundred times half a second
    assert spent / now[0] < 0.0125 and len(written) >= 8
    kept = sorted(each.name for each in tmp_path.iterdir())
    assert kept == [f"checkpoint-{work.batches}.safetensors", "checkpoint.json"]


# Several processes ----------------------------------------------------------------------------------


HOLDING = """
import sys, time
from pathlib import Path
from patchclamp.recording.checkpoint import checkpoints
with checkpoints(Path(sys.argv[1]), {"parameters": {}}, 40):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """A process that records into a store."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(tmp_path / "store")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_refused_until_the_first_is_gone(holder: subprocess.Popen, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=rf"store is being recorded by process {holder.pid} on "):
        recorded(model_of(), tiny.texts(), "mlp.*", [pc.Moments()], store=tmp_path / "store")
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    recorded(model_of(), tiny.texts(), "mlp.*", [pc.Moments()], store=tmp_path / "store")
    assert [each.name for each in tmp_path.iterdir()] == ["store"]


FULL = """
import resource, signal, sys
from pathlib import Path
from tests.recording import tiny
import patchclamp as pc
from patchclamp.recording import checkpoint
checkpoint.FIRST_AFTER, checkpoint.SHARE = float(sys.argv[2]), 1e9
model = pc.load(tiny.bert(), tokenizer=tiny.tokenizer())
assert model.sites
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
pc.record(model, tiny.texts(), "mlp.*", [pc.Histogram()], store=sys.argv[1], batch_tokens=40, progress=False)
"""


@pytest.mark.parametrize(("first_after", "said"), [(0, "a checkpoint in .*partial"), (1e9, ".*store")])
def test_a_disk_that_takes_no_more_is_said(first_after: float, said: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL, str(tmp_path / "store"), str(first_after)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(f"StoreError: cannot write {said}: .*File too large", done.stderr), done.stderr
    whole = recorded(model_of(), tiny.texts(), "mlp.*", [pc.Moments()], store=tmp_path / "store")
    assert same(whole, recorded(model_of(), tiny.texts(), "mlp.*", [pc.Moments()]))


INTERRUPTED = """
import sys, time
from tests.recording import tiny
import patchclamp as pc
from patchclamp.recording import checkpoint, run
checkpoint.FIRST_AFTER, checkpoint.SHARE = 0.0, 1e9
take = run.Accumulation.take
def slowly(self, read):
    print("batch", flush=True)
    time.sleep(0.2)
    take(self, read)
run.Accumulation.take = slowly
model = pc.load(tiny.bert(), tokenizer=tiny.tokenizer())
pc.record(model, tiny.texts(100), "mlp.*", [pc.Moments()], store=sys.argv[1], batch_tokens=40, progress=False)
"""


def test_control_c_says_how_to_go_on(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path / "store")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for _ in range(4):
        assert process.stdout.readline() == "batch\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert "KeyboardInterrupt" in error and "the same call again goes on after batch 3" in error
    assert (tmp_path / ".store.partial" / "checkpoint.json").exists()
