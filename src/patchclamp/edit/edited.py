"""`EditedModel`: a model whose weights were changed, which knows what was done and how to take it back."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import polars as pl
from torch import nn

from patchclamp.edit.changes import Changes, by_neuron, by_parameter
from patchclamp.errors import DataError, ModelError
from patchclamp.model.model import Model
from patchclamp.neurons import Neurons


@dataclass(frozen=True)
class Step:
    """One thing that was done to the weights.

    Attributes:
        words: what, as a sentence: "Silenced 3 neurons: each is held at 0."
        neurons: site -> indices of the neurons it was done to.
        details: anything else that is needed to do it again, as JSON holds it.
    """

    words: str
    neurons: Mapping[str, Sequence[int]] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def on(cls, words: str, neurons: Neurons, **details: Any) -> Step:
        """A step on a table of neurons."""
        return cls(words, {site: neurons.indices(site).tolist() for site in neurons.sites}, details)


@dataclass(frozen=True, eq=False)
class Edit:
    """What was done to a model at once, with the hashes of its weights before and after."""

    steps: tuple[Step, ...]
    changes: Changes
    before: str
    after: str


class EditedModel(Model):
    """A model with changed weights. It is a `Model`: it is recorded, intervened on and edited again like any other.

    Made by `bake` and the other functions of this room. It holds a copy; the model it was made from is as it was.

    Args:
        base: the model before.
        module: a copy of its module, with the changes in it.
        changes: what was written, and what stood there before.
        steps: what was done, in words.
        before: `base.weights_sha256()`, where it is known already.

    Attributes:
        edits: all edits, the first one first; an edited model that is edited again has several.
        base_name: what the model before all edits was loaded from.
    """

    def __init__(
        self, base: Model, module: nn.Module, changes: Changes, steps: Sequence[Step], before: str | None = None
    ) -> None:
        super().__init__(module, base.tokenizer, base.processor, base.name)
        self._example = base._example
        self.base_name: str = base.base_name if isinstance(base, EditedModel) else base.name
        self.name = f"{self.base_name} (edited)"
        earlier = base.edits if isinstance(base, EditedModel) else ()
        before = base.weights_sha256() if before is None else before
        self.edits: tuple[Edit, ...] = (*earlier, Edit(tuple(steps), changes, before, self.weights_sha256()))

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the weights come from, as JSON holds it.

        Keys: `base_model`, `class`, `weights_sha256_before`, `weights_sha256_after`, `patchclamp` (its version),
        `config` (flag -> [before, after]) and `interventions`, a list of `words`, `neurons` and `details`.
        """
        import patchclamp

        flags: dict[str, list[Any]] = {}
        for edit in self.edits:
            for name, (before, after) in edit.changes.flags.items():
                flags[name] = [flags[name][0] if name in flags else before, after]
        return {
            "base_model": self.base_name,
            "class": type(self.module).__name__,
            "weights_sha256_before": self.edits[0].before,
            "weights_sha256_after": self.edits[-1].after,
            "patchclamp": patchclamp.__version__,
            "config": flags,
            "interventions": [asdict(step) for edit in self.edits for step in edit.steps],
        }

    def diff(self, by: Literal["parameter", "neuron"] = "parameter") -> pl.DataFrame:
        """What changed, against the weights before all edits.

        Args:
            by: `"parameter"` gives a row for each parameter that was written: `parameter`, `shape`, `numbers` (how many
                it has), `changed` (how many are others now), `largest_change` (absolute) and `added` (it was not there
                before). `"neuron"` gives a row for each neuron and parameter: `site`, `index`, `parameter`, `changed`,
                `largest_change`; at a bias this is what the neuron adds to it.

        Raises:
            DataError: `by` is neither.
        """
        kept = [each for edit in self.edits for each in edit.changes.kept]
        if by == "parameter":
            return by_parameter(self.module, kept)
        if by != "neuron":
            raise DataError(f'diff(by=...) is "parameter" or "neuron", not {by!r}')
        return by_neuron(self.module, kept, [each for edit in self.edits for each in edit.changes.constants])

    def revert(self) -> Model:
        """The model before the last edit, to the bit: a copy with that edit taken back.

        Raises:
            ModelError: somebody else has changed the weights since the edit.
        """
        last = self.edits[-1]
        module = copied(self)
        last.changes.undo(module)
        tokenizer, processor = self.tokenizer, self.processor
        if len(self.edits) == 1:
            made = Model(module, tokenizer, processor, self.base_name)
            made._example = self._example
        else:
            made = copy.copy(self)
            made.module, made.edits, made._inspection = module, self.edits[:-1], None
        if made.weights_sha256() != last.before:
            raise ModelError(f"{self.name} cannot be reverted: its weights have been changed since the edit")
        return made

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write an ordinary folder that loads without patchclamp.

        Of a Hugging Face model: weights as safetensors, configuration, generation configuration, tokenizer or image
        processor. Of another module: `model.safetensors`, its state dict, for `safetensors.torch.load_model`. Beside
        them `README.md`, a card that says what was done, and `patchclamp.json`, the same for programs. The folder
        appears when it is whole.

        Args:
            directory: a folder that is not there, or empty. The weights are written in the type that they have here.

        Returns:
            The folder.

        Raises:
            StoreError: files are there already, or it cannot be written.
            ModelError: the model has adapters beside its weights (LoRA): merge them before you edit.
        """
        from patchclamp.edit.saving import save

        return save(self, directory)


def copied(model: Model) -> nn.Module:
    """A copy of a model's module to write into.

    Raises:
        ModelError: an intervention is at work in the module, weights are kept elsewhere, or it cannot be copied.
    """
    root = model.module
    model.check_weights()
    if any(each.device.type == "meta" for each in root.parameters()):
        raise ModelError(f"some weights of {model.name} are kept elsewhere (device_map=): load it whole to edit it")
    for module in root.modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if any(str(getattr(each, "__module__", "")).startswith("patchclamp.") for each in hooks):
            raise ModelError(
                f"an intervention or a recording is at work in {model.name}, and would be copied with it: "
                "edit outside of the with block"
            )
    try:
        return copy.deepcopy(root)
    except Exception as error:  # a module may hold what cannot be copied
        raise ModelError(f"{model.name} cannot be copied: {type(error).__name__}: {error}") from error
