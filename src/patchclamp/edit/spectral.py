"""Say some things more quietly: lower singular values of the unembedding.

    W' = U S' V^T = W + (factor - 1) * W V_i V_i^T,    for each damped component i

`V_i` is the right singular vector, so neither `U` nor `S` is needed, and states orthogonal to `V_i` keep their logits.
Where the unembedding is one tensor with the embedding, it becomes one of its own first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from patchclamp.decompose.output_svd import OutputDecomposition, head_matrix, output_svd
from patchclamp.edit.changes import Changes
from patchclamp.edit.edited import EditedModel, Step, copied
from patchclamp.edit.widths import is_configured
from patchclamp.errors import DataError, ModelError
from patchclamp.model import Model
from patchclamp.model.slices import join, why_no_parameters
from patchclamp.published import published

_ROWS_AT_ONCE = 16_384
_FLAG = "tie_word_embeddings"


@published(
    row="S008",
    title="Redefining Experts: Interpretable Decomposition of Language Models for Toxicity Mitigation",
    authors="Shaik et al.",
    year=2025,
    url="https://arxiv.org/abs/2509.16660",
    part="damping",
)
def damp_components(
    model: Model,
    components: Sequence[int] | np.ndarray,
    factor: float,
    *,
    decomposition: OutputDecomposition | None = None,
) -> EditedModel:
    """Multiply singular values of a copy's unembedding by a factor (Shaik et al., 2025).

    Args:
        model: with an unembedding that is a linear layer. It stays as it is.
        components: indices of singular components, 0 for the largest, as `OutputDecomposition.select` gives them.
        factor: 0 takes a component out, 1 changes nothing; the paper has 0.1 to 0.9.
        decomposition: of this model, where there is one already; None: `output_svd(model)`.

    Returns:
        An `EditedModel`. If the unembedding was tied to the embedding, the copy has a matrix more, and
        `tie_word_embeddings` of its configuration is False where that says no more than this.

    Raises:
        ModelError: no unembedding, a quantised one, or one that is the embedding itself.
        DataError: no such component, a factor that is not finite, or a decomposition of another matrix.
    """
    if isinstance(factor, bool) or not np.isfinite(factor):
        raise DataError(f"a factor is a finite number, not {factor!r}")
    readout = model.readout
    path = readout.unembedding
    head: Any = model.module.get_submodule(path)
    if isinstance(head, nn.Embedding):
        raise ModelError(
            f"the unembedding of {model.name} is its embedding {path}: there is no layer to be damped alone"
        )
    if why := why_no_parameters(path, head):
        raise ModelError(f"the unembedding cannot be changed: {why}")
    matrix = head_matrix(model)
    found = output_svd(model) if decomposition is None else decomposition
    if found.right.shape[1] != matrix.shape[1]:
        raise DataError(f"the decomposition is of a matrix of width {found.right.shape[1]}, not {matrix.shape[1]}")
    chosen = found.checked(components)
    found.warn_of_parts(chosen)
    changes = _OfHead(copied(model), join(path, "weight"))
    others = changes.untie(model)
    if others and is_configured(model.module):
        _say_untied(model, changes, others, readout.scale)
    new = _damped(matrix, found.right[chosen], float(factor))
    changes.whole(changes.weight, new.T if type(head).__name__ == "Conv1D" else new)
    return EditedModel(model, changes.root, changes, [_step(path, chosen, float(factor), found, others)])


class _OfHead(Changes):
    """Changes of an unembedding: what it was tied to is kept.

    Args:
        root: a copy of the network.
        weight: dotted name of the unembedding's matrix.
    """

    def __init__(self, root: nn.Module, weight: str) -> None:
        super().__init__(root)
        self.weight = weight
        self._tied_to = ""
        self._listed: str | None = None

    def untie(self, model: Model) -> tuple[str, ...]:
        """Give the unembedding a matrix of its own; the names of what it was one tensor with."""
        group = next((each for each in model.tied_weights if self.weight in each), ())
        others = tuple(name for name in group if name != self.weight)
        if others:
            self._tied_to = others[0]
            old = self.root.get_parameter(self.weight)
            _set(self.root, self.weight, nn.Parameter(old.detach().clone(), old.requires_grad))
            # Where transformers notes what it will not write twice.
            self._listed = getattr(self.root, "all_tied_weights_keys", {}).pop(self.weight, None)
        return others

    def undo(self, root: nn.Module) -> None:
        """Put back the matrix, and what it was one tensor with."""
        super().undo(root)
        if self._tied_to:
            _set(root, self.weight, root.get_parameter(self._tied_to))
        if self._listed is not None:
            root.all_tied_weights_keys[self.weight] = self._listed  # type: ignore[index,operator]


def _set(root: nn.Module, parameter: str, value: nn.Parameter) -> None:
    path, _, name = parameter.rpartition(".")
    setattr(root.get_submodule(path), name, value)


def _say_untied(model: Model, changes: _OfHead, others: Sequence[str], scale: float) -> None:
    """Say in the configuration that nothing is tied, where it then says nothing else.

    T5 ties three matrices by this flag, and scales by it. There it stays: transformers does not tie what it finds twice
    and different in a folder.
    """
    paths = list(_flags(changes.root.config)) if len(others) == 1 else []
    for path in paths:
        changes.set_flag(path, False)
    config: Any = changes.root.config
    try:
        kept = not paths or type(config).from_dict(config.to_dict()).to_dict() == config.to_dict()
        again = Model(changes.root)
        again._example = model._example
        kept = kept and abs(again.readout.scale - scale) <= 1e-6 * abs(scale)
    except Exception:  # whatever a foreign configuration raises that does not know the flag
        kept = False
    if not kept:
        for path in paths:
            changes.set_flag(path, True)
            del changes.flags[path]


def _flags(config: Any, prefix: str = "") -> Iterator[str]:
    for name, value in vars(config).items():
        if name == _FLAG and value:
            yield prefix + name
        elif hasattr(value, "to_dict") and not name.startswith("_"):
            yield from _flags(value, f"{prefix}{name}.")


def _damped(matrix: torch.Tensor, right: np.ndarray, factor: float) -> torch.Tensor:
    """`[vocabulary, d]`, of the type of the matrix, computed in float64."""
    rows = torch.from_numpy(np.ascontiguousarray(right))
    made = []
    for block in matrix.split(_ROWS_AT_ONCE):
        wide = block.to("cpu", torch.float64)
        made.append((wide + (factor - 1) * (wide @ rows.T) @ rows).to(matrix))
    return torch.cat(made)


def _step(path: str, chosen: np.ndarray, factor: float, found: OutputDecomposition, others: Sequence[str]) -> Step:
    several = "component" if len(chosen) == 1 else "components"
    words = f"Damped {len(chosen)} {several} of the unembedding {path}: singular values times {factor:g}."
    if others:
        words += f" It was one tensor with {' and '.join(others)}, and is one of its own now."
    details = {
        "components": chosen.tolist(),
        "factor": factor,
        "singular_values": found.singular_values[chosen].tolist(),
        "untied_from": list(others),
    }
    return Step(words, {}, details)
