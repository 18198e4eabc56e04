"""`Directions`: vectors by site; what they refuse, and that a file gives them back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import patchclamp as pc
from patchclamp.errors import DataError, StoreError, UnknownName


def some() -> pc.Directions:
    return pc.Directions({"resid_post.1": [[3.0, 4.0], [0.0, -2.0]], "mlp.0": np.eye(2, 5)}, names=["up", "down"])


def test_what_they_hold() -> None:
    directions = some()
    assert directions.sites == ["resid_post.1", "mlp.0"] == list(directions) and len(directions) == 2
    assert directions.names == ["up", "down"] and directions.count == 2
    assert directions["mlp.0"].dtype == np.float32 and directions["mlp.0"].shape == (2, 5)
    assert "mlp.0" in directions and "mlp.1" not in directions and directions.get("mlp.1") is None
    assert repr(directions) == "Directions(2 at resid_post.1, mlp.0: up, down)"
    assert pc.Directions({"mlp.0": np.zeros((6, 2))}).names == [str(number) for number in range(6)]
    assert repr(pc.Directions({"mlp.0": np.zeros((6, 2))})).endswith("0, 1, 2, 3, ...)")


def test_one_vector_and_tensors_of_any_kind() -> None:
    given = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16, requires_grad=True)
    assert pc.Directions({"a": given})["a"].tolist() == [[1.0, 2.0, 3.0]]
    mine = np.ones((1, 3))
    directions = pc.Directions({"a": mine})
    mine[:] = 5.0  # a value does not change afterwards
    assert directions["a"].tolist() == [[1.0, 1.0, 1.0]]


def test_parts_of_them() -> None:
    directions = some()
    assert directions.only("down", "up")["resid_post.1"].tolist() == [[0.0, -2.0], [3.0, 4.0]]
    assert directions.only("down").names == ["down"] and directions.only("down").sites == directions.sites
    assert directions.at("mlp.0").sites == ["mlp.0"] and directions.at("mlp.0").names == ["up", "down"]
    unit = directions.unit()
    np.testing.assert_allclose(unit["resid_post.1"], [[0.6, 0.8], [0.0, -1.0]], rtol=1e-6)
    assert unit.names == directions.names and directions["resid_post.1"][0, 0] == 3.0
    with pytest.raises(UnknownName, match=r"no direction is called 'dwn'\. The nearest: down"):
        directions.only("dwn")
    with pytest.raises(UnknownName, match=r"no site with directions is called 'mlp\.1'\. The nearest: mlp\.0"):
        directions.at("mlp.1")
    with pytest.raises(UnknownName, match=r"no site with directions is called 'mlp\.1'"):
        directions["mlp.1"]


def test_they_are_values() -> None:
    assert some() == some() and some() != some().only("up", "down").at("mlp.0")
    assert some() != pc.Directions(dict(some()), names=["up", "left"]) and some() != "directions"
    assert some() != pc.Directions({"resid_post.1": some()["resid_post.1"], "mlp.0": 2 * some()["mlp.0"]}, some().names)
    assert some().only("up") != some().only("down")
    with pytest.raises(TypeError):
        hash(some())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pc.Directions({}), r'directions are given by site, as in \{"resid_post\.3"'),
        (lambda: pc.Directions([1.0, 2.0]), "directions are given by site"),  # type: ignore[arg-type]
        (lambda: pc.Directions({"a": [[1.0, np.nan]]}), "a direction at a is not finite"),
        (lambda: pc.Directions({"a": [1e300]}), "a direction at a is not finite"),
        (lambda: pc.Directions({"a": np.zeros((0, 4))}), r"directions at a are \[n, size\], not \[0, 4\]"),
        (lambda: pc.Directions({"a": np.zeros((1, 2, 3))}), r"directions at a are \[n, size\], not \[1, 2, 3\]"),
        (lambda: pc.Directions({"a": 3.0}), r"directions at a are \[n, size\], not \[\]"),
        (lambda: pc.Directions({"a": ["x"]}), "the directions at a are not numbers"),
        (lambda: pc.Directions({"a": [[1.0], [1.0, 2.0]]}), "the directions at a are not numbers"),
        (lambda: pc.Directions({"a": np.eye(2), "b": np.eye(3)}), r"each site has as many directions: not \[2, 3\]"),
        (lambda: pc.Directions({"a": np.eye(2)}, ["x"]), r"2 directions have 2 different names, not \['x'\]"),
        (lambda: pc.Directions({"a": np.eye(2)}, ["x", "x"]), "2 directions have 2 different names"),
        (lambda: some().only("up", "up"), "2 directions have 2 different names"),
        (lambda: pc.Directions({"a": [[0.0, 0.0], [1.0, 0.0]]}).unit(), "direction '0' has length 0 at a"),
    ],
)
def test_what_they_do_not_take(make: Any, message: str) -> None:
    with pytest.raises(DataError, match=message), np.errstate(over="ignore"):
        make()


names = st.text(min_size=1, max_size=5)


@given(
    st.dictionaries(names, st.integers(1, 4), min_size=1, max_size=3),
    st.lists(names, min_size=1, max_size=4, unique=True),
)
def test_a_file_gives_them_back(tmp_path_factory, sizes: dict[str, int], listed: list[str]) -> None:
    generator = np.random.default_rng(len(listed))
    made = pc.Directions({site: generator.normal(size=(len(listed), size)) for site, size in sizes.items()}, listed)
    file = tmp_path_factory.mktemp("directions") / "made.safetensors"
    made.save(file)
    made.save(str(file))  # once more, over the first
    again = pc.Directions.load(file)
    assert again == made
    assert [each.name for each in file.parent.iterdir()] == [file.name]


def test_a_file_keeps_the_order_of_sites(tmp_path: Path) -> None:
    made = pc.Directions({"mlp.9": [1.0], "mlp.10": [2.0], "attn.0": [3.0]})
    made.save(tmp_path / "made.safetensors")
    assert pc.Directions.load(tmp_path / "made.safetensors") == made


def test_files_that_are_none(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    with pytest.raises(StoreError, match=r"there is no file .*missing"):
        pc.Directions.load(tmp_path / "missing")
    with pytest.raises(StoreError, match="there is no file"):
        pc.Directions.load(tmp_path)
    file = tmp_path / "other.safetensors"
    save_file({"a": np.zeros((2, 3), np.float32)}, file)
    with pytest.raises(StoreError, match=r"other\.safetensors is no file of directions"):
        pc.Directions.load(file)
    save_file({"a": np.zeros((2, 3), np.float32)}, file, {"names": '["x"]', "sites": '["a"]'})
    with pytest.raises(StoreError, match="is no file of directions: 2 directions have 2 different names"):
        pc.Directions.load(file)
    save_file({"a": np.zeros((2, 3), np.float32)}, file, {"names": '["x", "y"]', "sites": '["b"]'})
    with pytest.raises(StoreError, match="is no file of directions"):
        pc.Directions.load(file)
    file.write_bytes(b"something else")
    with pytest.raises(StoreError, match="is no file of directions"):
        pc.Directions.load(file)
    with pytest.raises(StoreError, match="cannot write"):
        some().save(tmp_path / "missing" / "made.safetensors")
    some().save(tmp_path / "made.safetensors")
    content = (tmp_path / "made.safetensors").read_bytes()
    (tmp_path / "made.safetensors").write_bytes(content[:-3])
    with pytest.raises(StoreError, match="is no file of directions"):
        pc.Directions.load(tmp_path / "made.safetensors")
