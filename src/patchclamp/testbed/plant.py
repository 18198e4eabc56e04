"""Plant neurons whose job is known into a real model.

A GPT-2 or a Llama of Hugging Face gets weights by hand: embeddings that say what each word is, a few attention heads,
and in its MLPs planted neurons among ordinary ones, which read and write at random. What each planted neuron does can
be undone by editing its weights, and the model then behaves differently in the way that `truth` says.

Difficulty is four numbers: how much each planted neuron hears of everything else (`noise`), how few words of a
document are in its language (`rarity`), how much the directions of classes overlap (`superposition`), and how much
louder some ordinary neurons are than others (`loudness`). The last one is what makes a plain difference of means fail:
it ranks what is loud.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import nn

from patchclamp.data import Texts
from patchclamp.errors import DataError, unknown
from patchclamp.model import load
from patchclamp.neurons import Neurons
from patchclamp.testbed import circuits
from patchclamp.testbed.circuits import Architecture, Head
from patchclamp.testbed.plain import plain, quantile_of_each
from patchclamp.testbed.planted import Difficulty, Planted, Question
from patchclamp.testbed.residual import CODE, HEAD, PREVIOUS, WIDTH, codes, residual, unit
from patchclamp.testbed.roles import ROLES, Job, Places, Setting, jobs
from patchclamp.testbed.world import BEGINNING, LANGUAGES, RELATIONS, documents, world

ARCHITECTURES = ("gpt2", "llama", "mlp")


def plant(
    architecture: str = "gpt2",
    *,
    roles: tuple[str, ...] | None = None,
    count: int = 3,
    difficulty: float | Difficulty = 1.0,
    layers: int = 3,
    neurons: int = 576,
    examples: int = 400,
    seed: int = 0,
) -> Planted:
    """A model in which chosen neurons do a known job, its data, and which neurons those are.

    Args:
        architecture: "gpt2" or "llama" (Hugging Face models that read documents), or "mlp" (a plain network of one
            hidden layer that is given vectors).
        roles: what is planted, of `testbed.ROLES`; None: all that the architecture can have.
        count: neurons of each role and label. All are there whatever this says for facts (one for each subject) and
            massive activations (one).
        difficulty: 0 is easy, 1 the default; or a `Difficulty`.
        layers: of a language model, at least 2.
        neurons: in each layer, ordinary ones included.
        examples: documents, or vectors.
        seed: of everything that is drawn.

    Returns:
        `Planted`: `model`, `data`, `truth` (with columns `role`, `label`, `reads`, `writes`, `decoy_of`), `questions`
        that finders can be asked, and, for language models, a `twin` in which some neurons have a duplicate.

    Raises:
        UnknownName: an architecture or a role that is none.
        DataError: too few layers, neurons or examples for what is to be planted.
    """
    if architecture not in ARCHITECTURES:
        raise unknown("architecture", architecture, ARCHITECTURES)
    level = difficulty if isinstance(difficulty, Difficulty) else Difficulty.at(difficulty)
    if count < 1 or examples < 40:
        raise DataError(f"at least 1 neuron of each role and 40 examples are wanted, not {count} and {examples}")
    if architecture == "mlp":
        return plain(roles, count, level, neurons, examples, seed)
    if layers < 2:
        raise DataError(f"copying from the context takes at least 2 layers, not {layers}")
    chosen = ROLES if roles is None else tuple(roles)
    of_words = world(count, seed)
    tokenizer = of_words.tokenizer()
    texts, labels = documents(of_words, examples, level.own_words, level.switched, seed)
    places = _places(tokenizer, texts, labels)
    stream = residual(seed)
    meanings = codes(of_words.classes, _ALONE, level.superposition, seed)
    made = np.random.default_rng([seed, 5])
    setting = Setting(of_words, meanings, stream, places, _orthogonal(made, PREVIOUS, CODE), count)
    todo = _in_layers(jobs(setting, chosen, made), layers, neurons, made)

    module = _with_heads(architecture, setting, layers, neurons)
    truth, ordinary = _fill(module, setting, todo, level, neurons, np.random.default_rng([seed, 6]))
    twin, pairs = None, None
    if "duplicate" in chosen:
        second = _with_heads(architecture, setting, layers, neurons)
        made = np.random.default_rng([seed, 7])
        copied = [np.sort(made.choice(places, count, replace=False)) for places in ordinary]
        there, copies = _fill(second, setting, todo, level, neurons, made, (module, copied))
        twin = load(second, tokenizer=tokenizer)
        truth += [_row(f"mlp.{layer}", int(index), "duplicate") for layer, each in enumerate(copied) for index in each]
        there += [_row(f"mlp.{layer}", int(index), "duplicate") for layer, each in enumerate(copies) for index in each]
        pairs = pl.DataFrame(
            [(one["site"], one["index"], two["site"], two["index"]) for one, two in zip(truth, there, strict=True)],
            ["site", "index", "twin_site", "twin_index"],
            orient="row",
        )
    facts = {"architecture": architecture, "seed": seed, "layers": layers, "neurons": neurons, **asdict(level)}
    return Planted(
        load(module, tokenizer=tokenizer),
        Texts(texts, labels),
        Neurons.from_polars(pl.DataFrame(truth)),
        tuple(each for each in _QUESTIONS if each.role in chosen),
        twin,
        pairs,
        facts,
    )


# Helpers --------------------------------------------------------------------------------------------

_ALONE = ("format", "refusal", "consent")
# What a planted neuron is given where it fires, typically and almost at most, in units of its nonlinearity's input.
_AMPLITUDE, _LOUDEST = 3.0, 4.5
_ORDINARY_RATES = (0.01, 0.15)
_UNEMBEDDING, _FREQUENCY = 4.0, 1.5
_QUESTIONS = (
    Question("selective", "language", LANGUAGES),
    Question("relation", "relation", RELATIONS),
    Question("safety", "harm", ("harmful",)),
)


def _places(tokenizer: Any, texts: list[str], labels: dict[str, list]) -> Places:
    found = tokenizer(texts, padding=True, return_tensors="np")
    harmful = np.asarray([each == "harmful" for each in labels["harm"]])
    return Places(found["input_ids"].astype(np.int64), found["attention_mask"].astype(bool), harmful)


def _in_layers(todo: list[Job], layers: int, neurons: int, made: np.random.Generator) -> list[list[Job]]:
    placed: list[list[Job]] = [[] for _ in range(layers)]
    for job in todo:
        placed[0 if job.first else int(made.integers(layers))].append(job)
    fullest = max(len(each) for each in placed)
    if fullest > neurons // 2:
        raise DataError(
            f"{fullest} neurons would be planted in a layer of {neurons}: at least {2 * fullest} are wanted"
        )
    return placed


def _with_heads(architecture: Architecture | str, setting: Setting, layers: int, neurons: int) -> nn.Module:
    """Embeddings, unembedding and heads; no neuron yet."""
    stream, meanings, known = setting.residual, setting.codes, setting.world
    module = circuits.bare("gpt2" if architecture == "gpt2" else "llama", len(known.words), layers, neurons)
    tokens = meanings.code @ stream.parts["code"].T + stream.scalar("constant")
    counts = np.bincount(setting.places.ids[setting.places.real], minlength=len(known.words)) + 1.0
    frequency = np.log(counts) - np.log(counts).mean()
    unembedding = _UNEMBEDDING * meanings.output @ stream.parts["output"].T
    unembedding += _FREQUENCY * frequency[:, None] * stream.scalar("frequency")
    circuits.set_embedding(module, tokens, circuits.sines() @ stream.parts["position"].T, unembedding)

    scale = _scale(module, setting, 0)
    circuits.set_heads(module, 0, {0: _back(module, setting, scale), **_of_context(setting, scale)})
    circuits.set_heads(module, 1, {0: _copier(setting, _scale(module, setting, 1))})
    return module


def _scale(module: nn.Module, setting: Setting, layer: int) -> float:
    """What the norm before a layer's attention multiplies the residual stream with, as far as heads care."""
    given = circuits.normed(module, _some(setting), layer, "attention")
    return float(np.median(given[:, 1:] @ setting.residual.scalar("constant")))


