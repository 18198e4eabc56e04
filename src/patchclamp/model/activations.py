"""`Activations`: a tensor of activations that knows which token each row belongs to."""

from __future__ import annotations

import copy
from typing import Any

import torch


class Activations(torch.Tensor):
    """Activations of one text at one site: an ordinary tensor `[tokens, size]` with `.tokens`.

    Any operation on it gives a plain tensor.

    Attributes:
        tokens: the string of each row's token, special tokens included; None for inputs without tokens.
        site: name of the site.
    """

    tokens: list[str] | None
    site: str

    # Results of arithmetic have other rows: they must not carry the labels along.
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def of(tensor: torch.Tensor, site: str, tokens: list[str] | None) -> Activations:
        """Label a tensor `[tokens, size]`."""
        labelled: Any = tensor.detach().as_subclass(Activations)
        labelled.tokens, labelled.site = tokens, site
        return labelled

    def __deepcopy__(self, memo: dict[int, Any]) -> Activations:
        return Activations.of(self.clone(), self.site, copy.copy(self.tokens))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        words = "" if self.tokens is None else " on " + " ".join(repr(each) for each in self.tokens[:8])
        more = " ..." if self.tokens is not None and len(self.tokens) > 8 else ""
        return f"Activations({self.site}: {list(self.shape)}, {self.dtype}{words}{more})"
