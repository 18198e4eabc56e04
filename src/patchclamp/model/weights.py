"""The weights of single modules as they are stored: as a matrix, tied to others, or packed by quantisation."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from patchclamp.errors import ModelError

_PACKED_CLASSES = re.compile(r"4bit|8bit|^(Quant|WQ|HQQ|AQLM|VPTQ|FP8|AutoRound)\w*Linear|Quantized", re.IGNORECASE)
_PACKED_TYPES = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.qint8, torch.quint8, torch.qint32)


def projection_weights(module: nn.Module, name: str = "") -> torch.Tensor:
    """The matrix of a linear layer, `[inputs, outputs]`: a view, so that a change to it changes the module.

    Args:
        module: `nn.Linear` or a subclass, or Hugging Face's `Conv1D`.
        name: dotted path of the module, for the message.

    Raises:
        ModelError: the weights are packed by quantisation, or the module is no linear layer.
    """
    called = f"{name} ({type(module).__name__})" if name else type(module).__name__
    if why := is_quantised(module):
        raise ModelError(
            f"{called} is quantised: {why}. What flows through it can be recorded and intervened on, "
            "but its weights cannot be read or edited"
        )
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
        raise ModelError(f"{called} is no linear layer with a matrix of weights")
    return weight.detach() if type(module).__name__ == "Conv1D" else weight.detach().T


def kernels(module: nn.Module, name: str = "") -> torch.Tensor:
    """What each output channel of a convolution reads, `[outputs, inputs * kernel]`, before any norm that follows.

    Raises:
        ModelError: a transposed convolution in groups, whose kernels are not one matrix.
    """
    weight: Any = module.weight
    if not getattr(module, "transposed", False):
        return weight.detach().flatten(1)
    if module.groups != 1:
        raise ModelError(f"{name}: the kernels of a transposed convolution in groups are not one matrix")
    return weight.detach().transpose(0, 1).flatten(1)


def check_devices(root: nn.Module) -> None:
    """Refuse a module whose weights are missing, or lie on several devices with nobody who moves the data.

    Raises:
        ModelError: so it is; the message names a weight on each device.
    """
    if hasattr(root, "hf_device_map") or any(hasattr(module, "_hf_hook") for module in root.modules()):
        return  # accelerate moves the data, and brings weights
    places: dict[torch.device, str] = {}
    for name, parameter in root.named_parameters():
        places.setdefault(parameter.device, name)
    if missing := next((name for device, name in places.items() if device.type == "meta"), ""):
        raise ModelError(f"the weight {missing} is on the device 'meta': it has a shape and no values. Load it first")
    if len(places) > 1:
        listed = " and ".join(f"{name} on {device}" for device, name in list(places.items())[:2])
        raise ModelError(f"the weights lie on several devices ({listed}): use model.to(...), or device_map= in loading")


def is_quantised(module: nn.Module) -> str | None:
    """Why the weights of a module cannot be taken for the numbers it computes with; None where they can."""
    kind = type(module)
    if re.match(r"torch\.(ao\.)?nn\.(intrinsic\.)?quantized\.", kind.__module__):
        return f"{kind.__module__}.{kind.__name__} packs its weights"
    if _PACKED_CLASSES.search(kind.__name__):
        return f"a {kind.__name__} packs its weights"
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if not name.endswith("weight"):
            continue
        if (
            tensor.is_quantized
            or tensor.dtype in _PACKED_TYPES
            or (tensor.dtype.is_floating_point and tensor.itemsize < 2)
        ):
            return f"its {name} is of type {tensor.dtype}"
        if is_traceable_wrapper_subclass(tensor) and type(tensor).__module__.startswith("torchao"):
            return f"its {name} is a {type(tensor).__name__}"
    return None


def tied_weights(root: nn.Module) -> list[tuple[str, ...]]:
    """Dotted names of parameters that are one tensor, as `("transformer.wte.weight", "lm_head.weight")`.

    Returns:
        One tuple for each tensor that has several names, in the order of the modules.
    """
    groups: dict[object, list[str]] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        groups.setdefault(_memory(parameter), []).append(name)
    return [tuple(names) for names in groups.values() if len(names) > 1]


def weights_sha256(root: nn.Module) -> str:
    """SHA-256 over the names, shapes, types and bytes of all weights, as they are now; those of packed ones too.

    Raises:
        ModelError: a weight is on "meta": it has no values.
    """
    digest = hashlib.sha256()
    for name, value in root.state_dict().items():
        if isinstance(value, torch.Tensor) and value.device.type == "meta":
            value = _put_aside(root, name, value)
        for part, each in _leaves(name, value):
            if not isinstance(each, torch.Tensor):
                digest.update(f"{part} {each}\n".encode())
                continue
            if each.device.type == "meta":
                raise ModelError(f"the weight {part} is on the device 'meta': it has a shape and no values")
            digest.update(f"{part} {tuple(each.shape)} {each.dtype}\n".encode())
            flat = each.detach().to("cpu").contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def _put_aside(root: nn.Module, name: str, value: torch.Tensor) -> torch.Tensor:
    """A weight that accelerate keeps elsewhere until it is needed; `value` itself where it does not."""
    owner, _, leaf = name.rpartition(".")
    hook = getattr(root.get_submodule(owner), "_hf_hook", None)
    for each in (hook, *getattr(hook, "hooks", ())):
        kept = getattr(each, "weights_map", None)
        if kept is not None and leaf in kept:
            return kept[leaf]
    return value


def _memory(parameter: nn.Parameter) -> object:
    """What two names of one tensor share. Two parameters may be one tensor: `head.weight.data = embedding.weight`."""
    # Types without memory to point at (meta, lazy, wrappers of other tensors) are told by identity.
    if parameter.device.type == "meta" or isinstance(parameter, nn.UninitializedParameter) or not parameter.numel():
        return id(parameter)
    if is_traceable_wrapper_subclass(parameter):
        return id(parameter)
    return parameter.device, parameter.data_ptr(), parameter.numel()


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Plain tensors and other values in an entry of a state dict, with names that say where they were."""
    if isinstance(value, torch.Tensor):
        yield from _plain_tensors(name, value)
    elif isinstance(value, torch.ScriptObject):
        # What packs the weights of a layer for one machine gives them back in this form.
        state = getattr(value, "__getstate__", None)
        yield from _leaves(name, state() if state is not None else ())
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _leaves(f"{name}.{key}", each)
    elif isinstance(value, (list, tuple)):
        for number, each in enumerate(value):
            yield from _leaves(f"{name}.{number}", each)
    elif isinstance(value, (str, bytes, int, float, torch.dtype)):
        yield name, value


def _plain_tensors(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, Any]]:
    if is_traceable_wrapper_subclass(tensor):
        inner, context = tensor.__tensor_flatten__()
        yield name, f"{type(tensor).__name__} {context}"
        for each in inner:
            yield from _leaves(f"{name}.{each}", getattr(tensor, each))
    elif not tensor.is_quantized:
        yield name, tensor
    else:
        yield f"{name}.int_repr", tensor.int_repr()
        if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            yield f"{name}.scale", tensor.q_scale()
            yield f"{name}.zero_point", tensor.q_zero_point()
        else:
            yield f"{name}.scales", tensor.q_per_channel_scales()
            yield f"{name}.zero_points", tensor.q_per_channel_zero_points()
            yield f"{name}.axis", tensor.q_per_channel_axis()
