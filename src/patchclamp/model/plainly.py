"""`plainly`: let a network run as its Python code says, so that what is put onto its modules is reached."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn


@contextmanager
def plainly(root: nn.Module, writes: bool = False) -> Iterator[None]:
    """While the block runs, nothing goes round the modules; afterwards all is as before.

    - `torch.compile`: code that is compiled already does not look at hooks again; it runs uncompiled.
    - `nn.TransformerEncoder`: its fast path calls no submodule and hands on nested tensors; it takes the other path.
    - Gradient checkpointing (only if `writes`): the second forward pass, during `backward`, may come after the
      block and would not be the same; activations are kept instead.
    """
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # whoever compiled anything has imported it
            stack.enter_context(_uncompiled.held())
        if any(isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)) for module in root.modules()):
            stack.enter_context(_without_fast_path.held())
        if writes:
            stack.enter_context(_without_checkpointing(root))
        yield


class _Switch:
    """Something that is off while anybody needs it off; blocks may end in any order, as generators do."""

    def __init__(self, turn_off: Callable[[], Callable[[], None]]) -> None:
        self._turn_off, self._holders = turn_off, 0
        self._put_back: Callable[[], None] = lambda: None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Off while the block runs."""
        if self._holders == 0:
            self._put_back = self._turn_off()
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1
            if self._holders == 0:
                self._put_back()


def _compiler_off() -> Callable[[], None]:
    stance = torch.compiler.set_stance("force_eager")
    stance.__enter__()
    return lambda: stance.__exit__(None, None, None)


def _fast_path_off() -> Callable[[], None]:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    return lambda: torch.backends.mha.set_fastpath_enabled(enabled)


_uncompiled = _Switch(_compiler_off)
_without_fast_path = _Switch(_fast_path_off)
_checkpointing: WeakKeyDictionary[nn.Module, _Switch] = WeakKeyDictionary()


@contextmanager
def _without_checkpointing(root: nn.Module) -> Iterator[None]:
    on = [module for module in root.modules() if getattr(module, "gradient_checkpointing", False) is True]
    if any(module.training for module in on):
        warnings.warn(
            "gradient checkpointing is off inside intervene(): its second forward pass could come after the block and "
            "would miss the intervention",
            stacklevel=2,
        )
    off = [module for module in root.modules() if module in _checkpointing]
    with ExitStack() as stack:
        for module in dict.fromkeys([*on, *off]):
            switch = _checkpointing.get(module) or _checkpointing.setdefault(module, _checkpoints_of(module))
            stack.enter_context(switch.held())
        yield


def _checkpoints_of(module: nn.Module) -> _Switch:
    def turn_off() -> Callable[[], None]:
        before = module.gradient_checkpointing
        module.gradient_checkpointing = False  # type: ignore[assignment]

        def put_back() -> None:
            module.gradient_checkpointing = before
            del _checkpointing[module]  # the switch knows the module, which would never be let go

        return put_back

    return _Switch(turn_off)
