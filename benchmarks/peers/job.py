"""The job that every library does: summaries of all neurons after the activation function of every MLP.

Only torch, numpy and the standard library are used here, so it runs in the environment of each library. A library
gives the activations of a batch by layer; the statistics are the same for all. patchclamp keeps its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

TOP = 20
TOLERANCE = 1e-4

Result = dict[str, np.ndarray]
Activations = dict[int, torch.Tensor]  # layer -> [lines, length, neurons]


@dataclass(frozen=True)
class Batch:
    """Lines of token ids, which of them are not padding, which of them count, and the example of each line."""

    ids: torch.Tensor
    mask: torch.Tensor
    counted: torch.Tensor
    examples: torch.Tensor


@dataclass(frozen=True)
class Case:
    """A model in a folder, and the data it reads."""

    title: str
    kind: str  # "gpt2" or "bert"
    model: str
    layers: int
    batch_tokens: int
    examples_in_a_batch: int  # of the end-to-end pass of a library that leaves batching to its user
    limit: int  # longest text in tokens
    texts: list[str]  # none where the data are ids
    batches: list[Batch]

    def naive_batches(self) -> Iterator[Batch]:
        """Batches as one makes them from texts with the tokenizer: in corpus order, padded to the longest."""
        if not self.texts:
            yield from self.batches
            return
        tokenizer = tokenizer_of(self.model)
        for start in range(0, len(self.texts), self.examples_in_a_batch):
            texts = self.texts[start : start + self.examples_in_a_batch]
            read = tokenizer(
                texts,
                padding=True,
                truncation=True,
                max_length=self.limit,
                return_tensors="pt",
                return_special_tokens_mask=True,
            )
            mask = read["attention_mask"].bool()
            counted = mask & (read["special_tokens_mask"] == 0)
            yield Batch(read["input_ids"], mask, counted, torch.arange(start, start + len(texts)))


Pass = Callable[[Iterable[Batch]], Result]


def save_case(case: Case, folder: Path) -> None:
    """Write the case where `load_case` finds it."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {name: value for name, value in vars(case).items() if name != "batches"}
    (folder / "case.json").write_text(json.dumps(facts), encoding="utf-8")
    arrays = {
        f"{n}.{name}": tensor.numpy() for n, each in enumerate(case.batches) for name, tensor in vars(each).items()
    }
    np.savez(folder / "batches.npz", **arrays)


def load_case(folder: Path) -> Case:
    """The case in a folder."""
    facts = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    with np.load(folder / "batches.npz", allow_pickle=False) as stored:
        arrays = {name: torch.from_numpy(stored[name]) for name in stored.files}
    number = len({name.partition(".")[0] for name in arrays})
    names = Batch.__dataclass_fields__
    batches = [Batch(**{name: arrays[f"{n}.{name}"] for name in names}) for n in range(number)]
    return Case(**facts, batches=batches)


