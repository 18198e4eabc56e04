"""`SideBySide`: each part of the batch is what the network gives under its intervention alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from tests.architectures import GPT2, LAYERS, T5, tokenizer
from tests.intervene.by_hand import changing, chosen, clamped
from tests.raw import assert_same, call, hooks_of
from tests.zoo import CASES, Case, by_title

import patchclamp as pc
from patchclamp.errors import DataError, UnknownName
from patchclamp.intervene import SideBySide


@cache
def loaded(case: Case) -> pc.Model:
    return pc.load(case.build(), tokenizer=tokenizer())


def copies(inputs: dict[str, Any], number: int) -> dict[str, Any]:
    return {name: torch.cat([value] * number) for name, value in inputs.items()}


def all_of(output: Any) -> torch.Tensor:
    """What a network returned, `[examples, ...]` of each tensor, one after the other."""
    if isinstance(output, torch.Tensor):
        return output.flatten(1)
    if hasattr(output, "text_embeds"):  # each text beside each image is another shape for another batch
        return torch.cat([output.text_embeds, output.image_embeds], 1)
    values = list(output.values()) if hasattr(output, "values") else list(output)
    return torch.cat([all_of(each) for each in values if isinstance(each, torch.Tensor) and each.ndim > 1], 1)


@torch.no_grad()
def run(model: pc.Model, inputs: dict[str, Any], *changes: Any) -> torch.Tensor:
    with model.intervene(*changes):
        return all_of(model.module(**inputs))


def parts_for(model: pc.Model, case: Case) -> list[Any]:
    """Interventions of all kinds, some of them several, at different sites; also none at all."""
    sites = [site for site in model.sites.values() if not site.fixed]
    early, late = sites[0], sites[-1]
    others = [site for site in sites if site.kind in ("expert", "recurrent", "mlp", "mixer", "conv", "attn")][:6]
    patterns = [site.name for site in sites if site.kind == "pattern"]
    size = {site.name: int(site.size or model.activations(case.inputs("left"), site).shape[-1]) for site in sites}
    pool = {others[0].name: torch.linspace(-1, 1, 5)[:, None].expand(5, size[others[0].name])}
    tokens = case.reads == "texts"
    first: dict[str, Any] = {"positions": [0, -1]} if tokens else {}
    second: dict[str, Any] = {"positions": [1]} if tokens else {}
    found: list[Any] = [
        pc.ablate(pc.Neurons({site.name: [0, 2] for site in others})),
        None,
        [pc.clamp(pc.Neurons({early.name: [1]}), 1.5, **first), pc.scale(pc.Neurons({early.name: [1]}), -2.0)],
        pc.steer(pc.Directions({late.name: torch.linspace(-1, 1, size[late.name])}), 0.5, examples=[0, 2]),
        (pc.ablate(pc.Neurons({others[0].name: [0, 1]}), "resample", source=pool, seed=7),),
        pc.scale(pc.Neurons({name: [1] for name in patterns}), 0.5, examples=[1]),
        [],
        pc.clamp(pc.Neurons({site.name: [0] for site in others}), 0.7, examples=[2], **second),
    ]
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_part_is_what_it_is_alone(case: Case) -> None:
    model = loaded(case)
    packed = case.title in ("nn.LSTM", "nn.GRU", "nn.RNN")  # such a network reads from the left edge
    inputs = case.inputs("right" if packed else "left")
    parts, hooks = parts_for(model, case), hooks_of(model.module)
    if case.title in ("T5", "T5, gated"):
        parts[-1] = pc.clamp(pc.Neurons({"decoder.mlp.1": [0], "encoder.mlp.0": [2]}), 0.7, positions=[-1])
    together = run(model, copies(inputs, len(parts)), SideBySide(parts)).chunk(len(parts))
    plain = run(model, inputs)
    differ = 0
    for part, got in zip(parts, together, strict=True):
        alone = part if isinstance(part, (list, tuple)) else [] if part is None else [part]
        expected = run(model, inputs, *alone)
        assert_same(got, expected)
        differ += not torch.allclose(expected, plain, rtol=1e-3)
    assert differ >= 4 and hooks_of(model.module) == hooks


@pytest.mark.parametrize("title", ["GPT-2", "Mixtral"])
def test_parts_beside_plain_hooks(title: str) -> None:
    model, inputs = loaded(by_title(title)), by_title(title).inputs("left")
    mask, number = inputs["attention_mask"].bool(), 3
    site = model.site("mlp.1" if title == "GPT-2" else "expert.1.2")
    made = [pc.clamp(pc.Neurons({site.name: [0, 3]}), 2.5, positions=[0], examples=[row]) for row in range(number)]
    rows = torch.cat([chosen(mask, [0], [row]) for row in range(number)])
    many = copies(inputs, number)
    with torch.no_grad(), changing(model.module, {site: clamped([0, 3], 2.5)}, lambda _: rows):
        expected = call(model.module, many)
    with torch.no_grad(), model.intervene(SideBySide(made)):
        assert_same(call(model.module, many), expected)


def test_parts_without_a_mask_and_with_positions_of_experts() -> None:
    model = loaded(by_title("Mixtral"))
    ids = by_title("Mixtral").inputs("right")["input_ids"][:2, :5]
    sites = [f"expert.{layer}.{expert}" for layer in range(LAYERS) for expert in range(4)]
    parts = [pc.ablate(pc.Neurons({site: range(24) for site in sites}), positions=[position]) for position in range(5)]
    together = run(model, {"input_ids": ids.repeat(5, 1)}, SideBySide(parts)).chunk(5)
    for part, got in zip(parts, together, strict=True):
        assert_same(got, run(model, {"input_ids": ids}, part))


def test_in_order_with_others_nested_and_generating() -> None:
    model, inputs = loaded(by_title("GPT-2")), GPT2.inputs("left")
    silent, loud = pc.ablate(pc.Neurons({"mlp.0": [1]})), pc.scale(pc.Neurons({"mlp.0": [1, 2]}), 3.0)
    held = pc.clamp(pc.Neurons({"mlp.0": [1]}), 0.5)
    both = run(model, copies(inputs, 2), held, SideBySide([loud, silent]), loud).chunk(2)
    assert_same(both[0], run(model, inputs, held, loud, loud))
    assert_same(both[1], run(model, inputs, held, silent, loud))
    four = run(model, copies(inputs, 4), SideBySide([SideBySide([silent, loud]), SideBySide([None, held])])).chunk(4)
    for got, alone in zip(four, ([silent], [loud], [], [held]), strict=True):
        assert_same(got, run(model, inputs, *alone))
    ids = torch.tensor([[4, 5, 6]])
    loud = pc.scale(pc.Neurons({"mlp.1": range(24)}), 4.0, positions="generated")
    with model.intervene(SideBySide([None, loud])):
        together = scores(model, ids.repeat(2, 1))
    for row, alone in enumerate(([], [loud])):
        with model.intervene(*alone):
            assert_same(together[:, row], scores(model, ids)[:, 0])
    assert torch.allclose(together[0, 0], together[0, 1]) and not torch.allclose(together[2, 0], together[2, 1])


def scores(model: pc.Model, ids: torch.Tensor) -> torch.Tensor:
    """Logits of each new token, `[new, examples, vocabulary]`."""
    output: Any = model.module.generate(  # type: ignore[operator]
        ids, max_new_tokens=4, do_sample=False, pad_token_id=1, eos_token_id=None, output_scores=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return torch.stack(output.scores)


def test_gradients_of_a_part_stay_in_it() -> None:
    model, inputs = pc.load(T5.build()), T5.inputs("left")
    neurons = pc.Neurons({"encoder.mlp.0": range(24), "decoder.mlp.0": range(24)})
    table: Any = model.module.get_submodule("encoder.block.0.layer.1.DenseReluDense.wi").weight

    def gradient(output: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(output.square().sum(), table, retain_graph=True)[0]

    with model.intervene(SideBySide([None, pc.ablate(neurons), pc.scale(neurons, 0.5)])):
        parts = call(model.module, copies(inputs, 3)).chunk(3)
    assert_same(gradient(parts[0]), gradient(call(model.module, inputs)))
    assert not gradient(parts[1]).any()
    with model.intervene(pc.scale(neurons, 0.5)):
        assert_same(gradient(parts[2]), gradient(call(model.module, inputs)))


def test_what_it_does_not_take() -> None:
    model, inputs = loaded(by_title("GPT-2")), GPT2.inputs()
    silent = pc.ablate(pc.Neurons({"mlp.0": [1]}))
    with pytest.raises(DataError, match="3 interventions side by side need a batch of that many parts, not 4"):
        run(model, inputs, SideBySide([silent, None, silent]))
    with pytest.raises(DataError, match="SideBySide takes at least one part"):
        SideBySide([])
    with pytest.raises(DataError, match=r"applied by model\.intervene only"):
        SideBySide([silent]).edits(model)
    with pytest.raises(UnknownName, match=r"mlp\.0:24 does not exist"):
        run(model, inputs, SideBySide([None, pc.ablate(pc.Neurons({"mlp.0": [24]}))]))
    with pytest.raises(DataError, match=r"example 2 is not there: the batch has 2"):
        run(model, inputs, SideBySide([None, pc.ablate(pc.Neurons({"mlp.0": [1]}), examples=[2])]))
