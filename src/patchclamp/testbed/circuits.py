"""Attention heads set by hand, and where the weights of a GPT-2 or a Llama are.

Three kinds of head are enough for what planted neurons read: one that looks at the token before, one that looks at
every token alike, and one that looks for a kind of token, or else at the beginning of the text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from patchclamp.testbed.residual import HEAD, HEADS, POSITION, WIDTH

Architecture = Literal["gpt2", "llama"]
POSITIONS = 40


@dataclass(frozen=True, eq=False)
class Head:
    """Maps of one head, float64: `query`, `key`, `value` `[HEAD, WIDTH]`, `output` `[WIDTH, HEAD]`."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    output: np.ndarray


def bare(architecture: Architecture, tokens: int, layers: int, neurons: int) -> nn.Module:
    """A model of this architecture whose weights are all 0, but for its norms."""
    module = _gpt2(tokens, layers, neurons) if architecture == "gpt2" else _llama(tokens, layers, neurons)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            norm = name.endswith(("norm.weight", "layernorm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight"))
            weight.fill_(1.0 if norm else 0.0)
    return module.eval()


def blocks(module: Any) -> list[Any]:
    """Its transformer blocks, in order."""
    return list(module.transformer.h if _is_gpt2(module) else module.model.layers)


def normed(module: Any, ids: torch.Tensor, layer: int, where: Literal["attention", "mlp"]) -> np.ndarray:
    """What a layer's attention or MLP is given, behind the norm: `[examples, positions, WIDTH]` float64."""
    block, found = blocks(module)[layer], []
    names = {"attention": "ln_1", "mlp": "ln_2"} if _is_gpt2(module) else _LLAMA_NORMS

    def keep(_: nn.Module, __: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        found.append(out.detach())
        raise _EnoughError

    handle = getattr(block, names[where]).register_forward_hook(keep)
    try:
        with torch.no_grad(), contextlib.suppress(_EnoughError):
            # Padding stands behind, where it changes nothing.
            module(ids, attention_mask=torch.ones_like(ids))
    finally:
        handle.remove()
    return found[0].double().numpy()


def set_heads(module: Any, layer: int, heads: dict[int, Head]) -> None:
    """Write heads into a layer's attention."""
    block = blocks(module)[layer]
    with torch.no_grad():
        for number, head in heads.items():
            rows = slice(number * HEAD, (number + 1) * HEAD)
            if _is_gpt2(module):
                for part, each in enumerate((head.query, head.key, head.value)):
                    block.attn.c_attn.weight[:, part * WIDTH + rows.start : part * WIDTH + rows.stop] = _tensor(each.T)
                block.attn.c_proj.weight[rows] = _tensor(head.output.T)
            else:
                attention = block.self_attn
                for name, each in (("q_proj", head.query), ("k_proj", head.key), ("v_proj", head.value)):
                    getattr(attention, name).weight[rows] = _tensor(each)
                attention.o_proj.weight[:, rows] = _tensor(head.output)


def set_neurons(
    module: Any, layer: int, read: np.ndarray, bias: np.ndarray, write: np.ndarray, one: np.ndarray
) -> None:
    """Write a layer's MLP.

    Args:
        module: the model.
        layer: which.
        read: `[neurons, WIDTH]`.
        bias: `[neurons]`.
        write: `[neurons, WIDTH]`.
        one: `[WIDTH]`, on which what the MLP is given is 1, more or less: a Llama has no biases, and reads it instead.
    """
    mlp = blocks(module)[layer].mlp
    with torch.no_grad():
        if _is_gpt2(module):
            mlp.c_fc.weight.copy_(_tensor(read.T))
            mlp.c_fc.bias.copy_(_tensor(bias))
            mlp.c_proj.weight.copy_(_tensor(write))
        else:
            mlp.gate_proj.weight.copy_(_tensor(read + bias[:, None] * one))
            mlp.up_proj.weight.copy_(_tensor(np.broadcast_to(one, read.shape)))
            mlp.down_proj.weight.copy_(_tensor(write.T))


def has_biases(module: nn.Module) -> bool:
    """Whether its MLPs have them."""
    return _is_gpt2(module)


def nonlinearity(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """That of its MLPs."""
    return blocks(module)[0].mlp.act if _is_gpt2(module) else blocks(module)[0].mlp.act_fn


def set_embedding(module: Any, tokens: np.ndarray, positions: np.ndarray, unembedding: np.ndarray) -> None:
    """Write `[tokens, WIDTH]`, `[POSITIONS, WIDTH]` (GPT-2 only) and `[tokens, WIDTH]`."""
    with torch.no_grad():
        module.get_input_embeddings().weight.copy_(_tensor(tokens))
        module.lm_head.weight.copy_(_tensor(unembedding))
        if _is_gpt2(module):
            module.transformer.wpe.weight.copy_(_tensor(positions))


def sines() -> np.ndarray:
    """`[POSITIONS, POSITION]` float64, unit rows: by which a GPT-2 tells positions apart."""
    angle = np.arange(POSITIONS)[:, None] * _STEPS
    return np.concatenate([np.cos(angle), np.sin(angle)], 1) / np.sqrt(len(_STEPS))


def looks_back(module: nn.Module, part: dict[str, np.ndarray], scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Query and key `[HEAD, WIDTH]` by which a head attends to the token before.

    Args:
        module: the model.
        part: of the residual stream: "position" and "constant".
        scale: what the norm multiplies the residual stream with.
    """
    query, key = np.zeros((HEAD, WIDTH)), np.zeros((HEAD, WIDTH))
    size = np.sqrt(_SHARP * np.sqrt(HEAD)) / scale
    if _is_gpt2(module):
        turn = np.block(
            [[np.diag(np.cos(_STEPS)), -np.diag(np.sin(_STEPS))], [np.diag(np.sin(_STEPS)), np.diag(np.cos(_STEPS))]]
        )
        query[:POSITION] = size * part["position"].T
        key[:POSITION] = size * turn @ part["position"].T
        return query, key
    # Rotary positions turn query and key by themselves: a key that is one step ahead meets the query one step later.
    half = HEAD // 2
    angle = _ROTARY ** (-np.arange(_FAST) * 2 / HEAD)
    constant = part["constant"][:, 0]
    each = size / np.sqrt(_FAST)
    query[:_FAST] = each * constant
    key[:_FAST] = each * np.cos(angle)[:, None] * constant
    key[half : half + _FAST] = each * np.sin(angle)[:, None] * constant
    return query, key


def looks_for(pairs: list[tuple[np.ndarray, np.ndarray]], scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Query and key `[HEAD, WIDTH]`: the attention of a pair of tokens is e to the sum of products of directions.

    Rotary positions leave the slowest pair of coordinates where it is, nearly; two products at most.
    """
    query, key = np.zeros((HEAD, WIDTH)), np.zeros((HEAD, WIDTH))
    size = np.sqrt(np.sqrt(HEAD)) / scale
    for number, (asks, has) in enumerate(pairs):
        query[HEAD // 2 - 1 - number] = size * asks
        key[HEAD // 2 - 1 - number] = size * has
    return query, key


# Helpers --------------------------------------------------------------------------------------------


class _EnoughError(Exception):
    """What comes after is not wanted."""


_LLAMA_NORMS = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}
# Odd multiples of one step: their cosines add up at 0 and nowhere else within the text.
_STEPS = 2 * np.pi * np.asarray([1, 3, 5, 7, 9, 11, 13, 17]) / 40
_SHARP = 30.0  # attention of the token before over others, in units of a logit
_ROTARY, _FAST = 10_000.0, 6


def _gpt2(tokens: int, layers: int, neurons: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=tokens,
            n_positions=POSITIONS,
            n_embd=WIDTH,
            n_layer=layers,
            n_head=HEADS,
            n_inner=neurons,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=1,
            eos_token_id=1,
            pad_token_id=0,
            tie_word_embeddings=False,
        )
    )


def _llama(tokens: int, layers: int, neurons: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokens,
            hidden_size=WIDTH,
            intermediate_size=neurons,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=POSITIONS,
            bos_token_id=1,
            eos_token_id=1,
            pad_token_id=0,
            tie_word_embeddings=False,
        )
    )


def _is_gpt2(module: nn.Module) -> bool:
    return hasattr(module, "transformer")


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(values, np.float32))
