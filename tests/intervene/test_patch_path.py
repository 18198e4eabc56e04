"""`patch_path`: the direct path only, beside its closed form and beside plain hooks that hold everything else."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache
from typing import Any

import pytest
import torch
from tests.architectures import GPT2, LAYERS, LLAMA, Architecture, ids_of, tokenizer
from tests.raw import assert_same, call
from tests.zoo import CASES, Case, by_title
from torch import nn

import patchclamp as pc
from patchclamp.errors import DataError, UnknownName

CLEAN, OTHER = "the cat sat on a mat", "two dogs ran home and they"


@cache
def loaded(architecture: Architecture) -> pc.Model:
    return pc.load(architecture.build(), tokenizer=tokenizer())


@torch.no_grad()
def run(model: pc.Model, inputs: dict[str, Any], *changes: Any) -> torch.Tensor:
    with model.intervene(*changes):
        return call(model.module, inputs)


@torch.no_grad()
def given_to(module: nn.Module, text: str, path: str, to: Any = None) -> torch.Tensor:
    """What a module is given, or (`to="returned"`) returns, for a text: by a plain hook."""
    kept: list[torch.Tensor] = []

    def keep(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        first = output if isinstance(output, torch.Tensor) else output[0]
        kept.append(first if to == "returned" else args[0] if args else kwargs["hidden_states"])

    with module.get_submodule(path).register_forward_hook(keep, with_kwargs=True):
        module(torch.tensor([ids_of(text)]))
    return kept[0].clone()


# The closed form --------------------------------------------------------------------------------------


def direct(
    module: Any, layer: int, name: str, neurons: list[int] | None = None, rows: list[int] | None = None
) -> torch.Tensor:
    """What a sender of GPT-2 writes on the other text more than on this one, `[1, tokens, width]`."""
    path = f"transformer.h.{layer}.{name}.c_proj"
    difference = given_to(module, OTHER, path) - given_to(module, CLEAN, path)
    kept = torch.zeros(difference.shape[1:])
    for row in range(6) if rows is None else rows:
        for neuron in range(kept.shape[1]) if neurons is None else neurons:
            kept[row, neuron] = 1.0
    return (difference * kept) @ module.get_submodule(path).weight


@torch.no_grad()
def test_the_direct_path_to_the_logits_goes_through_the_last_norm_alone() -> None:
    model: Any = loaded(GPT2)
    module = model.module
    stream = given_to(module, CLEAN, "transformer.ln_f")
    for layer, name in ((0, "attn"), (0, "mlp"), (1, "attn"), (1, "mlp")):
        path = pc.patch_path(model, f"{name}.{layer}", "resid_post.1", CLEAN, OTHER)
        expected = module.lm_head(module.transformer.ln_f(stream + direct(module, layer, name)))
        got = run(model, model.inputs(CLEAN), path)
        assert_same(got, expected)
        assert not torch.allclose(got, run(model, model.inputs(CLEAN)), rtol=1e-3)
        # Not what patching the sender does, which goes all ways.
        whole = run(
            model, model.inputs(CLEAN), pc.patch(f"{name}.{layer}", model.activations(OTHER, f"{name}.{layer}"))
        )
        assert torch.allclose(got, whole, rtol=1e-3) == ((layer, name) == (LAYERS - 1, "mlp"))


@torch.no_grad()
@pytest.mark.parametrize("positions", [None, [2, -1]], ids=str)
def test_neurons_to_neurons_through_the_norm_between(positions: list[int] | None) -> None:
    model: Any = loaded(GPT2)
    module, head = model.module, list(range(4, 8))
    sender = pc.Neurons({"attn.0": head})
    receivers = pc.Neurons({"mlp.1": [7, 2, 20], "mlp.0": [3]})
    path = pc.patch_path(model, sender, receivers, CLEAN, OTHER, positions)
    change = direct(module, 0, "attn", head, positions)
    for layer, block in enumerate(module.transformer.h):
        stream = given_to(module, CLEAN, f"transformer.h.{layer}.ln_2")
        activations = block.mlp.act(block.mlp.c_fc(block.ln_2(stream + change)))
        torch.testing.assert_close(path.values[f"mlp.{layer}"], activations, rtol=1e-4, atol=1e-5)
    assert path.neurons == receivers and path.where is None
    # The receivers alone carry it on.
    values = {name: path.values[name][0] for name in receivers.sites}
    assert_same(run(model, model.inputs(CLEAN), path), run(model, model.inputs(CLEAN), pc.patch(receivers, values)))


@torch.no_grad()
def test_attention_as_a_receiver_looks_anew() -> None:
    model: Any = loaded(GPT2)
    module = model.module
    stream = given_to(module, CLEAN, "transformer.h.1.ln_1") + direct(module, 0, "mlp")
    attention, kept = module.transformer.h[1].attn, []
    with attention.c_proj.register_forward_pre_hook(lambda _module, args: kept.append(args[0])):
        tokens = stream.shape[1]
        causal = torch.zeros(1, 1, tokens, tokens).masked_fill(~torch.ones(tokens, tokens).bool().tril(), -torch.inf)
        attention(module.transformer.h[1].ln_1(stream), attention_mask=causal)
    path = pc.patch_path(model, "mlp.0", ["attn.1"], CLEAN, OTHER)
    torch.testing.assert_close(path.values["attn.1"], kept[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_receivers_do_not_act_on_each_other() -> None:
    model: Any = loaded(GPT2)
    together = pc.patch_path(model, "attn.0", ["mlp.0", "attn.1", "mlp.1", "resid_post.1"], CLEAN, OTHER)
    for site in ("mlp.0", "attn.1", "mlp.1", "resid_post.1"):
        alone = pc.patch_path(model, "attn.0", site, CLEAN, OTHER)
        torch.testing.assert_close(together.values[site], alone.values[site])
    one = pc.patch_path(model, "attn.0", pc.Neurons({"mlp.0": [1]}), CLEAN, OTHER)
    torch.testing.assert_close(one.values["mlp.0"], together.values["mlp.0"])


def test_several_senders_do_not_act_on_each_other() -> None:
    model: Any = loaded(GPT2)
    sender = pc.Neurons({"attn.0": [1, 2], "mlp.0": [5]})
    path = pc.patch_path(model, sender, "resid_post.1", CLEAN, OTHER, [1])
    stream = given_to(model.module, CLEAN, "transformer.h.1", "returned")
    with torch.no_grad():
        change = direct(model.module, 0, "attn", [1, 2], [1]) + direct(model.module, 0, "mlp", [5], [1])
    torch.testing.assert_close(path.values["resid_post.1"], stream + change, rtol=1e-4, atol=1e-5)


def test_a_linear_network_splits_into_its_paths() -> None:
    """Without nonlinearities the effects of all direct paths to the stream add up to the whole difference."""
    module: Any = GPT2.build(torch.float64)
    for block in module.transformer.h:
        block.ln_1, block.ln_2, block.mlp.act = nn.Identity(), nn.Identity(), nn.Identity()
        with torch.no_grad():
            block.attn.c_proj.weight.zero_()
    model = pc.load(module, tokenizer=tokenizer())
    clean, other = (model.activations(text, "resid_post.1").clone() for text in (CLEAN, OTHER))
    embeddings = [model.activations(text, "resid_pre.0").clone() for text in (CLEAN, OTHER)]
    total = embeddings[1] - embeddings[0]
    for layer in range(LAYERS):
        path = pc.patch_path(model, f"mlp.{layer}", "resid_post.1", CLEAN, OTHER)
        total = total + path.values["resid_post.1"][0] - clean
    torch.testing.assert_close(total, other - clean, rtol=1e-9, atol=1e-9)
    # From one MLP to the next: the product of their weights, as nothing lies between.
    first, second = (module.transformer.h[layer].mlp for layer in range(2))
    path = pc.patch_path(model, "mlp.0", "mlp.1", CLEAN, OTHER)
    change = model.activations(OTHER, "mlp.0").clone() - model.activations(CLEAN, "mlp.0").clone()
    expected = model.activations(CLEAN, "mlp.1").clone() + change @ first.c_proj.weight @ second.c_fc.weight
    torch.testing.assert_close(path.values["mlp.1"][0], expected.detach(), rtol=1e-9, atol=1e-9)


# Every architecture -----------------------------------------------------------------------------------

WRITERS = ("attn", "cross_attn", "mlp", "mixer")
PATHS = [case for case in CASES if case.reads == "texts" and "nn." not in case.title]
DENSE = [case for case in PATHS if case.title not in ("Mixtral", "Qwen2-MoE", "DeepSeek-V3")]


@torch.no_grad()
def held_by_hand(model: pc.Model, sender: str, end: str, inputs: Any, other: Any, rows: torch.Tensor) -> torch.Tensor:
    """What a receiver is given while plain hooks hold every other output projection, and the sender is exchanged."""
    module = model.module
    writers = {name: site for name, site in model.sites.items() if site.kind in WRITERS}
    kept: dict[str, dict[str, torch.Tensor]] = {"clean": {}, "other": {}, "received": {}}

    def keeping(into: str, name: str) -> Any:
        return lambda _module, args: kept[into].__setitem__(name, args[0].clone())

    for into, given in (("clean", inputs), ("other", other)):
        with ExitStack() as stack:
            for name, site in writers.items():
                target = module.get_submodule(site.module)
                stack.enter_context(target.register_forward_pre_hook(keeping(into, name)))
            module(**given)

    def holding(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple) -> tuple:
            new = kept["clean"][name].clone()
            if name == sender:
                where = rows.flatten() if new.ndim == 2 else rows
                new[where] = kept["other"][name][where]
            return (new, *args[1:])

        return hook

    with ExitStack() as stack:
        target = module.get_submodule(model.sites[end].module)
        stack.enter_context(target.register_forward_pre_hook(keeping("received", end)))
        for name, site in writers.items():
            stack.enter_context(module.get_submodule(site.module).register_forward_pre_hook(holding(name)))
        module(**inputs)
    return kept["received"][end]


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_beside_plain_hooks_that_hold_everything_else(case: Case) -> None:
    model, inputs = pc.load(case.build()), case.inputs("left")
    other = {name: value.clone() for name, value in inputs.items()}
    mask = inputs["attention_mask"].bool()
    other["input_ids"][mask] = other["input_ids"].flip(0)[mask].clamp(min=4)
    stack = "encoder." if model.is_encoder_decoder else ""
    sender = f"{stack}mixer.0" if f"{stack}mixer.0" in model.sites else f"{stack}attn.0"
    end = sender.replace("attn.0", "mlp.1").replace("mixer.0", "mixer.1")
    rows = torch.zeros_like(mask)
    for row in range(len(mask)):
        rows[row, mask[row].nonzero()[-1]] = True
    path = pc.patch_path(model, sender, end, inputs, other, [-1])
    expected = held_by_hand(model, sender, end, inputs, other, rows)
    assert_same(path.values[end], expected)

    def put(_module: nn.Module, args: tuple) -> tuple:
        return (expected, *args[1:])

    with torch.no_grad(), model.module.get_submodule(model.sites[end].module).register_forward_pre_hook(put):
        wanted = call(model.module, inputs)
    got = run(model, inputs, path)
    assert_same(got, wanted)
    assert not torch.equal(got, run(model, inputs))


def test_what_it_does_not_take() -> None:
    model = loaded(GPT2)
    for arguments, kind, message in (
        (("mlp.1", "attn.1"), DataError, r"the sender mlp\.1 is not reached before the receivers attn\.1"),
        (("mlp.0", "mlp.0"), DataError, r"the sender mlp\.0 is not reached before the receivers mlp\.0"),
        (("mlp.0", ["mlp.1", "attn.0"]), DataError, r"is not reached before the receivers attn\.0, mlp\.1"),
        (("resid_post.0", "mlp.1"), DataError, r"the sender resid_post\.0 does not write into the residual stream"),
        (("module:transformer.h.0.mlp", "mlp.1"), DataError, "the sender module:.* does not write into"),
        (("mlp.0", "module:lm_head"), DataError, r"the receiver module:lm_head is not listed"),
        (("mlp.7", "mlp.1"), UnknownName, r"no site is called 'mlp\.7'"),
        (("mlp.0", "mlp.7"), UnknownName, r"no site is called 'mlp\.7'"),
        ((pc.Neurons({"mlp.0": [24]}), "mlp.1"), UnknownName, r"mlp\.0:24 does not exist"),
    ):
        with pytest.raises(kind, match=message):
            pc.patch_path(model, *arguments, CLEAN, OTHER)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"not of one shape: attn\.0 is \[1, 6, 16\] on the one and \[1, 2, 16\]"):
        pc.patch_path(model, "attn.0", "mlp.1", CLEAN, "two dogs")
    with pytest.raises(DataError, match="an example has more tokens in the one than in the other"):
        pc.patch_path(model, "attn.0", "mlp.1", [CLEAN, "two dogs"], ["two dogs", CLEAN])
    with pytest.raises(DataError, match=r"there is no position 6 at attn\.0"):
        pc.patch_path(model, "attn.0", "mlp.1", CLEAN, OTHER, [6])
    mixtral = pc.load(by_title("Mixtral").build(), tokenizer=tokenizer())
    with pytest.raises(
        DataError, match=r"expert\.0\.0 shows only the tokens that were routed to it, and cannot be held"
    ):
        pc.patch_path(mixtral, "attn.0", "attn.1", CLEAN, OTHER)
    assert torch.equal(run(model, model.inputs(CLEAN)), run(pc.load(GPT2.build()), model.inputs(CLEAN)))


def test_names_of_another_library_and_ready_inputs() -> None:
    model = loaded(LLAMA)
    inputs, other = model.inputs(CLEAN), model.inputs(OTHER)
    expected = pc.patch_path(model, "attn.0", ["mlp.1"], CLEAN, OTHER)
    sender = pc.Neurons({"blocks.0.attn.hook_z": range(24)})
    receivers = pc.Neurons({"blocks.1.mlp.hook_post": range(24)})
    for made in (
        pc.patch_path(model, "blocks.0.attn.hook_z", "blocks.1.mlp.hook_post", inputs, other),
        pc.patch_path(model, sender, "mlp.1", [CLEAN], [OTHER]),
    ):
        assert made == expected
    by_neuron = pc.patch_path(model, sender, receivers, inputs, other)
    assert torch.equal(run(model, inputs, by_neuron), run(model, inputs, expected))


# Noising and denoising --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", PATHS, ids=str)
def test_patching_everything_gives_the_other_run_in_both_directions(case: Case) -> None:
    model = pc.load(case.build())
    inputs = case.inputs("right")
    ids = inputs["input_ids"][[0, 2], :6]
    runs = [{"input_ids": each} for each in (ids, ids.flip(0))]
    if model.is_encoder_decoder:
        runs = [each | {"decoder_input_ids": each["input_ids"].flip(1)} for each in runs]
    kinds = ("resid_pre", "resid_mid", "resid_post", "attn", "cross_attn", "mlp", "mixer")
    everything = [name for name, site in model.sites.items() if site.kind in kinds]
    first = [name for name in everything if name.endswith("resid_pre.0")]
    writers = [name for name in everything if "resid" not in name or name in first]
    for here, there in (runs, runs[::-1]):
        source = model.activations(there, everything)
        outputs = [run(model, each) for each in (here, there)]
        assert not torch.allclose(*outputs, rtol=1e-3)
        for names in (everything, first, writers):
            assert_same(run(model, here, pc.patch(names, source)), outputs[1])
        # Some of the positions give neither the one run nor the other; all of them, one by one, the other.
        some = run(model, here, pc.patch(first, source, [2]))
        assert not torch.allclose(some, outputs[0], rtol=1e-3) and not torch.allclose(some, outputs[1], rtol=1e-3)
        each = [pc.patch(first, source, [position]) for position in range(6)]
        assert_same(run(model, here, *each), outputs[1])
        rows = run(model, here, pc.patch(everything, source, examples=[1]))
        assert_same(rows[0], outputs[0][0])
        assert_same(rows[1], outputs[1][1])
