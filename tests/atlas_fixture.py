"""A small atlas for the tests that read one: every figure in it is computed from a tiny random network.

Two sites of a network in plain numpy see 240 short examples. Its vocabulary holds texts that attack
a page or a terminal. Planted neurons have known behaviour: `mlp.0:7` reads the direction of
return/returns, `mlp.1:3` is dead, and `mlp.0:11` reads the first hostile token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from patchclamp.atlas import Atlas
from patchclamp.storage import new_folder, write_manifest

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    'it\'s "quoted" & <b>bold</b>',
    "line\nbreak",
    "\x1b[31mred\x1b[0m",
    "[bold red]markup[/bold red]",
    "שלום",
    "مرحبا",
    "\u202egnitirw",
    "👩‍🔬🧠",
    "javascript:alert(3)",
    "{{7*7}}",
)
_WORDS = [
    "return",
    "returns",
    "value",
    "values",
    "error",
    "errors",
    "raise",
    "list",
    "item",
    "items",
    "key",
    "the",
    "a",
    "of",
    "to",
    "in",
    "is",
    "not",
    "if",
    "else",
    "function",
    "class",
    "method",
    "call",
    "calls",
    "index",
    "string",
    "number",
    "byte",
    "path",
    "file",
    "open",
    "close",
    "read",
    "write",
    "loop",
    "exception",
    "never",
    "no",
    "true",
    "false",
    "object",
    "type",
    "module",
    "import",
    "name",
    "names",
    "set",
    "get",
]
_SIZE, _WIDTH, _EXAMPLES, _SHOWN = 96, 24, 240, 6


@pytest.fixture(scope="session")
def atlas_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the small atlas; tests that change it copy it first."""
    return write_atlas(tmp_path_factory.mktemp("atlas") / "small")


@pytest.fixture
def atlas(atlas_folder: Path) -> Atlas:
    return Atlas.open(atlas_folder)


def write_atlas(path: Path) -> Path:
    """Write the atlas by its schema and give its folder."""
    texts = _Texts()
    activations = _activations(texts)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in _SCHEMAS}
    for layer, site in enumerate(activations):
        for index in range(_SIZE):
            for table, found in _neuron(texts, activations, site, layer, index).items():
                rows[table].extend(found)
    with new_folder(path, "atlas") as folder:
        for table, found in rows.items():
            pl.DataFrame(found, schema=_SCHEMAS[table]).write_parquet(folder / f"{table}.parquet")
        (folder / "recording").mkdir()
        (folder / "recording" / "manifest.json").write_text("{}", encoding="utf-8")
        sites = [
            {
                "name": site,
                "kind": "mlp",
                "layer": layer,
                "size": _SIZE,
                "activation": ("gelu", "relu")[layer],
            }
            for layer, site in enumerate(activations)
        ]
        model = {
            "name": "tiny <b>network</b>",
            "class": "Tiny",
            "weights_sha256": "0" * 64,
            "neurons": 2 * _SIZE,
        }
        data = {
            "name": "random words",
            "sha256": "1" * 64,
            "examples": _EXAMPLES,
            "tokens": int(texts.counts.sum()),
        }
        content = {
            "model": model,
            "data": data,
            "labels": {"kind": ["code", "prose"]},
            "sites": sites,
            "versions": {},
        }
        write_manifest(folder, "atlas", content)
    return path


class _Texts:
    """The corpus, flat: one entry per token. The first token of an example is special and does not count."""

    def __init__(self) -> None:
        draw = np.random.default_rng(0)
        self.vocabulary = ["[CLS]", *(" " + word for word in _WORDS), *(" " + word for word in HOSTILE)]
        size = len(self.vocabulary) - 1
        common = 1.0 / np.arange(3, size + 3)
        lengths = draw.integers(10, 28, _EXAMPLES)
        kinds = draw.integers(0, 2, _EXAMPLES)
        orders = [draw.permutation(size), draw.permutation(size)]
        self.token, self.example, self.position, self.kind = (np.zeros(0, dtype=np.int64) for _ in range(4))
        for example, (length, kind) in enumerate(zip(lengths, kinds, strict=True)):
            chance = common[orders[kind]] / common.sum()
            tokens = np.concatenate([[0], draw.choice(size, length, p=chance) + 1])
            self.token = np.concatenate([self.token, tokens])
            self.example = np.concatenate([self.example, np.full(length + 1, example)])
            self.position = np.concatenate([self.position, np.arange(length + 1)])
            self.kind = np.concatenate([self.kind, np.full(length + 1, kind)])
        self.counts = self.position > 0
        self.occurrences = np.bincount(self.token[self.counts], minlength=size + 1)

    def identity(self, word: str) -> int:
        return self.vocabulary.index(" " + word)


