"""Stores of every format that patchclamp has written can still be read, with the numbers that they were written with.

python -m tests.formats.test_formats NAME    writes a store of today's format into `tests/formats/NAME`
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.recording import tiny

import patchclamp as pc
from patchclamp.recording import activation_store
from patchclamp.storage import FORMAT_VERSION
from patchclamp.storage.doctor import examine

HERE = Path(__file__).parent
STORES = sorted(each for each in HERE.iterdir() if each.is_dir() and each.name.startswith("format-"))


@pytest.mark.parametrize("store", STORES, ids=lambda each: each.name)
def test_an_old_store_is_read(store: Path) -> None:
    assert sum(each.stat().st_size for each in store.rglob("*") if each.is_file()) <= 100_000
    assert not examine(store / "recording").damaged
    found = pc.Recording.open(store / "recording")
    expected = json.loads((store / "expected.json").read_text(encoding="utf-8"))
    assert {site: _said(found[site]) for site in found} == expected
    kept = found["mlp.0"].activations
    assert kept is not None
    np.testing.assert_allclose(np.asarray(kept.values).mean(0), found["mlp.0"].moments.mean, atol=1e-6)


def test_todays_format_is_among_them() -> None:
    versions = [json.loads((each / "recording/manifest.json").read_text())["format_version"] for each in STORES]
    assert FORMAT_VERSION in versions


def _said(site: Any) -> dict[str, Any]:
    """Some numbers of each summary, as they were when the store was written."""
    top = site.top_examples
    return {
        "count": site.count,
        "mean": site.moments.mean[:4].tolist(),
        "rate": site.firing_rate.rate[:4, 0].tolist(),
        "max": site.min_max.max[:4].tolist(),
        "summaries": sorted(site.summaries),
        "top": top.values[:4, 0].tolist(),
        "arrays": {
            name: {key: float(np.nansum(np.nan_to_num(array.astype(np.float64), posinf=0.0, neginf=0.0)))}
            for name, summary in sorted(site.summaries.items())
            for key, array in sorted(summary.state().items())[:1]
        },
    }


def _write(folder: Path) -> None:
    activation_store._ROWS = 64  # a chunk has its full size, however little is in it
    model = pc.load(tiny.bert(), tokenizer=tiny.tokenizer())
    texts = tiny.texts(12)
    data = pc.Texts(texts, labels={"length": ["short" if len(each) < 40 else "long" for each in texts]})
    summaries = [
        *(pc.Moments(), pc.FiringRate(0.0, pc.FractionOfMaximum(0.5)), pc.MinMax()),
        *(pc.TopExamples(3, context=2), pc.ByToken(most_frequent=5), pc.ByLabel(of=(pc.Moments(),)), pc.Pooled("max")),
    ]
    recording = pc.record(model, data, "mlp.*", summaries, activations=True, progress=False)
    recording.save(folder / "recording")
    expected = {site: _said(pc.Recording.open(folder / "recording")[site]) for site in recording}
    (folder / "expected.json").write_text(json.dumps(expected, indent=1), encoding="utf-8")


if __name__ == "__main__":
    _write(HERE / sys.argv[1])
