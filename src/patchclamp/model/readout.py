"""`Readout`: from the residual stream to logits, with the norm before the unembedding folded in.

    logits = cap(scale * (unembedding(norm(x)) + bias)),    cap(z) = softcap * tanh(z / softcap)

Which module is the norm, whether it centres, its gain (Gemma's is one plus its weight), the scale and the soft cap are
read off the arithmetic of one small forward pass, not off class names. A network whose logits are not
made like this is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from patchclamp.errors import DataError
from patchclamp.model.closeness import same, tolerance
from patchclamp.model.example import Example, example_inputs, run
from patchclamp.model.hooks import first_tensor, input_tensor
from patchclamp.model.modules import is_norm, linear_shape
from patchclamp.model.norms import LinearPart, linear_part
from patchclamp.model.site import Site
from patchclamp.model.top_tokens import TopTokens, Written, top_tokens, written_by
from patchclamp.model.weights import is_quantised, projection_weights

_ROWS_AT_ONCE = 16_384
# Logits of this size are at the bound of any soft cap.
_LARGE = 3000.0
_NEITHER = "its logits are neither a multiple of what the unembedding gives nor that with a soft cap"


@dataclass(frozen=True, eq=False)
class Readout:
    """How logits are read from the residual stream after the last block, `[..., d]`.

    Its weights are those of the network, looked at, not copied; what is folded is computed when it is first asked for.

    Attributes:
        residual: name of the site that is read.
        norm: dotted path of the norm before the unembedding, `""` where there is none.
        unembedding: dotted path of the unembedding.
        scale: factor in front of the logits.
        softcap: bound of the logits, or None.
    """

    residual: str
    norm: str
    unembedding: str
    scale: float
    softcap: float | None
    _parts: _Parts = field(repr=False)
    _model: Any = field(default=None, repr=False)  # whose sites `top_tokens` knows

    @property
    def linear_part(self) -> LinearPart:
        """Of the norm; a gain of ones where there is no norm."""
        return self._parts.linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The network's own logits `[..., vocabulary]` for a residual stream `[..., d]` after the last block.

        Raises:
            DataError: `x` is of another width.
        """
        parts = self._parts
        self._check(x)
        hidden = x.to(parts.matrix.device, parts.dtype)
        if parts.norm is not None:
            hidden = parts.norm.forward(hidden)
        hidden = hidden.to(parts.matrix.dtype)
        for matrix, bias in parts.between:
            hidden = hidden @ matrix + (0 if bias is None else bias)
        return _capped(parts.logits(hidden), self.softcap)

    def directions(self, weights: torch.Tensor) -> torch.Tensor:
        """What vectors that are added to the residual stream do to the logits: `[n, d]` -> `[n, vocabulary]`.

        Only the linear part: not divided by the size of the residual stream, not capped. This is
        `weights @ readout.weight.T`, computed without making `readout.weight`.

        Raises:
            DataError: `weights` are of another width.
        """
        made = self._folded(weights)
        blocks = self._parts.matrix.split(_ROWS_AT_ONCE)
        return torch.cat([made @ block.to(made).T for block in blocks], dim=-1)

    def top_tokens(
        self,
        of: str | Site | Iterable[str | Site] | torch.Tensor = "mlp.*",
        k: int = 10,
        *,
        bottom: bool = False,
        dtype: torch.dtype | None = None,
        memory: int = 1 << 28,
        progress: bool = True,
    ) -> TopTokens:
        """The tokens that neurons promote most: the largest of their `directions`, for any number of neurons.

        A few neurons are multiplied at a time, into one buffer; only the best k of each are kept. A norm between
        a neuron and the residual stream (Gemma 2) is folded in; in a network that normalises sums, those of later
        blocks are not.

        Args:
            of: sites, by name or glob, whose neurons write into the residual stream; or vectors `[n, d]`.
            k: how many tokens; all where the vocabulary is smaller.
            bottom: also give the tokens that are suppressed most.
            dtype: what is multiplied. None for float32. torch.bfloat16 where there is a GPU, whose ids then are
                those of rounded logits.
            memory: most bytes of the buffer. Beside it there is a copy of the unembedding, if its weights are of
                another type or order.
            progress: draw a progress bar, if there are many neurons.

        Returns:
            A `TopTokens`: `ids` and `values`, `[neurons, k]` each; `found["mlp.3"]` is one site. Of equal values the
            smaller id comes first.

        Raises:
            UnknownName: no such site.
            ModelError: the neurons of a site have no output weights of their own, or they are quantised.
            DataError: k or `memory` below 1; vectors of another width; neurons that write into another stream; NaN
                among the weights; bfloat16 on a processor.
        """
        device = self._parts.matrix.device
        for name, number in {"k": k, "memory": memory}.items():
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise DataError(f"top_tokens: {name} is a whole number >= 1, not {number!r}")
        dtype = torch.float32 if dtype is None else dtype
        if dtype not in (torch.float32, torch.float64) and device.type == "cpu":
            raise DataError(
                f"top_tokens: {dtype} is for a GPU; a processor multiplies it many times slower than float32"
            )
        if isinstance(of, torch.Tensor):
            self._check(of)
            written = [Written("", of.detach().reshape(-1, of.shape[-1]))]
        elif self._model is None:
            raise DataError("this readout knows no sites: use model.readout, or give vectors [n, d]")
        else:
            written = written_by(self._model, of, self.residual)
        with torch.no_grad():
            return top_tokens(
                written,
                self._folded,
                self._parts.matrix,
                k,
                bottom=bottom,
                dtype=dtype,
                memory=memory,
                show=progress,
            )

    def _folded(self, weights: torch.Tensor) -> torch.Tensor:
        """`[n, d]` -> what is to be multiplied by the unembedding, `[n, width]`, float32 or wider."""
        self._check(weights)
        wide = torch.promote_types(weights.dtype, torch.float32)
        made = self.linear_part(weights.detach().to(self._parts.matrix.device, wide))
        for matrix, _ in self._parts.between:
            made = made @ matrix.to(made)
        return made * self.scale

    @cached_property
    def weight(self) -> torch.Tensor:
        """The unembedding with scale and norm folded in, `[vocabulary, d]` float32: a copy."""
        width = len(self.linear_part.gain)
        return self.directions(torch.eye(width, device=self._parts.matrix.device)).T

    @cached_property
    def bias(self) -> torch.Tensor | None:
        """What is added before the soft cap, `[vocabulary]` float32: the biases of all parts; None if they are zero."""
        parts = self._parts
        hidden = self.linear_part.shift
        for matrix, bias in parts.between:
            hidden = hidden @ matrix.to(hidden) + (0 if bias is None else bias.to(hidden))
        made = torch.cat([block.to(hidden) @ hidden for block in parts.matrix.split(_ROWS_AT_ONCE)]) * self.scale
        if parts.bias is not None:
            made = made + parts.bias.to(made) * parts.scale_after
        return made if bool(made.any()) else None

    def _check(self, x: torch.Tensor) -> None:
        width = len(self.linear_part.gain)
        if x.shape[-1] != width:
            raise DataError(f"the residual stream of this network has width {width}, not {x.shape[-1]}")


