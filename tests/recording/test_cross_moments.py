"""Sums of products of two sets of neurons: against brute force, however the rows come and wherever they drift."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from patchclamp.recording import cross_moments
from patchclamp.recording.cross_moments import CrossMoments

KINDS = ["normal", "few", "large mean", "tiny", "huge", "growing", "drifting", "double", "late"]


def drawn(seed: int, kind: str) -> tuple[NDArray, NDArray]:
    random = np.random.default_rng(seed)
    rows, first, second = (int(random.integers(1, high)) for high in (60, 6, 7))
    values = random.normal(size=(rows, first + second))
    values += values[:, random.permutation(first + second)] * random.choice([-2, 0, 1], size=first + second)
    if kind == "few":
        values = random.choice([-1.0, 0.0, 0.5], size=values.shape)
    elif kind == "large mean":
        values = 1e4 + 0.1 * values
    elif kind == "tiny":
        values *= 1e-30
    elif kind == "huge":
        values *= 1e30
    elif kind == "growing":
        values *= 10.0 ** np.linspace(-18, 18, rows)[:, None]
    elif kind == "drifting":
        values += 1e3 * (np.arange(rows) // 10)[:, None]
    elif kind == "late":  # constant, and then not
        values[: rows // 2] = 0.1
    values = values.astype(np.float64 if kind == "double" else np.float32)
    values[:, random.random(first + second) < 0.2] = 0.1
    return values[:, :first], values[:, first:]


def brute(first: NDArray, second: NDArray) -> NDArray:
    """One pair at a time in the widest float there is; NaN where one of the two is constant."""
    found = np.full((first.shape[1], second.shape[1]), np.nan)
    for i, one in enumerate(first.T.astype(np.longdouble)):
        for j, other in enumerate(second.T.astype(np.longdouble)):
            if np.ptp(one) > 0 and np.ptp(other) > 0:
                left, right = one - one.mean(), other - other.mean()
                found[i, j] = (left * right).sum() / np.sqrt((left**2).sum() * (right**2).sum())
    return found


def shown(first: NDArray, second: NDArray, cuts: list[int], **options: int) -> CrossMoments:
    dtype = torch.from_numpy(first).dtype
    moments = CrossMoments(first.shape[1], second.shape[1], dtype=dtype, **options)  # type: ignore[arg-type]
    for one, other in zip(np.split(first, cuts), np.split(second, cuts), strict=True):
        middle = second.shape[1] // 2  # the second set comes in two parts
        here = torch.from_numpy(other)
        moments.add([torch.from_numpy(one)], [here[:, :middle], here[:, middle:]])
    moments.close()
    return moments


@given(st.integers(0, 2**32 - 1), st.sampled_from(KINDS), st.sampled_from([1, 3, 16, 100]), st.integers(1, 3))
def test_however_the_rows_come(seed: int, kind: str, block_rows: int, pending: int) -> None:
    first, second = drawn(seed, kind)
    random = np.random.default_rng(seed)
    cuts = np.sort(random.integers(0, len(first) + 1, size=random.integers(0, 5))).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_moments, "_PENDING", pending)
        patch.setattr(cross_moments, "_CHUNK_ELEMENTS", int(random.choice([1, 20, 1 << 20])))
        patch.setattr(cross_moments, "_PRODUCT_ELEMENTS", int(random.choice([1, 20, 1 << 20])))
        moments = shown(first, second, cuts, block_rows=block_rows)
    assert moments.count == len(first)
    tolerance = 1e-10 if kind == "double" else 5e-6
    np.testing.assert_allclose(moments.r(slice(None)).numpy(), brute(first, second), rtol=0, atol=tolerance)
    part = moments.r(slice(0, 1), slice(1, None)).numpy()
    np.testing.assert_array_equal(part, moments.r(slice(None)).numpy()[:1, 1:])


def test_a_large_mean_and_a_million_rows() -> None:
    """A mean of 10,000 standard deviations, over which float32 sums lose every digit, and a drift on top."""
    random = np.random.default_rng(0)
    rows, moments = 1_000_000, CrossMoments(6, 5)
    total, means = np.zeros((11, 11)), np.zeros(11)
    mixing = random.normal(size=(4, 11))
    for start in range(0, rows, 10_000):
        values = 1e3 + 0.1 * (random.normal(size=(10_000, 4)) @ mixing + random.normal(size=(10_000, 11)))
        values[:, 3] += start * 1e-6
        values = values.astype(np.float32)
        # float64 has room for this shift, which is the same for all rows.
        wide = values.astype(np.float64) - 1e3
        total, means = total + wide.T @ wide, means + wide.sum(0)
        given_rows = torch.from_numpy(values)
        moments.add([given_rows[:, :6]], [given_rows[:, 6:]])
    moments.close()
    covariance = total / rows - np.outer(means / rows, means / rows)
    expected = covariance / np.sqrt(np.outer(covariance.diagonal(), covariance.diagonal()))
    assert moments.count == rows and np.abs(expected[:6, 6:]).max() > 0.5
    np.testing.assert_allclose(moments.r(slice(None)).numpy(), expected[:6, 6:], rtol=0, atol=1e-6)


def test_the_rows_that_are_given_are_left_as_they_are() -> None:
    values = torch.randn(50, 4)
    before = values.clone()
    moments = CrossMoments(4, 4, block_rows=16)
    moments.add([values], [values])
    moments.close()
    assert torch.equal(values, before)
    torch.testing.assert_close(moments.r(slice(None)).diagonal(), torch.ones(4, dtype=torch.float64))


def test_it_holds_what_it_says() -> None:
    first, second, rows = 700, 500, 256
    moments = CrossMoments(first, second, block_rows=rows)
    moments.add([torch.randn(rows + 5, first)], [torch.randn(rows + 5, second)])
    every = [moments.comoment, moments._product]
    every += [each for side in moments._sides for each in vars(side).values()]
    every += [each for pair in moments._pending for each in pair]
    held = sum(each.numel() * each.element_size() for each in every)
    # What is made in between and given back is said too; it is much only where the neurons are few.
    assert held <= CrossMoments.bytes_for(first, second, rows) < 3 * held
    assert CrossMoments.bytes_for(9216, 9216, 4096) < 1.8 * 8 * 9216**2


@pytest.mark.parametrize("how", ["autocast", "no gradient"])
def test_whatever_the_caller_has_set(how: str) -> None:
    values = torch.randn(300, 8, generator=torch.Generator().manual_seed(0), requires_grad=how == "no gradient")
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        moments = CrossMoments(8, 8)
        moments.add([values.detach()], [values.detach()])
        moments.close()
    expected = np.corrcoef(values.detach().double().numpy(), rowvar=False)
    np.testing.assert_allclose(moments.r(slice(None)).numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: torch.cuda.is_available() is False")
def test_on_a_gpu() -> None:
    values = torch.randn(9000, 60, generator=torch.Generator().manual_seed(0))
    moments = CrossMoments(20, 40, device="cuda")
    moments.add([values[:, :20].cuda()], [values[:, 20:].cuda()])
    moments.close()
    expected = np.corrcoef(values.double().numpy(), rowvar=False)[:20, 20:]
    np.testing.assert_allclose(moments.r(slice(None)).cpu().numpy(), expected, rtol=0, atol=1e-5)
