"""`Runs`: what is left out of later passes changes no number; nothing stays behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.architectures import BERT, GPT2, LLAMA, T5, Architecture, tokenizer
from tests.zoo import CASES, Case

import patchclamp as pc
from patchclamp.intervene import ablate
from patchclamp.verify.runs import Runs, touched

TEXTS = ["the cat sat on a mat", "two dogs ran home", "it sat", "they stayed in all day long"]
# Of one length: a network's output at padding is no number of the text.
ALIKE = ["the cat sat on", "two dogs ran home", "it sat in all", "they stayed a day"]
DEEP = [case for case in CASES if case.reads == "texts"]


def size_of(batch_output: Any) -> torch.Tensor:
    """A number for each row of whatever a network returns."""
    tensor = batch_output
    for name in ("logits", "last_hidden_state", "text_embeds"):
        if getattr(batch_output, name, None) is not None:
            tensor = getattr(batch_output, name)
            break
    return tensor.double().flatten(1).square().mean(1)


@pytest.mark.parametrize("architecture", [GPT2, LLAMA, BERT, T5], ids=str)
def test_a_replay_gives_the_numbers_of_whole_passes(architecture: Architecture) -> None:
    model = pc.load(architecture.build(), tokenizer=tokenizer())
    metric = "embedding_shift" if architecture is BERT else "loss"
    last = [name for name in model.sites if name.rpartition(".")[0].endswith("mlp")][-1]
    sets = [pc.Neurons({last: [number, number + 3]}) for number in range(6)]
    before = {name: each.clone() for name, each in model.module.state_dict().items()}
    runs = Runs(model, metric, TEXTS, touched(model, [ablate(sets[0])]), batch_tokens=64)
    found = runs.values([ablate(each) for each in sets])
    whole = Runs(model, metric, TEXTS, touched(model, [ablate(sets[0])]), batch_tokens=64)
    whole._replay = type(whole._replay)()
    assert found == pytest.approx(whole.values([ablate(each) for each in sets]), rel=1e-5, abs=1e-7)
    assert runs._replay.fraction == 0.5 and runs.passes < 1 + 0.5 * 8
    for path, module in model.module.named_modules():
        assert "forward" not in module.__dict__, path
        assert not module._forward_hooks and not module._forward_pre_hooks, path
    assert all(torch.equal(each, before[name]) for name, each in model.module.state_dict().items())


def test_lower_blocks_are_not_run_again() -> None:
    model = pc.load(GPT2.build(), tokenizer=tokenizer())
    calls = [0, 0]
    for layer in (0, 1):
        path = GPT2.sites[f"mlp.{layer}"].module

        def count(*_: Any, layer: int = layer) -> None:
            calls[layer] += 1

        model.module.get_submodule(path).register_forward_hook(count)
    site = model.site("mlp.1")  # finding the sites runs the network too
    calls[:] = 0, 0
    runs = Runs(model, "loss", TEXTS, [site])
    runs.values([ablate(pc.Neurons({"mlp.1": [number]})) for number in range(5)])
    assert calls[0] == 1 and calls[1] > 1


@pytest.mark.parametrize("case", DEEP, ids=lambda case: case.title)
def test_side_by_side_equals_one_by_one(case: Case) -> None:
    network = case.build()
    model = pc.load(network, tokenizer=tokenizer())
    kinds = ("mlp", "expert", "mixer", "recurrent")
    name = next((each for each, site in model.sites.items() if site.kind in kinds), None)
    assert name is not None
    size = model.site(name).size or 4
    interventions = [ablate(pc.Neurons({name: [number % size]})) for number in range(4)]

    def metric(given: pc.Model, batch: Any) -> torch.Tensor:
        return size_of(batch.run(given))

    together = Runs(model, metric, ALIKE, [model.site(name)], batch_tokens=4096).values(interventions)
    apart = Runs(model, metric, ALIKE, [model.site(name)], batch_tokens=1).values(interventions)
    assert together == pytest.approx(apart, rel=2e-3, abs=1e-6)


def test_activity_counts_real_tokens_only() -> None:
    model = pc.load(BERT.build(), tokenizer=tokenizer())
    activity = Runs(model, "embedding_shift", TEXTS, [model.site("mlp.1")]).activity()
    rows = torch.cat([model.activations(text, "mlp.1") for text in TEXTS])
    assert activity.rate["mlp.1"] == pytest.approx((rows > 0).double().mean(0).numpy())
    norms = model.output_weights("mlp.1").norm(dim=1)
    assert activity.loudness["mlp.1"] == pytest.approx((rows.abs().mean(0) * norms).numpy(), rel=1e-4, abs=1e-6)
    assert np.allclose(activity.mean["mlp.1"], rows.mean(0).numpy(), atol=1e-6)