def readout_of(root: nn.Module, sites: Mapping[str, Site], example: Example | None = None) -> Readout | str:
    """How `root` reads its logits from the residual stream, or why that cannot be said.

    Args:
        root: the network. It is run twice on the example, without gradient, in evaluation mode.
        sites: its sites by name; the residual stream after the last block is among them.
        example: what to run it on; None for made-up tokens.
    """
    example = example_inputs(root) if example is None else example
    if example is None:
        return "the network could not be tried: it does not say what inputs it takes (pc.load(..., example=...))"
    last: dict[str, Site] = {}
    for site in sites.values():
        if site.kind == "resid_post" and (site.layer or 0) >= (
            last[site.stack].layer or 0 if site.stack in last else 0
        ):
            last[site.stack] = site
    if not last:
        return "it has no stack of blocks, so there is no residual stream to read from"
    try:
        with _tracing(root, sites) as calls:
            logits = _logits(run(root, example))
        if logits is None:
            return f"{type(root).__name__} returns no logits"
        return _read(root, example, last, calls, logits)
    except Exception as error:  # whatever a foreign model raises on made-up inputs
        return f"the network could not be tried: {type(error).__name__}: {error}"


# One traced forward pass ----------------------------------------------------------------------------


class _Call(NamedTuple):
    path: str
    given: torch.Tensor | None  # [rows, width]
    returned: torch.Tensor


