"""`record_over`: the same data through a series of checkpoints, one model in memory at a time.

Training runs, seeds, edits: each checkpoint is recorded by `record`, so each is a recording like any other, and all
have the same sites of the same sizes. A series in a store goes on where it was interrupted.
"""

from __future__ import annotations

import gc
import hashlib
import inspect
import json
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from patchclamp.data import Images, Tensors, as_data
from patchclamp.errors import DataError, ModelError, StoreError, UnknownName
from patchclamp.model.load import load
from patchclamp.model.model import Model
from patchclamp.model.site import Site
from patchclamp.recording.record import record
from patchclamp.recording.recording import Recording
from patchclamp.recording.recording_series import RecordingSeries, folder_name, read_index, write_index
from patchclamp.recording.summaries import Summary
from patchclamp.storage import Remote, exists, place, read_manifest

CALIBRATION = "each checkpoint by itself"

# What a checkpoint may be: a model, a folder or hub id (`id@revision`), or a function that gives one of these.
Checkpoint = Model | nn.Module | str | os.PathLike[str] | Callable[[], Any]

# What does not change a recording.
_PASSING = ("progress", "batch_tokens", "memory")


def record_over(
    checkpoints: Mapping[str, Checkpoint] | Iterable[Any],
    data: Any,
    sites: str | Site | Iterable[str | Site] = "mlp.*",
    summaries: Sequence[Summary | type[Summary]] | None = None,
    *,
    store: str | os.PathLike[str] | None = None,
    loading: Mapping[str, Any] | None = None,
    **options: Any,
) -> RecordingSeries:
    """Record each of several checkpoints on the same data; only one that is loaded here is in memory at a time.

    Relative thresholds (`FractionOfMaximum`, `OwnQuantile`) are calibrated on each checkpoint by itself, so that
    "half of its maximum" follows a neuron whose scale grows; a number is the same for all.

    Args:
        checkpoints: name -> a checkpoint, or (name, checkpoint) pairs, or folders and hub ids alone, which are then
            their own names. A checkpoint is a `Model` or any module, a folder, a hub id (`"id@revision"` for one
            revision of it), or a function without parameters that gives one of these. An iterator is asked for
            one checkpoint at a time.
        data: as for `record`; read once per checkpoint, so a generator will not do.
        sites: as for `record`.
        summaries: as for `record`.
        store: a folder for the series, or a place in an object store (`s3://bucket/name`), with a recording of each
            checkpoint in it. One that is there already, of the same name, data and parameters, is not recorded again.
            If the checkpoint is a folder, an id or a function, and was when it was recorded, it is not even loaded:
            what it holds is taken to be unchanged.
        loading: keywords of `load` for checkpoints that are not a `Model`: `{"tokenizer": words, "device": "cuda"}`.
        options: other keywords of `record`.

    Returns:
        A `RecordingSeries`: `series["step1000"]`, `series.trajectory("mlp.3", "mean")`, `series.compare()`.

    Raises:
        DataError: no checkpoints, two of one name, data that can be read once only or changed on the way, sites or
            sizes of a checkpoint that are not those of the first.
        ModelError: a checkpoint cannot be loaded.
        StoreError: the store holds a series of other data or parameters, or cannot be written.
        Others: as `record`; a note names the checkpoint.
    """
    if unexpected := sorted(options.keys() - _options()):
        raise TypeError(f"record_over() got an unexpected keyword argument {unexpected[0]!r}")
    given = as_data(data)
    _refuse_once(given)
    sites = [sites] if isinstance(sites, str | Site) else list(sites)
    summaries = None if summaries is None else _templates(summaries)
    folder = None if store is None else place(store)
    job = _Job(given, sites, summaries, dict(loading or {}), options, folder, isinstance(checkpoints, Iterator))
    if folder is not None:
        job.find()
    pairs = _named(checkpoints)
    while (pair := next(pairs, None)) is not None:
        job.take(*_checked(pair, job.recordings))
        del pair  # it may hold a model, which must go before the next one is made
        job.let_go()
    if not job.recordings:
        raise DataError("no checkpoints are given: a series needs at least one")
    return RecordingSeries(job.recordings, job.facts, folder)


