"""Stores in an object store: a real S3 interface on localhost, with connections that drop in the middle."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.recording import tiny

import patchclamp as pc
from patchclamp.errors import DamagedStore, DataError, MissingExtra, StoreError
from patchclamp.recording import checkpoint
from patchclamp.storage import Conflict, Remote, lease, leased, remote
from patchclamp.storage.doctor import examine

pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'patchclamp[s3]'")
pytest.importorskip("moto", reason="moto is not installed")
from tests.object_store import BUCKET, Proxy, running

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server() -> Iterator[Proxy]:
    with running() as proxy:
        yield proxy


@pytest.fixture
def s3(server: Proxy, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    monkeypatch.setattr(remote, "PAUSES", (0.01, 0.05))
    server.quiet()
    return server


@pytest.fixture
def url(s3: Proxy, request: pytest.FixtureRequest) -> str:
    """A place that no other test uses."""
    return f"s3://{BUCKET}/{request.node.name.replace('[', '-').replace(']', '')}"


def recorded(module: Any, **options: Any) -> pc.Recording:
    model = pc.load(module, tokenizer=tiny.tokenizer())
    return pc.record(model, tiny.texts(), "mlp.*", progress=False, **options)


def names(url: str) -> list[str]:
    return Remote(url).names()


def same(one: pc.Recording, other: pc.Recording, activations: bool = False) -> bool:
    assert list(one) == list(other)
    assert one.facts == other.facts
    assert one.vocabulary == other.vocabulary
    for site in one:
        for name, summary in one[site].summaries.items():
            state, expected = other[site].summaries[name].state(), summary.state()
            for key, array in expected.items():
                np.testing.assert_array_equal(state[key], array)
        if activations:
            for mine, theirs in zip(one[site].activations or (), other[site].activations or (), strict=True):
                np.testing.assert_array_equal(theirs[:], mine[:])
    return True


# Recordings -----------------------------------------------------------------------------------------


def test_a_recording_there_and_back(url: str, tmp_path: Path) -> None:
    here = recorded(tiny.bert(), store=tmp_path / "here", activations=True)
    there = recorded(tiny.bert(), store=url, activations=True)
    assert same(here, there, activations=True)
    assert str(there.path) == url
    assert not names(f"{url}.partial")
    manifest = json.loads(Remote(url).read("manifest.json"))
    assert all(each == "manifest.json" or each.startswith(f"{manifest['prefix']}/") for each in names(url))
    assert not examine(url).damaged
    assert not examine(url).strangers
    # Copied to a disk as it is, it is a store like any other.
    Remote(url).download(names(url), tmp_path / "copy")
    assert same(here, pc.Recording.open(tmp_path / "copy"), activations=True)
    assert not examine(tmp_path / "copy").damaged
    # And from there to another place.
    there.save(tmp_path / "again")
    assert same(here, pc.Recording.open(tmp_path / "again"), activations=True)
    assert pc.Recording.open(f"file://{tmp_path}/again").path == tmp_path / "again"


def test_what_is_there_is_opened_and_what_differs_is_said(url: str, s3: Proxy) -> None:
    first = recorded(tiny.bert(), store=url)
    s3.quiet()
    assert same(first, recorded(tiny.bert(), store=url))
    assert not [each for each in s3.requests if each[0] == "PUT" and ".partial" not in each[1]]
    with pytest.raises(StoreError, match=rf"{url} holds another recording. What differs: .*seed"):
        recorded(tiny.bert(), store=url, seed=1)


def test_a_new_store_replaces_the_old_one(url: str) -> None:
    recorded(tiny.bert(), store=url)
    before = set(names(url))
    other = recorded(tiny.bert(seed=3))
    other.save(url)
    assert same(other, pc.Recording.open(url))
    assert not before & set(names(url)) - {"manifest.json"}
    with pytest.raises(StoreError, match="a recording is there already"):
        other.save(url, replace=False)


def test_who_writes_meanwhile_is_noticed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, theirs = recorded(tiny.bert()), recorded(tiny.bert(seed=3))
    upload = Remote.upload

    def slow(self: Remote, *rest: Any) -> None:
        upload(self, *rest)
        monkeypatch.setattr(Remote, "upload", upload)
        theirs.save(url)  # just before the manifest of the first is written

    monkeypatch.setattr(Remote, "upload", slow)
    with pytest.raises(StoreError, match=f"cannot write {url}: another process has written a store there meanwhile"):
        mine.save(url)
    assert same(theirs, pc.Recording.open(url))
    assert not examine(url).strangers


def test_who_reads_while_it_is_replaced_gets_the_new_one(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded(tiny.bert(), store=url)
    newer = recorded(tiny.bert(seed=3))
    download = Remote.download

    def late(self: Remote, *rest: Any) -> None:
        monkeypatch.setattr(Remote, "download", download)
        newer.save(url)  # and the old files are gone
        download(self, *rest)

    monkeypatch.setattr(Remote, "download", late)
    assert same(newer, pc.Recording.open(url))


def test_activations_are_fetched_in_parts(url: str, s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    from patchclamp.recording import activation_store

    monkeypatch.setattr(activation_store, "_ROWS", 16)
    here = recorded(tiny.bert(), activations=True)
    here.save(url)
    there = pc.Recording.open(url)
    s3.quiet()
    kept, expected = there["mlp.1"].activations, here["mlp.1"].activations
    assert kept is not None and expected is not None
    for part in (slice(20, 40), 3, -1, slice(None, None, 7), np.array([1, 50]), (slice(2, 4), slice(None, 3))):
        np.testing.assert_array_equal(kept.values[part], np.asarray(expected.values)[part])
    first = [each for each in s3.requests if "/c/" in each[1]][:2]
    assert sorted(each[1].rpartition("/c/")[2] for each in first) == ["1/0", "2/0"]
    assert not list(there.store.folder.rglob("c/*/*")) if there.store else False
    # A chunk that is altered, or gone, is named.
    chunk = next(each for each in names(url) if "/mlp.1/values/c/1/" in each)
    whole = Remote(url).read(chunk)
    Remote(url).put(chunk, whole[:-4], Remote(url).tag(chunk))
    with pytest.raises(DamagedStore, match=f"{chunk} is damaged"):
        kept.values[20:40]
    Remote(url).delete([chunk])
    with pytest.raises(DamagedStore, match=f"{chunk} is missing"):
        kept.values[20:40]
    with pytest.raises(DamagedStore, match=f"{url}/{chunk} is missing"):
        pc.Recording.open(url)
    assert [each.file for each in examine(url).damaged] == [chunk]


def test_series_and_atlases(url: str, tmp_path: Path) -> None:
    models = {"a/b": tiny.bert(), "c": tiny.bert(seed=1)}
    options: dict[str, Any] = {"loading": {"tokenizer": tiny.tokenizer()}, "progress": False}
    here = pc.record_over(models, tiny.texts(), store=tmp_path / "series", **options)
    pc.record_over(models, tiny.texts(), store=f"{url}/series", **options)
    there = pc.RecordingSeries.open(f"{url}/series")
    assert there.names == here.names == ["a/b", "c"]
    np.testing.assert_array_equal(there.trajectory("mlp.0"), here.trajectory("mlp.0"))
    assert examine(f"{url}/series").kind == "series"
    assert not examine(f"{url}/series").damaged
    with pytest.raises(StoreError, match="there is no series of recordings at s3://"):
        pc.RecordingSeries.open(f"{url}/nothing")
    model = pc.load(tiny.bert(), tokenizer=tiny.tokenizer())
    built = pc.Atlas.build(model, tiny.texts(), tmp_path / "atlas", progress=False)
    far = pc.Atlas.build(model, tiny.texts(), f"{url}/atlas", progress=False)
    assert far.neurons.to_polars().equals(built.neurons.to_polars())
    assert f"{url}/atlas" in repr(far)
    shown = subprocess.run(
        [sys.executable, "-c", "from patchclamp.cli import app; app()", "neuron", f"{url}/atlas", "mlp.1:3"],
        capture_output=True,
        text=True,
    )
    assert "mlp.1:3" in shown.stdout, shown.stderr
    asked = subprocess.run(
        [sys.executable, "-c", "from patchclamp.cli import app; app()", "doctor", f"{url}/atlas"],
        capture_output=True,
        text=True,
    )
    assert asked.returncode == 0 and "is whole" in asked.stdout, asked


# Connections that drop ------------------------------------------------------------------------------


class Dropping:
    """Drops every `every`-th request that matters."""

    def __init__(
        self, how: str, every: int, methods: tuple[str, ...] = ("GET", "PUT", "POST", "HEAD", "DELETE")
    ) -> None:
        self.how, self.every, self.methods = how, every, methods
        self.seen = 0

    def __call__(self, method: str, path: str) -> str:
        if method not in self.methods:
            return ""
        self.seen += 1
        return self.how if self.seen % self.every == 0 else ""


@pytest.mark.parametrize("how", ["request", "answer", "half"])
def test_dropped_connections_change_nothing(how: str, url: str, s3: Proxy, often: None) -> None:
    expected = recorded(tiny.bert(), activations=True)
    s3.rule = Dropping(how, 3)
    found = recorded(tiny.bert(), store=url, activations=True)
    assert same(expected, found, activations=True)
    assert s3.dropped > 10
    s3.quiet()
    assert not examine(url).damaged
    assert not examine(url).strangers


def test_a_connection_that_never_holds_is_said(url: str, s3: Proxy) -> None:
    found = recorded(tiny.bert(), store=url)
    s3.rule = lambda method, path: "request"
    with pytest.raises(StoreError, match=f"cannot read {url}/manifest.json: "):
        pc.Recording.open(url)
    with pytest.raises(StoreError, match="cannot read"):
        found.save(url)
    s3.quiet()
    assert same(found, pc.Recording.open(url))


def test_an_upload_that_never_ends_leaves_the_old_store(url: str, s3: Proxy) -> None:
    old, new = recorded(tiny.bert(), store=url), recorded(tiny.bert(seed=3))
    s3.rule = lambda method, path: "request" if method == "PUT" and "summaries" in path else ""
    with pytest.raises(StoreError, match="cannot write"):
        new.save(url)
    s3.quiet()
    assert same(old, pc.Recording.open(url))
    assert not examine(url).strangers


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after every batch."""
    monkeypatch.setattr(checkpoint, "FIRST_AFTER", 0.0)
    monkeypatch.setattr(checkpoint, "SHARE", 1e9)


