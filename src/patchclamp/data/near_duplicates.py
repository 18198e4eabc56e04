"""Near duplicates among texts: MinHash finds candidates, an exact comparison decides.

A text is the set of its stretches of five words. Under a random order of all stretches, the smallest of two sets
agree with a probability that is their Jaccard similarity J = |A and B| / |A or B|. 128 such orders are cut into
bands of r; sets that agree in a whole band are candidates, which happens with probability 1 - (1 - J^r)^(128 / r).

Reference: A. Broder, "On the resemblance and containment of documents" (1997).
"""

from __future__ import annotations

import hashlib
from numbers import Real

import numpy as np

from patchclamp.data.sampling import whole_number
from patchclamp.errors import DataError

_ORDERS = 128
_WORDS = 5
_MISSED = 1e-4
_AT_ONCE = 4096


class NearDuplicates:
    """The texts that were kept so far; `add` says whether a further one repeats one of them.

    Args:
        threshold: smallest Jaccard similarity of near duplicates, in (0, 1].
        seed: draws the orders.

    Raises:
        DataError: the threshold is not in (0, 1].
    """

    def __init__(self, threshold: float, seed: int) -> None:
        if not isinstance(threshold, Real) or isinstance(threshold, bool) or not 0 < threshold <= 1:
            raise DataError(f"threshold is a similarity in (0, 1], not {threshold!r}")
        self._threshold = float(threshold)
        self._rows = _rows_of_a_band(self._threshold)
        draw = np.random.default_rng(whole_number("seed", seed, least=0))
        self._keys = draw.integers(0, 1 << 63, size=_ORDERS, dtype=np.uint64)
        self._kept: dict[int, np.ndarray] = {}
        self._bands: list[dict[bytes, list[int]]] = [{} for _ in range(_ORDERS // self._rows)]

    def add(self, index: int, text: str) -> int | None:
        """The index of the earliest kept text that this one nearly repeats; None, and the text is kept."""
        stretches = _stretches(text)
        signature = self._signature(stretches)
        bands = [signature[start : start + self._rows].tobytes() for start in range(0, _ORDERS, self._rows)]
        bands = bands[: len(self._bands)]
        candidates = {each for band, places in zip(bands, self._bands, strict=True) for each in places.get(band, ())}
        for candidate in sorted(candidates):
            if _jaccard(stretches, self._kept[candidate]) >= self._threshold:
                return candidate
        self._kept[index] = stretches
        for band, places in zip(bands, self._bands, strict=True):
            places.setdefault(band, []).append(index)
        return None

    def _signature(self, stretches: np.ndarray) -> np.ndarray:
        """The smallest stretch under each order, `[128]` uint64."""
        smallest = np.full(_ORDERS, np.iinfo(np.uint64).max, np.uint64)
        for start in range(0, len(stretches), _AT_ONCE):
            mixed = _mixed(stretches[start : start + _AT_ONCE, None] ^ self._keys)
            smallest = np.minimum(smallest, mixed.min(0))
        return smallest


def _stretches(text: str) -> np.ndarray:
    """Hashes of the stretches of five words, each once, ascending. uint64."""
    words = text.lower().split()
    parts = {"\0".join(words[start : start + _WORDS]) for start in range(max(1, len(words) - _WORDS + 1))}
    hashes = [hashlib.blake2b(part.encode(), digest_size=8).digest() for part in parts]
    return np.unique(np.frombuffer(b"".join(hashes), "<u8").astype(np.uint64))


def _jaccard(one: np.ndarray, other: np.ndarray) -> float:
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Each number scattered over 64 bits (the last steps of SplitMix64, which no two numbers share)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def _rows_of_a_band(threshold: float) -> int:
    """The longest band with which a pair at the threshold is missed once in 10,000 at most; else one row."""
    fitting = [r for r in range(1, _ORDERS + 1) if (1 - threshold**r) ** (_ORDERS // r) <= _MISSED]
    return max(fitting, default=1)
