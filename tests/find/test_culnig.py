"""CULNIG on a network whose units are planted: knowledge of all groups, of each, a name, and a favoured option."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.architectures import GPT2, TEXTS, tokenizer
from torch import nn

import patchclamp as pc
from patchclamp.errors import DataError
from patchclamp.find.culnig import Questions, culnig

GROUPS = ("ava", "bor", "cyn", "dol")
GENERAL, OWN, NAME, FORMAT, SIZE = 0, (1, 2, 3, 4), 5, 6, 200
ASKED, READ = 8, 9  # inputs: that a fact is asked for; that the passage says it


def network() -> pc.Model:
    """Inputs: the group (4), the right option (4), whether a fact is asked for, whether it can be read. Four classes.

    The general unit of option k fires if k is right and a fact is asked for; so does one unit for each group, if the
    question is of the group; they answer. There are four of each unit (one for each option), of which the first is
    named by the constants. The name unit of the group answers too, whether it is asked or read; the format units answer
    with nothing but the options. The other units are noise.
    """
    generator = torch.Generator().manual_seed(0)
    into, bias, out = torch.zeros(SIZE, 10), torch.zeros(SIZE), torch.zeros(4, SIZE)
    into[60:] = 0.005 * torch.randn(SIZE - 60, 10, generator=generator)
    out[:, 60:] = 0.005 * torch.randn(4, SIZE - 60, generator=generator)
    for option in range(4):
        unit = option * 7
        into[unit + GENERAL, 4 + option], into[unit + GENERAL, ASKED], bias[unit + GENERAL] = 1, 1, -1
        for group, own in enumerate(OWN):
            into[unit + own, 4 + option], into[unit + own, ASKED], into[unit + own, group] = 1, 1, 1
            bias[unit + own] = -2
        into[unit + NAME, :4], into[unit + NAME, 4 + option], bias[unit + NAME] = 1, 1, -1
        into[unit + FORMAT, 4 + option] = 1
        out[option, unit : unit + 7] = torch.tensor([1.0, 1.4, 1.4, 1.4, 1.4, 1.2, 1.2])
    module = nn.Sequential(nn.Linear(10, SIZE), nn.ReLU(), nn.Linear(SIZE, 4, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(into)  # type: ignore[union-attr, operator]
        module[0].bias.copy_(bias)  # type: ignore[union-attr, operator]
        module[2].weight.copy_(out)  # type: ignore[union-attr, operator]
    return pc.load(module)


def questions(asked: bool, named: bool, read: bool) -> Questions:
    rows, answers, groups = [], [], []
    for group in range(4):
        for option in range(4):
            row = torch.zeros(10)
            row[group], row[4 + option], row[ASKED], row[READ] = float(named), 1, float(asked), float(read)
            rows.append(row)
            answers.append(option)
            groups.append(GROUPS[group])
    return Questions(torch.stack(rows), answers, groups)


TARGET = questions(asked=True, named=True, read=False)
CONTROL = questions(asked=False, named=False, read=False)
CONFOUND = questions(asked=False, named=True, read=True)
# Four units of each kind in 200, so that the shares let all of one kind in, and no more.
SHARES: dict[str, Any] = {"share": 8 / SIZE, "excluded_share": 8 / SIZE, "specific_share": 4 / SIZE}


def units(*places: int) -> set[int]:
    return {option * 7 + place for option in range(4) for place in places}


def of_kind(found: pc.Neurons, kind: str) -> set[int]:
    return set(found.to_polars().filter(kind=kind)["index"].to_list())


def quietly(*args: Any, **more: Any) -> pc.Neurons:
    with pytest.warns(UserWarning, match="questions are given"):
        return culnig(*args, **more)


# What it finds --------------------------------------------------------------------------------------


def test_knowledge_is_found_and_impostors_are_not() -> None:
    found = culnig(network(), TARGET, CONTROL, CONFOUND, "mlp.0", **SHARES)
    assert of_kind(found, "general") == units(GENERAL)
    assert of_kind(found, "excluded") == units(NAME)
    specific = found.to_polars().filter(kind="specific")
    assert set(specific["index"]) == units(*OWN)
    for index, group in zip(specific["index"], specific["group"], strict=True):
        assert group == GROUPS[index % 7 - 1]
    assert not of_kind(found, "general") & units(FORMAT)
    row = found.to_polars().filter(index=OWN[2]).row(0, named=True)
    assert row["z_cyn"] == pytest.approx(np.sqrt(3)) and row["z_ava"] == pytest.approx(-1 / np.sqrt(3))


def test_specific_is_what_stands_out_among_groups() -> None:
    """Four groups: one that scores alone is sqrt(3) standard deviations above the mean, and never more."""
    below = culnig(network(), TARGET, CONTROL, CONFOUND, "mlp.0", least_z=1.7, **SHARES)
    above = culnig(network(), TARGET, CONTROL, CONFOUND, "mlp.0", least_z=1.8, **SHARES)
    assert of_kind(below, "specific") == units(*OWN) and not of_kind(above, "specific")


def test_without_the_control_the_format_comes_in() -> None:
    found = quietly(network(), TARGET, None, CONFOUND, "mlp.0", excluded_share=0.0, **{"share": 12 / SIZE})
    assert of_kind(found, "general") >= units(FORMAT)
    with_it = culnig(network(), TARGET, CONTROL, CONFOUND, "mlp.0", excluded_share=0.0, share=12 / SIZE)
    assert not of_kind(with_it, "general") & units(FORMAT)


def test_without_the_confound_the_name_comes_in() -> None:
    found = quietly(network(), TARGET, CONTROL, None, "mlp.0", **SHARES)
    assert of_kind(found, "general") == units(GENERAL, NAME) and not of_kind(found, "excluded")
    assert set(found["confound"]) == {0.0}


def test_the_score_by_hand() -> None:
    """P max_t a dP/da of each text alone; tokens of padding do not count."""
    model = pc.load(GPT2.build(), tokenizer=tokenizer())
    answers = ["cat", "sat", "dogs", "day"]
    found = quietly(model, Questions(TEXTS, answers), None, None, "mlp.1", batch=3)
    expected = np.zeros(24)
    for text, answer in zip(TEXTS, answers, strict=True):
        token = int(model.tokenizer(answer)["input_ids"][0])
        call = model.inputs(text)
        kept: list[torch.Tensor] = []

        def keep(_module: nn.Module, args: tuple[torch.Tensor], into: list[torch.Tensor] = kept) -> None:
            args[0].retain_grad()
            into.append(args[0])

        handle = model.module.get_submodule("transformer.h.1.mlp.c_proj").register_forward_pre_hook(keep)
        p = model.module(**call).logits[0, -1].softmax(0)[token]
        handle.remove()
        p.backward()
        slope = kept[0].grad
        assert slope is not None
        expected += (p * (kept[0] * slope)[0].amax(0)).detach().numpy() / 4
    ordered = found.to_polars().sort("index")["score"].to_numpy()
    np.testing.assert_allclose(ordered, expected, rtol=1e-4, atol=1e-9)


def test_a_neuron_of_equal_scores_has_no_z() -> None:
    found = culnig(network(), TARGET, CONTROL, CONFOUND, "mlp.0", **SHARES)
    row = found.to_polars().filter(index=units(GENERAL).pop()).row(0, named=True)
    silent = [row[f"z_{group}"] for group in GROUPS]
    assert max(map(abs, silent)) < 2
    nothing = Questions(torch.zeros(8, 10), [0] * 8, [*GROUPS] * 2)
    flat = quietly(network(), nothing, None, None, "mlp.0")
    assert set(flat["z_ava"]) == {0.0} and not of_kind(flat, "specific")


def test_the_same_twice_and_in_any_batches() -> None:
    tables = [
        culnig(network(), TARGET, CONTROL, CONFOUND, "mlp.0", batch=batch, **SHARES).to_polars().sort("index")
        for batch in (64, 64, 5)
    ]
    for each in tables[1:]:
        assert each["kind"].to_list() == tables[0]["kind"].to_list()
        assert each["group"].to_list() == tables[0]["group"].to_list()
        np.testing.assert_allclose(each["score"], tables[0]["score"], rtol=1e-4, atol=1e-9)


def test_dropout_is_off_and_attention_has_its_own_share() -> None:
    module = GPT2.build()
    module.train()
    model = pc.load(module, tokenizer=tokenizer())
    given = Questions(TEXTS, ["cat"] * 4)
    more: dict[str, Any] = {"sites": ["mlp.*", "attn.*"], "share": 3 / 48, "attention_share": 2 / 32}
    found, again = quietly(model, given, **more), quietly(model, given, **more)
    np.testing.assert_allclose(found["score"], again["score"], rtol=1e-4, atol=1e-9)
    assert module.training
    kinds = found.to_polars().filter(kind="general")["site"].str.slice(0, 3).to_list()
    assert sorted(kinds) == ["att"] * 2 + ["mlp"] * 3


# What is refused ------------------------------------------------------------------------------------


def test_bad_input_is_said() -> None:
    model = pc.load(GPT2.build(), tokenizer=tokenizer())
    for given, match in [
        (Questions(TEXTS, ["cat sat", *["cat"] * 3]), "'cat sat' is 2 tokens"),
        (Questions(TEXTS, ["cat"] * 3), "each of 3 examples, and there are 4"),
        (Questions(TEXTS, ["cat"] * 4, ["a", "b"]), "4 answers are given, and 2 groups"),
        (Questions(TEXTS, ["cat"] * 4, ["a"] * 4), "at least two groups"),
        (Questions(TEXTS, [999] * 4), "no token or class 999"),
    ]:
        with pytest.warns(UserWarning), pytest.raises(DataError, match=match):
            culnig(model, given)
    with pytest.raises(DataError, match="share is a share"):
        culnig(model, TARGET, share=1.5)
    missing = Questions(CONTROL.inputs[:12], CONTROL.answers[:12], CONTROL.groups[:12])  # type: ignore[index]
    with pytest.raises(DataError, match="'dol' has questions in the target"):
        culnig(network(), TARGET, missing, CONFOUND, "mlp.0")
    with pytest.warns(UserWarning), pytest.raises(DataError, match="has no tokenizer"):
        culnig(network(), Questions(TARGET.inputs, ["A"] * 16))
