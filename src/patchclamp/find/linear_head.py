"""The linear layer that makes the logits of classes, and the site whose neurons, pooled, it reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from patchclamp.find.explanation import Part
from patchclamp.model import Model
from patchclamp.model.closeness import same
from patchclamp.model.hooks import first_tensor, input_tensor
from patchclamp.model.modules import linear_shape
from patchclamp.model.weights import is_quantised, projection_weights


class LinearHead:
    """Finds, in one pass, the linear layer that returned the logits, and what it was given."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._calls: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While the block runs, linear layers are watched."""

        def keep(path: str) -> object:
            def hook(_module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
                given, made = input_tensor(args, kwargs), first_tensor(output)
                if given is not None and made is not None and made.ndim == 2:
                    self._calls.append((path, given.detach(), made.detach()))

            return hook

        with ExitStack() as stack:
            for path, module in self.model.module.named_modules():
                if linear_shape(module):
                    handle = module.register_forward_hook(keep(path), with_kwargs=True)  # type: ignore[arg-type]
                    stack.callback(handle.remove)
            yield

    def parts(
        self, activations: Mapping[str, torch.Tensor], logits: torch.Tensor, numbers: torch.Tensor, signs: torch.Tensor
    ) -> list[Part]:
        """What the neurons that the head reads wrote into the logits of some classes; nothing where it reads none.

        Args:
            activations: site -> `[1, ..., size]`.
            logits: `[1, classes]`.
            numbers: of the classes.
            signs: what their logits are multiplied by.
        """
        for path, given, made in reversed(self._calls):
            module = self.model.module.get_submodule(path)
            if not same(made, logits) or is_quantised(module):
                continue
            matrix = projection_weights(module, path).detach().double()[:, numbers.to(logits.device)]
            each = given[0].double() * (matrix * signs.to(matrix)).sum(1)
            for name, values in reversed(list(activations.items())):
                written = _pooled(values[0].double(), given[0].double(), each)
                if written is None:
                    continue
                site, bias = self.model.site(name), getattr(module, "bias", None)
                found = [Part("site", site.layer, written, site)]
                if bias is not None:
                    wanted = bias.detach().double()[numbers.to(bias.device)].cpu()
                    found.append(Part("biases", None, float((wanted * signs).sum())))
                return found
        return []


def _pooled(values: torch.Tensor, given: torch.Tensor, each: torch.Tensor) -> torch.Tensor | None:
    """What each neuron wrote, `[size]`, if what the head was given is the site's values, as they are or pooled."""
    size = values.shape[-1]
    if len(given) == size:
        rows = values.reshape(-1, size)
        if any(same(pooled, given) for pooled in (rows.mean(0), rows.amax(0), rows[0], rows[-1])):
            return each
    if values.ndim > 1 and values.numel() == len(given) and same(values.movedim(-1, 0).flatten(), given):
        return each.reshape(size, -1).sum(1)
    return None
