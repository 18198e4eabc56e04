"""Is an explanation of a neuron true? It fires on the concept and on nothing else; and the network uses it for that.

Two claims, two tests. Seen from outside: of strings that refer to the concept and strings that do not, on which is the
neuron active? And as a cause: when a prompt is run with the value that the neuron had on a prompt of another concept
(at the concept's token), is the other prompt's answer given? The second is beside as many random neurons, and the
whole layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from patchclamp.errors import DataError, ModelError, UnknownName
from patchclamp.model import Model
from patchclamp.model.hooks import first_tensor, hooked, reading
from patchclamp.model.tokenize import TokenReader, pad, require_tokenizer
from patchclamp.neurons import Neuron, Neurons
from patchclamp.published import published
from patchclamp.recording import Recording
from patchclamp.statistics import average_precision

Explanation = Callable[[list[str]], Sequence[bool]] | Collection[str]
"""Which tokens refer to the concept: a function from a text's tokens to a truth value for each, or a set of tokens."""

_part = partial(
    published,
    row="S098",
    title="Rigorously Assessing Natural Language Explanations of Neurons",
    authors="Huang et al.",
    year=2023,
    url="https://arxiv.org/abs/2309.10312",
)


@dataclass(frozen=True, eq=False)
class Observed:
    """How far "active" and "refers to the concept" are the same.

    Attributes:
        neuron: which.
        threshold: above it the neuron is active.
        precision: share of the active examples that refer to the concept; 0 where none is active.
        recall: share of the examples of the concept on which it is active.
        type_1: share of the other examples on which it is active all the same.
        type_2: share of the examples of the concept on which it is not.
        average_precision: over all thresholds; the share of the concept's examples for a neuron that does not care.
        curve: `[thresholds, 3]` float64: every value as a threshold (active: that or more), precision, recall.
        values: `[examples]` float64, the largest activation in each; the concept's examples first.
        refers: `[examples]` bool.
    """

    neuron: Neuron
    threshold: float
    precision: float
    recall: float
    type_1: float
    type_2: float
    average_precision: float
    curve: np.ndarray = field(repr=False)
    values: np.ndarray = field(repr=False)
    refers: np.ndarray = field(repr=False)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


@_part(part="observational")
def observational(
    of: Model | Recording,
    neuron: str | Neuron | tuple[str, int],
    positives: Sequence[Any] | None = None,
    negatives: Sequence[Any] | None = None,
    *,
    explanation: Explanation | None = None,
    texts: Sequence[str] | None = None,
    threshold: float = 0.0,
) -> Observed:
    """Is a neuron active on all that an explanation says, and on nothing else?

    Args:
        of: the model; or a recording with `Pooled("max")`.
        neuron: "mlp.3:417".
        positives: texts that refer to the concept; a text alone counts whole (special tokens aside), `(text, part)`
            only at the tokens of that part of it. Of a recording: numbers of examples.
        negatives: likewise, that do not refer to it.
        explanation: instead, with `texts`: which tokens refer to the concept. Then each token is an example. A set
            holds tokens as `model.tokens` gives them; spaces at their ends do not count.
        texts: where the explanation is tried.
        threshold: above it a neuron is active. 0 calls a GELU active on tiny values: look at the curve.

    Raises:
        DataError: no positives or no negatives, a part that is not in its text, an activation that is not finite.
        UnknownName: there is no such neuron.
    """
    which = Neuron.parse(neuron) if isinstance(neuron, str) else Neuron(*neuron)
    if (explanation is None) != (texts is None) or (positives is None) != (negatives is None):
        raise DataError("give positives and negatives, or an explanation and texts")
    if (positives is None) == (texts is None):
        raise DataError("give positives and negatives, or an explanation and texts: one of the two")
    if isinstance(of, Recording):
        if positives is None or negatives is None:
            raise DataError("a recording has one value for each example: give numbers of positives and negatives")
        yes, no = (_of_recording(of, which, each) for each in (positives, negatives))
    elif texts is not None and explanation is not None:
        yes, no = _of_tokens(of, which, texts, explanation)
    else:
        yes, no = (_of_texts(of, which, each or ()) for each in (positives, negatives))
    if not len(yes) or not len(no):
        raise DataError(f"there is no example that {'refers' if not len(yes) else 'does not refer'} to the concept")
    values = np.concatenate([yes, no])
    if not np.isfinite(values).all():
        raise DataError(f"an activation of {which} is not finite")
    refers = np.arange(len(values)) < len(yes)
    active = values > threshold
    hits = int((active & refers).sum())
    return Observed(
        which,
        threshold,
        hits / int(active.sum()) if active.any() else 0.0,
        hits / len(yes),
        float(active[~refers].mean()),
        1 - hits / len(yes),
        float(average_precision(refers, values)),
        _curve(values, refers),
        values,
        refers,
    )


