"""Ablation to what neurons did elsewhere, and clamping at their own quantiles."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from tests.architectures import GPT2, LLAMA, SEQUENTIAL, TEXTS, tokenizer
from tests.intervene.by_hand import chosen
from tests.raw import call, hooks_of
from tests.zoo import by_title

import patchclamp as pc
from patchclamp.errors import DataError, UnknownName

SOURCE = ["they stayed home and it rained all day", "a cat in it"]
NEURONS = pc.Neurons({"mlp.0": [7, 2, 20], "attn.1": [3]})


@cache
def gpt2() -> pc.Model:
    return pc.load(GPT2.build(), tokenizer=tokenizer())


@cache
def elsewhere() -> list[dict[str, torch.Tensor]]:
    return gpt2().activations(SOURCE, ["mlp.*", "attn.*"])


def rows_of(site: str) -> torch.Tensor:
    """What there is to draw from, `[rows, size]`."""
    return torch.cat([each[site] for each in elsewhere()])


def seen(change: Any, site: str, inputs: dict[str, Any] | None = None) -> torch.Tensor:
    with gpt2().intervene(change):
        return gpt2().activations(inputs or GPT2.inputs("left"), site).clone()


def drawn_row(values: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
    """Which row of the pool each of `[..., size]` is; fails where one is none of them."""
    same = (values.flatten(0, -2)[:, None] == pool).all(-1)
    assert same.any(1).all()
    return same.float().argmax(1)


def test_all_neurons_of_a_site_get_what_they_did_at_one_position() -> None:
    change = pc.ablate(NEURONS, "resample", source=elsewhere(), seed=3)
    for site in NEURONS.sites:
        indices = NEURONS.indices(site).tolist()
        values, pool = seen(change, site), rows_of(site)
        rows = drawn_row(values[..., indices], pool[:, indices])
        assert len(rows.unique()) > 5  # not one row for all
        # One by one they are values of several rows; together they are not shuffled.
        expected = pool[rows][:, indices].view(*values.shape[:-1], len(indices))
        assert torch.equal(values[..., indices], expected)
        others = [index for index in range(values.shape[-1]) if index not in indices]
        if site == "mlp.0":
            plain = gpt2().activations(GPT2.inputs("left"), site).clone()
            assert torch.equal(values[..., others], plain[..., others])


def test_the_network_goes_on_with_what_was_drawn() -> None:
    change, inputs = pc.ablate(NEURONS.at("mlp.0"), "resample", source=elsewhere(), seed=1), GPT2.inputs("left")
    there = seen(change, "mlp.0", inputs)

    def put(_module: Any, args: tuple) -> tuple:
        return (there, *args[1:])

    module = gpt2().module
    with torch.no_grad(), gpt2().intervene(change):
        got = call(module, inputs)
    with torch.no_grad(), module.get_submodule(GPT2.sites["mlp.0"].module).register_forward_pre_hook(put):
        assert torch.equal(got, call(module, inputs))


def test_a_seed_and_each_block_draw_the_same() -> None:
    make = lambda seed: pc.ablate(NEURONS, "resample", source=elsewhere(), seed=seed)  # noqa: E731
    first, again, other = seen(make(3), "mlp.0"), seen(make(3), "mlp.0"), seen(make(4), "mlp.0")
    assert torch.equal(first, again) and not torch.equal(first, other)
    change, state = make(3), torch.random.get_rng_state()
    with gpt2().intervene(change):
        two = [gpt2().activations(GPT2.inputs("left"), "mlp.0").clone() for _ in range(2)]
    assert torch.equal(two[0], first) and not torch.equal(two[1], first)  # within a block it goes on drawing
    assert torch.equal(seen(change, "mlp.0"), first)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_every_row_is_drawn_as_often() -> None:
    pool = torch.arange(12.0)[:, None].expand(12, 10).contiguous()
    model, x = pc.load(SEQUENTIAL.build()), {"input": torch.randn(6000, 6)}
    change = pc.ablate(pc.Neurons({"mlp.0": [4, 1]}), "resample", source={"mlp.0": pool}, seed=11)
    with model.intervene(change):
        values = model.activations(x, "mlp.0")
    assert torch.equal(values[:, 4].clone(), values[:, 1].clone())
    counts = np.bincount(values[:, 4].clone().long().numpy(), minlength=12)
    assert chisquare(counts).pvalue > 0.01
    following = np.histogram2d(values[:-1, 4].clone().numpy(), values[1:, 4].clone().numpy(), bins=12)[0]
    assert chisquare(following.ravel()).pvalue > 0.01  # nor does one say which comes next


def test_only_at_the_positions() -> None:
    inputs = GPT2.inputs("left")
    everywhere = seen(pc.ablate(NEURONS, "resample", source=elsewhere(), seed=3), "mlp.0")
    change = pc.ablate(NEURONS, "resample", source=elsewhere(), seed=3, positions=[0, -1], examples=[0, 2, 3])
    plain = gpt2().activations(inputs, "mlp.0").clone()
    rows = chosen(inputs["attention_mask"].bool(), [0, -1], [0, 2, 3])
    assert torch.equal(seen(change, "mlp.0"), torch.where(rows[..., None], everywhere, plain))


@pytest.mark.parametrize(
    ("title", "site"), [("Mixtral", "expert.1.1"), ("nn.GRU", "recurrent.recurrent.0"), ("ViT", "mlp.1")]
)
def test_other_kinds_of_sites(title: str, site: str) -> None:
    model, inputs = pc.load(by_title(title).build()), by_title(title).inputs("right")
    source = model.activations(inputs, site).clone()
    pool = source.reshape(-1, source.shape[-1]) + 10.0
    hooks = hooks_of(model.module)
    with model.intervene(pc.ablate(pc.Neurons({site: [0, 2]}), "resample", source={site: pool}, seed=5)):
        values = model.activations(inputs, site).clone()
    drawn_row(values[..., [0, 2]], pool[:, [0, 2]])
    assert (values[..., [0, 2]] > 5).all() and hooks_of(model.module) == hooks


def test_what_it_is_drawn_from() -> None:
    one = {"mlp.0": elsewhere()[0]["mlp.0"], "attn.1": elsewhere()[0]["attn.1"]}
    several = pc.ablate(NEURONS, "resample", source=elsewhere())
    together = {name: rows_of(name) for name in one}
    assert several == pc.ablate(NEURONS, "resample", source=together) != pc.ablate(NEURONS, "resample", source=one)
    assert several != pc.ablate(NEURONS, "resample", source=elsewhere(), seed=1) and several == copy.deepcopy(several)
    batch = {name: each.reshape(1, *each.shape) for name, each in together.items()}
    assert pc.ablate(NEURONS, "resample", source=batch) == several
    changed = {name: each.clone().detach() for name, each in together.items()}
    made = pc.ablate(NEURONS, "resample", source=changed)
    changed["mlp.0"].zero_()
    assert made == several  # a value does not change afterwards


def test_what_it_does_not_take() -> None:
    good = {"mlp.0": torch.zeros(3, 24), "attn.1": torch.zeros(3, 16)}
    cases: list[tuple[Any, Any, str]] = [
        (None, DataError, r'ablate\(to="resample"\) needs source=: activations on other inputs'),
        ({"mlp.0": good["mlp.0"]}, UnknownName, r"no site of the source is called 'attn\.1'"),
        (good | {"attn.1": torch.zeros(3, 3)}, DataError, r"the source of attn\.1 is \[3, 3\], which has no neuron 3"),
        (good | {"attn.1": torch.tensor(0.0)}, DataError, r"the source of attn\.1 is \[\]"),
        (good | {"mlp.0": torch.zeros(0, 24)}, DataError, r"the source of mlp\.0 is empty, or not finite"),
        (good | {"mlp.0": torch.full((1, 24), torch.nan)}, DataError, r"the source of mlp\.0 is empty, or not finite"),
        ([], DataError, "source= is a mapping from site to activations, or a list of such, with at least one in it"),
        (torch.zeros(3, 24), DataError, "source= is a mapping from site to activations"),
    ]
    for source, kind, message in cases:
        with pytest.raises(kind, match=message):
            pc.ablate(NEURONS, "resample", source=source)
    with (
        pytest.raises(UnknownName, match=r"attn\.1:16 does not exist"),
        gpt2().intervene(pc.ablate(pc.Neurons({"attn.1": [16]}), "resample", source={"attn.1": torch.zeros(1, 20)})),
    ):
        raise AssertionError("the block must not begin")
    pattern = gpt2().activations(SOURCE[0], "pattern.0").clone()
    with (
        pytest.raises(DataError, match=r"pattern\.0 cannot be resampled"),
        gpt2().intervene(pc.ablate(pc.Neurons({"pattern.0": [1]}), "resample", source={"pattern.0": pattern})),
    ):
        raise AssertionError("the block must not begin")


# Quantiles --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantile", [0.0, 0.1, 0.5, 0.95, 1.0])
def test_held_at_their_own_quantiles(quantile: float) -> None:
    model = pc.load(LLAMA.build(), tokenizer=tokenizer())
    recording = pc.record(model, TEXTS, ["mlp.*"], [pc.Histogram()], progress=False)
    neurons = pc.Neurons({"mlp.1": [7, 2, 20], "mlp.0": [0]})
    change = pc.clamp(neurons, quantile=quantile, recording=recording)
    for site in neurons.sites:
        rows = torch.cat(model.activations(TEXTS, site)).clone().numpy()
        with model.intervene(change):
            inside = model.activations(TEXTS[2], site)
        for index in neurons.indices(site):
            held = set(inside[:, index].tolist())
            assert len(held) == 1
            # The histogram's bins are an eighth of a value wide.
            low, high = (np.quantile(rows[:, index], quantile, method=way) for way in ("lower", "higher"))
            slack = max(abs(low), abs(high)) / 8
            assert low - slack <= held.pop() <= high + slack
    with pytest.raises(DataError, match="a quantile is asked for with q in"):
        pc.clamp(neurons, quantile=1.5, recording=recording)


def test_a_value_or_a_quantile() -> None:
    neurons = pc.Neurons({"mlp.1": [7]})
    with pytest.raises(DataError, match=r"clamp\(\) takes a finite value, or quantile= and recording="):
        pc.clamp(neurons)
    with pytest.raises(DataError, match=r"clamp\(\) takes a finite value, or quantile= and recording="):
        pc.clamp(neurons, 1.0, quantile=0.5)
    with pytest.raises(DataError, match=r"clamp\(quantile=\.\.\.\) needs recording=, with the summary Histogram"):
        pc.clamp(neurons, quantile=0.5)
