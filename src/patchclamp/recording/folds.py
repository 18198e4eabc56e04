"""The two folds of a data set: what describes a neuron reads the first, what scores the description reads the second.

The fold of an example is one bit of a hash of what it is: of the text, the pixels, the numbers. So a text that occurs
twice is in one fold, and so are all windows of a long document: nothing of what is scored has been described. The
folds are about equal, and the same in every recording of the data, whatever the batches and the order.

A batch that does not say in which fold its examples are (one made by hand) is divided by a hash of their ids. That
hash is the output of SplitMix64 (Steele, Lea and Flood, 2014): the number that its generator, started at the seed,
gives after as many steps as the id says. It is a bijection: no two ids of one seed share it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import overload

import numpy as np
import torch

FOLDS = 2
_SEED_OF_FOLDS = 0x666F6C6473  # "folds"


def fold_of_content(content: bytes | memoryview) -> int:
    """The fold of an example: 0 (for describing) or 1 (for scoring), from all that it is made of."""
    return hashlib.blake2b(content, digest_size=1).digest()[0] & 1


@overload
def fold_of(example: torch.Tensor) -> torch.Tensor: ...
@overload
def fold_of(example: np.ndarray | Sequence[int] | int) -> np.ndarray: ...
def fold_of(example: torch.Tensor | np.ndarray | Sequence[int] | int) -> torch.Tensor | np.ndarray:
    """The fold of each example, from its id alone: for batches that do not say it.

    Args:
        example: ids of examples, of any shape: a tensor, an array, or numbers.

    Returns:
        int64 in the same shape; a tensor for a tensor, else an array.
    """
    if isinstance(example, torch.Tensor):
        return hashed(example, _SEED_OF_FOLDS) & 1
    ids = np.array(example, dtype=np.int64)  # a copy: torch shares no memory that is read-only
    return (hashed(torch.from_numpy(ids), _SEED_OF_FOLDS) & 1).numpy()


def hashed(example: torch.Tensor, seed: int) -> torch.Tensor:
    """A random number for each id: int64, all 64 bits, the same for the same id and seed on every machine."""
    bits = _signed(seed) + (example.to(torch.int64) + 1) * _signed(0x9E3779B97F4A7C15)
    bits = (bits ^ _shifted(bits, 30)) * _signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ _shifted(bits, 27)) * _signed(0x94D049BB133111EB)
    return bits ^ _shifted(bits, 31)


def _shifted(bits: torch.Tensor, number: int) -> torch.Tensor:
    """To the right, with zeros from the left: torch itself would repeat the sign."""
    return (bits >> number) & ((1 << (64 - number)) - 1)


def _signed(number: int) -> int:
    """The int64 with these 64 bits."""
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >> 63 else number
