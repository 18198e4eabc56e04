"""A store that is damaged anywhere gives the truth or an error that names the file, and the doctor says the same."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.recording import tiny
from tests.recording.tiny import recorded

import patchclamp as pc
from patchclamp.errors import PatchclampError
from patchclamp.storage.doctor import Examination, examine

CASES = 300 if os.environ.get("PATCHCLAMP_TEST_ALL") else 60


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A recording with every kind of file, an atlas, and a series."""
    folder = tmp_path_factory.mktemp("stores")
    model = pc.load(tiny.bert(), tokenizer=tiny.tokenizer())
    texts = tiny.texts(40)
    data = pc.Texts(texts, labels={"kind": ["even" if len(each) % 2 == 0 else "odd" for each in texts]})
    kept = [pc.Moments(), pc.TopExamples(3, context=2), pc.ByToken(most_frequent=8), pc.ByLabel(), pc.Pooled("max")]
    recorded(model, data, "mlp.*", kept, store=folder / "recording", activations=True)
    pc.Atlas.build(model, data, folder / "atlas", progress=False)
    named = {"a": tiny.bert(), "b": tiny.seeded(tiny.bert(), 1)}
    loading = {"tokenizer": tiny.tokenizer()}
    pc.record_over(named, texts, summaries=[pc.Moments()], store=folder / "series", loading=loading, progress=False)
    return {name: folder / name for name in ("recording", "atlas", "series")}


def everything(kind: str, path: Path) -> Iterator[bytes]:
    """All that can be read of a store."""
    if kind == "atlas":
        atlas = pc.Atlas.open(path)
        for table in ("neurons", "examples", "tokens", "labels", "histograms", "neighbors"):
            yield repr(atlas.table(table).collect().to_dict(as_series=False)).encode()
        path = path / "recording"
        if not path.is_dir():
            return
    recordings = [pc.Recording.open(path)] if kind != "series" else list(pc.RecordingSeries.open(path).values())
    for recording in recordings:
        yield repr((recording.labels, recording.vocabulary, recording.labels_of_examples)).encode()
        yield recording.folds.tobytes()
        for site in recording:
            for summary in recording[site].summaries.values():
                yield from (np.ascontiguousarray(array).tobytes() for array in summary.state().values())
            if (kept := recording[site].activations) is not None:
                yield from (np.ascontiguousarray(each[:]).tobytes() for each in kept)
        for windows in recording.windows.values():
            yield from (np.ascontiguousarray(array).tobytes() for array in windows.state().values())


def _flip(file: Path, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(bytes(content))


def _cut(file: Path, draw: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: draw.randrange(len(content))])


def _delete(file: Path, draw: random.Random) -> None:
    file.unlink()


def _empty(file: Path, draw: random.Random) -> None:
    file.write_bytes(b"")


def _other(file: Path, draw: random.Random) -> None:
    others = sorted(each for each in file.parent.iterdir() if each.is_file() and each != file)
    file.write_bytes(draw.choice(others).read_bytes() if others else b"something else")


def _folder(file: Path, draw: random.Random) -> None:
    file.unlink()
    file.mkdir()


HARMS: list[Callable[[Path, random.Random], None]] = [_flip, _flip, _cut, _delete, _empty, _other, _folder]


@pytest.mark.parametrize("kind", ["recording", "atlas", "series"])
def test_anything_damaged_is_the_truth_or_an_error_that_names_it(
    kind: str, stores: dict[str, Path], tmp_path: Path
) -> None:
    truth = list(everything(kind, stores[kind]))
    names = sorted(each.relative_to(stores[kind]) for each in stores[kind].rglob("*") if each.is_file())
    assert len(names) > 4
    errors = 0
    for case in range(CASES // 3):
        draw = random.Random(case)
        path = tmp_path / "store"
        shutil.copytree(stores[kind], path)
        name = draw.choice(names)
        before = (path / name).read_bytes()
        draw.choice(HARMS)(path / name, draw)
        unharmed = (path / name).is_file() and (path / name).read_bytes() == before
        found = examine(path)
        try:
            read = list(everything(kind, path))
        except PatchclampError as error:
            errors += 1
            assert not unharmed and name.name in str(error), (case, name, error)
        else:
            assert read == truth, (case, name)
        assert bool(found.damaged) != unharmed, (case, name, found)
        if not unharmed:
            assert any(each.file in (name.as_posix(), name.parts[0]) for each in found.damaged), (case, name, found)
        shutil.rmtree(path)
    assert errors > CASES // 3 * 0.8


def test_a_whole_store_is_whole(stores: dict[str, Path]) -> None:
    for kind, path in stores.items():
        found = examine(path)
        assert found.kind == kind and not found.damaged and not found.strangers and found.files > 3
    assert "the summaries of mlp.0" in examine(stores["recording"]).whole
    assert "the table neurons" in examine(stores["atlas"]).whole


def test_what_is_lost_and_what_is_not(stores: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "store"
    shutil.copytree(stores["recording"], path)
    (path / "summaries" / "mlp.1.safetensors").unlink()
    (path / "notes.txt").write_text("mine")
    (tmp_path / ".store.partial").mkdir()
    found: Examination = examine(path)
    assert [(each.file, each.what, each.lost) for each in found.damaged] == [
        ("summaries/mlp.1.safetensors", "is missing", "the summaries of mlp.1")
    ]
    assert "the summaries of mlp.0" in found.whole and "the summaries of mlp.1" not in found.whole
    assert found.strangers == ["notes.txt"] and found.unfinished == tmp_path / ".store.partial"


def doctor(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "patchclamp.cli", "doctor", str(path)], capture_output=True, text=True)


def test_the_command(stores: dict[str, Path], tmp_path: Path) -> None:
    whole = doctor(stores["recording"])
    assert whole.returncode == 0 and "the recording is whole" in whole.stdout.replace("\n", " "), whole
    path = tmp_path / "store"
    shutil.copytree(stores["recording"], path)
    _flip(path / "vocabulary.parquet", random.Random(0))
    hurt = doctor(path)
    assert hurt.returncode == 1 and "vocabulary.parquet" in hurt.stdout and "What can still be read" in hurt.stdout
    nothing = doctor(tmp_path / "nothing")
    assert nothing.returncode == 1 and "there is no store at" in nothing.stderr and "Traceback" not in nothing.stderr


def test_the_doctor_needs_neither_torch_nor_transformers(stores: dict[str, Path]) -> None:
    script = (
        "import sys; from pathlib import Path; from patchclamp.cli.doctor import show; show(Path(sys.argv[1])); "
        "print([each for each in ('torch', 'transformers') if each in sys.modules])"
    )
    command = [sys.executable, "-c", script, str(stores["atlas"])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
