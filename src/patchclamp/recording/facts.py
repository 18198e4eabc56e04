"""What a recording says of itself: model, data, parameters, versions; and what tells two recordings apart."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import nn

from patchclamp.model.model import Model
from patchclamp.model.site import Site
from patchclamp.recording.corpus import Corpus
from patchclamp.recording.summaries import Summary

# What a configuration says that is not about what the model computes.
_PASSING = ("_name_or_path", "transformers_version", "architectures", "use_cache")


def facts_of(
    model: Model, corpus: Corpus, sites: Sequence[Site], templates: Mapping[str, Summary], parameters: Mapping[str, Any]
) -> dict[str, Any]:
    """The facts of a recording, as JSON: `model`, `data`, `parameters`, `versions`."""
    weight = next(model.module.parameters(), None)
    facts = {
        "model": {
            "name": model.name,
            "class": type(model.module).__name__,
            "weights_sha256": model.weights_sha256(),
            "configuration_sha256": _configuration_sha256(model.module),
            "dtype": None if weight is None else str(weight.dtype).removeprefix("torch."),
        },
        "data": {
            "name": corpus.name,
            "sha256": corpus.sha256,
            "tokens_sha256": corpus.tokens_sha256,
            "examples": corpus.examples,
            "tokens": corpus.tokens,
            "truncated": corpus.truncated,
        },
        "parameters": {
            "sites": [site.name for site in sites],
            "summaries": {name: each.parameters() for name, each in templates.items()},
            **parameters,
        },
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in ("patchclamp", "torch", "transformers", "numpy")},
    }
    # There and back, so that they equal what is read from a manifest.
    return json.loads(json.dumps(facts))


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What makes the recording `there` another one than that of the facts `here`, in words; empty if nothing does."""
    found = []
    for part, keys in {"model": ("weights_sha256", "class"), "data": ("sha256",)}.items():
        if any(there[part].get(key) != here[part][key] for key in keys):
            found.append(f"the {part} (there {there[part].get('name')!r}, here {here[part]['name']!r})")
    if not found and there["model"].get("configuration_sha256") != here["model"]["configuration_sha256"]:
        found.append("the configuration of the model")
    if not found and there["data"].get("tokens_sha256") != here["data"]["tokens_sha256"]:
        found.append("the tokens that the texts are made into (another tokenizer, or another longest text)")
    missing = object()
    for name in sorted({*there["parameters"], *here["parameters"]}):
        values = [each["parameters"].get(name, missing) for each in (there, here)]
        if values[0] != values[1]:
            before, now = ("not said" if value is missing else repr(value) for value in values)
            found.append(f"{name} (there {before}, here {now})")
    return found


def _configuration_sha256(module: nn.Module) -> str:
    """Hash of what a module computes with its weights: its parts as they print, and its configuration."""
    config: Any = getattr(module, "config", None)
    said = config.to_dict() if hasattr(config, "to_dict") else {}
    kept = {str(key): value for key, value in said.items() if key not in _PASSING}
    text = f"{module!r}\n{json.dumps(kept, sort_keys=True, default=repr)}"
    # An address in memory is another one each time.
    return hashlib.sha256(re.sub(r" at 0x[0-9a-fA-F]+", "", text).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
