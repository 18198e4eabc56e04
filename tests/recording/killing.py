"""Record in processes that are killed, and record again: run as a program by `test_resume.py`.

    python -m tests.recording.killing FOLDER KILLS SEED

The program imports everything once and forks: a child records, and dies by SIGKILL at its moment. Then another child
records into the same store to the end, and what it saved is compared, byte by byte, with what a child saved that
nobody disturbed. Every line that is printed is a JSON object about one kill.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from tests.recording import tiny

import patchclamp as pc
from patchclamp.recording import checkpoint, run

# A fifth of the kills waits for a checkpoint to begin; the others are spread over the whole run.
AIMED_EVERY = 5
TEXTS = 400
_TIMES = ("created", "manifest_sha256")


def main(folder: Path, kills: int, seed: int) -> None:
    """Kill `kills` times; see the module."""
    torch.set_num_threads(1)
    module = tiny.bert()
    with torch.no_grad():  # one word is no number, and rows are left out for it
        module.get_parameter("embeddings.word_embeddings.weight")[-1] = torch.nan
    model = pc.load(module, tokenizer=tiny.tokenizer())
    texts = tiny.texts(TEXTS, seed=seed)
    data = pc.Texts(texts, labels={"kind": ["even" if len(each) % 2 == 0 else "odd" for each in texts]})
    assert model.sites
    draw = random.Random(seed)

    begun = time.monotonic()
    _finished(_forked(model, data, folder / "whole"))
    duration = time.monotonic() - begun
    expected = dict(_content(folder / "whole"))
    killed, store = 0, folder / "store-0"
    while killed < kills:
        child = _forked(model, data, store)
        aimed = killed % AIMED_EVERY == 0
        if aimed:
            moment = _until_writing(store, child, draw.randint(1, 6))
        else:
            moment = draw.uniform(0, duration)
            time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        died = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        events = _events(store)
        said: dict[str, Any] = {"moment": moment, "duration": duration, "aimed": aimed, "died": died}
        said["batch"] = max((number for event, number in events if event == "batch"), default=0)
        said["writing"] = bool(events) and events[-1][0] == "writing"
        said["written"] = max((number for event, number in events if event == "written"), default=0)
        killed += died
        if died and not draw.randrange(3):  # one run in three is killed again before it may end
            print(json.dumps(said), flush=True)
            continue
        _log(store).unlink(missing_ok=True)
        _finished(_forked(model, data, store))
        first = min((number for event, number in _events(store) if event == "batch"), default=0)
        said |= {"again_from": first, "same": dict(_content(store)) == expected}
        said["left"] = sorted(each.name for each in folder.iterdir() if each.name.startswith("."))
        print(json.dumps(said), flush=True)
        store = folder / f"store-{killed}"


def _forked(model: pc.Model, data: pc.Texts, store: Path) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        _record(model, data, store)
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(status)


def _record(model: pc.Model, data: pc.Texts, store: Path) -> None:
    """Record with as many checkpoints as fit, and note what happens when."""
    checkpoint.FIRST_AFTER, checkpoint.SHARE = 0.0, 0.5
    log = os.open(_log(store), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(event: str, number: int) -> None:
        os.write(log, f"{event} {number}\n".encode())

    write, take, before = checkpoint.Checkpoints.write, run.Accumulation.take, [0]

    def noted(self: checkpoint.Checkpoints, batches: int, *rest: Any) -> None:
        note("writing", batches)
        write(self, batches, *rest)
        note("written", batches)

    def taken(self: run.Accumulation, read: Any) -> None:
        if not before[0]:
            before[0] = _done(store)
        before[0] += 1
        note("batch", before[0])
        take(self, read)

    checkpoint.Checkpoints.write, run.Accumulation.take = noted, taken  # type: ignore[method-assign]
    summaries = [
        *(pc.Moments(), pc.FiringRate(0.0, pc.FractionOfMaximum(0.5)), pc.MinMax(), pc.Histogram()),
        *(pc.TopExamples(4, context=3), pc.ByToken(most_frequent=20), pc.ByLabel(), pc.ByPosition(8), pc.NGrams(2, 8)),
        *(pc.Exemplars(2), pc.Pooled("max"), pc.CoFiring(partners=3), pc.Correlation(partners=3)),
    ]
    pc.record(model, data, "mlp.*", summaries, store=store, activations=True, batch_tokens=60, progress=False)


def _done(store: Path) -> int:
    """The batches of the checkpoint that this run begins with."""
    try:
        return json.loads((store.parent / f".{store.name}.partial" / "checkpoint.json").read_text())["batches"]
    except OSError:
        return 0


def _log(store: Path) -> Path:
    return store.parent / f"{store.name}.log"


def _events(store: Path) -> list[tuple[str, int]]:
    if not _log(store).exists():
        return []
    lines = [line.split() for line in _log(store).read_text().splitlines()]
    return [(event, int(number)) for event, number in lines]


def _until_writing(store: Path, child: int, which: int) -> float:
    """Wait until the child has begun to write so many checkpoints, or has ended."""
    begun, seen = time.monotonic(), sum(event == "writing" for event, _ in _events(store))
    while sum(event == "writing" for event, _ in _events(store)) < seen + which:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.0005)
    return time.monotonic() - begun


def _finished(child: int) -> None:
    status = os.waitpid(child, 0)[1]
    assert status == 0, f"the recording failed: {status}"


def _content(store: Path) -> Iterator[tuple[str, bytes]]:
    """Every file, but for what says when it was written."""
    for file in sorted(store.rglob("*")):
        if file.is_file():
            content = file.read_bytes()
            if file.name == "manifest.json":
                said = {key: value for key, value in json.loads(content).items() if key not in _TIMES}
                content = json.dumps(said).encode()
            yield file.relative_to(store).as_posix(), content


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
