"""Silence the neurons of each language, and see which texts suffer."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import polars as pl

import patchclamp as pc
from label_findings.markdown import table
from patchclamp.testbed import languages
from patchclamp.testbed.silencing import loss_by_label, loss_increase
from patchclamp.testbed.trained import trained

RATES = (0.01, 0.02, 0.05, 0.1, 0.2)
RANDOM_SETS = 20
LEAST = 10  # neurons that each language owns at the rate whose matrices are shown


def four_languages() -> str:
    """The section: sets at all rates beside random ones, then matrices at one rate."""
    net = trained("four_languages")
    shown, held_out = languages.documents(1000, seed=2), languages.documents(120, seed=3)
    recording = pc.record(net.model, shown, "gate.*", [pc.ByLabel(), pc.Moments()], progress=False)
    tried = {rate: Tried.of(net.model, held_out, recording, rate) for rate in RATES}
    rate = next((each for each in RATES if min(map(len, tried[each].sets.values())) >= LEAST), RATES[-1])
    plain = loss_by_label(net.model, held_out, "language")
    lines = [
        "## Language neurons: a decoder of four languages",
        f"`pc.testbed` has a trained decoder with gated MLPs ({len(recording.neurons())} neurons in "
        f"{len(recording.sites)} layers) of four artificial languages in two related pairs. `find.lape` reads the "
        f"gates on {len(shown):,} documents; then each language's set is held at 0 at the gates "
        f"(`model.intervene(pc.ablate(set))`), and the loss of the next token is measured on {len(held_out)} other "
        "documents. The decoder was trained on neither. As it is, its loss is "
        f"{', '.join(f'{each:.2f}' for each in plain)} nats ({', '.join(languages.NAMES)}). Beside "
        f"each set: {RANDOM_SETS} random sets of the same size per layer, of neurons that are not in it. The "
        "paper selects 1% of the neurons; a neuron may belong to several languages.",
        table(COLUMNS, [row for each in tried.values() for row in each.rows()]),
        *verdict(tried, rate, net.model, held_out, recording),
        *matrices(tried[rate], net.model, held_out, recording),
        *depth(recording, tried[rate].sets, rate),
    ]
    return "\n\n".join(lines)


COLUMNS = (
    *("selected", "language", "neurons", "rise on its own", "largest rise on another"),
    *("random sets, on its own: mean", "median", "largest on any", "mean below a fifth"),
)


@dataclass(frozen=True)
class Tried:
    """The sets of one rate, silenced.

    Attributes:
        rate: share of all neurons that are selected.
        sets: of each language.
        rise: `[sets, languages]`, of the loss, in nats.
        drawn: of each language, the random sets.
        chance: `[sets, random sets, languages]`, as `rise`.
    """

    rate: float
    sets: dict[str, pc.Neurons]
    rise: np.ndarray
    drawn: list[list[pc.Neurons]]
    chance: np.ndarray

    @classmethod
    def of(cls, model: pc.Model, data: pc.Texts, recording: pc.Recording, rate: float) -> Tried:
        sets = owned(recording, rate)
        rise = loss_increase(model, data, "language", list(sets.values()))
        everyone = recording.neurons()
        drawn = [[everyone.sample(like=each, seed=seed) for seed in range(RANDOM_SETS)] for each in sets.values()]
        chance = np.stack([loss_increase(model, data, "language", each) for each in drawn])
        return cls(rate, sets, rise, drawn, chance)

    def dominates(self) -> bool:
        """Whether every set costs its own language most."""
        return bool((self.rise.argmax(1) == np.arange(len(self.rise))).all())

    def above_chance(self) -> np.ndarray:
        """`[sets]` bool: whether random sets raise the loss by less than a fifth, on the same texts, in the mean."""
        return self.chance.mean(1).diagonal() < self.rise.diagonal() / 5

    def rows(self) -> list[list[str]]:
        rows = []
        for place, (name, each) in enumerate(self.sets.items()):
            chance, rise = self.chance[place], self.rise[place]
            drawn = chance[:, place]
            figures = [rise[place], np.delete(rise, place).max(), drawn.mean(), np.median(drawn), chance.max()]
            said = "yes" if self.above_chance()[place] else "no"
            rows.append([f"{self.rate:.0%}", name, str(len(each)), *map(nats, figures), said])
        return rows


def verdict(
    tried: dict[float, Tried], rate: float, model: pc.Model, data: pc.Texts, recording: pc.Recording
) -> list[str]:
    """What of the claims holds."""
    dominated = [f"{each:.0%}" for each, found in tried.items() if found.dominates()]
    missed = [f"{each:.0%}" for each, found in tried.items() if not found.dominates()]
    above, number = int(tried[rate].above_chance().sum()), len(languages.NAMES)
    # Of random sets: how often the language that they were drawn for is the one that suffers most.
    random = np.concatenate([each.chance.argmax(2) == np.arange(number)[:, None] for each in tried.values()])
    return [
        f"**The diagonal.** Every set costs its own language most at {', '.join(dominated) or 'no rate'}"
        + (f", not at {', '.join(missed)}" if missed else "")
        + f". Of random sets, {random.mean():.0%} cost the language most that they were drawn for (chance: "
        f"{1 / number:.0%}).",
        f"**Beside chance.** At {rate:.0%}, the first rate at which each language owns at least {LEAST} neurons, "
        f"random sets raise the loss by less than a fifth of what the language's own set does for {above} of {number} "
        "languages. "
        + ("" if above == number else "**What was expected of all does not hold for the others.** ")
        + worst(tried[rate], model, data, recording),
    ]


def worst(tried: Tried, model: pc.Model, data: pc.Texts, recording: pc.Recording) -> str:
    """The neuron that makes the most harmful random set harmful."""
    place, draw, _ = np.unravel_index(int(tried.chance.argmax()), tried.chance.shape)
    names = tried.drawn[place][draw].names
    alone = loss_increase(model, data, "language", [pc.Neurons([each]) for each in names])
    most = int(alone.max(1).argmax())
    site, _, index = names[most].rpartition(":")
    rates = recording[site].by_label.rate("language")[int(index), :, 0]
    listed = ", ".join(nats(each) for each in alone[most])
    return (
        f"The most harmful of them (+{tried.chance.max():.2f} nats on one language) holds `{names[most]}`, which alone "
        f"costs {listed} nats, and fires on {rates.min():.0%} to {rates.max():.0%} of the tokens of every language: "
        "how concentrated the firing of a neuron is does not say how much depends on it."
    )


def matrices(tried: Tried, model: pc.Model, data: pc.Texts, recording: pc.Recording) -> list[str]:
    alone = owned(recording, tried.rate, alone=True)
    rises = [loss_increase(model, data, "language", list(alone.values()))]
    rises.append(loss_increase(model, data, "language", list(tried.sets.values()), to="mean"))
    return [
        f"The rise of the loss in nats at {tried.rate:.0%}: rows are what is silenced, columns the texts. As "
        "published:",
        matrix(tried.rise, tried.sets),
        "Only neurons that no other language owns too:",
        matrix(rises[0], alone),
        "As published, but held at their means, not at 0:",
        matrix(rises[1], tried.sets),
        "The means of the random sets held at 0:",
        matrix(tried.chance.mean(1), tried.sets),
    ]


def owned(recording: pc.Recording, rate: float, alone: bool = False) -> dict[str, pc.Neurons]:
    """The set of each language; `alone`: neurons that no other language owns too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that fewer pass the filter than are asked for
        found = pc.find.lape(recording, "language", top_rate=rate).to_polars()
    mean = recording.neurons().to_polars().select("site", "index", "mean")
    neurons = pc.Neurons.from_polars(found.join(mean, on=["site", "index"], maintain_order="left"))
    owners = pl.col("owners")
    return {
        each: neurons.where(owners == each if alone else owners.str.split(", ").list.contains(each))
        for each in languages.NAMES
    }