class Statistics:
    """Count, sums, extremes, fraction above 0 and the largest activations of each neuron of one layer."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: torch.Tensor | None = None  # [4, neurons] float64: sum, sum of squares, positive
        self.largest = self.smallest = torch.empty(0)
        self.values = torch.empty(0)
        self.examples = torch.empty(0, dtype=torch.int64)

    def update(self, rows: torch.Tensor, examples: torch.Tensor) -> None:
        """Take in rows `[rows, neurons]` and the example of each."""
        rows = rows.float()
        sums = torch.stack((rows.sum(0), rows.square().sum(0), (rows > 0).sum(0).float())).double()
        largest, smallest = rows.amax(0), rows.amin(0)
        values, places = rows.T.contiguous().topk(min(TOP, len(rows)), dim=1)
        owners = examples[places]
        self.count += len(rows)
        if self.sums is None:
            self.sums, self.largest, self.smallest, self.values, self.examples = sums, largest, smallest, values, owners
            return
        self.sums += sums
        self.largest = torch.maximum(self.largest, largest)
        self.smallest = torch.minimum(self.smallest, smallest)
        both = torch.cat((self.values, values), dim=1)
        self.values, kept = both.topk(min(TOP, both.shape[1]), dim=1)
        self.examples = torch.cat((self.examples, owners), dim=1).gather(1, kept)

    def result(self) -> Result:
        """As arrays."""
        assert self.sums is not None
        total, squares, positive = (each.numpy() for each in self.sums)
        return {
            "count": np.asarray(self.count),
            "sum": total,
            "squares": squares,
            "max": self.largest.numpy(),
            "min": self.smallest.numpy(),
            "rate": positive / self.count,
            "top_values": self.values.numpy(),
            "top_examples": self.examples.numpy(),
        }


def summarized(activations: Callable[[Batch], Activations]) -> Pass:
    """The pass of a library that gives activations: statistics of the tokens that count, batch by batch."""

    def run(batches: Iterable[Batch]) -> Result:
        layers: dict[int, Statistics] = {}
        with torch.no_grad():
            for batch in batches:
                owners = batch.examples[:, None].expand(batch.counted.shape)[batch.counted]
                everything = bool(batch.counted.all())
                for layer, tensor in activations(batch).items():
                    tensor = tensor.detach().reshape(*batch.ids.shape, -1)
                    rows = tensor.flatten(0, 1) if everything else tensor[batch.counted]
                    layers.setdefault(layer, Statistics()).update(rows, owners)
        return joined({layer: statistics.result() for layer, statistics in layers.items()})

    return run


def joined(layers: dict[int, Result]) -> Result:
    """Results of layers in one flat dictionary."""
    return {f"{layer}.{name}": array for layer, result in sorted(layers.items()) for name, array in result.items()}


def difference(found: Result, reference: Result) -> str:
    """What differs between two results, in words; empty if they agree."""
    if found.keys() != reference.keys():
        return f"other sites: {len(found) // 8} layers instead of {len(reference) // 8}"
    for layer in sorted({int(name.partition(".")[0]) for name in reference}):
        mine = {name.partition(".")[2]: value for name, value in found.items() if name.startswith(f"{layer}.")}
        true = {name.partition(".")[2]: value for name, value in reference.items() if name.startswith(f"{layer}.")}
        count = int(true["count"])
        if int(mine["count"]) != count:
            return f"layer {layer}: {int(mine['count']):,} tokens instead of {count:,}"
        scale = float(max(true["max"].max(), -true["min"].min()))
        errors = {
            "mean": np.abs(mine["sum"] - true["sum"]) / count / scale,
            "mean square": np.abs(mine["squares"] - true["squares"]) / count / scale**2,
            "maximum": np.abs(mine["max"] - true["max"]) / scale,
            "minimum": np.abs(mine["min"] - true["min"]) / scale,
            "top values": np.abs(mine["top_values"] - true["top_values"]) / scale,
            # an activation near 0 may be on either side of it
            "fraction above 0": np.maximum(np.abs(mine["rate"] - true["rate"]) - 2 / count, 0.0),
        }
        for name, error in errors.items():
            if not float(error.max()) <= TOLERANCE:
                return f"layer {layer}: {name} off by {float(error.max()):.1e} of the largest activation"
        same = float((mine["top_examples"] == true["top_examples"]).mean())
        if same < 0.98:  # equal or nearly equal activations may change places
            return f"layer {layer}: {1 - same:.1%} of the top examples are others"
    return ""


@cache
def tokenizer_of(folder: str) -> Any:
    """The tokenizer in a folder, read once."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def plain_model(case: Case) -> Any:
    """The model of the case without a head, as transformers loads it."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(case.model, dtype=torch.float32).eval()


def neuron_modules(model: Any, kind: str) -> list[tuple[Any, str]]:
    """By layer the module whose input ("in") or output ("out") are the neurons after the activation function."""
    if kind == "gpt2":
        return [(block.mlp.c_proj, "in") for block in model.h]
    return [(layer.intermediate, "out") for layer in model.encoder.layer]


def arguments(case: Case, batch: Batch) -> dict[str, Any]:
    """Of the forward pass."""
    if case.kind == "gpt2":
        return {"input_ids": batch.ids, "use_cache": False}
    return {"input_ids": batch.ids, "attention_mask": batch.mask.long()}


class Enough(Exception):
    """Ends a forward pass after the last site that is read."""
