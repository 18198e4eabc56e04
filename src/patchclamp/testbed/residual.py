"""The residual stream of a planted model: which of its directions mean what.

It is cut into orthogonal parts, and turned so that no coordinate is any part's own (but for one that the massive
activation has for itself). All parts are orthogonal to the vector of ones, so that a layer norm, which takes off the
mean, does not mix them.

    code      of the token            previous  code of the token before
    position  sines and cosines       output    what the unembedding reads
    scalars   constant, share of the beginning, harm so far, copying, null space, log frequency, idle
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CODE, PREVIOUS, POSITION, OUTPUT = 48, 36, 16, 32
SCALARS = ("constant", "beginning", "harm", "copying", "null", "frequency", "idle")
WIDTH, HEADS = 144, 4
HEAD = WIDTH // HEADS


@dataclass(frozen=True, eq=False)
class Residual:
    """Directions of the parts.

    Attributes:
        parts: name -> `[WIDTH, size]` float64, orthonormal columns; scalars have one.
        massive: `[WIDTH]`, one coordinate axis.
    """

    parts: dict[str, np.ndarray]
    massive: np.ndarray

    def scalar(self, name: str) -> np.ndarray:
        """`[WIDTH]`: the direction of one scalar."""
        return self.parts[name][:, 0]


def residual(seed: int) -> Residual:
    """Parts at random directions."""
    made = np.random.default_rng([seed, 3])
    axis = np.zeros(WIDTH)
    axis[int(made.integers(WIDTH))] = 1.0
    fixed = np.stack([np.ones(WIDTH), axis], 1)
    basis = np.linalg.qr(np.concatenate([fixed, made.standard_normal((WIDTH, WIDTH - 2))], 1))[0][:, 2:]
    parts, place = {}, 0
    sizes = {"code": CODE, "previous": PREVIOUS, "position": POSITION, "output": OUTPUT} | dict.fromkeys(SCALARS, 1)
    for name, size in sizes.items():
        parts[name] = basis[:, place : place + size]
        place += size
    return Residual(parts, axis)


@dataclass(frozen=True, eq=False)
class Codes:
    """What stands for each token.

    Attributes:
        code: `[tokens, CODE]` float64, unit rows: what a token is when it is read.
        output: `[tokens, OUTPUT]`, unit rows: what says it when it is predicted.
        features: class -> `[CODE]`, what the codes of its words have in common.
        output_features: class -> `[OUTPUT]`.
    """

    code: np.ndarray
    output: np.ndarray
    features: dict[str, np.ndarray]
    output_features: dict[str, np.ndarray]


def codes(classes: dict[str, tuple[str, ...]], alone: tuple[str, ...], superposition: float, seed: int) -> Codes:
    """Draw codes.

    Args:
        classes: class -> its words, in the order of the token ids.
        alone: classes whose words, when predicted, share nothing with any other word.
        superposition: from 0, where features of classes are orthogonal, to 1, where they are random directions.
        seed: of the draw.
    """
    made = np.random.default_rng([seed, 4])
    features = _features(made, list(classes), CODE, superposition)
    kept = OUTPUT - sum(len(classes[each]) for each in alone)
    others = [each for each in classes if each not in alone]
    narrow = _features(made, others, kept, superposition)
    code, output, reserved = [], [], kept
    outputs = {}
    for name, words in classes.items():
        # A single word of its class is all of it.
        shared = _SHARED if len(words) > 1 and name not in _OWN else 0.0
        code.append(shared * features[name] + np.sqrt(1 - shared**2) * _unit(made, len(words), CODE))
        rows = np.zeros((len(words), OUTPUT))
        if name in alone:
            rows[np.arange(len(words)), reserved + np.arange(len(words))] = 1.0
            reserved += len(words)
        else:
            rows[:, :kept] = shared * narrow[name] + np.sqrt(1 - shared**2) * _unit(made, len(words), kept)
        output.append(rows)
        outputs[name] = np.concatenate([narrow[name], np.zeros(OUTPUT - kept)]) if name in narrow else rows.mean(0)
    return Codes(_norm(np.concatenate(code)), _norm(np.concatenate(output)), features, outputs)


def unit(vector: np.ndarray) -> np.ndarray:
    """A vector of the same direction, of length 1."""
    return vector / np.linalg.norm(vector)


# Helpers --------------------------------------------------------------------------------------------

# How much of a word's code is that of its class.
_SHARED = 0.7
# Classes whose words are each for themselves.
_OWN = frozenset({"special", "format", "single", "after single", "first of pair", "second of pair", "after pair"})


def _features(made: np.random.Generator, names: list[str], size: int, superposition: float) -> dict[str, np.ndarray]:
    straight = np.linalg.qr(made.standard_normal((size, min(size, len(names)))))[0].T
    mixed = _unit(made, len(names), size)
    # More classes than dimensions: those beyond are random directions, whatever is asked for.
    mixed[: len(straight)] = np.sqrt(1 - superposition**2) * straight + superposition * mixed[: len(straight)]
    return dict(zip(names, _norm(mixed), strict=True))


def _unit(made: np.random.Generator, number: int, size: int) -> np.ndarray:
    return _norm(made.standard_normal((number, size)))


def _norm(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