def _some(setting: Setting) -> torch.Tensor:
    return torch.from_numpy(setting.places.ids)


def _back(module: nn.Module, setting: Setting, scale: float) -> Head:
    """The token before, into the part "previous"."""
    parts = setting.residual.parts
    query, key = circuits.looks_back(module, parts, scale)
    size = np.sqrt(CODE / PREVIOUS) / scale
    return Head(query, key, setting.look_back @ parts["code"].T, size * parts["previous"] @ np.eye(PREVIOUS, HEAD))


def _of_context(setting: Setting, scale: float) -> dict[int, Head]:
    """How near the beginning is (every token alike), and whether something harmful was said."""
    stream, features = setting.residual, setting.codes.features
    code = stream.parts["code"]
    start = code @ setting.codes.code[setting.world.words.index(BEGINNING)]
    nowhere = np.zeros((HEAD, WIDTH))
    share = Head(nowhere, nowhere, _row_of(start), 3.0 * _row_of(stream.scalar("beginning")).T / scale)
    harm = code @ features["harmful"]
    query, key = circuits.looks_for([(stream.scalar("constant"), 24.0 * harm + 10.0 * start)], scale)
    said = Head(query, key, _row_of(harm), _row_of(stream.scalar("harm")).T / scale)
    return {1: share, 2: said}


