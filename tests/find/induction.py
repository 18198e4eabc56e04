"""An induction head set by hand into a GPT-2 without norms, and pairs of inputs on which it works and does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

import patchclamp as pc

TOKENS, POSITIONS, WIDTH, HEADS = 8, 10, 36, 3
PLANTED = {
    ("embedding", "attn.0.0.value"),
    ("attn.0.0", "attn.1.1.key"),
    ("embedding", "attn.1.1.query"),
    ("embedding", "attn.1.1.value"),
    ("attn.1.1", "logits"),
}

_TOKEN, _PREVIOUS, _OUT, _POSITION = slice(0, 8), slice(8, 16), slice(16, 24), slice(24, 34)


def gpt2(seed: int = 0, **options: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": TOKENS,
        "n_positions": POSITIONS,
        "n_embd": WIDTH,
        "n_layer": 2,
        "n_head": HEADS,
    }
    sizes |= {"n_inner": 16, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **options})).eval()


def without_norms(module: Any) -> Any:
    for block in module.transformer.h:
        block.ln_1, block.ln_2 = nn.Identity(), nn.Identity()
    module.transformer.ln_f = nn.Identity()
    return module


@torch.no_grad()
def induction(noise: float = 0.02, sharp: float = 35.0) -> pc.Model:
    """Head 0.0 writes down the token before, head 1.1 finds what followed the last token; all else is noise."""
    module = without_norms(gpt2())
    for name, weight in module.named_parameters():
        weight.copy_(noise * torch.randn_like(weight) if ".h." in name else torch.zeros_like(weight))
    module.transformer.wte.weight[:, _TOKEN] = torch.eye(TOKENS)
    module.transformer.wpe.weight[:, _POSITION] = torch.eye(POSITIONS)
    module.lm_head.weight[:, _OUT] = torch.eye(TOKENS)
    position, token = sharp**0.5 * torch.eye(POSITIONS), sharp**0.5 * torch.eye(TOKENS)
    _set(module, 0, 0, (_POSITION, position), (_POSITION, position.roll(1, 1)), _PREVIOUS, 1.0)
    _set(module, 1, 1, (_TOKEN, token), (_PREVIOUS, token), _OUT, 5.0)
    return pc.load(module)


def pairs(count: int, seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[int], list[int]]:
    """Clean inputs whose last token came before, others in which it did not, what followed it, and another token."""
    generator = np.random.default_rng(seed)
    clean, corrupt, right, wrong = [], [], [], []
    for _ in range(count):
        tokens, place = generator.permutation(TOKENS), int(generator.integers(1, 5))
        clean.append([*tokens[:7], tokens[place]])
        corrupt.append(generator.permutation(TOKENS))
        right.append(int(tokens[place + 1]))
        wrong.append(int(tokens[place + 2]))
    return _ids(clean), _ids(corrupt), right, wrong


def _ids(rows: Any) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.as_tensor(np.asarray(rows))}


Map = tuple[slice, torch.Tensor]


def _set(module: Any, layer: int, head: int, query: Map, key: Map, out: slice, gain: float) -> None:
    attention, size = module.transformer.h[layer].attn, WIDTH // HEADS
    for part, (rows, matrix) in enumerate((query, key, (_TOKEN, torch.eye(TOKENS)))):
        first = WIDTH * part + head * size
        attention.c_attn.weight[:, first : first + size] = 0
        attention.c_attn.weight[rows, first : first + matrix.shape[1]] = matrix
    attention.c_proj.weight[head * size : (head + 1) * size] = 0
    attention.c_proj.weight[head * size : head * size + TOKENS, out] = gain * torch.eye(TOKENS)
