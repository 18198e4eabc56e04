"""Domain neurons: label entropy as in `lape`, in each module of a network by itself.

A network of several modules (a vision encoder, a projector, a language model) sees different numbers of tokens in
each, and fires at different rates. Rates, quantiles and the share that is selected are those of one module, so that
what is found in one does not depend on the others. The labels of the paper are domains of images: common, medical,
driving, remote sensing, documents.

    q_k = p_k / sum p        entropy = - sum q_k ln q_k        p_k: share of the module's tokens that fire, on domain k

`domains_overlap` says how much of one domain's neurons another owns as well. The paper also reads image tokens with
the logit lens, which is no finder: `model.readout` makes logits of any residual stream.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import polars as pl

from patchclamp.errors import DataError, unknown
from patchclamp.find.labelled import Labelled, Labels, labelled, table
from patchclamp.find.lape import concentration, firing_rates, firing_threshold, owner_names, selection
from patchclamp.neurons import Neurons
from patchclamp.published import published
from patchclamp.recording import Recording

_OWNED = "owned_by_"


@published(
    row="S083",
    title="MMNeuron: Discovering Neuron-Level Domain-Specific Interpretation in Multimodal Large Language Model",
    authors="Huo et al.",
    year=2024,
    url="https://arxiv.org/abs/2406.11193",
    part="finder",
)
def domains(
    recording: Recording,
    labels: Labels,
    positive: str | None = None,
    *,
    modules: Mapping[str, str | Sequence[str]] | None = None,
    top_rate: float = 0.01,
    filter_rate: float = 0.95,
    bar_rate: float = 0.95,
    threshold: float | None = None,
    null: str | None = None,
    permutations: int = 200,
    seed: int = 0,
) -> Neurons:
    """Neurons that fire on few domains, module by module (Huo et al., 2024), best first.

    Args:
        recording: with `ByLabel` of this label, or `Pooled("fired")`, of sites of all modules.
        labels: the domain of each example: a label of the data, or one value for each example.
        positive: score neurons for this domain only; None: for each.
        modules: name of a module -> its sites, by name or glob: `{"encoder": "vision.*", "language": "text.*"}`. Each
            recorded site is in one. None: the stacks of the network, by the names before `.mlp` or `.gate`.
        top_rate: share of a module's neurons that are selected.
        filter_rate: a neuron whose rates are all at most this quantile of its module's rates is not selected.
        bar_rate: a domain owns a selected neuron that fires on it more often than this quantile of its module's rates.
        threshold: what a neuron is above when it fires; None: 0, where the nonlinearity is silent below it.
        null: "permute" adds `p` and `q`, each corrected for the neurons of its module.
        permutations: how often labels are dealt anew.
        seed: of that.

    Returns:
        All neurons, with the columns of `lape`, and `module`; `owned_by_<domain>`, whether that domain owns it.

    Raises:
        DataError: as `lape`; a site that is in no module, or in two.
        UnknownName: no such label or category; a pattern that no recorded site has.
    """
    frames = []
    for module, sites in _modules(recording, modules).items():
        part = replace(recording, by_site={site: recording.by_site[site] for site in sites})
        given = labelled(part, labels, positive)
        level = firing_threshold(part, threshold)

        def scores(of: Labelled, level: float = level) -> np.ndarray:
            return concentration(firing_rates(of, level), filter_rate)[:, of.scored]

        rates = firing_rates(given, level)
        entropy, selected, owned = selection(rates, f"domains, {module}", top_rate, filter_rate, bar_rate)
        columns: dict[str, np.ndarray | list] = {
            "module": [module] * len(rates),
            "entropy": entropy,
            "selected": selected,
            "owners": owner_names(given, owned),
            **{f"{_OWNED}{each}": owned[:, place] for place, each in enumerate(given.categories)},
        }
        found = table(given, scores(given), columns, null=null, permutations=permutations, seed=seed, again=scores)
        frames.append(found.to_polars())
    return Neurons.from_polars(pl.concat(frames).sort("score", descending=True, maintain_order=True))


def domains_overlap(found: Neurons) -> pl.DataFrame:
    """How much of one domain's neurons another domain owns as well, module by module.

    Args:
        found: what `domains` gave.

    Returns:
        Columns `module`, `label`, `other`; `neurons`, how many `label` owns there; `share` of these that `other` owns
        too (0 to 1; null where `label` owns none). One row for each ordered pair of domains.

    Raises:
        DataError: it is another table.
    """
    names = [each.removeprefix(_OWNED) for each in found.columns if each.startswith(_OWNED)]
    if not names or "module" not in found.columns:
        raise DataError("domains_overlap takes what find.domains gives: there is no column module or owned_by_<domain>")
    frame = found.to_polars()
    rows = []
    for module in frame["module"].unique(maintain_order=True):
        owned = frame.filter(pl.col("module") == module).select(f"{_OWNED}{each}" for each in names).to_numpy()
        both = owned.T.astype(np.int64) @ owned
        rows += [
            {
                "module": module,
                "label": name,
                "other": other,
                "neurons": int(both[one, one]),
                "share": both[one, two] / both[one, one] if both[one, one] else None,
            }
            for one, name in enumerate(names)
            for two, other in enumerate(names)
            if one != two
        ]
    schema = {"module": pl.String, "label": pl.String, "other": pl.String, "neurons": pl.Int64, "share": pl.Float64}
    return pl.DataFrame(rows, schema=schema)


# Helpers --------------------------------------------------------------------------------------------


def _modules(recording: Recording, given: Mapping[str, str | Sequence[str]] | None) -> dict[str, list[str]]:
    """Module -> its sites, in the order of the recording."""
    if given is None:
        stacks = [each.stack or "model" for each in recording.sites]
        return {
            stack: [site for site, own in zip(recording, stacks, strict=True) if own == stack]
            for stack in dict.fromkeys(stacks)
        }
    if not given:
        raise DataError("modules names none: give {name: sites}, or None for the stacks of the network")
    home: dict[str, str] = {}
    for module, patterns in given.items():
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            matching = [site for site in recording if fnmatch.fnmatchcase(site, pattern)]
            if not matching:
                raise unknown("recorded site", pattern, recording)
            for site in matching:
                if home.setdefault(site, module) != module:
                    raise DataError(f"{site} is in two modules, {home[site]!r} and {module!r}: it belongs to one")
    for site in recording:
        if site not in home:
            raise DataError(
                f"{site} is in none of the modules {', '.join(given)}: name one for it, or do not record it"
            )
    return {module: [site for site in recording if home[site] == module] for module in given}
