"""Recording and intervening on every architecture: batches change nothing, padding changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from tests.architectures import tokenizer
from tests.raw import hooks_of
from tests.zoo import CASES, SENTENCES, Case, by_title
from torch import nn

import patchclamp as pc
from patchclamp.errors import ModelError

TEXT_CASES = [case for case in CASES if case.reads == "texts"]
OTHER_CASES = [case for case in CASES if case.reads != "texts"]
texts_of = pytest.mark.parametrize("case", TEXT_CASES, ids=str)
both_sides = pytest.mark.parametrize("side", ["left", "right"])
# Of one token, too; and enough of them for several batches.
TEXTS = [*SENTENCES, "they stayed home", "a dogs it in"]
SUMMARIES = [pc.Moments, pc.MinMax, pc.FiringRate, pc.TopExamples(3)]


@cache
def loaded(case: Case, side: str = "right") -> pc.Model:
    """One model for all tests that leave it as it is."""
    return pc.load(case.build(), tokenizer=tokenizer(side=side))


def recordable(model: pc.Model) -> list[pc.Site]:
    return [site for site in model.sites.values() if site.kind != "pattern"]


def recorded(model: pc.Model, data: Any, batch_tokens: int = 4096, **options: Any) -> pc.Recording:
    return pc.record(model, data, recordable(model), SUMMARIES, batch_tokens=batch_tokens, progress=False, **options)


def assert_alike(one: pc.Recording, other: pc.Recording) -> None:
    """The same counts, means to 1e-4 of the neuron's spread, the same top examples."""
    assert list(one) == list(other)
    for name in one:
        mine, theirs = one[name], other[name]
        assert (mine.count, mine.passed) == (theirs.count, theirs.passed)
        scale = max(float(np.nan_to_num(np.abs(theirs.min_max.max)).max()), 1e-30) if theirs.count else 1.0
        np.testing.assert_allclose(mine.moments.mean, theirs.moments.mean, rtol=1e-4, atol=1e-4 * scale)
        np.testing.assert_allclose(mine.min_max.max, theirs.min_max.max, rtol=1e-3, atol=1e-4 * scale)
        top, other_top = mine.top_examples, theirs.top_examples
        differ = (top.example != other_top.example) | (top.position != other_top.position)
        # Where two activations are equal to rounding, either may come first.
        gap = np.abs(top.values - other_top.values)
        assert not (differ & ~(gap <= 1e-4 * scale)).any(), name


@texts_of
@both_sides
def test_padded_batches_say_what_single_texts_say(case: Case, side: str) -> None:
    model = loaded(case, side)
    before = hooks_of(model.module)
    together = recorded(model, TEXTS, batch_tokens=24)
    assert_alike(together, recorded(model, TEXTS, batch_tokens=1))
    for name in together:
        site = together[name].site
        # Independent of recording: one text at a time, as the notebook helper reads it.
        rows = [model.activations(text, site) for text in TEXTS] if site.stack != "decoder" else None
        if rows is not None:
            every = torch.cat([each.reshape(-1, each.shape[-1]).double() for each in rows]).numpy()
            assert len(every) == together[name].count
            scale = max(float(np.abs(every).max(initial=0)), 1e-30)
            mean = every.mean(0) if len(every) else np.full(every.shape[1], np.nan)
            np.testing.assert_allclose(together[name].moments.mean, mean, rtol=1e-4, atol=1e-4 * scale)
            best = np.sort(every, axis=0)[::-1][:3].T
            np.testing.assert_allclose(together[name].top_examples.values[:, : best.shape[1]], best, atol=1e-4 * scale)
    assert hooks_of(model.module) == before


@texts_of
def test_two_halves_merge_into_the_whole(case: Case) -> None:
    model = loaded(case)
    whole, first, second = (recorded(model, part) for part in (TEXTS, TEXTS[:4], TEXTS[4:]))
    for name in whole:
        for summary in ("moments", "firing_rate"):
            merged = copy.deepcopy(first[name].summaries[summary])
            merged.merge(second[name].summaries[summary])
            for key, value in merged.state().items():
                expected = whole[name].summaries[summary].state()[key]
                np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-3)


