"""`domains`: the same neurons in two modules of another width and number of tokens, and what overlaps."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

import patchclamp as pc
from patchclamp.find.domains import domains_overlap

DOMAINS = ("driving", "medical", "remote")
SIZE = 40


class Block(nn.Module):
    """Its neurons are its inputs, cut at 0; it adds nothing to them."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(size, size, bias=False), nn.ReLU(), nn.Linear(size, size, bias=False)
        with torch.no_grad():
            self.up.weight.copy_(torch.eye(size))
            self.down.weight.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.act(self.up(x)))


class TwoModules(nn.Module):
    """The second has three times the neurons, each three times, and half of the tokens, scaled by `gain`."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.vision, self.language = nn.ModuleList([Block(SIZE)]), nn.ModuleList([Block(3 * SIZE)])
        self.gain = gain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.vision[0](x)
        y = torch.cat([x, x, x], -1)[:, : x.shape[1] // 2] * self.gain
        return self.language[0](y).mean(1)


def planted(seed: int = 0, examples: int = 200) -> tuple[torch.Tensor, list[str]]:
    """Neurons 3, 10, 17 fire on one domain each, 24 on the last two, the rest on about a third of all examples."""
    made = np.random.default_rng(seed)
    rates = np.repeat(made.uniform(0.2, 0.4, SIZE)[:, None], 3, 1)
    for place in range(3):
        rates[7 * place + 3] = 0.01
        rates[7 * place + 3, place] = 0.9
    rates[24] = [0.0, 0.8, 0.9]
    kinds = np.arange(3 * examples) % 3
    fires = made.random((3 * examples, SIZE)) < rates[:, kinds].T
    # All tokens of an example are alike, so that rates are the same however many tokens there are.
    values = np.repeat(np.where(fires, 1.0, -1.0)[:, None], 4, 1)
    return torch.from_numpy(values.astype(np.float32)), [DOMAINS[each] for each in kinds]


def recorded(network: nn.Module, given: torch.Tensor, labels: list[str], sites: str = "*.mlp.*") -> pc.Recording:
    data = pc.Tensors(given, labels={"domain": labels})
    model = pc.load(network.eval(), example=given[:1])
    return pc.record(model, data, sites, [pc.ByLabel(), pc.Pooled("fired", dtype="float32")], progress=False)


def test_the_same_neurons_in_a_module_of_other_width_and_tokens_get_the_same() -> None:
    recording = recorded(TwoModules(), *planted())
    assert recording["vision.mlp.0"].count == 2 * recording["language.mlp.0"].count
    found = pc.find.domains(recording, "domain", top_rate=0.1).to_polars()
    assert set(found["module"]) == {"vision", "language"}
    vision = found.filter(pl.col("module") == "vision").sort("index").drop("site", "index", "module")
    language = found.filter(pl.col("module") == "language").sort("index")
    for copy in range(3):
        there = language.slice(copy * SIZE, SIZE).drop("site", "index", "module")
        assert there.equals(vision)
    selected = found.filter(pl.col("selected") & (pl.col("module") == "vision"))
    owners = dict(zip(selected["index"], selected["owners"], strict=True))
    assert owners == {3: "driving", 10: "medical", 17: "remote", 24: "medical, remote"}


def test_a_module_does_not_depend_on_the_others() -> None:
    """Not on what fires there, nor on whether it was recorded; and it is `lape` of the module alone."""
    given, labels = planted()
    both = pc.find.domains(recorded(TwoModules(), given, labels), "domain", null="permute", permutations=39)
    silent = pc.find.domains(recorded(TwoModules(-1.0), given, labels), "domain", null="permute", permutations=39)
    alone = recorded(TwoModules(), given, labels, "vision.mlp.*")
    expected = pc.find.domains(alone, "domain", null="permute", permutations=39)
    assert both.at("vision.mlp.0") == silent.at("vision.mlp.0") == expected
    assert both.at("language.mlp.0") != silent.at("language.mlp.0")
    lape = pc.find.lape(alone, "domain", null="permute", permutations=39)
    assert expected.to_polars().select(lape.columns).equals(lape.to_polars())


def test_overlap_is_a_share_of_the_neurons_of_one_domain() -> None:
    found = pc.find.domains(recorded(TwoModules(), *planted()), "domain", top_rate=0.1)
    overlap = domains_overlap(found)
    assert len(overlap) == 2 * 6
    rows = {(row["module"], row["label"], row["other"]): row for row in overlap.iter_rows(named=True)}
    assert [rows["vision", "medical", each]["share"] for each in ("remote", "driving")] == [0.5, 0]
    assert (rows["vision", "driving", "medical"]["neurons"], rows["vision", "driving", "medical"]["share"]) == (1, 0)
    assert (rows["language", "medical", "remote"]["neurons"], rows["language", "medical", "remote"]["share"]) == (
        6,
        0.5,
    )


def test_overlap_is_not_symmetric_and_null_where_there_is_nothing() -> None:
    frame = pl.DataFrame({"site": ["a"] * 4, "index": range(4), "module": ["m"] * 4})
    owned = {"x": [True, True, True, False], "y": [False, False, True, False], "z": [False] * 4}
    found = frame.with_columns(pl.Series(f"owned_by_{each}", values) for each, values in owned.items())
    rows = {
        (row["label"], row["other"]): row["share"]
        for row in domains_overlap(pc.Neurons.from_polars(found)).iter_rows(named=True)
    }
    assert rows == {
        ("x", "y"): pytest.approx(1 / 3),
        ("x", "z"): 0,
        ("y", "x"): 1,
        ("y", "z"): 0,
        ("z", "x"): None,
        ("z", "y"): None,
    }


def test_modules_may_be_named() -> None:
    recording = recorded(TwoModules(), *planted())
    stacks = pc.find.domains(recording, "domain").to_polars()
    named = pc.find.domains(recording, "domain", modules={"language": ["language.*"], "vision": "vision.mlp.?"})
    assert named.to_polars().sort("site", "index").equals(stacks.sort("site", "index"))
    one = pc.find.domains(recording, "domain", modules={"all": "*"}).to_polars()
    assert set(one["module"]) == {"all"} and one["selected"].sum() == 2
    lape = pc.find.lape(recording, "domain")
    assert one.select(lape.columns).equals(lape.to_polars())


def test_bad_modules_are_said() -> None:
    recording = recorded(TwoModules(), *planted(examples=20))
    for modules, match in [
        ({"vision": "vision.*"}, r"language\.mlp\.0 is in none of the modules vision"),
        ({"one": "*", "two": "vision.*"}, "in two modules, 'one' and 'two'"),
        ({"one": "*", "two": "visoin.*"}, "nearest: vision.mlp.0"),
        ({}, "names none"),
    ]:
        with pytest.raises(pc.errors.PatchclampError, match=match):
            pc.find.domains(recording, "domain", modules=modules)
    with pytest.raises(pc.errors.DataError, match="owned_by_"):
        domains_overlap(pc.find.lape(recording, "domain"))
    with pytest.warns(UserWarning, match="domains, (vision|language): .* pass the filter"):
        pc.find.domains(recording, "domain", modules={"vision": "v*", "language": "l*"}, top_rate=0.9)
