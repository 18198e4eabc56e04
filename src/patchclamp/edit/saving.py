"""Write an edited model as an ordinary folder, with a card that says where its weights come from."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchclamp.errors import ModelError, StoreError
from patchclamp.storage.folder import new_folder
from patchclamp.storage.remote import local

if TYPE_CHECKING:
    from patchclamp.edit.edited import EditedModel


def save(model: EditedModel, directory: str | os.PathLike[str]) -> Path:
    """Write the folder; see `EditedModel.save`."""
    target = local(directory)
    if target.is_dir() and any(target.iterdir()):
        there = ", ".join(sorted(each.name for each in target.iterdir())[:4])
        raise StoreError(f"will not write into {target}: files are there ({there}). Name a new folder")
    module: Any = model.module
    if getattr(module, "peft_config", None):
        # Their save_pretrained writes the adapters only, and what was edited are the weights beneath.
        raise ModelError(
            f"{model.name} has adapters beside its weights: merge them (merge_and_unload()) before editing"
        )
    ordinary = hasattr(module, "save_pretrained")
    try:
        with new_folder(target, "edited model", replace=False) as work:
            if ordinary:
                _save_pretrained(model, work)
            else:
                from safetensors.torch import save_model

                save_model(module, str(work / "model.safetensors"))
            provenance = {**model.provenance, "base_model": _without_folders(model.base_name)}
            (work / "README.md").write_text(_card(model, provenance, ordinary), encoding="utf-8")
            said = json.dumps(provenance, indent=1, ensure_ascii=False)
            (work / "patchclamp.json").write_text(said + "\n", encoding="utf-8")
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def _save_pretrained(model: EditedModel, work: Path) -> None:
    module: Any = model.module
    # transformers notes in the configuration what it writes; the model is to stay as it is.
    before = dict(vars(module.config))
    try:
        module.save_pretrained(work)
    except ValueError as error:  # a generation configuration that contradicts itself, for example
        raise StoreError(f"transformers does not write {model.name}: {error}") from error
    finally:
        vars(module.config).clear()
        vars(module.config).update(before)
    for each in (model.tokenizer, model.processor):
        if hasattr(each, "save_pretrained"):
            each.save_pretrained(work)


def _without_folders(name: str) -> str:
    """A folder on somebody's disk says nothing to others but its last part."""
    return Path(name).name if Path(name).expanduser().is_dir() else name


def _card(model: EditedModel, provenance: Mapping[str, Any], ordinary: bool) -> str:
    name = provenance["base_model"]
    head = ["---", "tags:", "- patchclamp", "- edited"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        head.append(f"base_model: {name}")
    if ordinary:
        head.append("library_name: transformers")
    facts = [
        ("base model", name),
        ("class", provenance["class"]),
        ("SHA-256 of the weights before", f"`{provenance['weights_sha256_before']}`"),
        ("SHA-256 of the weights after", f"`{provenance['weights_sha256_after']}`"),
        ("patchclamp", provenance["patchclamp"]),
        *(
            (f"configuration, `{flag}`", f"{old} before, {new} after")
            for flag, (old, new) in provenance["config"].items()
        ),
    ]
    lines = [*head, "---", "", f"# {name}, edited", ""]
    lines += ["The weights of this model were edited with patchclamp. Nobody trained it anew.", ""]
    lines += _table(("", ""), facts)
    lines += ["", "## What was done", ""]
    for number, step in enumerate(provenance["interventions"], 1):
        lines.append(f"{number}. {step['words']}")
        lines += [f"    - `{site}`: {', '.join(map(str, indices))}" for site, indices in step["neurons"].items()]
    lines += ["", "Values and factors are in `patchclamp.json`.", "", "## What changed in the weights", ""]
    changed = model.diff()
    lines += _table(changed.columns, changed.rows())
    lines += ["", "## How to load it", "", *_how_to_load(model, ordinary), ""]
    return "\n".join(lines)


def _how_to_load(model: EditedModel, ordinary: bool) -> list[str]:
    kind = type(model.module).__name__
    if ordinary:
        return [
            "```python",
            f"from transformers import {kind}",
            "",
            f'model = {kind}.from_pretrained("this folder")',
            "```",
        ]
    return [
        f"{kind} is no Hugging Face model: `model.safetensors` holds its state dict, and the code of the class is not",
        "here.",
        "",
        "```python",
        "from safetensors.torch import load_model",
        "",
        f"module = {kind}(...)  # built as it was",
        'load_model(module, "this folder/model.safetensors")',
        "```",
    ]


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return lines + [f"| {' | '.join(_said(each) for each in row)} |" for row in rows]


def _said(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