@texts_of
@both_sides
def test_interventions_do_the_same_in_a_batch_and_alone(case: Case, side: str) -> None:
    model = loaded(case, side)
    kinds = ("mlp", "mixer", "expert", "recurrent", "attn")
    sites = [site for site in recordable(model) if site.kind in kinds and site.layer in (0, None)]
    silent, held, louder = (pc.Neurons({site.name: [index] for site in sites}) for index in range(3))
    with model.intervene(pc.ablate(silent), pc.clamp(held, 0.7), pc.scale(louder, -2.0)):
        together, alone = (pc.record(model, TEXTS, sites, SUMMARIES, batch_tokens=n, progress=False) for n in (40, 1))
    assert_alike(together, alone)
    plain = pc.record(model, TEXTS, sites, SUMMARIES, progress=False)
    changed = 0
    for site in sites:
        lowest, highest = together[site.name].min_max.min, together[site.name].min_max.max
        if together[site.name].count and plain[site.name].count:
            assert lowest[0] == highest[0] == 0.0 and plain[site.name].min_max.max[0] != 0.0
            np.testing.assert_allclose([lowest[1], highest[1]], 0.7, rtol=1e-6)
            changed += 1
    assert changed
    first = next(site for site in sites if together[site.name].count)
    if first.kind != "recurrent":  # a unit feeds back on itself; elsewhere nothing before it has changed
        expected = -2.0 * plain[first.name].moments.mean[2]
        assert together[first.name].moments.mean[2] == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("case", [case for case in CASES if case.generates], ids=str)
def test_generation_with_a_cache_under_an_intervention(case: Case) -> None:
    """Each new token comes from a pass over itself alone; the change must be in every one of them."""
    model = loaded(case)
    blocks = {name: block for block in model.blocks for name in block.sites}
    site = next(each for each in reversed(list(model.sites.values())) if each.kind in ("mlp", "mixer", "expert"))
    neurons = pc.Neurons({site.name: range(0, site.size or 0, 2)})
    edited = copy.deepcopy(model.module)
    with torch.no_grad():
        for neuron in range(0, site.size or 0, 2):
            for consumer in blocks[site.name].consumers(site):
                consumer.of(edited, neuron).zero_()
    other = pc.load(edited, tokenizer=tokenizer())
    prompts = ["the cat sat", "two", "they stayed home and it rained"]
    plain = [model.generate(prompt, 8) for prompt in prompts]
    with model.intervene(pc.ablate(neurons)):
        changed = [model.generate(prompt, 8) for prompt in prompts]
        uncached = [model.generate(prompt, 8, use_cache=False) for prompt in prompts]
    assert changed == [other.generate(prompt, 8) for prompt in prompts]
    # A greedy choice between two equal logits may fall either way, not so in all of the texts.
    assert sum(one == two for one, two in zip(changed, uncached, strict=True)) >= 2
    assert [model.generate(prompt, 8) for prompt in prompts] == plain


@pytest.mark.parametrize("case", OTHER_CASES, ids=str)
def test_images_and_series_in_batches(case: Case) -> None:
    model = loaded(case)
    inputs = case.inputs("right")
    if case.reads == "both":
        inputs = {"pixel_values": inputs["pixel_values"]}
    values = next(iter(inputs.values()))
    values = torch.cat([values, values.flip(-1), values * 0.5])
    sites = [site for site in recordable(model) if site.stack in ("", "vision") or site.stack.startswith("stages")]
    data: Any = pc.Images(values) if case.reads in ("images", "both") else pc.Tensors(values)
    together = pc.record(model, data, sites, SUMMARIES, batch_tokens=10**6, progress=False)
    alone = pc.record(model, data, sites, SUMMARIES, batch_tokens=1, progress=False)
    assert_alike(together, alone)
    for name in together:
        keyword = next(iter(inputs))
        module = model.module.get_submodule("vision_model") if case.reads == "both" else model.module
        with torch.no_grad(), model.evaluating():
            read = (
                model.activations({keyword: values}, name)
                if case.reads != "both"
                else _of_tower(model, module, values, name)
            )
        rows = read.reshape(-1, read.shape[-1]).double().numpy()
        assert together[name].count == len(rows)
        np.testing.assert_allclose(together[name].moments.mean, rows.mean(0), rtol=1e-4, atol=1e-4 * np.abs(rows).max())


