"""The float32 matrix-product peak of this machine, now: the fastest product of some common shapes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

Shape = tuple[int, int, int]  # rows, inner, columns

_SHAPES: tuple[Shape, ...] = ((2048, 2048, 2048), (4096, 1024, 4096), (4096, 768, 8192), (1024, 768, 50304))


class Peak:
    """Measures products of one shape, the best of those that are tried at the start.

    Args:
        more: shapes that are tried beside the common ones: those of the work that is compared.
    """

    def __init__(self, more: Sequence[Shape] = ()) -> None:
        tried = {shape: self._prepared(shape) for shape in (*_SHAPES, *more)}
        speeds = {shape: max(_speed(shape, product) for _ in range(3)) for shape, product in tried.items()}
        self.shape = max(speeds, key=lambda shape: speeds[shape])
        self._product = tried[self.shape]

    def __call__(self, seconds: float = 0.5) -> float:
        """Floating-point operations a second, over about so many seconds."""
        started, done = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            self._product()
            done += 1
        return done * operations(self.shape) / (time.perf_counter() - started)

    @property
    def words(self) -> str:
        """The shape."""
        return "{:,} x {:,} by {:,} x {:,}".format(*self.shape[:2], *self.shape[1:])

    @staticmethod
    def _prepared(shape: Shape) -> Callable[[], object]:
        rows, inner, columns = shape
        left, right, out = torch.randn(rows, inner), torch.randn(inner, columns), torch.empty(rows, columns)
        return lambda: torch.mm(left, right, out=out)


def operations(shape: Shape) -> int:
    """Of one product: a multiplication and an addition for each term."""
    rows, inner, columns = shape
    return 2 * rows * inner * columns


def _speed(shape: Shape, product: Callable[[], object]) -> float:
    product()
    started = time.perf_counter()
    product()
    return operations(shape) / (time.perf_counter() - started)
