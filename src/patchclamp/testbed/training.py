"""The scripts that made the small trained networks: `python -m patchclamp.testbed.training NAME --seed 0`.

Each takes minutes on one core. The same seed on the same machine with the same number of threads gives the same
weights. A script writes float16 safetensors, and beside them in `facts.json` what it used and what it measured on
held-out data with those rounded weights.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from patchclamp.data import Example, Images, Tensors, Texts
from patchclamp.errors import unknown
from patchclamp.testbed import languages, modular, shapes
from patchclamp.testbed.trained import (
    CHECKPOINTS,
    NAMES,
    WEIGHTS,
    Data,
    held_out_data,
    network,
    read_tokenizer,
    score,
    training_data,
)

LANGUAGE_DOCUMENTS, IMAGES, VOCABULARY, CONTEXT = 20_000, 12_000, 1_024, 128


@dataclass(frozen=True)
class Recipe:
    """How one network is trained.

    Attributes:
        module: the network, with its first weights.
        loss: the loss of the batch of a step; steps count from 0.
        steps: how many optimiser steps.
        rate: greatest learning rate; it rises over the first 2 % of the steps and, if `decay`, falls to a tenth.
        decay: whether the learning rate falls, along a cosine.
        weight_decay: of AdamW.
        betas: of AdamW.
        held_out: what it is scored on.
        checkpoints: moment -> step after which the weights are kept, besides "last".
        facts: what else is worth knowing.
    """

    module: nn.Module
    loss: Callable[[int], torch.Tensor]
    steps: int
    rate: float
    weight_decay: float
    held_out: Data
    betas: tuple[float, float] = (0.9, 0.98)
    decay: bool = True
    checkpoints: dict[str, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def train(name: str, seed: int = 0, *, steps: int | None = None, weights: Path = WEIGHTS) -> dict[str, Any]:
    """Train one of the networks, and write its weights and facts.

    Args:
        name: which.
        seed: of the first weights, the order of the data, and for modular addition of the split.
        steps: fewer than the recipe has, to try it out; only the last weights are kept then.
        weights: folder to write to; a folder for each network and seed is made in it.

    Returns:
        What was written to `facts.json`.

    Raises:
        UnknownName: there is no such network.
    """
    if name not in NAMES:
        raise unknown("trained network", name, NAMES)
    torch.manual_seed(seed)
    started = time.process_time()
    recipe = _RECIPES[name](seed, weights)
    module, total = recipe.module, steps or recipe.steps
    moments = {total: CHECKPOINTS[-1]}
    if steps is None:
        moments |= {step: moment for moment, step in recipe.checkpoints.items()}
    optimiser = torch.optim.AdamW(_groups(module, recipe.weight_decay), lr=recipe.rate, betas=recipe.betas)
    found: dict[str, dict[str, float]] = {}
    module.train()
    for step in range(total):
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate * _pace(step, total, recipe.decay)
        loss = recipe.loss(step)
        optimiser.zero_grad()
        loss.backward()
        if recipe.decay:
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 0 or step + 1 in moments:
            print(f"{name} seed {seed} step {step + 1}: loss {loss.item():.4f}, {time.process_time() - started:.0f} s")
        if step + 1 in moments:
            folder = weights / name / f"seed-{seed}" / moments[step + 1]
            rounded = _save(module, folder)
            found[moments[step + 1]] = {"step": step + 1, **score(name, rounded, recipe.held_out, weights)}
            print(f"{folder.name}: {found[moments[step + 1]]}", flush=True)
    facts = {
        "checkpoints": found,
        "parameters": sum(each.numel() for each in module.parameters()),
        "seconds": round(time.process_time() - started, 1),
        **_circumstances(),
        "held_out_sha256": data_sha256(recipe.held_out),
        **recipe.facts,
    }
    file = weights / name / f"seed-{seed}" / "facts.json"
    file.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return facts


def data_sha256(data: Data) -> str:
    """Hash of texts, images or tensors, with their labels."""
    if isinstance(data, Images):
        return data.scan().sha256
    digest = hashlib.sha256()
    for each in data:
        digest.update(each.text.encode() if isinstance(each, Example) else each.values.numpy().tobytes())
        digest.update(json.dumps(dict(each.labels), sort_keys=True).encode())
    return digest.hexdigest()


# The networks -----------------------------------------------------------------------------------


def _four_languages(seed: int, weights: Path) -> Recipe:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer: Any = read_tokenizer("four_languages")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=None,
    )
    documents = training_data("four_languages", count=LANGUAGE_DOCUMENTS)
    held_out = held_out_data("four_languages")
    assert isinstance(documents, Texts) and isinstance(held_out, Texts)
    rows = [torch.tensor(ids) for ids in tokenizer([each.text for each in documents])["input_ids"]]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id or 0)
    order = _shuffled(len(rows), 32, seed)
    module = LlamaForCausalLM(config)

    def loss(_step: int) -> torch.Tensor:
        return _next_token_loss(module, padded[next(order)], tokenizer.pad_token_id)

    facts = {
        "documents": LANGUAGE_DOCUMENTS,
        "entropy": languages.entropy(each.text for each in held_out),
        "vocabulary": len(tokenizer),
        "vocabulary_sha256": languages.vocabulary_sha256(),
    }
    return Recipe(module, loss, 2_500, 4e-3, 0.05, held_out, checkpoints={"middle": 600}, facts=facts)


def _python_docs(seed: int, weights: Path) -> Recipe:
    from transformers import GPT2Config, GPT2LMHeadModel

    texts, held_out = training_data("python_docs"), held_out_data("python_docs")
    assert isinstance(texts, Texts)
    _make_tokenizer(texts, weights / "python_docs" / "tokenizer.json")
    tokenizer: Any = read_tokenizer("python_docs", weights)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=CONTEXT,
        n_embd=64,
        n_layer=3,
        n_head=4,
        n_inner=256,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    module = GPT2LMHeadModel(config)
    pieces = _pieces(
        tokenizer([each.text for each in texts], add_special_tokens=False, verbose=False)["input_ids"], tokenizer
    )
    rows = _rows(pieces, seed)

    def loss(_step: int) -> torch.Tensor:
        return _next_token_loss(module, torch.stack([next(rows) for _ in range(16)]), tokenizer.pad_token_id)

    facts = {"corpus": texts.name, "texts": len(texts), "tokens": sum(len(each) for each in pieces)}
    facts |= {"vocabulary": len(tokenizer), "data_sha256": data_sha256(texts)}
    moments = {"early": 100, "middle": 500} if seed == 0 else {"middle": 500}
    return Recipe(module, loss, 2_000, 4e-3, 0.05, held_out, checkpoints=moments, facts=facts)


def _shapes(seed: int, weights: Path) -> Recipe:
    data, held_out = training_data("shapes", count=IMAGES), held_out_data("shapes")
    assert isinstance(data, Images)
    pixels = torch.cat(
        [data.inputs(range(start, min(start + 1_000, IMAGES)))["pixel_values"] for start in range(0, IMAGES, 1_000)]
    )
    wanted = {
        head: torch.tensor([names.index(each) for each in data.label_values[head]])
        for head, names in shapes.HEADS.items()
    }
    order = _shuffled(len(pixels), 64, seed)
    module = network("shapes")

    def loss(_step: int) -> torch.Tensor:
        chosen = next(order)
        parts = shapes.split_heads(module(pixels[chosen]))
        losses = [nn.functional.cross_entropy(part, wanted[head][chosen]) for head, part in parts.items()]
        return torch.stack(losses).sum()

    facts = {"images": IMAGES}
    return Recipe(module, loss, 1_200, 4e-3, 0.05, held_out, checkpoints={"early": 60}, facts=facts)


def _modular_addition(seed: int, weights: Path) -> Recipe:
    pairs = torch.from_numpy(modular.all_pairs()[modular.train_mask(seed)])
    # The network cannot tell (b, a) from (a, b): half of the work is enough.
    pairs = pairs[pairs[:, 0] <= pairs[:, 1]]
    module = network("modular_addition")

    def loss(_step: int) -> torch.Tensor:
        return nn.functional.cross_entropy(module(pairs), pairs.sum(1) % modular.P)

    moments = {"early": 300}
    facts = {"trained_pairs": len(pairs), "trained_share": modular.TRAINED_SHARE}
    held_out = held_out_data("modular_addition", seed)
    return Recipe(module, loss, 3_500, 1e-3, 1.0, held_out, decay=False, checkpoints=moments, facts=facts)


def _digits(seed: int, weights: Path) -> Recipe:
    data, held_out = training_data("digits"), held_out_data("digits")
    assert isinstance(data, Tensors)
    wanted = torch.tensor([int(each.labels["digit"]) for each in data])
    order = _shuffled(len(data), 64, seed)
    module = network("digits")

    def loss(_step: int) -> torch.Tensor:
        chosen = next(order)
        return nn.functional.cross_entropy(module(data.values[chosen]), wanted[chosen])

    return Recipe(module, loss, 1_000, 5e-3, 0.1, held_out, facts={"images": len(data)})


_RECIPES: dict[str, Callable[[int, Path], Recipe]] = {
    "python_docs": _python_docs,
    "four_languages": _four_languages,
    "shapes": _shapes,
    "modular_addition": _modular_addition,
    "digits": _digits,
}


# Helpers ----------------------------------------------------------------------------------------


def _pace(step: int, total: int, decay: bool) -> float:
    """The learning rate of a step as a share of the greatest."""
    rise = min(1.0, (step + 1) / max(10, total // 50))
    return rise * (0.1 + 0.9 * (1 + math.cos(math.pi * step / total)) / 2) if decay else rise


def _groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices are decayed; biases and the scales of norms are not."""
    matrices = [each for each in module.parameters() if each.ndim > 1]
    others = [each for each in module.parameters() if each.ndim <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _shuffled(count: int, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Batches of places, each place once in an epoch, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).split(size)[: max(1, count // size)]


def _next_token_loss(module: Any, ids: torch.Tensor, padding: Any) -> torch.Tensor:
    logits = module(input_ids=ids, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=padding)


def _pieces(tokenized: Sequence[Sequence[int]], tokenizer: Any) -> list[list[int]]:
    """Texts cut to what a context holds, `<start>` before each piece."""
    most = CONTEXT - 1
    return [
        [tokenizer.bos_token_id, *ids[at : at + most]] for ids in tokenized for at in range(0, max(1, len(ids)), most)
    ]


def _rows(pieces: Sequence[Sequence[int]], seed: int) -> Iterator[torch.Tensor]:
    """Whole contexts, each beginning with a piece; of the last piece in one, the rest is left out."""
    generator = torch.Generator().manual_seed(seed)
    row: list[int] = []
    while True:
        for place in torch.randperm(len(pieces), generator=generator).tolist():
            row += pieces[place]
            if len(row) >= CONTEXT:
                yield torch.tensor(row[:CONTEXT])
                row = []


def _make_tokenizer(texts: Texts, file: Path) -> None:
    """Byte pairs learned on the texts, where there are none yet: networks of all seeds share them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    if file.exists():
        return
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<start>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([each.text for each in texts], trainer)
    made.post_processor = processors.Sequence(  # type: ignore[assignment]
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<start> $A", special_tokens=[("<start>", 1)]),
        ]
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    made.save(str(file), pretty=False)


def _save(module: Any, folder: Path) -> nn.Module:
    """Write the weights as float16, and give the module back as it will be loaded: rounded, in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    rounded = copy.deepcopy(module).half()
    if hasattr(module, "save_pretrained"):
        from transformers.utils import logging

        logging.disable_progress_bar()
        rounded.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
    else:
        from safetensors.torch import save_file

        save_file(rounded.state_dict(), folder / "model.safetensors")
    return rounded.float().eval()


def _circumstances() -> dict[str, Any]:
    import sklearn
    import tokenizers
    import transformers

    versions = {"torch": torch.__version__, "numpy": np.__version__, "transformers": transformers.__version__}
    versions |= {"tokenizers": tokenizers.__version__, "scikit-learn": sklearn.__version__}
    return {"threads": torch.get_num_threads(), "python": platform.python_version(), "versions": versions}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    train(given.name, given.seed)