@dataclass(frozen=True, eq=False)
class Mediated:
    """How often the values of neurons bring the source's answer.

    Attributes:
        iia: interchange intervention accuracy: share of the pairs in which the source's answer is given.
        random: `[sets]` float64, the same for random neurons, as many at each site.
        layer: the same for all neurons of the sites.
        pairs: how many pairs the shares are of.
        unknown: pairs left out: the network does not answer base and source rightly as they are.
        changed: `[pairs]` bool, where the neurons brought it.
    """

    iia: float
    random: np.ndarray
    layer: float
    pairs: int
    unknown: int
    changed: np.ndarray = field(repr=False)

    @property
    def p(self) -> float:
        """Share of random sets that do as well, these neurons counted among them; 1 without any set."""
        return (1 + int((self.random >= self.iia).sum())) / (1 + len(self.random))


@_part(part="interventional")
def interventional(
    model: Model,
    neurons: Neurons,
    pairs: Sequence[Any],
    *,
    among: str = "vocabulary",
    at: str = "concept",
    known: bool = True,
    controls: int = 10,
    seed: int = 0,
) -> Mediated:
    """Do neurons carry a concept to the answer? Each base prompt is run with their values on its source prompt.

    Args:
        model: a decoder with a tokenizer.
        neurons: those that are said to represent the concept, at one site or several.
        pairs: (base, source, base answer, source answer): two texts that differ in the concept's value, and the token
            that follows each, as an id or as a text of one token. Where they have not as many tokens, or not at the
            same places, a fifth entry says which go together: [(place in the base, place in the source), ...].
        among: "vocabulary": the source's answer must be the likeliest of all tokens; "answers": likelier than the
            base's.
        at: "concept": at the tokens in which base and source differ; "all": at all tokens. The places of a fifth entry
            are taken as they are.
        known: leave out pairs that the network does not answer rightly as they are.
        controls: sets of random neurons, none of them among `neurons`: at least 5, or 0.
        seed: of these.

    Raises:
        DataError: no pair (is left), texts of different length without places, a place that there is not, one answer
            for both, an answer of several tokens; the message names the pair.
        UnknownName: a site or neuron that the model does not have.
    """
    if among not in ("vocabulary", "answers") or at not in ("concept", "all"):
        raise DataError(f'among is "vocabulary" or "answers", and at "concept" or "all"; not {among!r}, {at!r}')
    if controls and controls < 5:
        raise DataError(f"at least 5 sets of random neurons say something, or 0 for none; not {controls}")
    if not isinstance(neurons, Neurons) or not len(neurons):
        raise DataError("there are no neurons whose values could be interchanged")
    runs = _Runs(model, neurons.sites, pairs, at, among)
    unknown = 0
    if known:
        right = runs.right
        unknown = int((~right).sum())
        if unknown == len(right):
            raise DataError(f"the network answers none of the {unknown} pairs rightly: there is nothing to change")
        runs.keep(right)
    pool = runs.everyone
    changed = runs.changed({site: neurons.indices(site) for site in neurons.sites})
    drawn = [pool.sample(like=neurons, seed=seed + number) for number in range(controls)]
    random = [runs.changed({site: each.indices(site) for site in each.sites}).mean() for each in drawn]
    layer = runs.changed({site: pool.indices(site) for site in neurons.sites})
    return Mediated(
        float(changed.mean()), np.asarray(random, np.float64), float(layer.mean()), len(changed), unknown, changed
    )


# Seen from outside ----------------------------------------------------------------------------------


def _of_recording(recording: Recording, neuron: Neuron, examples: Sequence[Any]) -> np.ndarray:
    pooled = recording[neuron.site].pooled
    if pooled.how != "max":
        raise DataError(f'the recording keeps the {pooled.how} of each example: record Pooled("max")')
    values = np.asarray(pooled.values)
    if not 0 <= neuron.index < values.shape[1]:
        raise UnknownName(f"{neuron} does not exist: {neuron.site} has neurons 0 to {values.shape[1] - 1}")
    places = np.asarray(examples)
    if len(places) and not (places.dtype.kind in "iu" and 0 <= places.min() <= places.max() < len(values)):
        raise DataError(f"examples of a recording are numbers from 0 to {len(values) - 1}")
    return values[places.astype(np.int64), neuron.index].astype(np.float64)


