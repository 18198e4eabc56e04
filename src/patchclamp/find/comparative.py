"""Comparative neuron analysis: through which neurons does a head, or anything else that one can ablate, act?

    score = increase in the original run - increase in the run with the intervention

with the increase of `logprob_increase`: how much adding what one neuron wrote raises the log probability of the token.
Neurons that write it whether or not the head is there have a score near 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from patchclamp.errors import DataError
from patchclamp.find.logprob_increase import Pass, Tokens, table
from patchclamp.model import Model, Site
from patchclamp.neurons import Neurons
from patchclamp.published import published


@published(
    row="S102",
    title="Interpreting Arithmetic Mechanism in Large Language Models through Comparative Neuron Analysis",
    authors="Zeping Yu, Sophia Ananiadou",
    year=2024,
    url="https://arxiv.org/abs/2409.14144",
    part="comparative",
)
def comparative(
    model: Model,
    inputs: str | Sequence[str],
    tokens: Tokens,
    intervention: Any,
    sites: str | Site | Sequence[str | Site] = "mlp.*",
    *,
    shared_size: bool = False,
    memory: int = 1 << 26,
) -> Neurons:
    """Neurons by how much of what they do for a token an intervention takes away (Yu and Ananiadou, 2024).

    Args:
        model: a decoder with a readout.
        inputs: texts; what comes after each is asked.
        tokens: the token after each text, by its string (of several tokens the first counts) or id; one for all.
        intervention: what `model.intervene` takes, such as `pc.ablate` of a head's neurons (`Site.head`); or several.
        sites: whose neurons.
        shared_size: divide by the size of the original run's last residual stream in both runs, as the authors' code
            does; else each run is divided by its own.
        memory: as of `logprob_increase`.

    Returns:
        All neurons of the sites, best first: `score`, in nats, the mean over texts; `increase`, in the original run;
        `increase_changed`, under the intervention.

    Raises:
        DataError, ModelError: as `logprob_increase`.
    """
    changes = intervention if isinstance(intervention, (list, tuple)) else (intervention,)
    if not changes or not all(hasattr(each, "edits") for each in changes):
        raise DataError(f"comparative takes an intervention, such as pc.ablate(neurons), not {intervention!r:.60}")
    readout = model.readout
    original = Pass.of(model, inputs, tokens, sites, readout)
    with model.intervene(*changes):
        changed = Pass.of(model, inputs, tokens, sites, readout)
    if shared_size:
        changed = replace(changed, lens=original.lens)
    first, second = original.increases(memory), changed.increases(memory)
    scores = {site: values - second[site] for site, values in first.items()}
    return table(scores, {"increase": first, "increase_changed": second})
