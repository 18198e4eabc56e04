"""Interventions at positions and examples: the same as plain hooks that edit these rows, wherever the padding is."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from tests.architectures import HEADS, LAYERS, padded, tokenizer
from tests.intervene.by_hand import changing, chosen, clamped
from tests.raw import assert_same, call
from tests.zoo import CASES, SENTENCES, Case, Inputs, by_title

import patchclamp as pc
from patchclamp.errors import DataError

TEXT_CASES = [case for case in CASES if case.reads == "texts"]
HOOKED = [case for case in TEXT_CASES if "nn." not in case.title or case.title == "nn.TransformerEncoder"]
both_sides = pytest.mark.parametrize("side", ["left", "right"])
LENGTHS = [len(text.split()) for text in SENTENCES]
# What the four texts, of 6, 1, 11 and 2 tokens, all have, and what only some have.
WHERE: list[dict[str, Any]] = [
    {"positions": [0, -1]},
    {"positions": [1, 4, -2, -6], "examples": [0, 2]},
    {"examples": [3, 1]},
    {"positions": [0], "examples": [1]},
    {"positions": [-2, 1], "examples": [2, 3]},
]


@cache
def loaded(case: Case) -> pc.Model:
    """One model for all tests: each leaves it as it is."""
    return pc.load(case.build(), tokenizer=tokenizer())


def mask_for(site: pc.Site, inputs: Inputs) -> torch.Tensor:
    """The real tokens that a site sees, `[examples, columns]`."""
    decoding = "decoder_attention_mask" in inputs and site.stack != "encoder"
    return inputs["decoder_attention_mask" if decoding else "attention_mask"].bool()


def fitting(site: pc.Site, where: dict[str, Any]) -> dict[str, Any]:
    """The decoder of two stacks is given the texts in reverse."""
    if site.stack != "decoder" or "examples" not in where:
        return where
    return where | {"examples": [len(SENTENCES) - 1 - row for row in where["examples"]]}


def hookable(model: pc.Model, layer: int = 0) -> list[pc.Site]:
    return [site for site in model.sites.values() if site.through in ("module", "experts") and site.layer == layer]


@torch.no_grad()
def run(model: pc.Model, inputs: Inputs, *interventions: Any) -> torch.Tensor:
    """The network's own output under interventions."""
    with model.intervene(*interventions):
        return call(model.module, inputs)


@torch.no_grad()
def by_hand(model: pc.Model, inputs: Inputs, sites: Sequence[pc.Site], where: dict[str, Any]) -> torch.Tensor:
    """The output where plain hooks hold two neurons at 2.5."""
    changes = {site: clamped([0, 3], 2.5) for site in sites}
    with changing(model.module, changes, lambda site: chosen(mask_for(site, inputs), **where)) as calls:
        output = call(model.module, inputs)
    assert set(calls) == {site.name for site in sites}
    return output


def held(*sites: pc.Site, **where: Any) -> Any:
    return pc.clamp(pc.Neurons({site.name: [0, 3] for site in sites}), 2.5, **where)


# Every architecture -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", HOOKED, ids=str)
@both_sides
def test_only_these_rows_are_edited(case: Case, side: str) -> None:
    model, inputs = loaded(case), case.inputs(side)
    plain, differ = run(model, inputs), 0
    for number, site in enumerate(hookable(model)):
        where = fitting(site, WHERE[(number + (side == "left")) % len(WHERE)])
        got = run(model, inputs, held(site, **where))
        assert_same(got, by_hand(model, inputs, [site], where))
        differ += not torch.allclose(got, plain, rtol=1e-3)
    assert differ >= 3


@pytest.mark.slow
@pytest.mark.parametrize("case", HOOKED, ids=str)
@both_sides
@pytest.mark.parametrize("where", WHERE, ids=str)
def test_only_these_rows_are_edited_at_every_site(case: Case, side: str, where: dict[str, Any]) -> None:
    model, inputs = loaded(case), case.inputs(side)
    for layer in range(LAYERS):
        for site in hookable(model, layer):
            there = fitting(site, where)
            assert_same(run(model, inputs, held(site, **there)), by_hand(model, inputs, [site], there))


def single(inputs: Inputs, row: int) -> Inputs:
    """One example without its padding, which is on the right."""
    found = {}
    for name, value in inputs.items():
        mask = inputs["decoder_attention_mask" if name.startswith("decoder_") else "attention_mask"]
        found[name] = value[row : row + 1, : int(mask[row].sum())]
    return found


