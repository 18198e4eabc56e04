"""`build`: record a model and write its atlas, a folder of tables that anyone can read without the model."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from patchclamp.atlas.atlas import Atlas
from patchclamp.atlas.neighbors import neighbors
from patchclamp.atlas.tables import (
    examples_table,
    histograms_table,
    labels_table,
    neurons_table,
    tokens_table,
)
from patchclamp.model import Model, Site, load
from patchclamp.recording import Recording
from patchclamp.recording.record import prepare
from patchclamp.storage import published, write_manifest

_ROWS_TOGETHER = {"examples": 2000, "histograms": 500}


def build(
    model: Model | nn.Module,
    data: Any,
    path: str | os.PathLike[str],
    *,
    sites: str | Site | Iterable[str | Site] = "mlp.*",
    max_length: int | None = None,
    batch_tokens: int | None = None,
    correlate_tokens: int = 50_000,
    seed: int = 0,
    progress: bool = True,
) -> Atlas:
    """Record a model on data and write the atlas of its neurons.

    Args:
        model: a `Model`, or any module.
        data: as for `patchclamp.record`.
        path: the folder to write, or a place in an object store (`s3://bucket/name`). It appears only when it is whole;
            an older atlas there is replaced.
        sites: whose neurons.
        max_length: longest text in tokens; default: what model and tokenizer can take.
        batch_tokens: padded tokens of one forward pass; default: 2,048 on a processor, else 4,096.
        correlate_tokens: at most so many tokens are looked at for the nearest neurons, special ones included;
            0 leaves the nearest neurons out.
        seed: draws the samples for thresholds and correlations.
        progress: draw progress bars.

    Returns:
        The atlas, opened.

    Raises:
        DataError, UnknownName, SiteNotReached: as `patchclamp.record`.
        StoreError: the folder cannot be written, or something that is no atlas is there.
    """
    model = model if isinstance(model, Model) else load(model)
    with published(path, "atlas") as folder:
        run = prepare(
            model, data, sites, max_length=max_length, batch_tokens=batch_tokens, seed=seed, progress=progress
        )
        recording = run.go(progress)
        near = neighbors(
            model,
            run.corpus,
            recording.sites if correlate_tokens else [],
            tokens=correlate_tokens,
            batch_tokens=batch_tokens,
            seed=seed,
            progress=progress,
        )
        _write_tables(recording, folder)
        near.write_parquet(folder / "neighbors.parquet")
        recording.save(folder / "recording")
        write_manifest(folder, "atlas", _manifest(recording, correlate_tokens))
    return Atlas.open(path)


def _write_tables(recording: Recording, folder: Path) -> None:
    tokens, labels = tokens_table(recording), labels_table(recording)
    tables = {
        "neurons": neurons_table(recording, tokens, labels),
        "examples": examples_table(recording),
        "tokens": tokens,
        "labels": labels,
        "histograms": histograms_table(recording),
    }
    for name, table in tables.items():
        # Small groups of rows, so that the card of one neuron is read without the rest.
        table.write_parquet(folder / f"{name}.parquet", row_group_size=_ROWS_TOGETHER.get(name))


def _manifest(recording: Recording, correlate_tokens: int) -> dict[str, Any]:
    facts = recording.facts
    return {
        "model": facts["model"] | {"neurons": sum(site.size or 0 for site in recording.sites)},
        "data": facts["data"],
        "labels": {name: list(each) for name, each in recording.labels.items()},
        "parameters": facts["parameters"] | {"correlate_tokens": correlate_tokens},
        "sites": [
            {
                "name": site.name,
                "kind": site.kind,
                "layer": site.layer,
                "size": site.size,
                "activation": site.activation,
            }
            for site in recording.sites
        ],
        "versions": facts["versions"],
    }
