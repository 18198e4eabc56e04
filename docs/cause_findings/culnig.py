"""CULNIG in a small transformer that knows facts of four countries: are its neurons those of the facts?

The network is trained here. A question has four options, a country, an attribute and a mark; the right option comes
next. The options are the values that the attribute has in each country, and all values occur with all attributes, so
that only who knows country and attribute together knows the answer. Beside that the network reads passages (a value is
said, and right, whatever the country) and does another task: which of two numbers is larger.

Size, number of facts and sparsity of the network were chosen so that its MLPs are needed for the facts at all: in
others that were tried, attention does nearly all of it, and silencing any few neurons costs nothing.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

import patchclamp as pc
from patchclamp.find.culnig import Questions, culnig

COUNTRIES, ATTRIBUTES, VALUES, NUMBERS = 4, 16, 12, 12
WIDTH, LAYERS, NEURONS = 48, 2, 256
STEPS, BATCH, RANDOM_SETS, TRIED = 900, 120, 10, 400
SMOOTHING = 0.1  # of the right answers: where a network is all too sure, the gradient of its probability is 0
SPARSITY = 3.0  # weight of the mean activation: few neurons do much, as in large networks
SHARES = (0.01, 0.02, 0.05, 0.1)
# Tokens.
_COUNTRY, _ATTRIBUTE, _VALUE = 0, COUNTRIES, COUNTRIES + ATTRIBUTES
_NUMBER = _VALUE + VALUES
_MARK, _SAYS, _NOTHING, _WHICH = (_NUMBER + NUMBERS + each for each in range(4))
VOCABULARY = _WHICH + 1


@dataclass(frozen=True, eq=False)
class Asked:
    """Questions of one kind: token ids `[questions, 9]`, the right tokens, and the country of each."""

    ids: torch.Tensor
    answers: torch.Tensor
    countries: np.ndarray

    def questions(self) -> Questions:
        """As `culnig` takes them."""
        return Questions({"input_ids": self.ids}, self.answers.tolist(), [f"country {each}" for each in self.countries])


def measure(seed: int = 0) -> dict[str, Any]:
    """Train, find, silence.

    Returns:
        `accuracy` of the network on facts, on reading and on the other task; `silenced`, for each share of neurons that
        may be general: how many there are, and how many points of a hundred each accuracy loses without them, without
        those that are found without control and confound, and without random ones of the same layers (mean and
        worst); `specific`: what each country loses without the neurons that are specific to one.
    """
    world = world_of(seed)
    model = pc.load(_trained(world, seed))
    made = torch.Generator().manual_seed(seed + 1)
    kinds = ("fact", "options", "reading")
    given = [asked(kind, world, TRIED, made).questions() for kind in kinds]
    tests = {kind: asked(kind, world, TRIED, made) for kind in ("fact", "reading", "larger")}
    plain = _accuracies(model, tests)
    everyone = model.neurons("mlp.*")
    rows = []
    for share in SHARES:
        how: dict[str, Any] = {"share": share, "specific_share": 0.3 * share}
        found = culnig(model, given[0], given[1], given[2], "mlp.*", **how)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that impostors may be among what is found
            careless = culnig(model, given[0], None, None, "mlp.*", **how)
        mine = found.where(pl.col("kind").is_in(["general", "specific"]))
        chance = [
            _lost(model, tests, plain, everyone.sample(like=mine, seed=seed + draw)) for draw in range(RANDOM_SETS)
        ]
        rows.append(
            {
                "share": share,
                "neurons": len(mine),
                "excluded": int((found["kind"] == "excluded").sum()),
                "lost": _lost(model, tests, plain, mine),
                "lost_without_control_and_confound": _lost(
                    model, tests, plain, careless.where(pl.col("kind").is_in(["general", "specific"])).top(len(mine))
                ),
                "lost_random": {kind: float(np.mean([each[kind] for each in chance])) for kind in tests},
                "lost_random_worst": {kind: max(each[kind] for each in chance) for kind in tests},
                "specific": _of_countries(model, tests["fact"], found),
            }
        )
    return {"neurons": len(everyone), "accuracy": plain, "silenced": rows}


# The world ------------------------------------------------------------------------------------------


def asked(kind: str, world: torch.Tensor, number: int, made: torch.Generator) -> Asked:
    """Questions of a kind: "fact", "options" (the same without the question), "reading", "larger"."""
    country, attribute = (torch.randint(size, (number,), generator=made) for size in (COUNTRIES, ATTRIBUTES))
    nothing = torch.full((number,), _NOTHING)
    if kind == "larger":
        pair = torch.rand(number, NUMBERS, generator=made).argsort(1)[:, :2]
        rows = [torch.full((number,), _WHICH), nothing, nothing, nothing, _NUMBER + pair[:, 0], _NUMBER + pair[:, 1]]
        return Asked(_rows([nothing, nothing, *rows]), _NUMBER + pair.amax(1), country.numpy())
    right = world[country, attribute]
    if kind == "reading":
        right = world[torch.randint(COUNTRIES, (number,), generator=made), attribute]
    before = [_COUNTRY + country, _ATTRIBUTE + attribute, nothing, nothing]
    if kind == "options":
        before = [nothing, nothing, nothing, nothing]
    if kind == "reading":
        before[2:] = [torch.full((number,), _SAYS), _VALUE + right]
    # The options are what the attribute is in each country: none is wrong for another reason.
    mixed = torch.rand(number, COUNTRIES, generator=made).argsort(1)
    options = world[:, attribute].T.gather(1, mixed)
    return Asked(_rows([*(_VALUE + options).T, *before]), _VALUE + right, country.numpy())


def world_of(seed: int) -> torch.Tensor:
    """`[countries, attributes]`: the value of each; of each attribute those of all countries differ."""
    made = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(VALUES, generator=made)[:COUNTRIES] for _ in range(ATTRIBUTES)], 1)


def _rows(columns: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([*columns, torch.full_like(columns[0], _MARK)], 1)


def _trained(world: torch.Tensor, seed: int) -> GPT2LMHeadModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        size: dict[str, Any] = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_inner": NEURONS, "n_positions": 16}
        plain = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        config = GPT2Config(
            vocab_size=VOCABULARY, **size, **plain, activation_function="relu", bos_token_id=0, eos_token_id=0
        )
        module = GPT2LMHeadModel(config)
    made = torch.Generator().manual_seed(seed + 2)
    active: list[torch.Tensor] = []
    blocks: Any = module.transformer.h
    handles = [block.mlp.c_proj.register_forward_pre_hook(lambda _, args: active.append(args[0])) for block in blocks]
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=0.01)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 50) * (1 - step / STEPS)
        parts = [asked(kind, world, BATCH // 3, made) for kind in ("fact", "reading", "larger")]
        ids, answers = torch.cat([each.ids for each in parts]), torch.cat([each.answers for each in parts])
        active.clear()
        loss = functional.cross_entropy(module(input_ids=ids).logits[:, -1], answers, label_smoothing=SMOOTHING)
        loss = loss + SPARSITY * sum(each.abs().mean() for each in active)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for handle in handles:
        handle.remove()
    return module.eval()


# What silencing does --------------------------------------------------------------------------------


def _right(model: pc.Model, test: Asked) -> np.ndarray:
    with torch.no_grad():
        said = model.module(input_ids=test.ids).logits[:, -1].argmax(1)
    return (said == test.answers).numpy()


def _accuracies(model: pc.Model, tests: dict[str, Asked]) -> dict[str, float]:
    return {kind: float(_right(model, test).mean()) for kind, test in tests.items()}


def _lost(model: pc.Model, tests: dict[str, Asked], plain: dict[str, float], neurons: pc.Neurons) -> dict[str, float]:
    """How many points of a hundred each accuracy loses without neurons."""
    with model.intervene(pc.ablate(neurons)):
        without = _accuracies(model, tests)
    return {kind: 100 * (plain[kind] - without[kind]) for kind in tests}


def _of_countries(model: pc.Model, test: Asked, found: pc.Neurons) -> dict[str, Any]:
    """Points that each country loses without the neurons that are specific to one: `[neurons of, country]`."""
    plain = _right(model, test)
    rows, counts = [], []
    for country in range(COUNTRIES):
        mine = found.where(pl.col("group").str.split(", ").list.contains(f"country {country}"))
        counts.append(len(mine))
        if not len(mine):
            rows.append([0.0] * COUNTRIES)
            continue
        with model.intervene(pc.ablate(mine)):
            without = _right(model, test)
        lost = [100.0 * (plain - without.astype(int))[test.countries == each].mean() for each in range(COUNTRIES)]
        rows.append([round(float(each), 1) for each in lost])
    return {"neurons": counts, "points_lost": rows}


if __name__ == "__main__":
    print(measure())
