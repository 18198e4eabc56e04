"""`Site`: one place in a network where neurons live, and where its tensor is to be found."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from patchclamp.errors import DataError, UnknownName

_CUSTOM = re.compile(r"module:([^@]+)(?:@(input|output)(?:,axis=(-?[1-9]\d*))?(,time)?)?")


@dataclass(frozen=True)
class Site:
    """One place where neurons live. It is a description: it holds no tensor and no module.

    Attributes:
        name: `mlp.3`, `decoder.attn.0`, `expert.3.1`, `conv.layer2.0.conv1`, `module:a.b.c`.
        kind: `mlp`, `gate`, `mixer`, `expert`, `attn`, `pattern`, `resid_pre`, `resid_mid`, `resid_post`, `conv`,
            `recurrent` or `module`.
        layer: number of the block in its stack (of the layer, for `recurrent`); None where there is no such number.
        size: how many neurons; None until a first pass where the module does not say.
        activation: name of the nonlinearity (`gelu`, `relu`, `silu`, ...), where there is one.
        stack: `""` where the model has one stack of blocks, else `encoder`, `decoder`, `vision`, ...
        module: dotted path of the module whose tensor this is.
        tensor: whether the neurons are what the module is given or what it returns.
        in_place: a write goes into the tensor itself, because the block holds a second reference to it.
        reads: dotted paths of the projections that feed the neurons: `in`, or `gate` and `up`.
        writes: dotted path of the output projection, where there is one.
        heads: number of attention heads that share the neurons equally, for `attn`.
        norm: dotted path of the norm that follows the output projection, where there is one.
        axis: dimension of the tensor that counts the neurons: -1, or -3 for the channels of images.
        through: how the tensor is reached: by the module's own hooks, or inside fused experts, an
            attention's probabilities, or the time steps of a recurrent layer.
        unit: which expert of the module, or which layer and direction (`2 * layer + reverse`) of a recurrent one.
        time: the module is called once for each time step of a sequence, and all of its calls are wanted.
        fixed: why the site can be read but not written; empty where it can.
    """

    name: str
    kind: str
    layer: int | None
    size: int | None
    activation: str | None = None
    stack: str = ""
    module: str = field(default="", repr=False)
    tensor: Literal["input", "output"] = field(default="input", repr=False)
    in_place: bool = field(default=False, repr=False)
    reads: Mapping[str, str] = field(default_factory=dict, repr=False, hash=False)
    writes: str | None = field(default=None, repr=False)
    heads: int | None = field(default=None, repr=False)
    norm: str | None = field(default=None, repr=False)
    axis: int = field(default=-1, repr=False)
    through: Literal["module", "experts", "attention", "recurrent"] = field(default="module", repr=False)
    unit: int = field(default=0, repr=False)
    time: bool = field(default=False, repr=False)
    fixed: str = field(default="", repr=False)

    @classmethod
    def custom(
        cls, module: str, tensor: Literal["input", "output"] = "output", axis: int = -1, time: bool = False
    ) -> Site:
        """A site that you name: what any module is given or returns.

        Args:
            module: dotted path of the module, as in `model.module.named_modules()`.
            tensor: `"input"` for what the module is given (its first tensor), `"output"` for what it returns.
            axis: the dimension that counts the neurons: -1 for `[..., neurons]`, 1 for `[examples, channels, ...]`.
            time: the network calls the module once for each time step, with `[examples, neurons]` each time.

        Returns:
            A site of kind `module`; its name says all of this (`module:a.b.c`, `module:a.b.c@input`,
            `module:a.b.c@output,axis=1`, `module:a.b.c@output,time`), so a table of its neurons needs nothing else.

        Raises:
            DataError: `tensor` or `axis` is something else.
        """
        if tensor not in ("input", "output"):
            raise DataError(f'Site.custom(tensor=...) is "input" or "output", not {tensor!r}')
        if isinstance(axis, bool) or not isinstance(axis, int) or axis == 0:
            raise DataError(f"Site.custom(axis=...) is the dimension that counts the neurons, not {axis!r}")
        said = [tensor] + [f"axis={axis}"] * (axis != -1) + ["time"] * time
        name = f"module:{module}" + (f"@{','.join(said)}" if said != ["output"] else "")
        return cls(name, "module", None, None, module=module, tensor=tensor, axis=axis, time=time)

    @classmethod
    def from_name(cls, name: str) -> Site:
        """The custom site of this name: the inverse of `custom(...).name`.

        Raises:
            DataError: the name is not one that `custom` gives.
        """
        found = _CUSTOM.fullmatch(name)
        if found is None:
            raise DataError(
                f"{name!r} names no site: module:a.b.c, module:a.b.c@input or module:a.b.c@output,axis=1 does"
            )
        path, tensor, axis, time = found.groups()
        return cls.custom(path, "input" if tensor == "input" else "output", int(axis or -1), time is not None)

    def head(self, number: int) -> range:
        """Indices of the neurons of one attention head.

        Raises:
            UnknownName: this site has no heads, or not that many.
        """
        if self.heads is None or self.size is None:
            raise UnknownName(f"{self.name} has no attention heads: it is of kind {self.kind!r}")
        if not 0 <= number < self.heads:
            raise UnknownName(f"{self.name} has heads 0 to {self.heads - 1}, not {number}")
        width = self.size // self.heads
        return range(number * width, (number + 1) * width)
