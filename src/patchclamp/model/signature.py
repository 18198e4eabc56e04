"""What keyword arguments a module's `forward` takes."""

from __future__ import annotations

import inspect

from torch import nn


def accepts(module: nn.Module, name: str) -> bool:
    """Whether `module.forward` has a parameter of that name; `**kwargs` is not known to do anything with it."""
    return name in parameters(module)


def parameters(module: nn.Module) -> list[str]:
    """Names of the parameters of `module.forward`, without `*args` and `**kwargs`."""
    try:
        signature = inspect.signature(module.forward)
    except (TypeError, ValueError):
        return []
    open_ended = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [name for name, each in signature.parameters.items() if each.kind not in open_ended]
