"""Interventions at positions: what is refused and why, odd calls, gradients, training."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from tests.architectures import BERT, GPT2, LAYERS, LLAMA, OPT, SEQUENTIAL, T5, Architecture, bert, gpt_neox, tokenizer
from tests.intervene.by_hand import changing, chosen, clamped
from tests.raw import assert_same, call, hooks_of
from tests.zoo import Case, by_title
from torch import nn

import patchclamp as pc
from patchclamp.errors import DataError


@cache
def loaded(architecture: Architecture) -> pc.Model:
    return pc.load(architecture.build(), tokenizer=tokenizer())


def held(site: str, *where: Any, **more: Any) -> Any:
    return pc.clamp(pc.Neurons({site: [0, 3]}), 2.5, *where, **more)


@torch.no_grad()
def run(model: pc.Model, inputs: dict[str, Any], *interventions: Any) -> torch.Tensor:
    with model.intervene(*interventions):
        return call(model.module, inputs)


@torch.no_grad()
def by_hand(model: pc.Model, inputs: dict[str, Any], site: str, rows: torch.Tensor) -> torch.Tensor:
    with changing(model.module, {model.site(site): clamped([0, 3], 2.5)}, lambda _: rows):
        return call(model.module, inputs)


# What is not there ------------------------------------------------------------------------------------


def test_positions_and_examples_that_are_not_there() -> None:
    model, inputs = loaded(GPT2), GPT2.inputs("left")  # texts of 6, 1, 11 and 2 tokens
    for where, message in (
        ({"positions": [1]}, r"there is no position 1 at mlp\.0; there are 1"),
        ({"positions": [-2]}, r"there is no position -2 at mlp\.0; there are 1"),
        ({"positions": [6], "examples": [2, 0]}, r"there is no position 6 at mlp\.0; there are 6"),
        ({"positions": [11], "examples": [2]}, r"there is no position 11 at mlp\.0; there are 11"),
        ({"examples": [4]}, r"example 4 is not there: the batch has 4"),
    ):
        with pytest.raises(DataError, match=message):
            run(model, inputs, held("mlp.0", **where))
    # Only the texts that are chosen have to have them.
    rows = chosen(inputs["attention_mask"].bool(), [10, 1], [2])
    assert_same(
        run(model, inputs, held("mlp.0", positions=[10, 1], examples=[2])), by_hand(model, inputs, "mlp.0", rows)
    )
    assert torch.equal(run(model, inputs, held("mlp.0", positions=[])), run(model, inputs))
    assert torch.equal(run(model, inputs, held("mlp.0", examples=[])), run(model, inputs))
    assert torch.equal(run(model, inputs, held("mlp.0", positions="generated")), run(model, inputs))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_never_edited(side: str) -> None:
    model, inputs = loaded(GPT2), GPT2.inputs(side)
    mask = inputs["attention_mask"].bool()
    for site in ("resid_pre.0", "mlp.0", "attn.0"):
        before = model.activations(inputs, site).clone()
        for positions in ("prompt", [0, -1], range(-1, 1)):
            with model.intervene(held(site, positions=positions)):
                inside = model.activations(inputs, site).clone()
            assert torch.equal(inside[~mask], before[~mask]) and not torch.equal(inside[mask], before[mask])
    assert (~mask).any()


def test_what_says_neither_position_nor_example() -> None:
    neurons, source = pc.Neurons({"mlp.0": [1]}), {"mlp.0": torch.zeros(3, 24)}
    directions = pc.Directions({"mlp.0": np.ones(24)})
    makers: list[tuple[str, Any]] = [
        ("ablate", lambda **where: pc.ablate(neurons, **where)),
        ("ablate", lambda **where: pc.ablate(neurons, "resample", source=source, **where)),
        ("clamp", lambda **where: pc.clamp(neurons, 1.0, **where)),
        ("scale", lambda **where: pc.scale(neurons, 2.0, **where)),
        ("patch", lambda **where: pc.patch("mlp.0", source, **where)),
        ("steer", lambda **where: pc.steer(directions, **where)),
    ]
    for name, make in makers:
        for where, message in (
            ({"positions": 3}, r"\(positions=\.\.\.\) is a list of token indices, not 3"),
            ({"positions": [1.0]}, r"\(positions=\.\.\.\) is a list of token indices, not \[1\.0\]"),
            ({"positions": "last"}, r'\(positions=\.\.\.\) is "prompt", "generated" or token indices, not \'last\''),
            ({"positions": [True]}, r"\(positions=\.\.\.\) is a list of token indices, not \[True\]"),
            ({"positions": np.array([True, False])}, r"\(positions=\.\.\.\) is a list of token indices, not"),
            ({"examples": 0}, r"\(examples=\.\.\.\) is a list of the rows of a batch, not 0"),
            ({"examples": "all"}, r"\(examples=\.\.\.\) is a list of the rows of a batch, not 'all'"),
            ({"examples": [0, -1]}, r"\(examples=\.\.\.\) counts the rows of a batch from 0, not -1"),
        ):
            with pytest.raises(DataError, match=name + message):
                make(**where)
        assert make(positions=np.array([1, -1])) == make(positions=(1, -1)) != make(positions=[1])
        assert make(examples=range(2)) == make(examples=[0, 1]) != make()
        assert make(positions=torch.tensor([2])) == make(positions=[2])


def test_what_has_no_positions() -> None:
    model, inputs = loaded(BERT), BERT.inputs("left")
    for site in ("module:pooler", "module:pooler.dense"):
        with (
            pytest.raises(DataError, match=rf"{site} has no positions to choose from: its tensor here is \[4, 16\]"),
            model.intervene(pc.clamp(pc.Neurons({site: [0]}), 2.5, positions=[0])),
        ):
            model.module(**inputs)
        with torch.no_grad(), model.intervene(pc.clamp(pc.Neurons({site: [0]}), 0.5, examples=[1])):
            pooled = model.module(**inputs).pooler_output
        assert ((pooled - model.module(**inputs).pooler_output) != 0).any(1).tolist() == [False, True, False, False]
    plain, x = loaded(SEQUENTIAL), SEQUENTIAL.inputs()
    expected = run(plain, x, held("mlp.0"))
    expected[[0, 2, 4]] = run(plain, x)[[0, 2, 4]]
    assert_same(run(plain, x, held("mlp.0", examples=[3, 1])), expected)
    with pytest.raises(DataError, match=r"mlp\.0 has no positions to choose from: its tensor here is \[5, 10\]"):
        run(plain, x, held("mlp.0", positions=[0]))


# Odd calls --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [BERT, GPT2, OPT], ids=str)
def test_masks_by_keyword_in_order_and_of_another_shape(architecture: Architecture) -> None:
    model, inputs = loaded(architecture), architecture.inputs("left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    change, rows = held("mlp.1", positions=[0]), chosen(mask.bool(), [0])
    module: Any = model.module
    order = [ids, mask] if architecture is not GPT2 else [ids, None, mask]  # GPT-2 takes its cache second
    with torch.no_grad(), model.intervene(change):
        assert torch.equal(module(*order)[0], module(input_ids=ids, attention_mask=mask)[0])
    plain = {"input_ids": ids, "attention_mask": mask}
    assert_same(run(model, plain, change), by_hand(model, plain, "mlp.1", rows))
    # Without a mask every column is a token.
    rows = torch.zeros_like(mask, dtype=torch.bool)
    rows[:, 0] = True
    assert_same(run(model, {"input_ids": ids}, change), by_hand(model, {"input_ids": ids}, "mlp.1", rows))
    allowed = torch.ones(4, 1, 11, 11, dtype=torch.bool).tril()
    if architecture is not OPT:  # which takes no such mask
        with pytest.raises(
            DataError, match=r"which tokens are real is not known: the attention mask is \[4, 1, 11, 11"
        ):
            run(model, {"input_ids": ids, "attention_mask": allowed}, change)
    embeds = module.get_input_embeddings()(ids).detach()
    given = {"inputs_embeds": embeds, "attention_mask": mask}
    rows = chosen(mask.bool(), [0])
    assert_same(run(model, given, change), by_hand(model, given, "mlp.1", rows))


def test_a_decoder_that_makes_its_own_inputs_has_no_mask_of_the_encoder() -> None:
    model, inputs = loaded(T5), T5.inputs("left")
    labels = torch.full((4, 5), 7)
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")} | {"labels": labels}
    rows = torch.zeros(4, 5, dtype=torch.bool)
    rows[:, [1, 4]] = True
    site = "decoder.mlp.1"

    def logits(*changes: Any) -> torch.Tensor:
        with torch.no_grad(), model.intervene(*changes):
            return model.module(**given).logits

    with torch.no_grad(), changing(model.module, {model.site(site): clamped([0, 3], 2.5)}, lambda _: rows):
        expected = model.module(**given).logits
    assert_same(logits(held(site, positions=[1, -1])), expected)
    mask = inputs["attention_mask"].bool()
    with changing(model.module, {model.site("encoder.mlp.1"): clamped([0, 3], 2.5)}, lambda _: chosen(mask, [0])):
        expected = model.module(**given).logits.detach()
    assert_same(logits(held("encoder.mlp.1", positions=[0])), expected)


def test_targets_are_no_tokens() -> None:
    class Regression(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return self.second(torch.relu(self.first(x))) - targets[:, :1, None]

    module = Regression()
    model, x, targets = pc.load(module), torch.randn(2, 5, 3), torch.ones(2, 3, dtype=torch.int64)
    rows = torch.zeros(2, 5, dtype=torch.bool)
    rows[:, [1, 4]] = True
    with torch.no_grad(), model.intervene(held("mlp.0", positions=[1, -1])):
        got = module(x, targets)
    with torch.no_grad(), changing(module, {model.site("mlp.0"): clamped([0, 3], 2.5)}, lambda _: rows):
        assert_same(got, module(x, targets))


def test_a_compiled_network() -> None:
    module = GPT2.build()
    model, inputs = pc.load(module, tokenizer=tokenizer()), GPT2.inputs("left")
    compiled: Any = torch.compile(module, backend="eager")
    with torch.no_grad(), model.intervene(held("mlp.0", positions=[0])):
        got = call(compiled, inputs)
    assert_same(got, by_hand(model, inputs, "mlp.0", chosen(inputs["attention_mask"].bool(), [0])))


def test_an_mlp_that_is_computed_in_pieces() -> None:
    module = bert(chunk_size_feed_forward=3).eval()
    whole = bert().eval()
    whole.load_state_dict(module.state_dict())
    model, other = pc.load(module), pc.load(whole)
    ids = BERT.inputs("left")["input_ids"][:, -9:]
    mask = BERT.inputs("left")["attention_mask"][:, -9:]
    for where in ({"positions": [0, -1]}, {"positions": [4, -6], "examples": [0, 2]}, {"examples": [1]}):
        for given in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": ids}):
            if "positions" in where and "attention_mask" not in given:
                where = where | {"examples": [0, 2]}
            with torch.no_grad(), model.intervene(held("mlp.0", **where)):
                call(model.module, given)
                got = call(model.module, given)  # each call begins anew
            assert_same(got, run(other, given, held("mlp.0", **where)))
            rows = chosen(given.get("attention_mask", torch.ones_like(ids)).bool(), **where)
            assert_same(got, by_hand(other, given, "mlp.0", rows))


def test_a_part_that_is_called_by_itself() -> None:
    model = loaded(BERT)
    block: Any = model.module.get_submodule("encoder.layer.0")
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    for where in ({"positions": [0]}, {"examples": [1]}):
        with (
            pytest.raises(DataError, match=r"mlp\.0 is in a part of the network that was called by itself"),
            model.intervene(held("mlp.0", **where)),
        ):
            call(model.module, BERT.inputs())  # the call before is over
            block(x)
    t5 = loaded(T5)
    encoder: Any = t5.module.get_encoder()  # type: ignore[operator]
    inputs = {name: T5.inputs("left")[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad(), t5.intervene(held("encoder.mlp.0", positions=[0])):
        got = encoder(**inputs)[0]
        assert torch.equal(got, encoder(inputs["input_ids"], inputs["attention_mask"])[0])
        with pytest.raises(DataError, match="is in a part of the network that was called by itself"):
            encoder.block[0].layer[1](torch.randn(2, 3, 16))
    site = t5.site("encoder.mlp.0")
    rows = chosen(inputs["attention_mask"].bool(), [0])
    with torch.no_grad(), changing(t5.module, {site: clamped([0, 3], 2.5)}, lambda _: rows):
        assert_same(got, encoder(**inputs)[0])


def test_rows_and_positions_that_are_not_those_of_the_batch() -> None:
    class Folding(nn.Module):
        """Halves the examples, or the positions, between two projections."""

        def __init__(self, half: int) -> None:
            super().__init__()
            self.table, self.first, self.second = nn.Embedding(9, 4), nn.Linear(4, 6), nn.Linear(6, 2)
            self.along = half

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            hidden = self.first(self.table(input_ids))
            return self.second(hidden[:, ::2] if self.along else hidden[::2])

    ids = torch.arange(8).view(2, 4)
    for half, message in (
        (0, "shows 1 rows of a batch of 2 examples"),
        (1, "shows 2 positions, and each example has 4"),
    ):
        model = pc.load(Folding(half))
        site = pc.Site.custom("second", "input")
        with pytest.raises(DataError, match=message), model.intervene(held(site.name, positions=[0])):
            model.module(ids)
    with model.intervene(held(pc.Site.custom("second", "input").name, examples=[1])):
        model.module(ids)  # examples are told apart all the same


def test_a_network_whose_modules_are_called_on_every_token_at_once() -> None:
    model, inputs = loaded(OPT), OPT.inputs("left")
    for site in ("mlp.0", "resid_mid.1"):
        for where in ({"positions": [-1]}, {"examples": [0, 1]}, {"positions": [3], "examples": [2]}):
            rows = chosen(inputs["attention_mask"].bool(), **where)
            assert_same(run(model, inputs, held(site, **where)), by_hand(model, inputs, site, rows))


def test_the_same_in_a_wrapper_of_the_users_own() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = gpt_neox(False), nn.Linear(16, 3)

        def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(input_ids=ids, attention_mask=attention_mask)[0])

    module = Classifier().eval()
    model, inputs = pc.load(module), GPT2.inputs("left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    site = model.site("mlp.1")
    with torch.no_grad(), model.intervene(held(site.name, positions=[0])):
        got = module(ids, mask)
    with torch.no_grad(), changing(module, {site: clamped([0, 3], 2.5)}, lambda _: chosen(mask.bool(), [0])):
        assert_same(got, module(ids, mask))


# Gradients and training -------------------------------------------------------------------------------


GRADIENTS = ["GPT-2", "Llama", "OPT", "T5", "Mixtral", "Mamba", "BERT"]


@pytest.mark.parametrize("title", GRADIENTS)
def test_gradients_are_those_of_the_edited_tensor(title: str) -> None:
    case: Case = by_title(title)
    model, inputs = pc.load(case.build()), case.inputs("left")
    stack = "encoder" if title == "T5" else ""
    sites = [
        site for site in model.sites.values() if site.stack == stack and site.layer == 1 and site.kind != "pattern"
    ]
    mask = inputs["attention_mask"].bool()
    parameters = list(model.module.parameters())
    factors = {site.name: [1, 2] for site in sites}

    def scaled(tensor: torch.Tensor) -> torch.Tensor:
        factor = torch.ones(tensor.shape[-1])
        factor[[1, 2]] = -1.5
        return tensor * factor

    with model.intervene(pc.scale(pc.Neurons(factors), -1.5, positions=[0, -1])):
        got = torch.autograd.grad(call(model.module, inputs).square().mean(), parameters, allow_unused=True)
    with changing(model.module, {site: scaled for site in sites}, lambda _: chosen(mask, [0, -1])):
        expected = torch.autograd.grad(call(model.module, inputs).square().mean(), parameters, allow_unused=True)
    plain = torch.autograd.grad(call(model.module, inputs).square().mean(), parameters, allow_unused=True)
    differ = 0
    for mine, theirs, other in zip(got, expected, plain, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None and other is not None:
            assert_same(mine, theirs)
            differ += not torch.allclose(mine, other, rtol=1e-3)
    assert differ > 3


def test_training_goes_on_as_it_was() -> None:
    module = bert(hidden_dropout_prob=0.3).train()
    module.get_submodule("pooler").eval()
    model, inputs = pc.load(module), BERT.inputs("left")
    modes, hooks = [each.training for each in module.modules()], hooks_of(module)
    module.get_submodule("embeddings").requires_grad_(False)
    trained = [each.requires_grad for each in module.parameters()]
    rows = chosen(inputs["attention_mask"].bool(), [0])
    torch.manual_seed(5)
    with model.intervene(held("mlp.0", positions=[0])):
        got = call(module, inputs)
        assert [each.training for each in module.modules()] == modes
    torch.manual_seed(5)
    with changing(module, {model.site("mlp.0"): clamped([0, 3], 2.5)}, lambda _: rows):
        assert_same(got.detach(), call(module, inputs).detach())
    assert got.requires_grad and [each.requires_grad for each in module.parameters()] == trained
    assert [each.training for each in module.modules()] == modes and hooks_of(module) == hooks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_half(dtype: torch.dtype) -> None:
    for architecture, kind in itertools.product((GPT2, LLAMA), ("mlp", "resid_mid", "pattern")):
        model = pc.load(architecture.build(dtype))
        inputs = architecture.inputs("left", dtype)
        for layer in range(LAYERS):
            site = f"{kind}.{layer}"
            before = model.activations(inputs, site).clone()
            with model.intervene(pc.scale(pc.Neurons({site: [1]}), 0.5, positions=[0])):
                inside = model.activations(inputs, site).clone()
            axis = 1 if kind == "pattern" else -1
            rows = chosen(inputs["attention_mask"].bool(), [0])
            expected = before.movedim(axis, -1).clone()
            expected[..., 1][rows] *= 0.5
            assert inside.dtype == dtype
            if layer == 0:  # the next sees what the first has changed
                assert torch.equal(inside.movedim(axis, -1), expected)