@contextmanager
def _tracing(root: nn.Module, sites: Mapping[str, Site]) -> Iterator[list[_Call]]:
    """What the blocks return, and what the modules outside of blocks are given and return."""
    calls: list[_Call] = []
    blocks = tuple(f"{site.module}." for site in sites.values() if site.kind == "resid_post")

    def keep(path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            returned = first_tensor(output)
            if returned is not None and returned.ndim:
                given = input_tensor(args, kwargs)
                calls.append(_Call(path, None if given is None or not given.ndim else _rows(given), _rows(returned)))

        return hook

    handles = [
        module.register_forward_hook(keep(path), with_kwargs=True)
        for path, module in root.named_modules()
        if path and not path.startswith(blocks)
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1, tensor.shape[-1]).clone()


def _logits(output: Any) -> torch.Tensor | None:
    found = getattr(output, "logits", None)
    found = output if isinstance(output, torch.Tensor) else found
    return _rows(found) if isinstance(found, torch.Tensor) and found.ndim else None


# From the last block to the logits --------------------------------------------------------------------


@dataclass(frozen=True)
class _Parts:
    """The network's own modules and weights that make logits."""

    norm: nn.Module | None
    linear: LinearPart
    between: tuple[tuple[torch.Tensor, torch.Tensor | None], ...]  # projections after the norm, [inputs, outputs]
    matrix: torch.Tensor  # [vocabulary, width]
    bias: torch.Tensor | None
    dtype: torch.dtype  # of the residual stream
    scale_before: float = 1.0
    scale_after: float = 1.0

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Not yet capped."""
        made = (hidden * self.scale_before) @ self.matrix.T
        return (made if self.bias is None else made + self.bias) * self.scale_after


def _read(
    root: nn.Module, example: Example, last: Mapping[str, Site], calls: list[_Call], logits: torch.Tensor
) -> Readout | str:
    places = {
        site: max((n for n, c in enumerate(calls) if c.path == site.module), default=-1) for site in last.values()
    }
    residual, place = max(places.items(), key=lambda item: item[1])
    if place < 0:
        return f"a forward pass never calls {residual.module}"
    x, after = calls[place].returned, calls[place + 1 :]
    head = _unembedding(root, after, logits)
    if isinstance(head, str):
        return head
    path, module = head
    called = next((call for call in reversed(after) if call.path == path), None)
    reached = _way(root, after, x, path, None if called is None else called.given)
    if isinstance(reached, str):
        if reached:
            return f"{reached} comes between the last block and the unembedding {path}"
        return (
            f"what enters the unembedding {path} is not made by norms and linear layers of what the last block returns"
        )
    steps, hidden = reached
    parts = _parts(root, path, module, steps, x)
    if isinstance(parts, str):
        return parts
    if called is not None and called.given is not None:
        parts = replace(parts, scale_before=_factor(hidden, called.given))
    scaled = _Scaled(root, example, path if called is not None else "".join(steps[-1:]), called is not None)
    fitted = _fit(scaled, parts, hidden, logits)
    if isinstance(fitted, str):
        return fitted
    parts = replace(parts, scale_after=fitted[0])
    norm = steps[0] if parts.norm is not None else ""
    made = Readout(residual.name, norm, path, parts.scale_before * fitted[0], fitted[1], parts)
    with torch.no_grad():
        again = made(x)
    if not same(again, logits):
        gap = float((again.double() - logits.double()).abs().max())
        return f"norm and unembedding do not give the network's logits: they differ by up to {gap:.2g}"
    return made


def _unembedding(root: nn.Module, calls: Sequence[_Call], logits: torch.Tensor) -> tuple[str, Any] | str:
    paths = {module: path for path, module in root.named_modules()}
    if hasattr(root, "get_output_embeddings"):
        module = root.get_output_embeddings()  # type: ignore[operator]
        if module is None or module not in paths:
            return f"{type(root).__name__} has no unembedding: get_output_embeddings() gives none"
        if why := is_quantised(module):
            return f"the unembedding {paths[module]} is quantised: {why}"
        if getattr(module, "weight", None) is None or len(module.weight.shape) != 2:
            return f"the unembedding {paths[module]} is a {type(module).__name__}, which has no one matrix"
        return paths[module], module
    for call in reversed(calls):
        module = root.get_submodule(call.path)
        if linear_shape(module) and call.returned.shape == logits.shape:
            return call.path, module
    for module, path in paths.items():
        # `x @ embedding.weight.T`: whether it is so is verified like everything else.
        if isinstance(module, nn.Embedding) and module.num_embeddings == logits.shape[-1]:
            return path, module
    return f"no linear layer of {type(root).__name__} returns its logits"


def _way(
    root: nn.Module, calls: Sequence[_Call], x: torch.Tensor, head: str, wanted: torch.Tensor | None
) -> tuple[list[str], torch.Tensor] | str:
    """The modules that lead from `x` to what enters the unembedding, and what the last one returns.

    Where the unembedding is never called as a module (its weights are used directly), the longest way is it. If there
    is no way, the answer is the first module on one that is neither a norm nor linear, `""` where there is none.
    """
    if wanted is not None and _is_multiple(wanted, x):
        return [], x
    refused = ""
    for number, call in enumerate(calls):
        module = root.get_submodule(call.path)
        made_of_others = next(module.children(), None) is not None and not is_norm(module)
        if call.path == head or made_of_others or call.given is None or not same(call.given, x):
            continue
        if same(call.returned, x):
            continue  # dropout, identity
        if linear_shape(module) is None and linear_part(module, x.shape[-1]) is None:
            refused = refused or f"{call.path} ({type(module).__name__})"
            continue
        on = _way(root, calls[number + 1 :], call.returned, head, wanted)
        if not isinstance(on, str):
            return [call.path, *on[0]], on[1]
        refused = refused or on
    return ([], x) if wanted is None and not refused else refused


def _parts(root: nn.Module, path: str, head: Any, steps: Sequence[str], x: torch.Tensor) -> _Parts | str:
    """The modules on the way as parts, or why they cannot be: one norm comes first, projections may follow."""
    width = x.shape[-1]
    matrix = head.weight.detach() if isinstance(head, nn.Embedding) else projection_weights(head, path).T
    norm, between = None, []
    ones = torch.ones(width, device=matrix.device)
    linear = LinearPart(ones, torch.zeros_like(ones), False)
    for number, step in enumerate(steps):
        module = root.get_submodule(step)
        if linear_shape(module) is not None:
            bias = cast("torch.Tensor | None", getattr(module, "bias", None))
            between.append((projection_weights(module, step), None if bias is None else bias.detach()))
            continue
        found = linear_part(module, width)
        if number or found is None:
            return f"{step} normalises what {steps[number - 1]} made of the residual stream"
        norm, linear = module, found
    bias = cast("torch.Tensor | None", getattr(head, "bias", None))
    return _Parts(norm, linear, tuple(between), matrix, None if bias is None else bias.detach(), x.dtype)


class _Scaled(NamedTuple):
    """Where in a network to make logits large: what a module is given, or what it returns."""

    root: nn.Module
    example: Example
    path: str
    given: bool

    def logits(self, times: float) -> torch.Tensor | None:
        """Of a run in which that tensor is so many times as large."""

        def before(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0] * times, *args[1:])

        def after(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
            return output * times

        module = self.root.get_submodule(self.path)
        handle = module.register_forward_pre_hook(before) if self.given else module.register_forward_hook(after)
        try:
            return _logits(run(self.root, self.example))
        finally:
            handle.remove()


def _fit(
    scaled: _Scaled, parts: _Parts, hidden: torch.Tensor, logits: torch.Tensor
) -> tuple[float, float | None] | str:
    """(factor after the unembedding, soft cap). A cap shows where the logits are made large."""
    made = parts.logits(hidden)
    if made.shape != logits.shape:
        return f"its logits {list(logits.shape)} are not one for each position and token {list(made.shape)}"
    factor, bound = _factor(made, logits), None
    if scaled.path:
        times = _LARGE / max(float(made.abs().max()), 1e-6)
        large, shown = parts.logits(hidden * times), scaled.logits(times)
        if shown is not None and not same(large * factor, shown):
            bound = float(shown.abs().max())
            inside = logits.abs() < 0.9 * bound
            factor = _factor(made[inside], torch.atanh(logits[inside].double() / bound) * bound)
            if not same(_capped(large * factor, bound), shown):
                return _NEITHER
    return (factor, bound) if same(_capped(made * factor, bound), logits) else _NEITHER


def _capped(logits: torch.Tensor, bound: float | None) -> torch.Tensor:
    return logits if bound is None else bound * torch.tanh(logits / bound)


def _factor(left: torch.Tensor, right: torch.Tensor) -> float:
    """The number by which `left` is multiplied to come closest to `right`; 1 where the difference is rounding."""
    rounding = max(tolerance(left), tolerance(right))
    left, right = left.double(), right.double()
    found = float((left * right).sum() / (left * left).sum().clamp(min=1e-30))
    return 1.0 if abs(found - 1) < rounding else found


def _is_multiple(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape == right.shape and same(right * _factor(right, left), left)