def _activations(texts: _Texts) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(1)
    embedding = draw.normal(size=(len(texts.vocabulary), _WIDTH))
    before = np.roll(embedding[texts.token], 1, axis=0) * (texts.position > 0)[:, None]
    state = embedding[texts.token] + 0.3 * before
    into, out, second = (
        draw.normal(size=shape) / np.sqrt(_WIDTH) for shape in ((_WIDTH, _SIZE), (_SIZE, _WIDTH), (_WIDTH, _SIZE))
    )
    bias = np.zeros((2, _SIZE))
    planted = {
        7: ("return", "returns"),
        11: (HOSTILE[0],),
        12: (HOSTILE[1],),
        13: (HOSTILE[4],),
        14: (HOSTILE[3],),
    }
    for index, words in planted.items():
        direction = sum(embedding[texts.identity(word)] for word in words)
        # The direction that tells these words from all others, found by least squares.
        wanted = np.isin(np.arange(len(embedding)), [texts.identity(word) for word in words]).astype(float)
        direction = np.linalg.lstsq(embedding, wanted * np.linalg.norm(direction), rcond=None)[0]
        into[:, index], bias[0, index] = 3 * direction, -0.5
    bias[1, 3] = -1000.0
    first = _gelu(state @ into + bias[0])
    return {
        "mlp.0": first.astype(np.float32),
        "mlp.1": np.maximum((state + first @ out) @ second + bias[1], 0).astype(np.float32),
    }


def _gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _neuron(
    texts: _Texts, activations: dict[str, np.ndarray], site: str, layer: int, index: int
) -> dict[str, list[dict]]:
    key = {"site": site, "index": index}
    every = activations[site][:, index]
    values, token = every[texts.counts], texts.token[texts.counts]
    threshold = max(float(values.max()) / 2, 0.0)
    strong = values > threshold
    fired = np.bincount(token[strong], minlength=len(texts.vocabulary))
    labels = _labels(texts, values, strong)
    contrast = labels[0]["strong_rate"] - labels[1]["strong_rate"]
    family = _family(texts, fired)
    total, share_of = max(int(strong.sum()), 1), fired / np.maximum(texts.occurrences, 1)
    top = int(fired.argmax())
    purity = float(fired[family].sum() / total)
    coverage = float(fired[family].sum() / max(int(texts.occurrences[family].sum()), 1))
    quantiles = dict(
        zip(
            ("q01", "q05", "q25", "q50", "q75", "q95", "q99"),
            np.quantile(values, (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)),
            strict=True,
        )
    )
    facts = {
        "neuron": f"{site}:{index}", "site": site, "kind": "mlp", "layer": layer, "index": index,
        "count": len(values), "firing_rate": float((values > 0).mean()), "strong_rate": float(strong.mean()),
        "threshold": threshold, "mean": float(values.mean()), "std": float(values.std()),
        "min": float(values.min()), "max": float(values.max()),
        **{name: float(value) for name, value in quantiles.items()},
        "top_token": texts.vocabulary[top] if strong.any() else "",
        "top_token_purity": float(fired[top] / total),
        "top_token_coverage": float(share_of[top]),
        "family": ", ".join(texts.vocabulary[each].strip() for each in family) if strong.any() else "",
        "purity": purity, "coverage": coverage, "score": purity * coverage,
        "striking": purity * coverage > 0.5, "label": "kind",
        "label_value": labels[int(contrast < 0)]["value"],
        "label_contrast": abs(contrast),
    }  # fmt: skip
    return {
        "neurons": [facts],
        "examples": [key | row for row in _examples(texts, every)],
        "tokens": [
            key | {"rank": rank, "token": texts.vocabulary[each], "token_id": int(each),
                   "fired": int(fired[each]), "occurrences": int(texts.occurrences[each]),
                   "share_of_firings": float(fired[each] / total), "share_of_token": float(share_of[each])}
            for rank, each in enumerate(np.argsort(-fired, kind="stable")[:10]) if fired[each]
        ],
        "neighbors": [key | row for row in _neighbors(activations, site, index)],
        "labels": [key | row for row in labels],
        "histograms": [key | _histogram(values)],
    }  # fmt: skip


def _family(texts: _Texts, fired: np.ndarray) -> list[int]:
    stem = texts.vocabulary[int(fired.argmax())].strip().lower().removesuffix("s")
    return [place for place, word in enumerate(texts.vocabulary) if word.strip().lower().removesuffix("s") == stem]


