"""What a single module is: a projection, a norm, a nonlinearity, a convolution."""

from __future__ import annotations

import re

from torch import nn


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer, else None.

    `nn.Linear`, its subclasses, Hugging Face's `Conv1D`, and those that replace them with packed weights.
    """
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "weight"):
        return int(module.weight.shape[0]), int(module.weight.shape[1])  # type: ignore[union-attr,index]
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    named = isinstance(module, nn.Linear) or "linear" in type(module).__name__.lower()
    if named and isinstance(sizes[0], int) and isinstance(sizes[1], int):
        return sizes[0], sizes[1]
    return None


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: by its class name, as every library writes its own RMSNorm."""
    return "norm" in type(module).__name__.lower()


def is_channel_norm(module: nn.Module) -> bool:
    """Whether it normalises each channel by itself (batch and instance norm): a channel stays the same neuron."""
    return bool(re.search(r"batch_?norm|instance_?norm", type(module).__name__, re.IGNORECASE))


def is_convolution(module: nn.Module) -> bool:
    """`nn.Conv1d`, `2d`, `3d`, their transposed and quantised-aware subclasses."""
    return isinstance(module, nn.modules.conv._ConvNd)


def is_attention(module: nn.Module) -> bool:
    """Whether a module attends: by its class name."""
    return bool(re.search(r"attention|attn", type(module).__name__, re.IGNORECASE)) and not is_norm(module)


def is_mixer(module: nn.Module) -> bool:
    """Whether it is the mixer of a state-space block: by its class name."""
    return bool(re.search(r"amba\d*mixer|^mamba\d*$|^ssm|ssm$|deltanet", type(module).__name__, re.IGNORECASE))


def activation_name(module: nn.Module) -> str | None:
    """`gelu`, `relu`, `silu`, ... if the module is a nonlinearity, else None."""
    name = type(module).__name__
    if type(module).__module__ == "transformers.activations":
        return _TRANSFORMERS_ACTIVATIONS.get(name, name.removesuffix("Activation").lower())
    if name == "BloomGelu":
        return "gelu_new"
    if type(module).__module__ == "torch.nn.modules.activation" and not isinstance(
        module, (nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin)
    ):
        return "gelu_new" if isinstance(module, nn.GELU) and module.approximate == "tanh" else name.lower()
    return None


_TRANSFORMERS_ACTIVATIONS = {
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_new",
    "PytorchGELUTanh": "gelu_new",
    "GELUTanh": "gelu_new",
    "FastGELUActivation": "gelu_fast",
    "QuickGELUActivation": "quick_gelu",
    "SiLUActivation": "silu",
}
