"""Frequency tagging: neurons whose activity rises and falls with sentences, or with phrases.

Sentences of equal length follow each other without a pause. What a neuron does on each unit (a word) is a series with
`sampling_rate` units a second, so that sentences of four words in two phrases come at 1 and 2 Hz where words come at 4.
A neuron that follows them has a peak there:

    X(k) = sum over t of x(t) exp(-2 pi i k t / N)        amplitude |X|, power |X|^2

A series without rhythm that has variance s^2 has a power that is exponential with mean e = s^2 N^2 / (N - 1), so that
p = exp(-|X|^2 / e); at the Nyquist frequency, half the sampling rate, |X|^2 / e is chi-squared with one degree of
freedom.

Two things are easily taken for more than they are. A neuron that answers to one word of each sentence also has a peak
at every multiple of the sentence rate, the phrase rate among them: it is marked. And 2 Hz *is* the Nyquist frequency of
4 Hz: a rhythm of amplitude 1 has N there, not N / 2 as elsewhere, or less by its phase, down to nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from patchclamp.errors import DataError, ModelError, unknown, warn
from patchclamp.model import Model, Site
from patchclamp.model.tokenize import TokenReader, require_tokenizer
from patchclamp.neurons import Neurons
from patchclamp.published import published
from patchclamp.statistics import benjamini_hochberg

Signal = np.ndarray | Mapping[str, np.ndarray]

_FEWEST_PERIODS = 30
_ROWS_AT_ONCE = 1 << 22  # elements of a block of permuted waves
_NULLS = ("analytic", "permute")
_CORRECTIONS = ("q", "p")


@dataclass(frozen=True)
class TaggedRate:
    """Where a rate lies in a spectrum.

    Attributes:
        name: of the rate.
        rate: in Hz.
        bin: which component of the Fourier transform it is.
        nyquist: whether it is half the sampling rate, where the amplitude depends on the phase.
        harmonic_of: names of the slower rates of which it is a multiple.
    """

    name: str
    rate: float
    bin: int
    nyquist: bool
    harmonic_of: tuple[str, ...]


@published(
    row="S034",
    title="Hierarchical Frequency Tagging Probe (HFTP): A Unified Approach to Investigate Syntactic Structure "
    "Representations in Large Language Models and the Human Brain",
    authors="An et al.",
    year=2025,
    url="https://arxiv.org/abs/2510.13255",
    part="detector",
)
def frequency_tagging(
    signal: Signal,
    control: Signal,
    rates: Mapping[str, float] | None = None,
    sampling_rate: float = 4.0,
    *,
    null: str = "analytic",
    permutations: int = 1000,
    screen: str = "q",
    level: float = 0.05,
    z: float = 2.0,
    seed: int = 0,
) -> Neurons:
    """Neurons (or electrodes) with a peak at the rate of sentences or phrases (An et al., 2025), clearest first.

    A neuron is screened by the amplitude of its average series, against the same series without order. Of those that
    pass, the mean amplitude over the series exceeds that of the control by a difference, of the others by 0; what
    is more than `z` standard deviations above the mean difference of all neurons of all sites is significant. That is
    relative: at most one neuron of 1 + z^2 can be, so that networks are better compared by `q`, and by a network
    that has learned nothing. Where each place in the sentences has words of its own, that one has peaks too.

    Args:
        signal: site -> `[series, units, neurons]`, as `tagging_signal` makes it, or one such array (site "signal").
        control: the same of units that are shuffled within every sentence; the number of series may differ.
        rates: name -> Hz; None: {"sentence": 1.0, "phrase": 2.0}.
        sampling_rate: units a second.
        null: of the screen: "analytic", the formula above, or "permute", series whose units are shuffled.
        permutations: how many of these; the same ones for all neurons.
        screen: what must be below `level`: "q", a false discovery rate over all neurons, or "p", as in the paper,
            by which one neuron of twenty passes in noise, and then most of these are called significant if no
            neuron has a real peak.
        level: of the screen.
        z: of the difference.
        seed: of the permutations.

    Returns:
        All neurons: `score`, the largest z; `kind`, "sentence only", "phrase only", "both" or "none"; `harmonic`,
        whether it is significant at a rate and at a multiple of it, which one rhythm explains; and for each rate
        `amplitude_<rate>` of the average series, `p_<rate>`, `q_<rate>`, `difference_<rate>` and `z_<rate>`.

    Raises:
        DataError: arrays of another shape, values that are not finite, a rate that is no component of the Fourier
            transform of so many units, or a control of other sites, neurons or length.
        UnknownName: no such null or screen.

    Warns:
        UserWarning: If the slowest rate has fewer than 30 periods.
    """
    for what, given, known in (("null", null, _NULLS), ("screen", screen, _CORRECTIONS)):
        if given not in known:
            raise unknown(what, given, known)
    series, controls = _checked(signal, "signal"), _checked(control, "control")
    units = next(iter(series.values())).shape[1]
    _refuse_unlike(series, controls, units)
    tagged = tagged_rates(units, {"sentence": 1.0, "phrase": 2.0} if rates is None else rates, sampling_rate)
    periods = min(each.bin for each in tagged)
    if periods < _FEWEST_PERIODS:
        warn(f"{periods} periods of the slowest rate are few: below {_FEWEST_PERIODS} a peak may well be chance")
    average = np.concatenate([each.mean(0) for each in series.values()], axis=1)
    waves = _waves(units, tagged)
    amplitude = np.abs(waves @ average)
    analytic = null == "analytic"
    p = _analytic(amplitude, average, tagged) if analytic else _permuted(amplitude, average, waves, permutations, seed)
    # Of a neuron that never changes all is rounding.
    p[:, average.std(0) <= 1e-12 * np.abs(average).max(0)] = 1.0
    q = np.stack([benjamini_hochberg(each) for each in p])
    passed = (q if screen == "q" else p) < level
    difference = np.where(passed, _mean_amplitude(series, waves) - _mean_amplitude(controls, waves), 0.0)
    spread = difference.std(1, keepdims=True)
    standing = (difference - difference.mean(1, keepdims=True)) / np.where(spread > 0, spread, 1.0)
    columns = {"amplitude": amplitude, "p": p, "q": q, "difference": difference, "z": standing}
    return _table(series, tagged, columns, passed & (standing > z))


def tagged_rates(units: int, rates: Mapping[str, float], sampling_rate: float) -> list[TaggedRate]:
    """Where rates lie in the spectrum of a series of so many units, slowest first.

    Raises:
        DataError: no rates, or one that is not a whole number of periods, or is faster than half the sampling rate.
    """
    if not rates or not sampling_rate > 0:
        raise DataError(
            f"rates are {{'sentence': 1.0}}, at a sampling rate above 0; not {dict(rates)} at {sampling_rate}"
        )
    found = []
    for name, rate in sorted(rates.items(), key=lambda each: each[1]):
        if not 0 < rate <= sampling_rate / 2:
            raise DataError(
                f"{name}: {rate:g} Hz cannot be seen at {sampling_rate:g} units a second: above 0, up to half"
            )
        place = rate * units / sampling_rate
        if abs(place - round(place)) > 1e-6:
            raise DataError(
                f"{name}: {units} units at {sampling_rate:g} a second are {place:.2f} periods of {rate:g} Hz: a whole "
                "number is wanted, so leave out the last, incomplete sentence"
            )
        multiples = [each.name for each in found if round(place) % each.bin == 0]
        found.append(TaggedRate(name, float(rate), round(place), 2 * round(place) == units, tuple(multiples)))
    return found


@published(
    row="S034",
    title="Hierarchical Frequency Tagging Probe (HFTP): A Unified Approach to Investigate Syntactic Structure "
    "Representations in Large Language Models and the Human Brain",
    authors="An et al.",
    year=2025,
    url="https://arxiv.org/abs/2510.13255",
    part="signal",
)
def tagging_signal(
    model: Model,
    sentences: Iterable[str | Sequence[str]],
    sites: str | Site | Iterable[str | Site] = "mlp.*",
    *,
    shuffles: int = 100,
    groups: int = 10,
    scrambled: bool = False,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """What neurons do on sentences that follow each other in random order, word by word (An et al., 2025).

    All sentences are one text without punctuation, which the model reads in one context.

    Args:
        model: with a fast tokenizer.
        sentences: of equally many words: texts that are split at spaces, or lists of words.
        sites: names or globs.
        shuffles: in how many orders the model reads them.
        groups: the average of every `shuffles / groups` of these is a series.
        scrambled: the control: the words of every sentence are shuffled, anew for each order, so that no two that
            followed each other still do.
        seed: of the orders, which are the same with and without `scrambled`.

    Returns:
        Site -> `[groups, units, neurons]` float64; the mean over a word's tokens.

    Raises:
        DataError: sentences of different lengths, or of one word; more tokens than the model can read at once; orders
            that do not divide into the groups; a word without tokens.
        ModelError: a slow tokenizer, or a site that does not have one row for each token.
        UnknownName: no such site.
    """
    words = _sentences(sentences)
    if shuffles < 1 or groups < 1 or shuffles % groups:
        raise DataError(f"{shuffles} orders do not divide into {groups} groups")
    reader = require_tokenizer(model.reader, "sentences")
    names = [site.name for site in model.select(sites)]
    orders, within = (np.random.default_rng([seed, each]) for each in (0, 1))
    ways = _without_neighbours(len(words[0])) if scrambled else np.arange(len(words[0]))[None]
    found: dict[str, np.ndarray] = {}
    for number in range(shuffles):
        order = orders.permutation(len(words))
        chosen = ways[within.integers(len(ways), size=len(words))]
        units = [words[each][place] for each, way in zip(order, chosen, strict=True) for place in way]
        averaged = _read(model, reader, units, names, len(words))
        for name, values in averaged.items():
            held = found.setdefault(name, np.zeros((groups, *values.shape)))
            held[number * groups // shuffles] += values * (groups / shuffles)
    return found


# Helpers --------------------------------------------------------------------------------------------


def _checked(signal: Signal, what: str) -> dict[str, np.ndarray]:
    given = dict(signal) if isinstance(signal, Mapping) else {"signal": signal}
    if not given:
        raise DataError(f"the {what} has no site")
    found = {name: np.asarray(each, np.float64) for name, each in given.items()}
    for name, each in found.items():
        if each.ndim != 3 or 0 in each.shape:
            raise DataError(f"the {what} of {name} is [series, units, neurons]; not {list(each.shape)}")
        if not np.isfinite(each).all():
            raise DataError(f"the {what} of {name} has a value that is not finite")
    return found


def _refuse_unlike(series: dict[str, np.ndarray], controls: dict[str, np.ndarray], units: int) -> None:
    if odd := sorted(series.keys() ^ controls.keys()):
        raise DataError(f"{odd[0]} is not in both the signal and the control")
    for name, each in series.items():
        for what, shape in (("signal", each.shape[1:]), ("control", controls[name].shape[1:])):
            if shape != (units, each.shape[2]):
                raise DataError(
                    f"the {what} of {name} has {shape[0]} units and {shape[1]} neurons; wanted are {units} and "
                    f"{each.shape[2]}"
                )


def _waves(units: int, tagged: Sequence[TaggedRate]) -> np.ndarray:
    """`[rates, units]` complex128: a series times these is its Fourier transform there."""
    # Turns are counted in whole numbers, so that waves are exact where they cross zero.
    turns = np.outer([each.bin for each in tagged], np.arange(units)) % units
    return np.exp(-2j * np.pi * turns / units)


def _mean_amplitude(series: dict[str, np.ndarray], waves: np.ndarray) -> np.ndarray:
    """`[rates, neurons of all sites]`: the mean over series of the amplitude."""
    return np.concatenate([np.abs(waves @ each).mean(0) for each in series.values()], axis=1)


def _analytic(amplitude: np.ndarray, average: np.ndarray, tagged: Sequence[TaggedRate]) -> np.ndarray:
    from scipy.stats import chi2

    units = len(average)
    expected = average.var(0) * units**2 / (units - 1)
    share = np.divide(amplitude**2, expected, out=np.zeros_like(amplitude), where=expected > 0)
    return np.stack([chi2.sf(r, 1) if each.nyquist else np.exp(-r) for r, each in zip(share, tagged, strict=True)])


def _permuted(
    amplitude: np.ndarray, average: np.ndarray, waves: np.ndarray, permutations: int, seed: int
) -> np.ndarray:
    if permutations < 19:
        raise DataError(f"with {permutations} permutations no p is below 0.05: at least 19 are needed")
    generator = np.random.default_rng(seed)
    units = len(average)
    centred = average - average.mean(0)
    reached = np.ones_like(amplitude)  # the series as it is counts as one of its permutations
    at_once = max(1, _ROWS_AT_ONCE // (units * len(waves)))
    for start in range(0, permutations, at_once):
        number = min(at_once, permutations - start)
        orders = generator.permuted(np.tile(np.arange(units), (number, 1)), axis=1)
        # The waves are shuffled instead of the series: one product then serves all neurons.
        found = np.abs(waves[:, orders].reshape(-1, units) @ centred).reshape(len(waves), number, -1)
        reached += (found >= amplitude[:, None] * (1 - 1e-12)).sum(1)
    return reached / (permutations + 1)


def _table(
    series: dict[str, np.ndarray], tagged: Sequence[TaggedRate], columns: dict[str, np.ndarray], significant: np.ndarray
) -> Neurons:
    sizes = {name: each.shape[2] for name, each in series.items()}
    place = {each.name: number for number, each in enumerate(tagged)}
    harmonic = np.zeros(significant.shape[1], bool)
    for each in tagged:
        for slower in each.harmonic_of:
            harmonic |= significant[place[each.name]] & significant[place[slower]]
    frame: dict[str, object] = {
        "site": np.repeat(list(sizes), list(sizes.values())),
        "index": np.concatenate([np.arange(size) for size in sizes.values()]),
        "score": columns["z"].max(0),
        "kind": [_kind(tagged, each) for each in significant.T],
        "harmonic": harmonic,
    }
    for each in tagged:
        frame |= {f"{name}_{each.name}": values[place[each.name]] for name, values in columns.items()}
    return Neurons.from_polars(pl.DataFrame(frame).sort("score", descending=True, maintain_order=True))


def _kind(tagged: Sequence[TaggedRate], significant: np.ndarray) -> str:
    names = [each.name for each, yes in zip(tagged, significant, strict=True) if yes]
    if len(names) == len(tagged) == 2:
        return "both"
    return f"{names[0]} only" if len(names) == 1 else " and ".join(names) or "none"


def _sentences(given: Iterable[str | Sequence[str]]) -> list[list[str]]:
    words = [each.split() if isinstance(each, str) else list(each) for each in given]
    if not words or len(words[0]) < 2:
        raise DataError("sentences of at least two words are wanted")
    for number, each in enumerate(words):
        if len(each) != len(words[0]):
            raise DataError(
                f"sentence {number} has {len(each)} words ({' '.join(each)!r}) and the first has {len(words[0])}: all "
                "must be equally long, or they have no rate"
            )
        if not all(isinstance(word, str) and word and not word.isspace() for word in each):
            raise DataError(f"sentence {number} has a word that is no text: {each!r}")
    return words


def _without_neighbours(number: int) -> np.ndarray:
    """`[ways, number]`: orders in which nothing is followed by what followed it before."""
    if number > 8:
        raise DataError(f"sentences of {number} units: the control is made for at most 8")
    orders = np.asarray(list(itertools.permutations(range(number))))
    return orders[(np.diff(orders, axis=1) != 1).all(1)]


def _read(
    model: Model, reader: TokenReader, units: list[str], sites: list[str], sentences: int
) -> dict[str, np.ndarray]:
    """Site -> `[units, neurons]` float64, the mean over the tokens of each unit."""
    text = " ".join(units)
    encoded = reader.encode([text], whole=True, offsets=True)[0]
    if reader.max_length is not None and len(encoded.ids) > reader.max_length:
        fit = sentences * reader.max_length // len(encoded.ids)
        raise DataError(
            f"{sentences} sentences are {len(encoded.ids)} tokens and {model.name} reads {reader.max_length} at once: "
            f"about {fit} sentences fit"
        )
    ends = np.cumsum([len(unit) + 1 for unit in units])  # with the space behind each
    assert encoded.offsets is not None
    # The last character of a token tells whose it is: the first may be the space before.
    owner = [
        -1 if special or not text[start:stop].strip() else int(np.searchsorted(ends, stop - 1, side="right"))
        for special, (start, stop) in zip(encoded.special, encoded.offsets, strict=True)
    ]
    which = np.asarray(owner)[None] == np.arange(len(units))[:, None]
    count = which.sum(1, keepdims=True)
    if not count.all():
        raise DataError(f"the tokenizer has no token for the unit {units[int(count.argmin())]!r}")
    found = {}
    for name, values in model.activations(text, sites).items():
        if tuple(values.shape[:-1]) != (len(owner),):
            raise ModelError(f"{name} shows {list(values.shape)} for {len(owner)} tokens: which row is whose?")
        found[name] = which @ values.detach().double().cpu().numpy() / count
    return found