def _of_tower(model: pc.Model, module: nn.Module, values: torch.Tensor, name: str) -> torch.Tensor:
    prefix = "vision_model."
    site = model.site(name)
    kept: list[torch.Tensor] = []
    target = module.get_submodule(site.module.removeprefix(prefix))

    def keep(_module: nn.Module, args: tuple, kwargs: dict, output: Any = None) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        tensor = given if site.tensor == "input" else output if isinstance(output, torch.Tensor) else output[0]
        kept.append(tensor.detach().movedim(site.axis, -1))

    handle = target.register_forward_hook(keep, with_kwargs=True)
    module(values)
    handle.remove()
    return kept[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("title", ["BERT", "Llama", "Mixtral", "nn.LSTM"])
def test_low_precision_weights_are_counted_in_float32(title: str, dtype: torch.dtype) -> None:
    module = by_title(title).build().to(dtype)
    model = pc.load(module, tokenizer=tokenizer())
    many = TEXTS * 40
    recording = recorded(model, many)
    for name in recording:
        if not recording[name].count:
            continue
        rows = torch.cat([model.activations(text, name).reshape(-1, model.site(name).size) for text in TEXTS])
        assert rows.dtype == dtype
        exact = rows.double().mean(0).numpy()
        scale = float(rows.abs().max())
        # What half precision itself cannot resolve, padding may change; a sum in half precision would be far off.
        np.testing.assert_allclose(recording[name].moments.mean, exact, atol=8 * torch.finfo(dtype).eps * scale)
        assert recording[name].moments.mean.dtype == np.float64


@pytest.mark.parametrize("title", ["Mixtral", "Qwen2-MoE", "DeepSeek-V3"])
def test_experts_report_per_routed_token_and_per_token(title: str, tmp_path: Any) -> None:
    model = loaded(by_title(title))
    store = tmp_path / "recording"
    recording = pc.record(model, TEXTS, "expert.*", [pc.FiringRate(0.0), pc.Moments], store=store, progress=False)
    tokens = sum(len(text.split()) for text in TEXTS)
    layers = sorted({site.layer for site in recording.sites if site.layer is not None})
    config: Any = model.module.config
    for layer in layers:
        sites = [site for site in recording.sites if site.layer == layer]
        assert sum(recording[site].count for site in sites) == tokens * config.num_experts_per_tok
        for site in sites:
            each = recording[site]
            routed = [model.activations(text, site) for text in TEXTS]
            fired = sum((rows > 0).sum(0).numpy() for rows in routed)
            count = sum(len(rows) for rows in routed)
            assert (each.count, each.passed) == (count, tokens)
            assert each.routing_rate == pytest.approx(count / tokens)
            np.testing.assert_allclose(each.firing_rate_per_token[:, 0], fired / tokens)
            if count:
                np.testing.assert_allclose(each.firing_rate.rate[:, 0], fired / count)
    again = pc.Recording.open(store)
    assert [again[name].routing_rate for name in again] == [recording[name].routing_rate for name in recording]
    assert "routing_rate" in recording.neurons().columns


def test_special_tokens_that_do_not_count_do_not_count_for_experts_either() -> None:
    module = by_title("Mixtral").build()
    model = pc.load(module, tokenizer=tokenizer(special=True))
    recording = pc.record(model, TEXTS, "expert.*", [pc.Moments, pc.TopExamples(2)], progress=False)
    assert sum(recording[f"expert.0.{expert}"].count for expert in range(4)) == 2 * sum(len(t.split()) for t in TEXTS)
    for name in recording:
        rows, places = [], []
        for number, text in enumerate(TEXTS):
            read = model.activations(text, name)
            words = ["[CLS]", *text.split(), "[SEP]"]
            assert read.tokens is not None and len(read.tokens) == len(read)
            assert {each.strip() for each in read.tokens} <= set(words)
            kept = [place for place, token in enumerate(read.tokens) if token not in ("[CLS]", "[SEP]")]
            rows.append(read[kept].double())
            places += [(number, read.tokens[place].strip()) for place in kept]
        every = torch.cat(rows).numpy()
        each = recording[name]
        assert each.count == len(every)
        np.testing.assert_allclose(each.moments.mean, every.mean(0), rtol=1e-4, atol=1e-5)
        for neuron in range(3):
            example, position = int(each.top_examples.example[neuron, 0]), int(each.top_examples.position[neuron, 0])
            word = ["[CLS]", *TEXTS[example].split()][position]
            assert (example, word) == places[int(every[:, neuron].argmax())]


def test_an_expert_to_which_nothing_is_routed_counts_zero() -> None:
    module: Any = by_title("Mixtral").build()
    with torch.no_grad():  # the router never chooses expert 3
        module.model.layers[0].mlp.gate.weight[3] = 0
        module.model.layers[0].mlp.gate.weight[:3] *= 0.01
        module.model.layers[0].post_attention_layernorm.weight.fill_(0)
    model = pc.load(module, tokenizer=tokenizer())
    router = model.module.get_submodule("model.layers.0.mlp.gate")

    def forward(hidden: torch.Tensor) -> Any:
        hidden = hidden.reshape(-1, hidden.shape[-1])
        chosen = torch.tensor([[0, 1]]).expand(len(hidden), 2)
        return hidden.new_zeros(len(hidden), 4), torch.full((len(hidden), 2), 0.5), chosen

    router.forward = forward  # type: ignore[method-assign]
    recording = pc.record(model, TEXTS, "expert.0.*", [pc.FiringRate(0.0)], progress=False)
    tokens = sum(len(text.split()) for text in TEXTS)
    assert [recording[name].count for name in recording] == [tokens, tokens, 0, 0]
    idle = recording["expert.0.3"]
    assert idle.routing_rate == 0.0 and not idle.firing_rate_per_token.any()
    with model.intervene(pc.ablate(pc.Neurons({"expert.0.3": [0]}))):  # it is there, though nothing comes by
        model(TEXTS)


def test_attention_probabilities_are_not_recorded_and_say_why() -> None:
    model = loaded(by_title("BERT"))
    with pytest.raises(ModelError, match=r"pattern\.0 cannot be recorded: how many keys"):
        pc.record(model, TEXTS, "pattern.0", progress=False)


@pytest.mark.parametrize("title", ["BERT", "nn.LSTM"])
def test_a_compiled_model_is_recorded_and_changed_as_it_is_uncompiled(title: str) -> None:
    module = by_title(title).build()
    expected = recorded(pc.load(module, tokenizer=tokenizer()), TEXTS)
    compiled: Any = torch.compile(module, backend="eager")
    inputs = by_title(title).inputs("right")
    with torch.no_grad():
        compiled(**inputs)  # so that there is compiled code which knows of no hooks
    model = pc.load(compiled, tokenizer=tokenizer())
    assert_alike(recorded(model, TEXTS), expected)
    site = next(site for site in model.sites.values() if site.kind in ("mlp", "recurrent", "expert"))
    first: Callable[..., torch.Tensor] = lambda given: given if isinstance(given, torch.Tensor) else given[0]  # noqa: E731
    with torch.no_grad():
        plain = first(compiled(**inputs))
        with model.intervene(pc.clamp(pc.Neurons({site.name: [0, 2]}), 3.0)):
            changed, uncompiled = first(compiled(**inputs)), first(module(**inputs))
        torch.testing.assert_close(first(compiled(**inputs)), plain)
    torch.testing.assert_close(changed, uncompiled)
    assert not torch.allclose(changed, plain)
