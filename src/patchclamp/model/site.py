"""`Site`: one place in a network where neurons live, and where its tensor is to be found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from patchclamp.errors import UnknownName


@dataclass(frozen=True)
class Site:
    """One place where neurons live. It is a description: it holds no tensor and no module.

    Attributes:
        name: `mlp.3`, `decoder.attn.0`, `module:a.b.c`.
        kind: `mlp`, `gate`, `attn`, `resid_pre`, `resid_mid`, `resid_post` or `module`.
        layer: number of the block in its stack; None for a module named by hand.
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