def _labels(texts: _Texts, values: np.ndarray, strong: np.ndarray) -> list[dict]:
    kind = texts.kind[texts.counts]
    rows = []
    for code, name in enumerate(("code", "prose")):
        chosen = kind == code
        rows.append(
            {"label": "kind", "value": name, "count": int(chosen.sum()), "mean": float(values[chosen].mean()),
             "firing_rate": float((values[chosen] > 0).mean()), "strong_rate": float(strong[chosen].mean())}
        )  # fmt: skip
    return rows


def _examples(texts: _Texts, every: np.ndarray) -> Iterator[dict]:
    counted = np.where(texts.counts, every, -np.inf)
    seen: set[tuple[str, ...]] = set()
    for rank, peak in enumerate(np.argsort(-counted, kind="stable")[:20]):
        example, position = int(texts.example[peak]), int(texts.position[peak])
        start = max(position - _SHOWN, 0)
        place = np.flatnonzero((texts.example == example) & (texts.position >= start))[: 2 * _SHOWN + 1]
        tokens = tuple(texts.vocabulary[token] for token in texts.token[place])
        near_peak = tokens[max(position - start - 2, 0) : position - start + 2]
        if near_peak in seen:
            continue
        seen.add(near_peak)
        values = [
            float(value) if counts else float("nan")
            for value, counts in zip(every[place], texts.counts[place], strict=True)
        ]
        labels = json.dumps({"kind": ("code", "prose")[int(texts.kind[peak])]})
        yield {"rank": rank, "value": float(every[peak]), "example": example, "position": position,
               "start": start, "tokens": list(tokens), "values": values, "labels": labels}  # fmt: skip


def _neighbors(activations: dict[str, np.ndarray], site: str, index: int) -> Iterator[dict]:
    sites = list(activations)
    own = activations[site][:, index].astype(np.float64)
    for relation, other in (
        ("layer", site),
        ("next", sites[sites.index(site) + 1] if site != sites[-1] else None),
    ):
        if other is None or not own.std():
            continue
        matrix = activations[other].astype(np.float64)
        spread = matrix.std(axis=0)
        covariance = (matrix - matrix.mean(axis=0)).T @ (own - own.mean()) / len(own)
        correlation = np.divide(covariance, spread * own.std(), out=np.zeros(_SIZE), where=spread > 0)
        if other == site:
            correlation[index] = 0
        for rank, near in enumerate(np.argsort(-np.abs(correlation), kind="stable")[:5]):
            yield {
                "rank": rank,
                "other_site": other,
                "other_index": int(near),
                "correlation": float(correlation[near]),
                "relation": relation,
            }


def _histogram(values: np.ndarray) -> dict[str, list]:
    """8 bins per octave from 2^-14 to 2^4 for each sign, one for zero, and two open ones."""
    positive = 2.0 ** np.arange(-14, 4.0001, 1 / 8)
    edges = np.concatenate([[-np.inf], -positive[::-1], positive, [np.inf]])
    counts = np.bincount(np.searchsorted(edges, values, side="right") - 1, minlength=len(edges) - 1)
    filled = np.flatnonzero(counts)
    return {
        "edges": edges[filled[0] : filled[-1] + 2].tolist(),
        "counts": counts[filled[0] : filled[-1] + 1].tolist(),
    }


_TYPES = {"s": pl.String, "i": pl.Int64, "f": pl.Float64, "h": pl.Float32, "b": pl.Boolean}
_TYPES |= {
    "S": pl.List(pl.String),
    "F": pl.List(pl.Float64),
    "H": pl.List(pl.Float32),
    "I": pl.List(pl.Int64),
}
# Table -> its columns with their types; see `_TYPES`.
_SCHEMAS: dict[str, dict[str, Any]] = {
    table: {name: _TYPES[code] for name, code in (each.split(":") for each in f"site:s index:i {columns}".split())}
    for table, columns in {
        "neurons": "neuron:s kind:s layer:i count:i firing_rate:f strong_rate:f threshold:f mean:f std:f "
        "min:f max:f q01:f q05:f q25:f q50:f q75:f q95:f q99:f top_token:s top_token_purity:f "
        "top_token_coverage:f family:s purity:f coverage:f score:f striking:b "
        "label:s label_value:s label_contrast:f",
        "examples": "rank:i value:h example:i position:i start:i tokens:S values:H labels:s",
        "tokens": "rank:i token:s token_id:i fired:i occurrences:i share_of_firings:f share_of_token:f",
        "neighbors": "rank:i other_site:s other_index:i correlation:f relation:s",
        "labels": "label:s value:s count:i mean:f firing_rate:f strong_rate:f",
        "histograms": "edges:F counts:I",
    }.items()
}
