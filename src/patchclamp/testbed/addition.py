"""Addition of two digits, character by character, and a small decoder that learns it.

    7+5=  ->  2        the last digit of the sum comes first, as one adds by hand

It is trained anew each time, within seconds of one core.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import nn

from patchclamp.model import Model, load

CHARACTERS = "0123456789+=."


@dataclass(frozen=True, eq=False)
class Addition:
    """A trained decoder and what it was trained on.

    Attributes:
        model: the decoder, with a tokenizer of characters.
        prompts: `"7+5="`, all hundred.
        answers: the character that comes next: the last digit of the sum.
    """

    model: Model = field(repr=False)
    prompts: list[str] = field(repr=False)
    answers: list[str] = field(repr=False)

    def accuracy(self) -> float:
        """The share of prompts after which the right character is the likeliest, interventions in force included."""
        wanted = torch.tensor([CHARACTERS.index(each) for each in self.answers])
        with torch.no_grad(), self.model.evaluating():
            logits = self.model.module(**self.model.inputs(self.prompts)).logits[:, -1]
        return float((logits.argmax(-1) == wanted).double().mean())


def addition(
    *, layers: int = 2, heads: int = 2, width: int = 32, neurons: int = 64, steps: int = 500, seed: int = 0
) -> Addition:
    """Train a decoder to add two digits.

    Args:
        layers: blocks.
        heads: of each.
        width: of the residual stream.
        neurons: of each MLP.
        steps: of training, on all hundred sums each.
        seed: of the first weights.
    """
    pairs = list(itertools.product(range(10), repeat=2))
    prompts = [f"{left}+{right}=" for left, right in pairs]
    totals = [f"{(left + right) % 10}{(left + right) // 10}." for left, right in pairs]
    module = _decoder(layers, heads, width, neurons, seed)
    ids = torch.tensor(
        [[CHARACTERS.index(each) for each in prompt + total] for prompt, total in zip(prompts, totals, strict=True)]
    )
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    module.train()
    for _ in range(steps):
        logits = module(input_ids=ids).logits[:, 3:-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 4:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return Addition(load(module.eval(), tokenizer=_tokenizer()), prompts, [each[0] for each in totals])


# Helpers --------------------------------------------------------------------------------------------


def _decoder(layers: int, heads: int, width: int, neurons: int, seed: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(CHARACTERS),
        n_positions=8,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        n_inner=neurons,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=12,
        eos_token_id=12,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


def _tokenizer() -> object:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({each: number for number, each in enumerate(CHARACTERS)}, "."))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")  # type: ignore[assignment]
    backend.decoder = decoders.Fuse()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=".", unk_token=".")