@pytest.mark.parametrize("case", TEXT_CASES, ids=str)
def test_a_batch_padded_on_either_side_says_what_single_texts_say(case: Case) -> None:
    model, right = loaded(case), case.inputs("right")
    sites = [site for site in model.sites.values() if site.kind not in ("resid_post", "gate") and site.layer == 0]
    # Heads that look at padding would give what texts alone do not have.
    heads = pc.Neurons({site.name: [1] for site in sites if site.kind == "pattern"})
    others = pc.Neurons({site.name: [1] for site in sites if site.kind != "pattern"})
    changes = [pc.clamp(others, 1.5, positions=[0, -1]), pc.scale(heads, -2.0, positions="prompt")]
    changes.append(pc.scale(pc.Neurons({sites[0].name: [2]}), -3.0, positions=[-1]))
    alone = [run(model, single(right, row), *changes)[0] for row in range(len(SENTENCES))]
    packed = any(site.kind == "recurrent" for site in sites)  # a network that packs reads from the left edge
    for side in ["right"] if packed else ["left", "right"]:
        inputs = case.inputs(side)
        mask = inputs.get("decoder_attention_mask", inputs["attention_mask"]).bool()
        together, plain = run(model, inputs, *changes), run(model, inputs)
        for row, expected in enumerate(alone):
            assert_same(together[row][mask[row]], expected)
            assert not torch.allclose(plain[row][mask[row]], expected, rtol=1e-3)


# Generating -------------------------------------------------------------------------------------------

PROMPTS = ["the cat sat on a mat", "two dogs"]
GENERATED: list[Any] = [[2, -1, 8], "prompt", "generated"]
NEW = 4
STOP = 3


def in_text(mask: torch.Tensor, prompt: int, positions: Any) -> torch.Tensor:
    """`[examples, columns]`, written out column by column: which of a text so far are at the positions."""
    wanted = torch.zeros(mask.shape, dtype=torch.bool)
    for row in range(len(mask)):
        ends, number = int(mask[row, :prompt].sum()), -1
        for column in range(mask.shape[1]):
            if not mask[row, column]:
                continue
            number += 1
            if positions == "prompt":
                wanted[row, column] = column < prompt
            elif positions == "generated":
                wanted[row, column] = column >= prompt
            else:
                wanted[row, column] = number in [each if each >= 0 else ends + each for each in positions]
    return wanted


@torch.no_grad()
def scores_by_hand(model: pc.Model, sites: Sequence[pc.Site], positions: Any) -> torch.Tensor:
    """Logits of each new token, from forward passes over the whole text so far, without a cache and with hooks."""
    inputs = padded(PROMPTS, "left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    two = model.is_encoder_decoder
    text, real = (torch.full((2, 1), 1), torch.ones(2, 1)) if two else (ids, mask)
    prompt, found = text.shape[1], []
    changes = {site: clamped([0, 3], 2.5) for site in sites}
    for _ in range(NEW):
        given = {"input_ids": ids, "attention_mask": mask} | ({"decoder_input_ids": text} if two else {})
        if not two:
            numbers = {"position_ids": (real.cumsum(1) - 1).clamp(min=0)}
            takes = "position_ids" in inspect.signature(type(model.module).forward).parameters
            given = {"input_ids": text, "attention_mask": real} | (numbers if takes else {})

        text_rows, encoder_rows = in_text(real, prompt, positions), in_text(mask, mask.shape[1], positions)
        rows = {site.name: encoder_rows if site.stack == "encoder" else text_rows for site in sites}
        with changing(model.module, changes, lambda site, rows=rows: rows[site.name]):
            logits = model.module(**given).logits[:, -1].clone()
        logits[:, STOP] = 0.0
        found.append(logits)
        best = logits.masked_fill(torch.arange(logits.shape[1]) == STOP, -torch.inf).argmax(-1, keepdim=True)
        text, real = torch.cat([text, best], 1), torch.cat([real, torch.ones(2, 1, dtype=real.dtype)], 1)
    return torch.stack(found)


def scores(model: pc.Model, prompts: Sequence[str] = PROMPTS, **options: Any) -> torch.Tensor:
    """Logits of each new token, `[new, examples, vocabulary]`, as `generate` gives them."""
    inputs = padded(prompts, "left")
    inputs.pop("position_ids")
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False} | options
    output: Any = model.module.generate(  # type: ignore[operator]
        **inputs, **options, eos_token_id=STOP, pad_token_id=1, output_scores=True, return_dict_in_generate=True
    )
    return torch.stack(output.scores).nan_to_num(neginf=0.0)