def _of_texts(model: Model, neuron: Neuron, given: Sequence[Any]) -> np.ndarray:
    if isinstance(given, str):
        raise DataError("positives and negatives are lists of texts, not one text")
    parts = [(each, None) if isinstance(each, str) else tuple(each) for each in given]
    found = []
    read = _activations(model, neuron, [text for text, _ in parts])
    for (text, part), (encoded, values) in zip(parts, read, strict=True):
        inside = [not special for special in encoded.special]
        if part is not None:
            start = text.find(part)
            if start < 0 or not part:
                raise DataError(f"{part!r} is not in {text!r}")
            inside = [one < start + len(part) and two > start for one, two in encoded.offsets]
        if not any(inside):
            raise DataError(f"no token of {text!r} is one of {part or text!r}")
        found.append(values[inside].max())
    return np.asarray(found, np.float64)


def _of_tokens(
    model: Model, neuron: Neuron, texts: Sequence[str], explanation: Explanation
) -> tuple[np.ndarray, np.ndarray]:
    reader = require_tokenizer(model.reader, "an explanation")
    values, refers = [], []
    for text, (encoded, found) in zip(texts, _activations(model, neuron, texts), strict=True):
        tokens = reader.strings(encoded.ids)
        if callable(explanation):
            said = [bool(each) for each in explanation(tokens)]
            if len(said) != len(tokens):
                raise DataError(f"the explanation has {len(said)} truth values for {len(tokens)} tokens of {text!r}")
        else:
            wanted = {each.strip() for each in explanation}
            said = [token.strip() in wanted for token in tokens]
        counts = ~np.asarray(encoded.special)
        values.append(found[counts])
        refers.append(np.asarray(said)[counts])
    every, right = np.concatenate([[], *values]), np.concatenate([np.zeros(0, bool), *refers])
    return every[right], every[~right]


def _activations(model: Model, neuron: Neuron, texts: Sequence[str]) -> list[tuple[Any, np.ndarray]]:
    """Of each text its tokens, and the neuron's activation at each."""
    site = model.site(neuron.site)
    reader = require_tokenizer(model.reader, "a text")
    encoded = reader.encode(texts, offsets=True) if len(texts) else []
    found = []
    for start in range(0, len(encoded), _AT_ONCE):
        part = encoded[start : start + _AT_ONCE]
        tensor = _seen(model, [site.name], [each.ids for each in part])[site.name]
        if not 0 <= neuron.index < tensor.shape[-1]:
            raise UnknownName(f"{neuron} does not exist: {site.name} has neurons 0 to {tensor.shape[-1] - 1}")
        values = tensor[..., neuron.index].double().cpu().numpy()
        found += [(each, row[: len(each.ids)]) for each, row in zip(part, values, strict=True)]
    return found


def _curve(values: np.ndarray, refers: np.ndarray) -> np.ndarray:
    order = np.argsort(-values, kind="stable")
    last = np.append(np.diff(values[order]) != 0, True)
    hits = refers[order].cumsum()
    every = np.arange(1, len(values) + 1)
    return np.stack([values[order], hits / every, hits / refers.sum()], 1)[last]


# As a cause -----------------------------------------------------------------------------------------

_AT_ONCE = 128