def _copier(setting: Setting, scale: float) -> Head:
    """Says a name that came before, where the stream says so; else looks at the beginning and says nothing."""
    stream, meanings, known = setting.residual, setting.codes, setting.world
    code = stream.parts["code"]
    start = meanings.code[known.words.index(BEGINNING)]
    name = code @ meanings.features["name"]
    query, key = circuits.looks_for(
        [(stream.scalar("copying"), 40.0 * name), (stream.scalar("constant"), 12.0 * (code @ start))], scale
    )
    names = known.ids("name")
    value = _orthogonal(np.random.default_rng(0), HEAD, CODE)
    seen = np.concatenate([meanings.code[names], start[None]]) @ value.T
    said = np.concatenate([meanings.output[names], np.zeros((1, meanings.output.shape[1]))])
    solved = np.linalg.lstsq(seen, said, rcond=None)[0].T
    return Head(query, key, value @ code.T, stream.parts["output"] @ solved / scale)


def _fill(
    module: nn.Module,
    setting: Setting,
    todo: list[list[Job]],
    level: Difficulty,
    neurons: int,
    made: np.random.Generator,
    copied: tuple[nn.Module, list[np.ndarray]] | None = None,
) -> tuple[list[dict[str, object]], list[np.ndarray]]:
    """Write every layer's neurons, from the first on.

    Returns:
        The truth, and of each layer the places of its ordinary neurons; with `copied`, a model and places of neurons in
        each of its layers, where these were copied to.
    """
    truth, places_of = [], []
    for layer, here in enumerate(todo):
        sample = _Sample(module, setting, layer)
        places = made.permutation(neurons)
        read, bias, write = sample.ordinary(neurons, level.loudness, made)
        for index, job in zip(places, here, strict=False):
            read[index], bias[index] = sample.reads(job, level.noise, made)
            write[index] = job.write / sample.height
            truth.append(
                _row(f"mlp.{layer}", int(index), job.role, job.label, job.reads, job.writes, decoy_of=job.decoy_of)
            )
        free = places[len(here) :]
        if copied is not None:
            free = free[: len(copied[1][layer])]
            first = _Sample(copied[0], setting, layer)
            for index, place in zip(copied[1][layer], free, strict=True):
                given = _weights(circuits.blocks(copied[0])[layer].mlp, int(index))
                quiet = np.linalg.norm(read[place])
                read[place], bias[place] = sample.copy(*given, first, level.noise, made)
                write[place] *= quiet / np.linalg.norm(read[place])  # the louder, the less it writes
        circuits.set_neurons(module, layer, read, bias, write, sample.one)
        places_of.append(free)
    return truth, places_of


