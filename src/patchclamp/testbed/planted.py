"""What `testbed.plant` gives: a model, its data, and the truth about its neurons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polars as pl

from patchclamp.data import Tensors, Texts
from patchclamp.errors import DataError
from patchclamp.model import Model
from patchclamp.neurons import Neurons


@dataclass(frozen=True)
class Difficulty:
    """How hard it is to find what was planted; the fields do not depend on one another.

    Attributes:
        noise: how much a planted neuron hears of everything else, over how much of what it is for.
        rarity: share of a document's words that are of no language (of a plain network: how weak the signal is).
        superposition: 0 where classes of words have orthogonal directions, 1 where these are drawn at random.
        loudness: standard deviation of the logarithm of how loud ordinary neurons are; its mean is half of that.
    """

    noise: float = 0.3
    rarity: float = 0.7
    superposition: float = 0.5
    loudness: float = 1.5

    def __post_init__(self) -> None:
        for name, least, most in (("noise", 0, 10), ("rarity", 0, 0.95), ("superposition", 0, 1), ("loudness", 0, 5)):
            value = getattr(self, name)
            if not least <= value <= most:
                raise DataError(f"{name} lies between {least} and {most}; not {value}")

    @classmethod
    def at(cls, level: float) -> Difficulty:
        """From 0, easy, over 1, the default, to 3.

        Raises:
            DataError: another number.
        """
        if not 0 <= level <= 3:
            raise DataError(f"a difficulty lies between 0 and 3; not {level}")
        return cls(0.3 * level, 1 - 0.7 * (3 / 7) ** level, min(0.5 * level, 1.0), 1.5 * level)

    @property
    def own_words(self) -> float:
        """Share of a document's words that are in its language."""
        return 1 - self.rarity

    @property
    def switched(self) -> float:
        """Share of these that are in another language all the same."""
        return min(0.15 * self.noise, 0.5)


@dataclass(frozen=True)
class Question:
    """What a finder for a label can be asked about a planted model.

    Attributes:
        role: of the neurons that are the answer.
        label: of the data.
        positives: its categories that have neurons.
    """

    role: str
    label: str
    positives: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Planted:
    """A model whose neurons are known.

    Attributes:
        model: the model.
        data: what it reads, with labels.
        truth: every planted neuron, decoys included, at sites `mlp.<layer>`: columns `role`; `label`, what it is for
            ("aru", or "aru, bel"); `reads` and `writes`, in words (`aru*`: all words of that class); `decoy_of`.
        questions: what finders can be asked.
        twin: a second model, in which the same jobs are done by neurons elsewhere, and some ordinary neurons of the
            first have a copy; None where no duplicate was planted.
        pairs: which neurons of the two go together: `site`, `index`, `twin_site`, `twin_index`.
        parameters: what it was made with.
    """

    model: Model
    data: Texts | Tensors
    truth: Neurons
    questions: tuple[Question, ...]
    twin: Model | None
    pairs: pl.DataFrame | None
    parameters: dict[str, Any]

    def of(self, role: str, label: str | None = None) -> Neurons:
        """Planted neurons of a role (and for a label), decoys not among them."""
        wanted = pl.col("role") == role
        return self.truth.where(wanted if label is None else wanted & _names(label))

    def __repr__(self) -> str:
        roles = self.truth["role"].value_counts(sort=True)
        counts = ", ".join(f"{count} {role}" for role, count in roles.iter_rows())
        return f"Planted({self.parameters['architecture']}, {len(self.data)} examples: {counts})"


def _names(label: str) -> pl.Expr:
    return pl.col("label").str.split(", ").list.contains(label)
