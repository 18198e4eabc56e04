"""S010: a network with two paths is doubly dissociated, one with a single path is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.architectures import tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

import patchclamp as pc
from patchclamp.errors import DataError

# Task a asks with "the", task b with "they"; the answer to an object is a word of its own.
OBJECTS = {"cat": "sat", "dogs": "ran", "mat": "day", "home": "rained"}


def loaded(separate: bool) -> pc.Model:
    """A decoder with two paths, or one."""
    reader = tokenizer()
    ids: Any = {word: reader.convert_tokens_to_ids(word) for word in ("the", "they", *OBJECTS, *OBJECTS.values())}
    config = GPT2Config(
        vocab_size=len(reader), n_positions=16, n_embd=32, n_layer=1, n_head=4, n_inner=64, attn_pdrop=0
    )
    model = GPT2LMHeadModel(config).eval()
    _by_hand(model, ids, separate)
    return pc.load(model, tokenizer=reader)


def _by_hand(model: Any, ids: dict[str, int], separate: bool) -> None:
    """Question and object are added by attention of equal weights; neuron 4 q + k answers question q on object k."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        block = model.transformer.h[0]
        for norm in (block.ln_1, block.ln_2, model.transformer.ln_f):
            norm.weight.fill_(1.0)
        embedding = model.transformer.wte.weight
        made = torch.Generator().manual_seed(0)
        embedding.copy_(0.02 * torch.randn(embedding.shape, generator=made))
        places = {"the": 0, "they": 1, **{word: 2 + n for n, word in enumerate(OBJECTS)}}
        for word, place in places.items():
            embedding[ids[word]] = 0
            embedding[ids[word], place] = 4.0
        for number, word in enumerate(OBJECTS.values()):
            embedding[ids[word]] = 0
            embedding[ids[word], 10 + number] = 4.0
        # Values copy the first ten coordinates; queries and keys are zero, so all earlier tokens count alike.
        block.attn.c_attn.weight[:8, 64:72] = torch.eye(8)
        block.attn.c_proj.weight[:8, 16:24] = torch.eye(8)
        inner, outer = block.mlp.c_fc, block.mlp.c_proj
        inner.bias.fill_(-20.0)
        for question in range(2):
            for number in range(4):
                if separate:
                    neuron = 4 * question + number
                    inner.weight[16 + question, neuron] = 4.0
                    inner.bias[neuron] = -8.0
                else:
                    neuron = number
                    inner.bias[neuron] = -2.5
                inner.weight[2 + number, neuron] = 2.0
                outer.weight[neuron, 10 + number] = 3.0
        if not separate:
            for neuron in range(4, 8):
                inner.bias[neuron] = -20.0


def prompts(question: str) -> list[tuple[str, str, str, str]]:
    """Pairs of objects asked for with a question."""
    return [
        (f"{question} {one}", f"{question} {other}", f" {OBJECTS[one]}", f" {OBJECTS[other]}")
        for one in OBJECTS
        for other in OBJECTS
        if one != other
    ]


def test_two_paths_are_doubly_dissociated() -> None:
    model = loaded(True)
    found = pc.verify.dissociate(model, prompts("the"), prompts("they"), "mlp.0", units="neurons", count=4)
    assert sorted(found.a.indices("mlp.0")) == [0, 1, 2, 3] and sorted(found.b.indices("mlp.0")) == [4, 5, 6, 7]
    assert found.drops[0, 0] > 0.5 and found.drops[1, 1] > 0.5
    assert abs(found.drops[0, 1]) < 0.1 and abs(found.drops[1, 0]) < 0.1
    assert found.index > 1 and found.p < 0.01
    picked = found.effects.filter(found.effects["set"].is_not_null())
    assert len(picked) == 8 and (found.effects["unit"][0]).startswith("mlp.0:")


def test_one_path_is_not() -> None:
    model = loaded(False)
    found = pc.verify.dissociate(model, prompts("the"), prompts("they"), "mlp.0", units="neurons", count=2, seed=1)
    assert found.p > 0.1


def test_whole_sites_and_heads() -> None:
    model = loaded(True)
    found = pc.verify.dissociate(model, prompts("the"), prompts("they"), "attn.0", units="heads", count=1, controls=5)
    assert len(found.effects) == 4 and len(found.a) == 8
    with pytest.raises(DataError, match="too few to pick"):
        pc.verify.dissociate(model, prompts("the"), prompts("they"), "mlp.0", units="sites", count=1)


def test_bad_input() -> None:
    model = loaded(True)
    both, long = prompts("the"), [("they cat", "they cat sat", " ran", " sat")] * 4
    for one, other, message in (
        (both, both, "a prompt is in both tasks"),
        (both, long, "has 2 tokens and .* has 3"),
        (both[:2], prompts("they"), "task a has [0-9] prompts that can be used"),
    ):
        with pytest.raises(DataError, match=message):
            pc.verify.dissociate(model, one, other, "mlp.0", units="neurons")
