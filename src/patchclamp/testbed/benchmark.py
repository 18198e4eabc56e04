"""Race finders on networks whose neurons are known: who ranks what was planted first, and who cries wolf?

A finder is any callable with the arguments of `pc.find.<name>(recording, labels=, seed=, null=, permutations=)`;
nothing here knows one. It is asked the questions of a bed ("which neurons are for this language?"), once as they are
and once with the labels dealt anew over the examples, where there is nothing to be found.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl

from patchclamp.errors import DataError
from patchclamp.neurons import Neurons
from patchclamp.progress import progress as progress_bar
from patchclamp.recording import Recording, Summary, record
from patchclamp.statistics import average_precision, recall_at
from patchclamp.testbed.plant import plant
from patchclamp.testbed.planted import Planted, Question

Finder = Callable[..., Neurons]


@dataclass(frozen=True)
class Method:
    """A finder, and what it wants recorded.

    Attributes:
        find: `find(recording, labels=..., seed=..., null=..., permutations=...)`, as `pc.find.<name>`.
        summaries: what a recording must have.
        kind: kind of site that is recorded, "mlp" or "gate"; in a model without gates always "mlp".
        options: further arguments of the finder.
        null: whether it takes `null="permute"`.
    """

    find: Finder
    summaries: tuple[Summary, ...]
    kind: str = "mlp"
    options: Mapping[str, Any] = field(default_factory=dict)
    null: bool = True


@dataclass(frozen=True)
class Bed:
    """What is planted for a race: arguments of `testbed.plant` without the seed."""

    name: str
    parameters: Mapping[str, Any]

    def make(self, seed: int) -> Planted:
        """The planted model of one seed."""
        return plant(seed=seed, **self.parameters)


BEDS = tuple(Bed(each, {"architecture": each}) for each in ("gpt2", "llama", "mlp"))
EASY_BEDS = tuple(Bed(f"{each.name}, easy", {**each.parameters, "difficulty": 0}) for each in BEDS)


@dataclass(frozen=True, eq=False)
class Race:
    """What a benchmark found.

    Attributes:
        runs: one row for each method, bed, seed and question. `average_precision` and `recall` (the share of what was
            planted among as many neurons at the top), means over the categories of the question; `decoys_above`, the
            share of pairs of a decoy and a planted neuron in which the decoy is ranked first; `power`, the share of
            what was planted that has q < 0.05; `false`, how many neurons have q < 0.05 when labels are dealt anew
            (null where the method states no error rate); `seconds` of one call, without any null.
        skipped: method, bed, question and why.
    """

    runs: pl.DataFrame
    skipped: pl.DataFrame

    def summary(self) -> pl.DataFrame:
        """Means over seeds, the best method of each bed and question first.

        Columns: `bed`, `role`, `method`, `average_precision` and its `lowest` of all seeds, `recall`, `decoys_above`,
        `power`, `false_alarms` (the share of seeds with any false discovery), `seconds`.
        """
        return (
            self.runs.group_by("bed", "role", "method", maintain_order=True)
            .agg(
                pl.col("average_precision").mean(),
                pl.col("average_precision").min().alias("lowest"),
                pl.col("recall", "decoys_above", "power").mean(),
                (pl.col("false") > 0).mean().alias("false_alarms"),
                pl.col("seconds").median(),
            )
            .sort("bed", "role", "average_precision", descending=[False, False, True], maintain_order=True)
        )

    def __repr__(self) -> str:
        number = len(self.runs["method"].unique()) if len(self.runs) else 0
        return f"Race({number} methods, {len(self.runs)} runs)\n{self.summary()}"


def benchmark(
    methods: Mapping[str, Method],
    beds: Sequence[Bed] = BEDS,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    *,
    roles: Sequence[str] | None = None,
    permutations: int = 99,
    null: bool = True,
    progress: bool = True,
) -> Race:
    """Race methods on planted networks.

    Args:
        methods: name -> method; those of the library are `pc.find.label_finders()`.
        beds: what is planted.
        seeds: of the beds; the finders have the same.
        roles: ask for neurons of these roles only; None: all questions of a bed.
        permutations: of each null.
        null: whether `power` and `false` are measured, which costs two times `permutations` scorings.
        progress: show how far it is.

    Returns:
        A `Race`. A method that cannot answer on a bed is in `skipped`, with its own words.

    Raises:
        DataError: no method, bed or seed; a method whose table has not one row for each neuron.
    """
    for what, given in (("method", methods), ("bed", beds), ("seed", seeds)):
        if not len(given):
            raise DataError(f"a race wants at least one {what}")
    rows, skipped = [], []
    with progress_bar("race", len(beds) * len(seeds) * len(methods), "methods", progress) as bar:
        for bed in beds:
            for seed in seeds:
                planted = bed.make(seed)
                made: dict[str, Recording] = {}
                for name, method in methods.items():
                    for question in (each for each in planted.questions if roles is None or each.role in roles):
                        here = {"method": name, "bed": bed.name, "seed": seed, "role": question.role}
                        try:
                            recording = _recorded(planted, method, made)
                            rows.append(here | _run(planted, question, method, recording, seed, permutations, null))
                        except DataError as error:
                            skipped.append(here | {"why": str(error)})
                    bar.advance(1)
    return Race(pl.DataFrame(rows, _RUNS), pl.DataFrame(skipped, _SKIPPED))


def random_finder(recording: Recording, labels: Any, *, seed: int = 0, **_: Any) -> Neurons:
    """Ranks neurons by chance: what a finder has to beat."""
    made = np.random.default_rng([seed, 9])
    sites = [(name, int(each.site.size or 0)) for name, each in recording.by_site.items()]
    frame = pl.DataFrame(
        {
            "site": np.repeat([name for name, _ in sites], [size for _, size in sites]),
            "index": np.concatenate([np.arange(size) for _, size in sites]),
        }
    )
    score = made.random((len(frame), len(recording.labels[labels])))
    columns = [
        pl.Series(f"score_{label}", column) for label, column in zip(recording.labels[labels], score.T, strict=True)
    ]
    return Neurons.from_polars(frame.with_columns(pl.Series("score", score.max(1)), *columns).sort(-pl.col("score")))


# Helpers --------------------------------------------------------------------------------------------

_LEVEL = 0.05
_ASKED = {"method": pl.String, "bed": pl.String, "seed": pl.Int64, "role": pl.String}
_FIGURES = ("average_precision", "recall", "decoys_above", "seconds", "power")
_RUNS = {**_ASKED, **dict.fromkeys(_FIGURES, pl.Float64), "false": pl.Int64}
_SKIPPED = {**_ASKED, "why": pl.String}


def _recorded(planted: Planted, method: Method, made: dict[str, Recording]) -> Recording:
    kind = method.kind if any(site.kind == method.kind for site in planted.model.sites.values()) else "mlp"
    key = f"{kind} {[(each.name, sorted(each.parameters().items(), key=str)) for each in method.summaries]}"
    if key not in made:
        made[key] = record(planted.model, planted.data, f"{kind}.*", list(method.summaries), progress=False)
    return made[key]


def _run(
    planted: Planted,
    question: Question,
    method: Method,
    recording: Recording,
    seed: int,
    permutations: int,
    null: bool,
) -> dict[str, float | int | None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a race each method warns hundreds of times
        start = time.perf_counter()
        found = method.find(recording, labels=question.label, seed=seed, **method.options).to_polars()
        seconds = time.perf_counter() - start
        _check(found, recording)
        row: dict[str, float | int | None] = {"seconds": seconds, "power": None, "false": None}
        row |= _quality(planted, question, found)
        if null and method.null:
            how = {"seed": seed, "null": "permute", "permutations": permutations, **method.options}
            tested = method.find(recording, labels=question.label, **how).to_polars()
            mine = pl.any_horizontal(_is_of(planted, tested, question, label) for label in question.positives)
            row["power"] = float((tested.filter(mine)["q"].to_numpy() < _LEVEL).mean())
            given = np.asarray(recording.categories_of_examples(question.label))
            dealt = np.random.default_rng([seed, 10]).permutation(given)
            row["false"] = int((method.find(recording, labels=dealt.tolist(), **how)["q"] < _LEVEL).sum())
    return row


def _check(found: pl.DataFrame, recording: Recording) -> None:
    neurons = sum(int(each.site.size or 0) for each in recording.by_site.values())
    if len(found) != neurons:
        raise DataError(f"a finder in a race ranks every neuron: {len(found)} rows for {neurons} neurons")


def _quality(planted: Planted, question: Question, found: pl.DataFrame) -> dict[str, float]:
    precisions, recalls, above = [], [], []
    for label in question.positives:
        score = found[f"score_{label}"].to_numpy().astype(np.float64)
        right = found.select(_is_of(planted, found, question, label).alias("right"))["right"].to_numpy()
        decoy = found.select(_is_decoy(planted, found, question, label).alias("decoy"))["decoy"].to_numpy()
        precisions.append(float(average_precision(right, score)))
        recalls.append(recall_at(right, score))
        above.append(float((score[decoy][:, None] >= score[right]).mean()) if decoy.any() else 0.0)
    return {
        "average_precision": float(np.mean(precisions)),
        "recall": float(np.mean(recalls)),
        "decoys_above": float(np.mean(above)),
    }


def _is_of(planted: Planted, found: pl.DataFrame, question: Question, label: str) -> pl.Expr:
    return _among(planted.of(question.role, label), found)


def _is_decoy(planted: Planted, found: pl.DataFrame, question: Question, label: str) -> pl.Expr:
    wanted = (pl.col("decoy_of") == question.role) & pl.col("label").str.split(", ").list.contains(label)
    return _among(planted.truth.where(wanted), found)


def _among(neurons: Neurons, found: pl.DataFrame) -> pl.Expr:
    """Rows that are these neurons, by layer and index: `gate.2` holds the neurons of `mlp.2`."""
    named = [f"{site.partition('.')[2]}:{index}" for site, index in ((each.site, each.index) for each in neurons)]
    here = pl.concat_str(pl.col("site").str.split(".").list.get(1), pl.lit(":"), pl.col("index").cast(pl.String))
    return here.is_in(named)
