"""Small trained networks that travel with the package: real enough to have neurons, small enough to know all of them.

`python -m patchclamp.testbed.training NAME --seed 0` made each, and wrote beside the weights what it measured. The
weights are float16 safetensors and are loaded as float32; the data is made anew here, or read from the running Python.

| name | network | data |
|---|---|---|
| `python_docs` | decoder (GPT-2) | documentation and code of the standard library, label `kind` |
| `four_languages` | decoder with a gated MLP (Llama) | `testbed.languages`, label `language` |
| `shapes` | four convolutions and three heads | `testbed.shapes`, labels `shape`, `colour`, `texture` |
| `modular_addition` | one layer, p = 113 | all pairs of numbers, label `sum` |
| `digits` | MLP, 64-64-32-10 | scikit-learn's digits, label `digit` |
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from patchclamp.data import Images, Tensors, Texts, corpora
from patchclamp.errors import DataError, unknown
from patchclamp.model import Model, load
from patchclamp.testbed import languages, modular, shapes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NAMES = ("python_docs", "four_languages", "shapes", "modular_addition", "digits")
WEIGHTS = Path(__file__).parent / "weights"
CHECKPOINTS = ("early", "middle", "last")
"""Names of the moments of a training that may have been kept, in their order."""

Data = Texts | Images | Tensors


@dataclass(frozen=True)
class Trained:
    """One trained network, what it was trained on, and what it was not.

    Attributes:
        name: which network.
        seed: what its first weights and the order of its data were drawn from.
        checkpoint: which moment of the training: "early", "middle" or "last".
        checkpoints: the moments that there are of this network and seed.
        model: the network, ready to record.
        facts: what the script measured and used: `step`, `loss` and `accuracy` on `held_out` at this checkpoint,
            `seconds` of processor time of the whole training, `parameters`, versions, hash of the data.
    """

    name: str
    seed: int
    checkpoint: str
    checkpoints: tuple[str, ...]
    model: Model
    facts: dict[str, Any] = field(repr=False)

    @functools.cached_property
    def data(self) -> Data:
        """What it was trained on, made at the first use; of `four_languages` and `shapes` the first of many."""
        return training_data(self.name, self.seed)

    @functools.cached_property
    def held_out(self) -> Data:
        """What it never saw, with the same labels; made at the first use."""
        return held_out_data(self.name, self.seed)

    def score(self, data: Data | None = None) -> dict[str, float]:
        """How well the network does, as it is now: interventions that are in force count.

        Args:
            data: of the kind of `held_out`, which is the default.

        Returns:
            `loss` in nats (per token of a decoder; special tokens are not predicted) and `accuracy` (of the next
            token; of `shapes` that of each head, as `accuracy_shape`, and the mean of the three).
        """
        return score(self.name, self.model.module, self.held_out if data is None else data)


def trained(name: str, *, seed: int = 0, checkpoint: str | None = None) -> Trained:
    """Load one of the small trained networks.

    Args:
        name: "python_docs", "four_languages", "shapes", "modular_addition" or "digits".
        seed: of the training; most have only 0, `python_docs` and `digits` 0 and 1.
        checkpoint: "early", "middle" or "last", where the training kept them; None: the last.

    Raises:
        UnknownName: there is no such network, seed or checkpoint.
        DataError: the four languages come out otherwise here, with another numpy, than when theirs was trained.
    """
    if name not in NAMES:
        raise unknown("trained network", name, NAMES)
    seeds = sorted(int(each.parent.name.removeprefix("seed-")) for each in (WEIGHTS / name).glob("seed-*/facts.json"))
    if seed not in seeds:
        raise unknown(f"seed of {name}", seed, seeds)
    folder = WEIGHTS / name / f"seed-{seed}"
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    if name == "four_languages" and facts["vocabulary_sha256"] != languages.vocabulary_sha256():
        raise DataError(
            f"numpy {np.__version__} makes other words than the weights of {name} know: "
            f"they were trained with numpy {facts['versions']['numpy']}"
        )
    moments: dict[str, dict[str, Any]] = facts.pop("checkpoints")
    kept = tuple(each for each in CHECKPOINTS if each in moments)
    chosen = kept[-1] if checkpoint is None else checkpoint
    if chosen not in kept:
        raise unknown(f"checkpoint of {name} with seed {seed}", chosen, kept)
    model = _loaded(name, folder / chosen)
    model.name = f"testbed {name}, seed {seed}, {chosen}"
    return Trained(name, seed, chosen, kept, model, facts | moments[chosen])


def network(name: str) -> nn.Module:
    """One of the networks that are no Hugging Face models, untrained."""
    if name == "shapes":
        return shapes.ShapesNetwork()
    if name == "modular_addition":
        return modular.ModularAddition()
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def read_tokenizer(name: str, weights: Path = WEIGHTS) -> PreTrainedTokenizerFast:
    """The tokenizer of one of the decoders."""
    from transformers import PreTrainedTokenizerFast

    if name == "four_languages":
        return languages.tokenizer()
    return PreTrainedTokenizerFast(
        tokenizer_file=str(weights / name / "tokenizer.json"),
        bos_token="<start>",
        pad_token="<pad>",
        model_max_length=128,
    )


def training_data(name: str, seed: int = 0, count: int | None = None) -> Data:
    """What a network was trained on; `count`: how many of the documents or images that are made."""
    if name == "python_docs":
        return _python_docs(held_out=False)
    if name == "four_languages":
        return languages.documents(count or 2_000, seed=1)
    if name == "shapes":
        return shapes.draw(count or 4_000, seed=1).to_images()
    if name == "modular_addition":
        return _pairs(modular.train_mask(seed))
    return _digits(held_out=False)


def held_out_data(name: str, seed: int = 0) -> Data:
    """What it was not trained on."""
    if name == "python_docs":
        return _python_docs(held_out=True)
    if name == "four_languages":
        return languages.documents(1_000, seed=2)
    if name == "shapes":
        return shapes.draw(2_000, seed=2).to_images()
    if name == "modular_addition":
        return _pairs(~modular.train_mask(seed))
    return _digits(held_out=True)


@torch.no_grad()
def score(name: str, module: nn.Module, data: Data, weights: Path = WEIGHTS) -> dict[str, float]:
    """Loss and accuracy of a network on data of its kind (`Trained.score`), its tokenizer from the folder `weights`."""
    was_training = module.training
    module.eval()
    try:
        if isinstance(data, Texts):
            return _score_decoder(module, read_tokenizer(name, weights), data)
        if isinstance(data, Images):
            return _score_heads(module, data)
        (label,) = data.labels
        wanted = torch.tensor([int(each.labels[label]) for each in data])
        logits = module(data.values)
        loss = nn.functional.cross_entropy(logits, wanted)
        return {"loss": float(loss), "accuracy": float((logits.argmax(1) == wanted).double().mean())}
    finally:
        module.train(was_training)


# Helpers ----------------------------------------------------------------------------------------


def _loaded(name: str, folder: Path) -> Model:
    if (folder / "config.json").is_file():
        return load(folder, tokenizer=read_tokenizer(name), dtype=torch.float32)
    from safetensors.torch import load_file

    module = network(name)
    module.load_state_dict(load_file(folder / "model.safetensors"))  # copies into float32
    return load(module.eval())


def _python_docs(held_out: bool) -> Texts:
    """A tenth is held out, by the hash of the text: no text changes sides with the version of Python."""
    chosen = [
        (each.text, each.labels["kind"])
        for each in corpora.python_docs()
        if (hashlib.sha256(b"held out:" + each.text.encode()).digest()[0] < 26) == held_out
    ]
    texts, kinds = zip(*chosen, strict=True)
    return Texts(list(texts), labels={"kind": list(kinds)}, name=corpora.python_docs(1).name)


def _pairs(mask: np.ndarray) -> Tensors:
    pairs = modular.all_pairs()[mask]
    return Tensors(pairs, labels={"sum": pairs.sum(1) % modular.P}, name="modular_addition")


def _digits(held_out: bool) -> Tensors:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    given: Any = load_digits()
    parts = train_test_split(given.data, given.target, test_size=0.25, random_state=0, stratify=given.target)
    values, labels = np.asarray(parts[held_out]), parts[2 + held_out]
    return Tensors((values / 16).astype(np.float32), labels={"digit": labels}, name="digits")


def _score_decoder(module: Any, tokenizer: PreTrainedTokenizerFast, data: Texts) -> dict[str, float]:
    loss, right, tokens, characters = 0.0, 0, 0, 0
    for batch in _batches(tokenizer, data):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = module(input_ids=ids, attention_mask=mask).logits[:, :-1]
        wanted = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        counts = wanted != -100
        loss += float(nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum"))
        right += int(((logits.argmax(-1) == wanted) & counts).sum())
        tokens += int(counts.sum())
        characters += int(batch["characters"])
    return {"loss": loss / tokens, "accuracy": right / tokens, "bits_per_character": loss / characters / math.log(2)}


def _batches(tokenizer: PreTrainedTokenizerFast, data: Texts, size: int = 64) -> Iterator[dict[str, Any]]:
    """Texts of like length together, cut to what the decoder reads; `characters`: how many that leaves."""
    given = tokenizer([each.text for each in data], truncation=True, return_offsets_mapping=True)
    lengths = [len(ids) for ids in given["input_ids"]]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        padded = tokenizer.pad({"input_ids": [given["input_ids"][each] for each in chosen]}, return_tensors="pt")
        ends = [given["offset_mapping"][each][-1][1] for each in chosen]
        yield {**padded, "characters": sum(ends)}


def _score_heads(module: nn.Module, data: Images) -> dict[str, float]:
    logits = torch.cat(
        [
            module(data.inputs(range(start, min(start + 500, len(data))))["pixel_values"])
            for start in range(0, len(data), 500)
        ]
    )
    found: dict[str, float] = {}
    losses = []
    for head, part in shapes.split_heads(logits).items():
        wanted = torch.tensor([shapes.HEADS[head].index(each) for each in data.label_values[head]])
        losses.append(float(nn.functional.cross_entropy(part, wanted)))
        found[f"accuracy_{head}"] = float((part.argmax(1) == wanted).double().mean())
    return {"loss": float(np.mean(losses)), "accuracy": float(np.mean(list(found.values()))), **found}