# Going on, and who may ------------------------------------------------------------------------------


def test_killed_it_goes_on_from_its_checkpoint_when_the_lease_has_ended(
    url: str, s3: Proxy, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    seconds = 4.0
    command = [sys.executable, "-m", "tests.object_store", "record", url, str(seconds)]
    child = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and _checkpoint(url) < 3:
        assert child.poll() is None
        time.sleep(0.1)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    killed = time.monotonic()
    done = _checkpoint(url)
    assert done >= 3

    monkeypatch.setattr(lease, "SECONDS", seconds)
    model = pc.load(tiny.bert(), tokenizer=tiny.tokenizer())
    options: dict[str, Any] = {"activations": True, "batch_tokens": 60}
    with pytest.raises(StoreError, match=rf"{url} is being recorded by process {child.pid} on .*its lease ends 4 sec"):
        pc.record(model, tiny.texts(200), "mlp.*", store=url, progress=False, **options)
    time.sleep(max(0.0, killed + seconds + 1.5 - time.monotonic()))  # the server's clock has whole seconds
    found = pc.record(model, tiny.texts(200), "mlp.*", store=url, progress=True, **options)
    assert f"going on after batch {done} of" in capfd.readouterr().err
    assert same(pc.record(model, tiny.texts(200), "mlp.*", progress=False, **options), found, activations=True)
    assert not names(f"{url}.partial")
    assert not examine(url).strangers


def _checkpoint(url: str) -> int:
    try:
        return json.loads(Remote(f"{url}.partial").read("checkpoint.json"))["batches"]
    except FileNotFoundError:
        return 0


def test_who_lost_the_lease_writes_nothing(url: str, often: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from patchclamp.recording import run

    monkeypatch.setattr(lease, "SECONDS", 2.0)
    take, batches = run.Accumulation.take, [0]

    def stolen(self: run.Accumulation, read: Any) -> None:
        take(self, read)
        batches[0] += 1
        if batches[0] == 3:  # as another process does when this one was not heard of for too long
            place = Remote(f"{url}.partial")
            place.put("lease.json", b'{"process": 1, "host": "other"}', place.tag("lease.json"))
            time.sleep(1.5)

    monkeypatch.setattr(run.Accumulation, "take", stolen)
    with pytest.raises(StoreError, match=f"the lease of {url} was lost .another process took it over") as caught:
        recorded(tiny.bert(), store=url, batch_tokens=40)
    assert "goes on after batch 2" in "".join(caught.value.__notes__)
    assert json.loads(Remote(f"{url}.partial").read("lease.json"))["host"] == "other"
    assert _checkpoint(url) == 2
    assert not names(url)


def test_a_lease_is_held_by_one(url: str) -> None:
    place, held, refused = Remote(url), [], []

    def hold() -> None:
        try:
            with leased(place, "it", 60.0):
                held.append(1)
                time.sleep(1.0)
        except StoreError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=hold) for _ in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert (len(held), len(refused)) == (1, 5)
    assert "it is being recorded by process" in refused[0]
    assert not names(url)


def test_a_lease_is_renewed_also_over_a_bad_line(url: str, s3: Proxy) -> None:
    with leased(Remote(url), "it", 2.0) as first:
        s3.rule = Dropping("answer", 2, ("PUT",))
        time.sleep(4.0)
        first.check()
        s3.quiet()
        with pytest.raises(StoreError, match="is being recorded by"), leased(Remote(url), "it", 2.0):
            pass
        s3.rule = lambda method, path: "request"
        time.sleep(2.5)
        with pytest.raises(StoreError, match="the lease of it was lost"):
            first.check()
        s3.quiet()


def test_only_one_of_many_writes_what_it_expected(url: str) -> None:
    place, written, refused = Remote(url), [], []
    tag = place.put("it", b"before", None)

    def write(number: int) -> None:
        try:
            place.put("it", str(number).encode(), tag)
            written.append(number)
        except Conflict:
            refused.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(written) == 1 and len(refused) == 7
    assert place.read("it") == str(written[0]).encode()


# What cannot be -------------------------------------------------------------------------------------


def test_what_is_said_of_bad_places(s3: Proxy, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match=f"there is no recording at {url}: it has no manifest.json"):
        pc.Recording.open(url)
    with pytest.raises(StoreError, match=f"there is no store at {url}"):
        examine(url)
    with pytest.raises(StoreError, match=r"cannot write s3://no-such-bucket/x.partial/.*bucket does not exist"):
        recorded(tiny.bert(), store="s3://no-such-bucket/x")
    with pytest.raises(StoreError, match="s3:// names no place for a store: give s3://bucket/name"):
        pc.Recording.open("s3://")
    with pytest.raises(StoreError, match=r"nonsense://a/b cannot be a store: .*Among others there are"):
        pc.Recording.open("nonsense://a/b")
    Remote(url).put("manifest.json", b'{"format": "patchclamp atlas"}', None)
    with pytest.raises(StoreError, match=f"will not overwrite {url}: .* is not a patchclamp recording"):
        recorded(tiny.bert()).save(url)
    with pytest.raises(StoreError, match="is not a patchclamp recording"):
        recorded(tiny.bert(), store=url)
    import fsspec.core

    def without(url: str) -> None:
        raise ImportError("no")

    monkeypatch.setattr(fsspec.core, "url_to_fs", without)
    with pytest.raises(MissingExtra, match=r"s3:// needs another library: pip install 'patchclamp\[s3\]'"):
        pc.Recording.open("s3://a/b")
    with pytest.raises(MissingExtra, match="gs:// needs another library: pip install gcsfs"):
        pc.Recording.open("gs://a/b")


def test_a_manifest_cannot_lead_elsewhere(url: str) -> None:
    from patchclamp.storage.folder import sealed

    recorded(tiny.bert(), store=url)
    place = Remote(url)
    manifest = json.loads(place.read("manifest.json"))
    manifest.pop("manifest_sha256")
    for change in ({"prefix": "../other"}, {"files": {"../../x": "0"}}, {"files": {"/etc/passwd": "0"}}):
        place.put("manifest.json", sealed({**manifest, **change}), place.tag("manifest.json"))
        with pytest.raises(
            DamagedStore, match=r"manifest.json names a (file outside the folder|folder that is not ours)"
        ):
            pc.Recording.open(url)


def test_other_protocols_go_the_same_way(tmp_path: Path, often: None) -> None:
    """`memory://` stands for those whose library has no conditional writing."""
    url = f"memory://{tmp_path.name}/one"
    expected = recorded(tiny.bert(), activations=True)
    assert same(expected, recorded(tiny.bert(), store=url, activations=True), activations=True)
    assert same(expected, pc.Recording.open(url), activations=True)
    assert not examine(url).damaged
    expected.save(url)
    assert not examine(url).strangers


def test_local_folders_need_nothing_of_it(tmp_path: Path) -> None:
    recorded(tiny.bert(), store=tmp_path / "here")
    code = (
        "import sys; import patchclamp as pc\n"
        f"pc.Recording.open({str(tmp_path / 'here')!r})\n"
        "assert not {'s3fs', 'aiobotocore', 'fsspec.asyn'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(DataError):
        recorded(tiny.bert(), store=tmp_path / "other", batch_tokens=0)
    shutil.rmtree(tmp_path / "here")