@dataclass
class _Job:
    """A series on its way.

    Attributes:
        one_by_one: checkpoints are made when they are asked for, also those that are modules.
        first: name of the first checkpoint, its sites with their sizes, and the facts of its data.
        asked: what was asked for, as JSON: a store that was asked for something else is another series.
        done: the checkpoints of the store, name -> what they were loaded from.
        last: the model that was recorded last, if it should be gone by now.
    """

    data: Any
    sites: list[str | Site]
    summaries: list[Any] | None
    loading: dict[str, Any]
    options: dict[str, Any]
    folder: Path | Remote | None
    one_by_one: bool
    recordings: dict[str, Recording | Path | Remote] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    first: tuple[str, dict[str, int | None], Mapping[str, Any]] | None = None
    asked: dict[str, Any] = field(default_factory=dict)
    done: dict[str, str] = field(default_factory=dict)
    last: weakref.ref[nn.Module] | None = None

    def find(self) -> None:
        """Read what the store holds already."""
        assert self.folder is not None
        self.asked = _asked(self)
        index = read_index(self.folder)
        if index is None:
            return
        if differing := [key for key in self.asked if index["asked"].get(key) != self.asked[key]]:
            what = "; ".join(f"{key} (there {index['asked'].get(key)}, here {self.asked[key]})" for key in differing)
            raise StoreError(f"{self.folder} holds another series of recordings. What differs: {what}")
        self.done = dict(index["checkpoints"])

    def take(self, name: str, source: Any) -> None:
        """Record one checkpoint, or find it in the store."""
        said = _said(source)
        if self.folder is not None and said and self.done.get(name) == said:
            path = self.folder / folder_name(name)
            if exists(path):
                manifest = read_manifest(path, "recording")
                sizes = {site: each["site"]["size"] for site, each in manifest["sites"].items()}
                self._keep(name, path, sizes, manifest)
                return
        try:
            recording = self._recorded(name, source)
        except Exception as error:
            error.add_note(f"checkpoint {name!r}")
            raise
        sizes = {each.name: each.size for each in recording.sites}
        self._keep(name, recording if self.folder is None else self.folder / folder_name(name), sizes, recording.facts)
        if self.folder is not None:
            self.done[name] = said
            write_index(self.folder, {"asked": self.asked, "facts": self.facts, "checkpoints": self.done})

    def let_go(self) -> None:
        """Give back the memory of the last model; where its parts refer to each other, it is not gone by itself."""
        if self.last is not None and self.last() is not None:
            gc.collect()
        self.last = None
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _recorded(self, name: str, source: Any) -> Recording:
        if self.options.get("progress", True):
            print(f"checkpoint {len(self.recordings) + 1}: {name}", file=sys.stderr)
        model = _loaded(name, source, self.loading)
        if _said(source) or self.one_by_one:
            self.last = weakref.ref(model.module)
        del source
        try:
            chosen = model.select(self.sites)
        except UnknownName as error:
            raise UnknownName(f"checkpoint {name!r}: {error}") from error
        self._check_sites(name, {each.name: each.size for each in chosen})
        path = None if self.folder is None else self.folder / folder_name(name)
        return record(model, self.data, self.sites, self.summaries, store=path, **self.options)

    def _keep(self, name: str, recording: Recording | Path | Remote, sizes: dict[str, int | None], facts: Any) -> None:
        self._check_sites(name, sizes)
        if self.first is None:
            self.first = (name, sizes, facts["data"])
            kept = {key: facts[key] for key in ("data", "parameters")}
            self.facts = kept | {"calibration": CALIBRATION}
        first, _, data = self.first
        if facts["data"]["sha256"] != data["sha256"]:
            raise DataError(
                f"checkpoint {name!r} was recorded on other data than {first!r}: did they change meanwhile?"
            )
        if facts["data"].get("tokens_sha256") != data.get("tokens_sha256"):
            raise DataError(
                f"checkpoint {name!r} reads the data as other tokens than {first!r} does: give all one tokenizer, "
                'loading={"tokenizer": ...}, and one max_length'
            )
        self.recordings[name] = recording

    def _check_sites(self, name: str, sizes: Mapping[str, int | None]) -> None:
        if self.first is None:
            return
        first, wanted, _ = self.first
        if missing := [site for site in wanted if site not in sizes]:
            raise DataError(f"checkpoint {name!r} has no site {missing[0]!r}, and {first!r} has")
        if extra := [site for site in sizes if site not in wanted]:
            raise DataError(f"checkpoint {name!r} has the site {extra[0]!r}, and {first!r} has not")
        for site, size in sizes.items():
            if None not in (size, wanted[site]) and size != wanted[site]:
                raise DataError(f"{site} has {size} neurons in checkpoint {name!r}, and {wanted[site]} in {first!r}")


