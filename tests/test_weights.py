"""Places of single weights: sets, files, and that a network comes back as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

from patchclamp.errors import DataError, ModelError, StoreError, UnknownName
from patchclamp.weights import Weights


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def test_places_are_sorted_once_each_and_may_be_a_mask() -> None:
    mask = np.zeros((3, 4), bool)
    mask[1, 2] = mask[0, 3] = True
    assert (
        Weights({"0.weight": mask}) == Weights({"0.weight": torch.tensor([6, 3, 6])}) == Weights({"0.weight": [6, 3]})
    )
    weights = Weights({"0.weight": [6, 3], "2.bias": [], "0.bias": [1]})
    assert list(weights) == ["0.weight", "0.bias"] and weights.counts == {"0.weight": 2, "0.bias": 1}
    assert weights["0.weight"].dtype == np.int64 and weights["0.weight"].tolist() == [3, 6]
    assert weights.count == 3 and "2 in 0.weight" in repr(weights)
    with pytest.raises(UnknownName, match=r"0\.weight"):
        weights["0.wieght"]


def test_sets() -> None:
    one, two = Weights({"a": [1, 2, 3], "b": [0]}), Weights({"a": [3, 4], "c": [7]})
    assert one | two == Weights({"a": [1, 2, 3, 4], "b": [0], "c": [7]}) == two | one
    assert one & two == Weights({"a": [3]})
    assert one - two == Weights({"a": [1, 2], "b": [0]})
    assert (one - one).count == 0 and len(one - one) == 0
    assert one.jaccard(two) == pytest.approx(1 / 6) and one.jaccard(one) == 1.0
    assert Weights({}).jaccard(Weights({})) == 1.0 and one.jaccard(Weights({})) == 0.0


def test_a_copy_has_zeros_and_the_module_itself_has_not() -> None:
    module = network()
    before = {name: each.detach().clone() for name, each in module.named_parameters()}
    weights = Weights({"0.weight": [5, 11], "2.bias": [1]})
    made = weights.zeroed(module)
    expected = {name: each.clone() for name, each in before.items()}
    expected["0.weight"][1, 1] = expected["0.weight"][2, 3] = expected["2.bias"][1] = 0
    for name, each in made.named_parameters():
        assert torch.equal(each, expected[name])
    for name, each in module.named_parameters():
        assert torch.equal(each, before[name])


def test_silenced_for_a_while() -> None:
    module = network()
    with torch.no_grad():  # a parameter that does not lie contiguously
        module[0].weight = nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).T)  # type: ignore[union-attr]
    weights = Weights({"0.weight": [5, 11]})
    before = [each.detach().clone() for each in module.parameters()]
    inside = weights.zeroed(module)
    with pytest.raises(ZeroDivisionError), weights.silenced(module) as same:
        assert same is module and int((module[0].weight == 0).sum()) == 2  # type: ignore[union-attr]
        assert module[0].weight.detach()[[1, 2], [1, 3]].tolist() == [0, 0]  # type: ignore[union-attr, operator]
        torch.testing.assert_close(module(torch.ones(1, 4)), inside(torch.ones(1, 4)))
        raise ZeroDivisionError
    assert all(torch.equal(one, two) for one, two in zip(before, module.parameters(), strict=True))


def test_random_sets_are_alike() -> None:
    module, weights = network(), Weights({"0.weight": [5, 11, 0], "2.bias": [1]})
    one, again, other = weights.sample_like(module, 1), weights.sample_like(module, 1), weights.sample_like(module, 2)
    assert one == again != other and one.counts == other.counts == weights.counts
    assert one["0.weight"].max() < 12


def test_files(tmp_path: Path) -> None:
    weights = Weights({"0.weight": [5, 2**40], "2.bias": [1]})
    weights.save(tmp_path / "subject.safetensors")
    assert Weights.load(tmp_path / "subject.safetensors") == weights
    assert not list(tmp_path.glob("*.part"))
    with pytest.raises(StoreError, match="there is no file"):
        Weights.load(tmp_path / "other.safetensors")
    save_file({"0.weight": np.zeros(3, np.int64)}, tmp_path / "foreign.safetensors")
    with pytest.raises(StoreError, match="not written by"):
        Weights.load(tmp_path / "foreign.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(StoreError, match="no places of weights"):
        Weights.load(tmp_path / "broken.safetensors")
    with pytest.raises(StoreError, match="cannot write"):
        weights.save(tmp_path / "no" / "folder.safetensors")


def test_bad_input_is_said() -> None:
    for wrong, match in [([0.5], "whole numbers"), ([-1], "-1 is no place"), (["a"], "whole numbers")]:
        with pytest.raises(DataError, match=match):
            Weights({"a": wrong})
    with pytest.raises(DataError, match="by parameter"):
        Weights([1, 2])  # type: ignore[arg-type]
    module = network()
    with pytest.raises(UnknownName, match=r"0\.weight"):
        Weights({"0.weigth": [0]}).zeroed(module)
    with pytest.raises(ModelError, match="12 weights, and 12"), Weights({"0.weight": [12]}).silenced(module):
        pass