def to_steer(model: pc.Model) -> list[pc.Site]:
    """Sites of the first and the last layer of what generates."""
    stack = "decoder" if model.is_encoder_decoder else ""
    there = [site for site in model.sites.values() if site.stack == stack and site.through in ("module", "experts")]
    first = next(site for site in there if site.kind in ("attn", "mixer"))
    last = [site for site in there if site.kind in ("mlp", "mixer", "expert") and site.layer == LAYERS - 1]
    return [first, *last[:3]]


@pytest.mark.parametrize("case", [case for case in CASES if case.generates], ids=str)
def test_generating_with_and_without_a_cache_is_a_loop_of_forwards(case: Case) -> None:
    model = loaded(case)
    sites, plain = to_steer(model), scores(model)
    for positions in GENERATED:
        check_generating(model, sites, positions, plain)


def check_generating(model: pc.Model, sites: Sequence[pc.Site], positions: Any, plain: torch.Tensor) -> None:
    with model.intervene(held(*sites, positions=positions)):
        cached, uncached = scores(model), scores(model, use_cache=False)
    expected = scores_by_hand(model, sites, positions)
    assert_same(cached, expected)
    assert_same(uncached, expected)
    assert not torch.allclose(expected, plain, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.generates], ids=str)
@pytest.mark.parametrize("positions", [[0], [-1], [-2, 1], [3, 6], range(9)], ids=str)
def test_generating_at_more_positions_and_sites(case: Case, positions: Any) -> None:
    model = loaded(case)
    if model.is_encoder_decoder and -2 in positions:
        return  # the prompt of a decoder is one token
    stack, plain = "decoder" if model.is_encoder_decoder else "", scores(model)
    for site in model.sites.values():
        if site.stack == stack and site.through in ("module", "experts"):
            with model.intervene(held(site, positions=positions)):
                cached, uncached = scores(model), scores(model, use_cache=False)
            expected = scores_by_hand(model, [site], positions)
            assert_same(cached, expected)
            assert_same(uncached, expected)
    check_generating(model, to_steer(model), positions, plain)


@pytest.mark.parametrize("title", ["T5", "T5, gated"])
@pytest.mark.parametrize("positions", [[0, -1], "prompt"], ids=str)
def test_an_encoder_that_generate_calls_by_itself(title: str, positions: Any) -> None:
    model = loaded(by_title(title))
    sites = [model.site("encoder.mlp.0"), model.site("encoder.resid_pre.1"), model.site("encoder.attn.1")]
    expected = scores_by_hand(model, sites, positions)
    with model.intervene(held(*sites, positions=positions)):
        assert_same(scores(model), expected)
        assert_same(scores(model, use_cache=False), expected)
    with model.intervene(held(*sites, positions="generated")):
        generated = scores(model)
    assert torch.equal(generated, scores(model))
    with (
        pytest.raises(DataError, match=r"there is no position 2 at encoder\.mlp\.0; there are 2"),
        model.intervene(held(sites[0], positions=[2])),
    ):
        scores(model)


@pytest.mark.parametrize("title", ["GPT-2", "Mistral", "BLOOM", "Mixtral", "Qwen2-MoE", "T5"])
def test_a_cache_of_fixed_size_hides_no_padding(title: str) -> None:
    model = loaded(by_title(title))
    sites = to_steer(model)
    for positions in GENERATED:
        with model.intervene(held(*sites, positions=positions)):
            got = scores(model, cache_implementation="static", disable_compile=True)
        assert_same(got, scores_by_hand(model, sites, positions))


def test_one_text_after_the_other_and_a_cache_that_is_kept() -> None:
    model = loaded(by_title("Llama"))
    site = model.site("mlp.1")
    for options in ({}, {"use_cache": False}):
        with model.intervene(held(site, positions="generated")):
            first, second = scores(model, PROMPTS, **options), scores(model, PROMPTS[::-1], **options)
            again = scores(model, PROMPTS, **options)
        assert torch.equal(first, again)
        assert_same(second.flip(1), first)
    # Another text, by chance one token longer than the first has become, does not go on with it.
    longer = ["two dogs ran home and they stayed in all day", "it sat"]
    with model.intervene(held(site, positions="generated")):
        scores(model, PROMPTS, use_cache=False)
        assert_same(scores(model, longer, use_cache=False), scores(model, longer))
    # A second turn, whose question is given beside the cache of the first: it is prompt, and so is its end.
    ids = torch.tensor([[4, 5, 6, 7, 8, 9]])
    for positions, columns in (([-1], [3, 5]), ([5], [5])):
        with torch.no_grad(), model.intervene(held(site, positions=positions)):
            kept = model.module(input_ids=ids[:, :4], use_cache=True).past_key_values
            second = model.module(input_ids=ids[:, 4:], past_key_values=kept).logits
        rows = torch.isin(torch.arange(6), torch.tensor(columns))[None]
        with torch.no_grad(), changing(model.module, {site: clamped([0, 3], 2.5)}, lambda _, rows=rows: rows):
            expected = model.module(input_ids=ids).logits
        assert_same(second, expected[:, 4:])
        assert not torch.allclose(second, run(model, {"input_ids": ids})[:, 4:], rtol=1e-3)


