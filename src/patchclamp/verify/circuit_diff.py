r"""Which attention heads a training adds to a circuit: in that of the later model, and not in that of the earlier one.

    emergent = H(after) \ H(before),    H = the heads of the n edges of largest magnitude

Which edges are the first n depends on the examples. So examples are drawn again with replacement (and of several
attributions, such as those of other seeds, one), and a head is called emergent only if nearly all circuits of the
later model have it and nearly none of the earlier one's do, and if the circuits resemble each other at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl

from patchclamp.errors import DataError
from patchclamp.find.edge_attribution import EdgeAttribution
from patchclamp.published import published

Verdict = Literal["emergent", "lost", "kept", "unstable"]
Attributions = EdgeAttribution | Sequence[EdgeAttribution]


@dataclass(frozen=True, eq=False)
class CircuitDiff:
    """Heads of two circuits.

    Attributes:
        heads: one row for each head that is in a circuit of either model: `head`, `before` and `after`, the shares of
            circuits that have it, and `verdict`: "emergent", "lost", "kept", or "unstable", which is all that is not
            sure.
        jaccard_before: how alike the heads of two circuits of the earlier model are, in the mean; 1 if all are
            the same.
        jaccard_after: the same of the later one.
        reliable: whether both are as large as was asked for; without it every head is "unstable".
    """

    heads: pl.DataFrame
    jaccard_before: float
    jaccard_after: float
    reliable: bool

    @property
    def emergent(self) -> tuple[str, ...]:
        """Heads `attn.layer.head` that only the later model's circuits have."""
        return self._those("emergent")

    @property
    def lost(self) -> tuple[str, ...]:
        """Heads that only the earlier model's circuits have."""
        return self._those("lost")

    @property
    def kept(self) -> tuple[str, ...]:
        """Heads that both models' circuits have."""
        return self._those("kept")

    def _those(self, verdict: Verdict) -> tuple[str, ...]:
        return tuple(self.heads.filter(pl.col("verdict") == verdict)["head"])


@published(
    row="S043",
    title="Thinking Sparks!: Emergent Attention Heads in Reasoning Models During Post Training",
    authors="Park et al.",
    year=2025,
    url="https://arxiv.org/abs/2509.25758",
    part="emergent heads",
)
def circuit_diff(
    before: Attributions,
    after: Attributions,
    n: int,
    *,
    greedy: bool = False,
    resamples: int = 100,
    stable: float = 0.9,
    least_jaccard: float = 0.5,
    seed: int = 0,
) -> CircuitDiff:
    """The heads that emerged between two checkpoints of a decoder (Park et al., 2025).

    Args:
        before: edges of the earlier model, from `pc.find.eap_ig`; several of them (other seeds, other data) are drawn
            from as well.
        after: those of the later model, on the same task.
        n: edges of a circuit, before those are left out that lie on no path.
        greedy: as in `EdgeAttribution.top`.
        resamples: circuits for each model.
        stable: a head belongs to a model if at least this share of its circuits have it, and does not if at most the
            rest do. Above a half.
        least_jaccard: how alike the heads of a model's circuits have to be for any head to be believed.
        seed: of the drawing.

    Raises:
        DataError: the two models have not the same heads, no attribution, or shares out of range.
    """
    first, second = _listed(before), _listed(after)
    if any(each.graph.senders != first[0].graph.senders for each in (*first, *second)):
        raise DataError("the two models do not have the same layers and heads: they are no checkpoints of one model")
    if not 0.5 < stable <= 1 or not 0 <= least_jaccard <= 1 or resamples < 2:
        raise DataError(
            f"stable lies in (0.5, 1], least_jaccard in [0, 1], and there are 2 resamples or more; "
            f"not {stable}, {least_jaccard} and {resamples}"
        )
    names = [each for each in first[0].graph.senders if each.startswith("attn.")]
    drawn = [
        _drawn(each, n, greedy, resamples, names, np.random.default_rng([seed, number]))
        for number, each in enumerate((first, second))
    ]
    alike = [_jaccard(each) for each in drawn]
    reliable = min(alike) >= least_jaccard
    rows = []
    for place, name in enumerate(names):
        shares = [float(each[:, place].mean()) for each in drawn]
        if any(shares):
            rows.append((name, *shares, _verdict(shares, stable) if reliable else "unstable"))
    schema = {"head": pl.String, "before": pl.Float64, "after": pl.Float64, "verdict": pl.String}
    return CircuitDiff(pl.DataFrame(rows, schema=schema, orient="row"), alike[0], alike[1], reliable)


def circuit_history(checkpoints: Sequence[EdgeAttribution], n: int, *, greedy: bool = False) -> pl.DataFrame:
    """How the heads of a circuit come and go over checkpoints of one training.

    Args:
        checkpoints: edges of each, in the order of the training.
        n: edges of a circuit.
        greedy: as in `EdgeAttribution.top`.

    Returns:
        One row for each checkpoint: `heads` (their number), `added` and `pruned` against the one before, `cumulative`
        (heads that have been in any circuit so far) and `jaccard` with the one before (None for the first).

    Raises:
        DataError: no checkpoint.
    """
    given = _listed(checkpoints)
    sets = [set(each.heads(n, greedy=greedy)) for each in given]
    rows, ever = [], set()
    for number, heads in enumerate(sets):
        last = sets[number - 1] if number else set()
        ever |= heads
        together = heads | last
        alike = (len(heads & last) / len(together) if together else 1.0) if number else None
        rows.append((len(heads), len(heads - last), len(last - heads), len(ever), alike))
    schema = {"heads": pl.Int64, "added": pl.Int64, "pruned": pl.Int64, "cumulative": pl.Int64, "jaccard": pl.Float64}
    return pl.DataFrame(rows, schema=schema, orient="row")


# Helpers --------------------------------------------------------------------------------------------


def _listed(given: Attributions) -> list[EdgeAttribution]:
    listed = list(given) if isinstance(given, Sequence) else [given]
    for each in listed:
        if not isinstance(each, EdgeAttribution):
            raise DataError(f"circuits are compared by attributions of their edges (pc.find.eap_ig), not {each!r:.60}")
    if not listed:
        raise DataError("there are no attributions to compare")
    return listed


def _drawn(
    given: Sequence[EdgeAttribution],
    n: int,
    greedy: bool,
    resamples: int,
    names: Sequence[str],
    generator: np.random.Generator,
) -> np.ndarray:
    """Whether the circuit of each resample has each head, `[resamples, heads]` bool."""
    found = np.zeros((resamples, len(names)), bool)
    for number in range(resamples):
        one = given[int(generator.integers(len(given)))]
        examples = generator.integers(0, len(one.scores), len(one.scores))
        heads = set(one.top(n, greedy=greedy, examples=examples).heads)
        found[number] = [name in heads for name in names]
    return found


def _jaccard(there: np.ndarray) -> float:
    """Mean over pairs of circuits: heads of both over heads of either; 1 for two without heads."""
    counts = there.astype(np.int64)
    both = counts @ counts.T
    sizes = counts.sum(1)
    either = sizes[:, None] + sizes - both
    alike = np.where(either > 0, both / np.maximum(either, 1), 1.0)
    return float(alike[np.triu_indices(len(there), 1)].mean())


def _verdict(shares: Sequence[float], stable: float) -> Verdict:
    before, after = shares
    there, gone = stable - 1e-9, 1 - stable + 1e-9
    if after >= there:
        return "emergent" if before <= gone else "kept" if before >= there else "unstable"
    return "lost" if before >= there and after <= gone else "unstable"
