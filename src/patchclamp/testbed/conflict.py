"""Facts that a small decoder remembers, and contexts that say otherwise.

    reads:  ent7 colour is red . ent7 colour is     remembers: blue     follows from the context: red

It is trained on facts alone, on facts after a context about something else, and on facts after a context that
contradicts them. What is said once is mostly not believed, and the text goes on with the fact; what is said twice
mostly is. So it can do both, and after a context of one sentence it says what it remembers. Its heads are two numbers
wide: what they fetch, neurons have to make an answer of. It is trained anew each time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from patchclamp.errors import DataError
from patchclamp.model import Model, load

ONCE, TWICE = 0.35, 0.95
_PAD, _START = "<pad>", "<start>"


@dataclass(frozen=True, eq=False)
class Conflict:
    """A trained decoder, and what can be asked of it.

    Attributes:
        model: the decoder, with a tokenizer of words.
        facts: name -> the colour that it was told in training.
        examples: (context, question, answer of the context), said once, of pairs of a name and a colour that were a
            context in training.
        development: the same, of pairs never met as a context.
        held_out: others of these.
        plain: (text, answer): facts with no context, or with one about another name.
    """

    model: Model = field(repr=False)
    facts: dict[str, str] = field(repr=False)
    examples: list[tuple[str, str, str]] = field(repr=False)
    development: list[tuple[str, str, str]] = field(repr=False)
    held_out: list[tuple[str, str, str]] = field(repr=False)
    plain: list[tuple[str, str]] = field(repr=False)

    @property
    def said_twice(self) -> list[tuple[str, str, str]]:
        """The held-out examples with their contexts said twice."""
        return [(f"{context} {context}", question, answer) for context, question, answer in self.held_out]

    def faithful(self, examples: list[tuple[str, str, str]]) -> float:
        """The share of examples whose likeliest next token is the answer of the context."""
        logits, wanted = self._logits([(f"{context} {question}", answer) for context, question, answer in examples])
        return float((logits.argmax(-1) == wanted).double().mean())

    def loss(self) -> float:
        """Mean loss, in nats, of the answers in `plain`."""
        logits, wanted = self._logits(self.plain)
        return float(nn.functional.cross_entropy(logits, wanted))

    def recalled(self) -> float:
        """The share of `plain` whose likeliest next token is the fact."""
        logits, wanted = self._logits(self.plain)
        return float((logits.argmax(-1) == wanted).double().mean())

    def _logits(self, asked: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
        """At the last token of each text, with the interventions that are in force; and the ids of the answers."""
        inputs = self.model.inputs([text for text, _ in asked])
        last = inputs["attention_mask"].sum(1) - 1
        with torch.no_grad(), self.model.evaluating():
            logits = self.model.module(**inputs).logits
        wanted = torch.tensor([self.model.tokenizer.convert_tokens_to_ids(answer) for _, answer in asked])
        return logits[torch.arange(len(asked)), last], wanted


def conflict(
    *, names: int = 40, colours: int = 12, once: float = ONCE, twice: float = TWICE, steps: int = 500, seed: int = 0
) -> Conflict:
    """Train a decoder on facts and on contexts that contradict them.

    Args:
        names: how many facts.
        colours: how many answers.
        once: how often a text goes on with what a contradicting context said once.
        twice: with what it said twice.
        steps: of training, 96 sequences of each kind.
        seed: of facts, texts, first weights.

    Raises:
        DataError: fewer than 4 names or colours, or shares that are none.
    """
    if names < 4 or colours < 4 or not 0 <= once <= twice <= 1:
        raise DataError(
            f"at least 4 names and colours and shares in [0, 1] are wanted, not {names}, {colours}, {once}, {twice}"
        )
    made = np.random.default_rng(seed)
    of_names = [f"ent{number}" for number in range(names)]
    of_colours = [f"colour{number}" for number in range(colours)]
    facts = made.integers(colours, size=names)
    pairs = [(name, colour) for name in range(names) for colour in range(colours) if colour != facts[name]]
    order = made.permutation(len(pairs))
    shown, unseen = np.split(np.asarray(pairs)[order], [int(0.7 * len(pairs))])
    model = _decoder([*of_names, *of_colours], seed)
    _train(model, _Sequences(model, of_names, of_colours, facts, shown, made), (once, twice), steps)

    def triples(chosen: np.ndarray) -> list[tuple[str, str, str]]:
        return [
            (f"{of_names[name]} colour is {of_colours[colour]} .", f"{of_names[name]} colour is", of_colours[colour])
            for name, colour in chosen
        ]

    plain = [(f"{name} colour is", of_colours[fact]) for name, fact in zip(of_names, facts, strict=True)]
    for name in range(names):
        other, colour = (name + 1 + int(made.integers(names - 1))) % names, int(made.integers(colours))
        context = f"{of_names[other]} colour is {of_colours[colour]} ."
        plain.append((f"{context} {of_names[name]} colour is", of_colours[facts[name]]))
    development, held_out = np.array_split(unseen, 2)
    known = {name: of_colours[fact] for name, fact in zip(of_names, facts, strict=True)}
    return Conflict(model, known, triples(shown), triples(development), triples(held_out), plain)


# Helpers --------------------------------------------------------------------------------------------

_AT_ONCE = 96


def _decoder(words: list[str], seed: int) -> Model:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    listed = [_PAD, _START, "colour", "is", ".", *words]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(listed)}, _PAD))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=_PAD, unk_token=_PAD)
    config = GPT2Config(
        vocab_size=len(listed),
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=16,
        n_inner=256,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = GPT2LMHeadModel(config)
    return load(module.eval(), tokenizer=tokenizer)


class _Sequences:
    """Draws what is trained on."""

    def __init__(
        self,
        model: Model,
        names: list[str],
        colours: list[str],
        facts: np.ndarray,
        shown: np.ndarray,
        made: np.random.Generator,
    ) -> None:
        ids = model.tokenizer.convert_tokens_to_ids
        self.names, self.colours = (torch.tensor([ids(each) for each in words]) for words in (names, colours))
        self.colour, self.is_, self.dot = (torch.full((_AT_ONCE,), int(ids(each))) for each in ("colour", "is", "."))
        self.facts, self.shown, self.made = facts, shown, made

    def __call__(self, times: int, share: float) -> tuple[torch.Tensor, torch.Tensor]:
        """`[batch, tokens]` with a context said so many times, followed in a share of the cases; `[batch]` answers."""
        some = self.shown[self.made.integers(len(self.shown), size=_AT_ONCE)]
        name, said = some[:, 0], some[:, 1]
        answer = np.where(self.made.random(_AT_ONCE) < share, said, self.facts[name])
        # A third of the contexts is about something else, and changes nothing.
        aside = self.made.random(_AT_ONCE) < 1 / 3
        other = (name + 1 + self.made.integers(len(self.facts) - 1, size=_AT_ONCE)) % len(self.facts)
        answer = np.where(aside, self.facts[name], answer)
        told = self.names[np.where(aside, other, name)]
        context = [told, self.colour, self.is_, self.colours[said], self.dot] * times
        return torch.stack([*context, self.names[name], self.colour, self.is_], 1), self.colours[answer]


def _train(model: Model, sequences: _Sequences, shares: tuple[float, float], steps: int) -> None:
    module = model.module
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    module.train()
    for _ in range(steps):
        losses = []
        for times, share in ((0, 0.0), (1, shares[0]), (2, shares[1])):
            ids, wanted = sequences(times, share)
            losses.append(nn.functional.cross_entropy(module(input_ids=ids).logits[:, -1], wanted))
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        schedule.step()
    module.eval()