class _Runs:
    """Pairs, their sources' activations, and runs of the bases with some of these."""

    def __init__(self, model: Model, sites: Sequence[str], pairs: Sequence[Any], at: str, among: str) -> None:
        if not len(pairs):
            raise DataError("there are no pairs of base and source")
        reader = require_tokenizer(model.reader, "a pair of texts")
        self.model, self.sites, self.among = model, list(sites), among
        listed = [tuple(each) for each in pairs]
        for number, each in enumerate(listed):
            if len(each) not in (4, 5):
                raise DataError(f"pair {number} is (base, source, base answer, source answer), and perhaps places")
        self.base = [row.ids for row in reader.encode([each[0] for each in listed])]
        self.source = [row.ids for row in reader.encode([each[1] for each in listed])]
        self.answers = np.asarray([[_one_token(reader, p[side], n) for side in (2, 3)] for n, p in enumerate(listed)])
        for number, (one, two) in enumerate(self.answers):
            if one == two:
                raise DataError(f"pair {number}: base and source have one answer, {listed[number][2]!r}")
        self.places = [
            _aligned(number, each, one, two, at)
            for number, (each, one, two) in enumerate(zip(listed, self.base, self.source, strict=True))
        ]

    def keep(self, which: np.ndarray) -> None:
        """Only these pairs."""
        kept = np.flatnonzero(which)
        self.base = [self.base[number] for number in kept]
        self.source = [self.source[number] for number in kept]
        self.places = [self.places[number] for number in kept]
        self.answers = self.answers[kept]

    @property
    def right(self) -> np.ndarray:
        """`[pairs]` bool: both prompts are answered rightly as they are."""
        return self._given(_logits(self.model, self.base), 0) & self._given(_logits(self.model, self.source), 1)

    @property
    def everyone(self) -> Neurons:
        """All neurons of the sites."""
        seen = _seen(self.model, self.sites, self.source[:1])
        return Neurons({name: range(tensor.shape[-1]) for name, tensor in seen.items()})

    def changed(self, indices: Mapping[str, np.ndarray]) -> np.ndarray:
        """`[pairs]` bool: the source's answer is given when these neurons have the source's values."""
        found = []
        for start in range(0, len(self.base), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            seen = _seen(self.model, self.sites, self.source[part])
            rows = torch.tensor([row for row, each in enumerate(self.places[part]) for _ in each])
            to = torch.tensor([one for each in self.places[part] for one, _ in each])
            come = torch.tensor([two for each in self.places[part] for _, two in each])
            edits = []
            for name, columns in indices.items():
                site = self.model.site(name)
                if len(columns) and not 0 <= columns.min() <= columns.max() < seen[name].shape[-1]:
                    raise UnknownName(f"{name}:{columns.max()} does not exist: there are {seen[name].shape[-1]} there")
                edits.append((site, partial(_put, seen[name], rows, to, come, torch.from_numpy(columns.copy()))))
            with hooked(self.model.module, edits):
                found.append(_logits(self.model, self.base[part]))
        return self._given(torch.cat(found), 1)

    def _given(self, logits: torch.Tensor, side: int) -> np.ndarray:
        wanted = torch.from_numpy(self.answers).to(logits.device)
        if self.among == "answers":
            of_answers = logits.gather(1, wanted)
            return (of_answers[:, side] > of_answers[:, 1 - side]).cpu().numpy()
        return (logits.argmax(1) == wanted[:, side]).cpu().numpy()


def _put(
    source: torch.Tensor,
    rows: torch.Tensor,
    to: torch.Tensor,
    come: torch.Tensor,
    columns: torch.Tensor,
    tensor: torch.Tensor,
) -> torch.Tensor:
    changed = tensor.clone()
    changed[rows[:, None], to[:, None], columns] = source[rows[:, None], come[:, None], columns].to(tensor)
    return changed


def _aligned(number: int, pair: tuple, base: Sequence[int], source: Sequence[int], at: str) -> list[tuple[int, int]]:
    """Places in the base and in the source that go together."""
    if len(pair) == 5:
        places = [(int(one), int(two)) for one, two in pair[4]]
        if not places or any(not 0 <= o < len(base) or not 0 <= t < len(source) for o, t in places):
            raise DataError(f"pair {number}: its {len(base)} and {len(source)} tokens have no places {places}")
        return places
    if len(base) != len(source):
        raise DataError(
            f"pair {number}: {pair[0]!r} has {len(base)} tokens and {pair[1]!r} has {len(source)}: "
            "say in a fifth entry which places go together"
        )
    places = [(place, place) for place in range(len(base)) if at == "all" or base[place] != source[place]]
    if not places:
        raise DataError(f"pair {number}: base and source are the same text, {pair[0]!r}")
    return places


def _one_token(reader: TokenReader, answer: Any, number: int) -> int:
    if not isinstance(answer, str):
        return int(answer)
    ids = reader.encode([answer], ready=True)[0].ids
    if len(ids) != 1:
        raise DataError(f"pair {number}: the answer {answer!r} has {len(ids)} tokens, and one is wanted")
    return ids[0]


@torch.no_grad()
def _seen(model: Model, sites: Sequence[str], ids: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Site -> `[texts, tokens, size]`, padded on the right."""
    chosen = [model.site(name) for name in sites]
    with model.evaluating(), reading(model.module, chosen) as captured:
        model.module(**model.text_inputs(pad(ids, _pad_id(model))))
    found = {}
    for name, site in zip(sites, chosen, strict=True):
        tensor = captured[site.name][-1].tensor if captured[site.name] else None
        if tensor is None or tensor.ndim != 3 or len(tensor) != len(ids):
            raise ModelError(f"{name} has no value for each token of each text: neurons of another site are wanted")
        found[name] = tensor
    return found


@torch.no_grad()
def _logits(model: Model, ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """`[texts, vocabulary]`, after the last token of each."""
    found = []
    for start in range(0, len(ids), _AT_ONCE):
        part = ids[start : start + _AT_ONCE]
        with model.evaluating():
            output = model.module(**model.text_inputs(pad(part, _pad_id(model))))
        logits = getattr(output, "logits", None)
        logits = first_tensor(output) if logits is None else logits
        if logits is None or logits.ndim != 3:
            raise ModelError(f"{model.name} gives no logits for each token")
        found.append(logits[torch.arange(len(part)), torch.tensor([len(each) - 1 for each in part])].float())
    return torch.cat(found)


def _pad_id(model: Model) -> int:
    return require_tokenizer(model.reader, "a text").pad_id
