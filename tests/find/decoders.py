"""Decoders whose blocks write into the residual stream in unusual ways, tiny and with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.architectures import (
    BLOOM,
    GEMMA2,
    GPT2,
    HEADS,
    LAYERS,
    LLAMA,
    MAMBA,
    NEOX,
    NEURONS,
    PHI,
    QWEN3,
    VOCABULARY,
    WIDTH,
    deepseek,
    mixtral,
    qwen2_moe,
)
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

_SIZES: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": WIDTH,
    "intermediate_size": NEURONS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}


def opt_decoder(before: bool, embedding: int = WIDTH) -> nn.Module:
    """OPT; `before`: norms before attention and MLP; `embedding`: narrower than the residual stream in the 350m."""
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=WIDTH,
            word_embed_proj_dim=embedding,
            ffn_dim=NEURONS,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=32,
            do_layer_norm_before=before,
            pad_token_id=1,
        )
    )


def granite() -> nn.Module:
    """Granite, which multiplies embeddings, what branches add, and logits."""
    factors: dict[str, Any] = {"residual_multiplier": 0.3, "logits_scaling": 2.0, "embedding_multiplier": 3.0}
    return GraniteForCausalLM(GraniteConfig(**_SIZES, **factors))


DECODERS: dict[str, Callable[[], nn.Module]] = {
    **{each.name: each.new for each in (GPT2, LLAMA, QWEN3, GEMMA2, NEOX, PHI, BLOOM, MAMBA)},
    "opt": lambda: opt_decoder(before=True),
    "opt-350m": lambda: opt_decoder(before=False, embedding=8),
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**_SIZES)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**_SIZES)),
    "granite": granite,
    "mixtral": mixtral,
    "qwen2-moe": qwen2_moe,
    "deepseek": deepseek,
}
