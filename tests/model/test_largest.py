"""The k largest of each row, against a sort that is written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from patchclamp.model.largest import largest

kinds = st.sampled_from(["normal", "few", "equal", "infinite"])
shapes = st.tuples(st.integers(1, 6), st.integers(1, 700))


def drawn(seed: int, kind: str, shape: tuple[int, int]) -> torch.Tensor:
    random = np.random.default_rng(seed)
    values = random.normal(size=shape)
    if kind == "few":
        values = random.choice([-1.0, -0.0, 0.0, 2.0], size=shape)
    elif kind == "equal":
        values = np.full(shape, 0.5)
    elif kind == "infinite":
        values[random.random(shape) < 0.3] = -np.inf
        values[random.random(shape) < 0.1] = np.inf
    return torch.from_numpy(values.astype(np.float32))


@given(st.integers(0, 2**32 - 1), kinds, shapes, st.sampled_from([1, 2, 3, 10, 65, 800]), st.booleans())
def test_it_is_the_start_of_a_stable_sort(seed: int, kind: str, shape: tuple[int, int], k: int, smallest: bool) -> None:
    values = drawn(seed, kind, shape)
    found, index = largest(values, k, smallest)
    key = values.numpy() if smallest else -values.numpy()
    order = np.argsort(key, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(index.numpy(), order)
    np.testing.assert_array_equal(found.numpy(), np.take_along_axis(values.numpy(), order, 1))


def test_a_part_of_a_wider_buffer() -> None:
    """What stands beside the columns is larger than all of them, and is not looked at."""
    buffer = torch.full((3, 704), 100.0)
    buffer[:, :690] = torch.randn(3, 690, generator=torch.Generator().manual_seed(0))
    found, index = largest(buffer[:, :690], 4)
    assert found.max() < 100 and index.max() < 690
    torch.testing.assert_close(found, buffer[:, :690].topk(4).values)


@pytest.mark.parametrize("smallest", [False, True])
def test_many_of_the_best_in_one_group_or_one_in_each(smallest: bool) -> None:
    values = torch.zeros(2, 640)
    values[0, 100:110] = torch.arange(1.0, 11.0)
    values[1, ::64] = torch.arange(1.0, 11.0)
    found, index = largest(-values if smallest else values, 10, smallest)
    assert index[0].tolist() == list(range(109, 99, -1)) and index[1].tolist() == list(range(576, -1, -64))
    assert found.abs().tolist() == [list(map(float, range(10, 0, -1)))] * 2