def nats(value: float) -> str:
    return f"{round(float(value), 3) + 0.0:.3f}"  # 0 has no sign


def matrix(rise: np.ndarray, sets: dict[str, pc.Neurons]) -> str:
    rows = [
        [f"{name} ({len(each)})", *(f"**{nats(v)}**" if v == row.max() else nats(v) for v in row)]
        for (name, each), row in zip(sets.items(), rise, strict=True)
    ]
    return table(["silenced", *(f"on {each}" for each in sets)], rows)


def depth(recording: pc.Recording, sets: dict[str, pc.Neurons], rate: float) -> list[str]:
    """Which layers the sets are in, and the kinds of `lape_ternary`."""
    kinds = pc.find.lape_ternary(recording, "language", top_rate=rate).to_polars()
    rows = []
    for site in recording:
        here = kinds.filter(pl.col("site") == site)["kind"]
        counts = [int((here == kind).sum()) for kind in ("specific", "related", "general")]
        rows.append([f"`{site}`", *(str(len(each.at(site))) for each in sets.values()), *map(str, counts)])
    middle = [sum(int(each) for each in row[1:5]) for row in rows]
    ends = min(middle[0], middle[-1]) > max(middle[1:-1])
    said = "as published, most lie in the first and the last layers" if ends else "they do not lie at both ends"
    return [
        f"**Where.** Neurons of each set by layer ({said}; but there are three layers only), and what `lape_ternary` "
        f"calls the neurons of the layer at the same rate (weight {kinds['weight'][0]:.3f}):",
        table(["layer", *sets, "specific", "related", "general"], rows),
    ]