# Experts, patterns, images ----------------------------------------------------------------------------


@pytest.mark.parametrize("title", ["Mixtral", "Qwen2-MoE", "DeepSeek-V3"])
def test_experts_of_a_network_that_is_given_no_mask(title: str) -> None:
    model = loaded(by_title(title))
    ids = by_title(title).inputs("right")["input_ids"][:, :5]
    sites = [site for site in model.sites.values() if site.kind == "expert"]
    mask = torch.ones_like(ids, dtype=torch.bool)
    for where in ({"positions": [3, -1]}, {"examples": [2]}, {"positions": [0], "examples": [0, 3]}):
        rows, changes = chosen(mask, **where), {each: clamped([0, 3], 2.5) for each in sites}
        with torch.no_grad(), changing(model.module, changes, lambda _, rows=rows: rows):
            expected = model.module(ids)[0]
        got = run(model, {"input_ids": ids}, held(*sites, **where))
        assert_same(got, expected)
        assert not torch.allclose(got, run(model, {"input_ids": ids}), rtol=1e-3)


@pytest.mark.parametrize("title", ["GPT-2", "Llama", "BERT", "BLOOM", "DeepSeek-V3", "T5"])
@both_sides
def test_the_positions_of_a_pattern_are_its_queries(title: str, side: str) -> None:
    """A head whose probabilities are doubled in some queries writes twice as much there."""
    model, inputs = loaded(by_title(title)), by_title(title).inputs(side)
    prefix = "encoder." if title == "T5" else ""
    attention = model.site(f"{prefix}attn.1")
    width = (attention.size or 0) // HEADS
    there = list(range(width, 2 * width))

    def doubled(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed[..., there] *= 2.0
        return changed

    for where in WHERE:
        got = run(model, inputs, pc.scale(pc.Neurons({f"{prefix}pattern.1": [1]}), 2.0, **where))
        rows = chosen(mask_for(attention, inputs), **where)
        with torch.no_grad(), changing(model.module, {attention: doubled}, lambda _, rows=rows: rows):
            assert_same(got, call(model.module, inputs))


@pytest.mark.parametrize("title", ["ViT", "CLIP", "ResNet", "ConvNeXt", "CNN in plain torch"])
def test_examples_and_patches_of_images(title: str) -> None:
    model, inputs = loaded(by_title(title)), by_title(title).inputs("right")
    for site in model.sites.values():
        if site.through != "module" or site.stack == "text" or site.layer not in (0, None):
            continue
        tokens = site.axis == -1 and title in ("ViT", "CLIP")
        expected = {}
        for name, where in (("examples", {"examples": [1]}), ("both", {"positions": [0, -1, 2], "examples": [2, 0]})):
            if name == "both" and not tokens:
                continue
            patches = torch.ones(len(next(iter(inputs.values()))), 5 if tokens else 1, dtype=torch.bool)
            rows = chosen(patches, **where)
            with torch.no_grad(), changing(model.module, {site: clamped([0, 3], 2.5)}, lambda _, rows=rows: rows):
                expected[name] = all_of(model.module(**inputs))
            with torch.no_grad(), model.intervene(held(site, **where)):
                assert_same(all_of(model.module(**inputs)), expected[name])
        if not tokens:
            with (
                pytest.raises(DataError, match="has no positions to choose from: its "),
                model.intervene(held(site, positions=[0])),
            ):
                model.module(**inputs)


def all_of(output: Any) -> torch.Tensor:
    """Every tensor that a network returned, in one row."""
    if isinstance(output, torch.Tensor):
        return output.flatten()
    values = output.values() if hasattr(output, "values") else output
    return torch.cat([all_of(each) for each in values if each is not None and not isinstance(each, (int, str))])