class _Sample:
    """What a layer's neurons are given on the documents."""

    def __init__(self, module: nn.Module, setting: Setting, layer: int) -> None:
        self.given = circuits.normed(module, _some(setting), layer, "mlp")
        self.counts = setting.places.real & (setting.places.position > 0)
        constant = setting.residual.scalar("constant")
        typical = float(np.median((self.given @ constant)[self.counts]))
        self.one = constant / typical
        # Without biases, a threshold is one on the ratio to what stands for 1.
        self.ones = np.ones(self.given.shape[:2]) if circuits.has_biases(module) else self.given @ self.one
        with torch.no_grad():
            self.height = float(circuits.nonlinearity(module)(torch.tensor(_AMPLITUDE)))

    def levels(self, read: np.ndarray) -> np.ndarray:
        """`[documents, positions]`: what is compared with a neuron's threshold."""
        return self.given @ read / self.ones

    def reads(self, job: Job, noise: float, made: np.random.Generator) -> tuple[np.ndarray, float]:
        """Weights `[WIDTH]` and the bias, so that the neuron fires where it should as far as it can."""
        direction = unit(made.standard_normal(WIDTH)) if job.read is None else unit(job.read)
        direction = unit(direction + noise * unit(made.standard_normal(WIDTH)))
        found = self.levels(direction)
        of_role = job.decoy_of or job.role
        inside = self.counts | job.fires if of_role == "massive" else self.counts
        yes, no = found[job.fires & inside], found[~job.fires & inside]
        if of_role == "dead":
            # A decoy of a dead one fires now and then.
            threshold = no.max() + 4 * no.std() if job.role == "dead" else np.quantile(no, 0.998)
            # What never fires should not do so nearly: a SiLU is not silent below 0.
            gain = (3 if job.role == "dead" else 1) * _AMPLITUDE / (4 * no.std())
        else:
            if len(yes) == 0:
                raise DataError(f"no document has anything for {job.role} ({job.reads}): give more examples")
            between = (np.quantile(yes, 0.1) + np.quantile(no, 0.995)) / 2
            gain = _LOUDEST / max(np.quantile(yes, 0.9) - between, 0.3 * no.std())
            gain *= 3 if job.role == "massive" else 1
            threshold = between if not job.decoy_of else np.median(yes)
        return gain * direction, float(-gain * threshold)

    def copy(
        self, read: np.ndarray, bias: float, first: _Sample, noise: float, made: np.random.Generator
    ) -> tuple[np.ndarray, float]:
        """Weights and bias of a neuron of another model, noisy and scaled."""
        size = np.linalg.norm(read)
        noisy = size * unit(read / size + 0.3 * noise * unit(made.standard_normal(WIDTH)))
        # It fires as often as the first one does: the stream that it reads is not quite the same.
        rate = (first.levels(read)[first.counts] > -bias).mean()
        threshold = float(np.quantile(self.levels(noisy)[self.counts], 1 - rate))
        scaled = float(np.exp(made.uniform(-0.7, 0.7)))
        return scaled * noisy, -scaled * threshold

    def ordinary(
        self, neurons: int, loudness: float, made: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Neurons that read and write at random, sparsely: `[neurons, WIDTH]`, `[neurons]`, `[neurons, WIDTH]`."""
        directions = made.standard_normal((neurons, WIDTH))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        found = (self.given[self.counts] @ directions.T) / self.ones[self.counts][:, None]
        low, high = np.log(_ORDINARY_RATES)
        rates = np.exp(made.uniform(low, high, neurons))
        thresholds = quantile_of_each(found, 1 - rates)
        loud = np.exp(loudness * (0.5 + made.standard_normal(neurons)))
        gain = loud / found.std(0)
        write = made.standard_normal((neurons, WIDTH))
        write *= 0.05 / np.linalg.norm(write, axis=1, keepdims=True) / loud[:, None]
        return gain[:, None] * directions, -gain * thresholds, write


def _weights(mlp: Any, index: int) -> tuple[np.ndarray, float]:
    """What a neuron reads, and its bias; a Llama's is in what it reads."""
    if hasattr(mlp, "c_fc"):
        return mlp.c_fc.weight[:, index].detach().double().numpy(), float(mlp.c_fc.bias[index].detach())
    read = mlp.gate_proj.weight[index].detach().double().numpy()
    return read, 0.0


def _row(
    site: str, index: int, role: str, label: str = "", reads: str = "", writes: str = "", decoy_of: str = ""
) -> dict[str, object]:
    return {
        "site": site,
        "index": index,
        "role": role,
        "label": label,
        "reads": reads,
        "writes": writes,
        "decoy_of": decoy_of,
    }


def _row_of(vector: np.ndarray) -> np.ndarray:
    """`[HEAD, WIDTH]` with one row that is not 0."""
    rows = np.zeros((HEAD, WIDTH))
    rows[0] = vector
    return rows


def _orthogonal(made: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return np.linalg.qr(made.standard_normal((columns, rows)))[0].T