def _options() -> set[str]:
    """The keywords of `record` that are passed on."""
    parameters = inspect.signature(record).parameters.values()
    return {each.name for each in parameters if each.kind is each.KEYWORD_ONLY and each.name != "store"}


def _named(checkpoints: Any) -> Iterator[tuple[str, Any]]:
    """(name, checkpoint), one at a time and without holding it."""
    if isinstance(checkpoints, Mapping):
        return iter(checkpoints.items())
    if isinstance(checkpoints, str | os.PathLike | nn.Module | Model) or not isinstance(checkpoints, Iterable):
        raise DataError(
            f"checkpoints are a mapping from names, pairs (name, checkpoint), or a list of folders; not "
            f"{type(checkpoints).__name__}"
        )
    return map(_pair, checkpoints)


def _pair(each: Any) -> tuple[str, Any]:
    if isinstance(each, str | os.PathLike):
        return str(each), each
    if isinstance(each, tuple | list) and len(each) == 2:
        return each[0], each[1]
    raise DataError(f"a checkpoint without a name: give (name, checkpoint), not {type(each).__name__}")


def _checked(pair: tuple[str, Any], known: Mapping[str, Any]) -> tuple[str, Any]:
    name, source = pair
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"the name of a checkpoint is a text, not {name!r}")
    if name in known:
        raise DataError(f"two checkpoints are called {name!r}")
    if not isinstance(source, str | os.PathLike) and not callable(source):
        raise DataError(
            f"checkpoint {name!r} is a {type(source).__name__}: give a model, a folder, a hub id, or a function that "
            "loads one"
        )
    return name, source


def _loaded(name: str, source: Any, loading: Mapping[str, Any]) -> Model:
    if not isinstance(source, Model | nn.Module | str | os.PathLike):
        source = source()
    if isinstance(source, Model):
        return source
    if isinstance(source, nn.Module):
        return load(source, **loading)
    if not isinstance(source, str | os.PathLike):
        raise ModelError(f"the function of checkpoint {name!r} gave {type(source).__name__}, and not a model")
    where, at, revision = str(source).rpartition("@")
    if at and where and not Path(source).expanduser().exists():
        return load(where, **{**loading, "revision": revision})
    return load(str(source), **loading)


def _said(source: Any) -> str:
    """What a checkpoint is loaded from, as a store remembers it; empty for one that is in memory already."""
    if isinstance(source, Model | nn.Module):
        return ""
    if isinstance(source, str | os.PathLike):
        return str(source)
    return "a function"


def _templates(summaries: Any) -> list[Any]:
    given = list(summaries) if isinstance(summaries, Iterable) and not isinstance(summaries, str) else [summaries]
    return [each() if isinstance(each, type) and issubclass(each, Summary) else each for each in given]


def _asked(job: _Job) -> dict[str, Any]:
    """What was asked for, as JSON."""
    summaries = job.summaries and {
        each.name: each.parameters()
        for each in job.summaries
        if isinstance(each, Summary)  # `record` refuses the others
    }
    asked = {
        "sites": [each.name if isinstance(each, Site) else str(each) for each in job.sites],
        "summaries": summaries,
        "options": {key: job.options[key] for key in sorted(job.options.keys() - set(_PASSING))},
        "data": _fingerprint(job.data),
    }
    # There and back, so that they equal what is read from a file.
    return json.loads(json.dumps(asked, default=lambda value: getattr(value, "__qualname__", repr(value))))


def _fingerprint(data: Any) -> str:
    """SHA-256 of the data as they were given: no model is needed to tell whether they are the same."""
    if isinstance(data, Images):
        return data.scan().sha256
    digest = hashlib.sha256()
    if isinstance(data, Tensors):
        digest.update(f"{tuple(data.values.shape)} {data.values.dtype}".encode())
        digest.update(data.values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        digest.update(repr([each.labels for each in data]).encode())
        return digest.hexdigest()
    for example in data:
        digest.update(repr(example).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _refuse_once(data: Any) -> None:
    # Texts and conversations of a generator; images refuse one by themselves.
    source = getattr(data, "_source", None)
    if getattr(source, "_once", False):
        raise DataError(
            f"{data.name} can be read once only, and a series reads the data once for each checkpoint: pass a list or "
            "a file"
        )
