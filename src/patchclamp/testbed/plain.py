"""Planted neurons in a plain network of one hidden layer, which is given vectors.

Its examples are independent, which makes it the bed on which error rates are easiest to check. A vector is the
direction of its category, weaker or stronger, among random ones.
"""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import polars as pl
import torch
from torch import nn

from patchclamp.data import Tensors
from patchclamp.errors import DataError, unknown
from patchclamp.model import load
from patchclamp.neurons import Neurons
from patchclamp.testbed.planted import Difficulty, Planted, Question
from patchclamp.testbed.residual import unit
from patchclamp.testbed.world import LANGUAGES

PLAIN_ROLES = ("dead", "selective", "selective_several", "selective_all", "polysemantic")
WIDTH = 64


def plain(
    roles: tuple[str, ...] | None, count: int, level: Difficulty, neurons: int, examples: int, seed: int
) -> Planted:
    """A `Linear`, a ReLU and a `Linear`; see `testbed.plant`.

    Outputs are one for each category, then two that stand for the format.

    Raises:
        UnknownName: a role that such a network cannot have.
        DataError: more is planted than half of the layer.
    """
    chosen = PLAIN_ROLES if roles is None else tuple(roles)
    for role in chosen:
        if role not in PLAIN_ROLES:
            raise unknown("role of a plain network", role, PLAIN_ROLES)
    todo = _jobs(chosen, count)
    if len(todo) > neurons // 2:
        raise DataError(f"{len(todo)} neurons would be planted in a layer of {neurons}: at least {2 * len(todo)}")
    made = np.random.default_rng([seed, 8])
    features = _features(level, made)
    which = np.arange(examples) % len(LANGUAGES)
    odd = made.random(examples) < 0.2  # a second, unrelated thing, for polysemantic neurons
    given = _vectors(features, which, odd, level, made)
    read, bias, write = _ordinary(given, neurons, level, made)
    truth = []
    for index, (role, reads, decoy_of) in zip(made.permutation(neurons), todo, strict=False):
        fires = np.isin(which, reads) | (odd & (len(LANGUAGES) in reads))
        noise = made.standard_normal(WIDTH) / np.sqrt(WIDTH)
        direction = unit(features[list(reads)].sum(0)) if reads else made.standard_normal(WIDTH)
        direction = unit(direction + (level.noise + 0.7 * bool(decoy_of)) * noise)
        read[index], bias[index] = _reads(direction, given @ direction, fires, role, decoy_of)
        write[index] = _writes(role, reads)
        truth.append(_row(int(index), role, reads, decoy_of))
    labels = {"language": [LANGUAGES[each] for each in which], "odd": np.where(odd, "yes", "no").tolist()}
    questions = (Question("selective", "language", LANGUAGES),) if "selective" in chosen else ()
    facts = {"architecture": "mlp", "seed": seed, "layers": 1, "neurons": neurons, **asdict(level)}
    data = Tensors(torch.from_numpy(given.astype(np.float32)), labels)
    return Planted(
        load(_network(read, bias, write)), data, Neurons.from_polars(pl.DataFrame(truth)), questions, None, None, facts
    )


def quantile_of_each(columns: np.ndarray, share: np.ndarray) -> np.ndarray:
    """`[columns]`: of each column its own quantile."""
    # Sorting float32 by rows is many times faster than a quantile of each float64 column.
    rows = np.sort(np.ascontiguousarray(columns.T, np.float32), axis=1)
    return rows[np.arange(len(rows)), (share * (rows.shape[1] - 1)).astype(int)].astype(np.float64)


# Helpers --------------------------------------------------------------------------------------------


def _features(level: Difficulty, made: np.random.Generator) -> np.ndarray:
    """`[categories + 1, WIDTH]`, unit rows: what each category looks like, and the odd thing."""
    number = len(LANGUAGES) + 1
    straight = np.linalg.qr(made.standard_normal((WIDTH, WIDTH)))[0][:number]
    mixed = made.standard_normal((number, WIDTH)) / np.sqrt(WIDTH)
    features = np.sqrt(1 - level.superposition**2) * straight + level.superposition * mixed
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def _vectors(
    features: np.ndarray, which: np.ndarray, odd: np.ndarray, level: Difficulty, made: np.random.Generator
) -> np.ndarray:
    # Some examples show their category weakly: the more of them, the rarer it is.
    strength = np.where(made.random(len(which)) < level.own_words, 6.0, 2.0)
    given = made.standard_normal((len(which), WIDTH))
    return given + strength[:, None] * features[which] + 6.0 * odd[:, None] * features[-1]


