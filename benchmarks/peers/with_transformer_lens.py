"""TransformerLens 4: a `TransformerBridge`, with `run_with_hooks` and one hook for each layer.

It boots models with a head only, and `stop_at_layer` ends before a layer, not after the last one. So the smallest head
is taken: BERT with that of two sentences, and GPT-2 asked for the logits of the last token alone.
"""

from __future__ import annotations

from typing import Any

import torch
from job import Activations, Batch, Case, Pass, summarized, tokenizer_of
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForNextSentencePrediction, GPT2LMHeadModel

PACKAGE = "transformer-lens"


def load(case: Case) -> Pass:
    """`return_type=None`: no logits are asked for."""
    kind: Any = GPT2LMHeadModel if case.kind == "gpt2" else AutoModelForNextSentencePrediction
    module = kind.from_pretrained(case.model, dtype=torch.float32).eval()
    bridge = TransformerBridge.boot_transformers(
        case.model, hf_model=module, tokenizer=tokenizer_of(case.model), dtype=torch.float32, device="cpu"
    )
    few = {"logits_to_keep": 1} if case.kind == "gpt2" else {}
    kept: Activations = {}

    def hook_of(layer: int) -> Any:
        def keep(tensor: torch.Tensor, hook: Any) -> None:
            kept[layer] = tensor

        return keep

    hooks = [(f"blocks.{layer}.mlp.hook_post", hook_of(layer)) for layer in range(case.layers)]

    def activations(batch: Batch) -> Activations:
        kept.clear()
        padded = {} if bool(batch.mask.all()) else {"attention_mask": batch.mask.long()}
        bridge.run_with_hooks(batch.ids, fwd_hooks=hooks, return_type=None, **padded, **few)
        return kept

    return summarized(activations)
