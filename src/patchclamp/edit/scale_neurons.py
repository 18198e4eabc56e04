"""`scale_neurons`: make the model follow some neurons more: multiply what they write.

IRCAN finds the neurons that carry a context into the answer and multiplies their outgoing weights by a factor, so that
the model follows the context rather than what it remembers:

    w_out[i] <- factor * w_out[i]
"""

from __future__ import annotations

from patchclamp.edit.bake import bake
from patchclamp.edit.edited import EditedModel
from patchclamp.intervene.scale import scale
from patchclamp.model.model import Model
from patchclamp.neurons import Neurons
from patchclamp.published import published


@published(
    row="S105",
    title="IRCAN: Mitigating Knowledge Conflicts in LLM Generation via Identifying and Reweighting Context-Aware "
    "Neurons",
    authors="Dan Shi, Renren Jin, Tianhao Shen, Weilong Dong, Xinwei Wu, Deyi Xiong",
    year=2024,
    url="https://arxiv.org/abs/2406.18406",
    part="re-weighting",
)
def scale_neurons(model: Model, neurons: Neurons, factor: float) -> EditedModel:
    """Multiply the outgoing weights of neurons by a factor, in a copy of the model.

    The paper takes the 1 to 16 neurons that most examples name, and factors from 2 to 20, both settled on held-out
    examples. A whole output row is multiplied, so the neuron speaks louder outside of the task too: measure that.

    Args:
        model: any model.
        neurons: at sites whose readers are known (`mlp`, `gate`, `attn`, `expert`, ...).
        factor: a finite number; 0 silences.

    Returns:
        The edited copy; the same as `bake(model, scale(neurons, factor))`.

    Raises:
        DataError: there are no neurons, or the factor is not a finite number.
        ModelError: which weights read the neurons is not known, or they are tied to others.
        UnknownName: a site or neuron that the model does not have.
    """
    return bake(model, scale(neurons, factor))