def _ordinary(
    given: np.ndarray, neurons: int, level: Difficulty, made: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Neurons that read and write at random: `[neurons, WIDTH]`, `[neurons]`, `[neurons, outputs]`."""
    read = made.standard_normal((neurons, WIDTH))
    read /= np.linalg.norm(read, axis=1, keepdims=True)
    found = given @ read.T
    rates = np.exp(made.uniform(np.log(0.05), np.log(0.4), neurons))
    gain = np.exp(level.loudness * (0.5 + made.standard_normal(neurons))) / found.std(0)
    write = 0.02 * made.standard_normal((neurons, len(LANGUAGES) + 2)) / gain[:, None]
    return gain[:, None] * read, -gain * quantile_of_each(found, 1 - rates), write


def _network(read: np.ndarray, bias: np.ndarray, write: np.ndarray) -> nn.Module:
    first, last = nn.Linear(*read.shape[::-1]), nn.Linear(*write.shape)
    with torch.no_grad():
        for layer, weight, offset in ((first, read, bias), (last, write.T, np.zeros(write.shape[1]))):
            layer.weight.copy_(torch.from_numpy(np.ascontiguousarray(weight, np.float32)))
            layer.bias.copy_(torch.from_numpy(offset.astype(np.float32)))
    return nn.Sequential(first, nn.ReLU(), last).eval()


def _row(index: int, role: str, reads: tuple[int, ...], decoy_of: str) -> dict[str, object]:
    named = [(*LANGUAGES, "odd")[each] for each in reads]
    writes = {"decoy_without_effect": "nothing", "decoy_format": "format"}.get(role, "its categories")
    return {
        "site": "mlp.0",
        "index": index,
        "role": role,
        "label": ", ".join(named) if (decoy_of or role).startswith("selective") else "",
        "reads": " ".join(named),
        "writes": writes,
        "decoy_of": decoy_of,
    }


def _jobs(roles: tuple[str, ...], count: int) -> list[tuple[str, tuple[int, ...], str]]:
    """Role, what it reads (places of categories; the one behind them is the odd thing), what it is a decoy of."""
    number = len(LANGUAGES)
    reads = {
        "dead": [()],
        "selective": [(each,) for each in range(number)],
        "selective_several": [(each, (each + 1) % number) for each in range(number - 1)],
        "selective_all": [tuple(range(number))],
        "polysemantic": [(0, number)],
    }
    todo: list[tuple[str, tuple[int, ...], str]] = []
    for role in roles:
        for each in reads[role]:
            todo += [(role, each, "")] * count
            todo += [("decoy_without_effect", each, role), ("decoy_format", each, role)]
    return todo


def _reads(
    direction: np.ndarray, value: np.ndarray, fires: np.ndarray, role: str, decoy_of: str
) -> tuple[np.ndarray, float]:
    if "dead" in (role, decoy_of):
        threshold = value.max() + 4 * value.std() if role == "dead" else np.quantile(value, 0.99)
        gain = 1 / value.std()
    elif fires.all():
        threshold, gain = value.min() - 0.1, 1.0
    else:
        threshold = (np.quantile(value[fires], 0.1) + np.quantile(value[~fires], 0.99)) / 2
        gain = 4.5 / max(np.quantile(value[fires], 0.9) - threshold, 0.1)
        if decoy_of:
            threshold = np.median(value[fires])
    return gain * direction, float(-gain * threshold)


def _writes(role: str, reads: tuple[int, ...]) -> np.ndarray:
    row = np.zeros(len(LANGUAGES) + 2)
    if role == "decoy_format":
        row[len(LANGUAGES) :] = 0.5
    elif role != "decoy_without_effect":
        row[[each for each in reads if each < len(LANGUAGES)]] = 0.5
    return row
