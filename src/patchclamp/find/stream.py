"""What each part of each block adds to the residual stream at the last token, so that it sums up exactly.

In a transformer every block adds to one vector, and the logits are read from that vector through a norm. With the size
that each norm divides by held at what it was, all of this is linear: what a neuron or a head wrote can be followed
to the logits, and the parts add up to them. Nothing is known of architectures: whether a block adds what its
projections return, passes it through a norm of its own first (Gemma 2), multiplies it (Granite), or normalises the sum
(OPT-350m) is read off the arithmetic of the very pass. What is left is kept as `rest`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from patchclamp.errors import ModelError
from patchclamp.model import Model, Site
from patchclamp.model.closeness import tolerance
from patchclamp.model.hooks import tapped
from patchclamp.model.modules import is_norm
from patchclamp.model.norms import LinearPart, linear_part
from patchclamp.model.readout import Readout
from patchclamp.model.taps import Seen, Tap

WRITERS = ("mlp", "attn", "mixer", "expert")


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """A norm that divides by what it divided by in one pass: a linear map and a shift.

    Attributes:
        linear: gain, shift, and whether it centres.
        size: `[examples]` float64, the divisor.
    """

    linear: LinearPart
    size: torch.Tensor

    @classmethod
    def of(cls, linear: LinearPart, given: torch.Tensor, returned: torch.Tensor) -> FrozenNorm:
        """From what the norm was given and returned, `[examples, d]`, so that its epsilon is in the divisor."""
        made = linear(given.double())
        square, scaled = (made * made).sum(-1), (made * (returned.double() - linear.shift.double())).sum(-1)
        return cls(linear, torch.where(square > 0, square / scaled, 1.0))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`[examples, d]` -> what it makes of a part of its input, without the shift."""
        return self.linear(x) / self.size[:, None].to(x)

    def back(self, direction: torch.Tensor) -> torch.Tensor:
        """The direction `[examples, d]` of its input that is read by one of its output."""
        made = direction * self.linear.gain.to(direction)
        made = made - made.mean(-1, keepdim=True) if self.linear.centres else made
        return made / self.size[:, None].to(made)


@dataclass(frozen=True, eq=False)
class Branch:
    """One projection that writes into the residual stream, and what it wrote at the last token.

    Attributes:
        site: the neurons that enter it.
        activations: `[examples, size]`.
        weights: `[size, d]`, the model's own.
        bias: `[d]`, or None.
        norm: the norm between the projection and the residual stream, or None.
        factor: `[examples]` float64, what it is multiplied by before it is added: of an expert what the router says.
        written: `[examples, d]` float64, what reaches the residual stream.
    """

    site: Site
    activations: torch.Tensor
    weights: torch.Tensor
    bias: torch.Tensor | None
    norm: FrozenNorm | None
    factor: torch.Tensor
    written: torch.Tensor

    def back(self, direction: torch.Tensor) -> torch.Tensor:
        """The direction `[examples, d]` of what the projection returns that is read by one of the residual stream."""
        return self.factor[:, None].to(direction) * (direction if self.norm is None else self.norm.back(direction))

    def each(self, direction: torch.Tensor) -> torch.Tensor:
        """What each neuron adds along a direction of the residual stream `[examples, d]`: `[examples, size]`."""
        wide = torch.promote_types(self.weights.dtype, torch.float32)
        read = self.back(direction).to(self.weights.device, wide) @ self.weights.detach().to(wide).T
        return self.activations.double() * read.double()

    def constant(self, direction: torch.Tensor) -> torch.Tensor:
        """What bias and norm add along a direction whatever the neurons do, `[examples]`."""
        made = direction.new_zeros(len(direction))
        if self.bias is not None:
            made = made + self.back(direction) @ self.bias.to(direction)
        if self.norm is not None:
            made = made + self.factor.to(direction) * (direction @ self.norm.linear.shift.to(direction))
        return made


@dataclass(frozen=True, eq=False)
class Layer:
    """What one block did to the residual stream at the last token. Vectors are `[examples, d]` float64.

    Attributes:
        number: of the block.
        before, after: the residual stream.
        branches: those that write into it, attention first.
        norms: where the block normalises its sums, the norm after each branch; else empty.
        rest: what the block did beside its branches.
        rounding: how far apart two numbers may be for rounding, as a share of the largest.
    """

    number: int
    before: torch.Tensor
    after: torch.Tensor
    branches: tuple[Branch, ...]
    norms: tuple[FrozenNorm, ...]
    rest: torch.Tensor
    rounding: float

    @property
    def adds(self) -> bool:
        """Whether the block adds what its branches write, and nothing else."""
        return not self.norms and _same(self.after - self.rest, self.after, self.rounding)


class Watch:
    """Reads what a stack of blocks writes at the last token, in a pass that somebody else runs.

    Args:
        model: the model.
        stack: as in `Site.stack`.
        last: `[examples]`, the column of each example's last token.
    """

    def __init__(self, model: Model, stack: str, last: torch.Tensor) -> None:
        self.model, self.last = model, last
        sites = [site for site in model.sites.values() if site.stack == stack]
        self.branches = [site for site in sites if site.kind in WRITERS]
        self.streams = [site for site in sites if site.kind in ("resid_pre", "resid_post")]
        self.width = next((site.size for site in self.streams if site.size), 0)
        numbers = sorted({site.layer for site in self.streams if site.layer is not None})
        self.blocks = {number: model.site(self._name(stack, "resid_post", number)) for number in numbers}
        self.stack = stack
        self._seen: dict[str, torch.Tensor] = {}
        self._length = 0
        self._norms = [
            (path, module)
            for path, module in model.module.named_modules()
            if is_norm(module) and any(path.startswith(f"{site.module}.") for site in self.blocks.values())
        ]

    @staticmethod
    def _name(stack: str, kind: str, number: int) -> str:
        return f"{stack}.{kind}.{number}" if stack else f"{kind}.{number}"

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While the block runs, the newest call counts."""
        projections = [Site.custom(site.writes) for site in self.branches if site.writes]
        norms = [Site.custom(path, tensor) for path, _ in self._norms for tensor in ("input", "output")]
        sites = {site.name: site for site in (*self.branches, *self.streams, *projections, *norms)}
        with tapped(self.model.module, [self._tap(site) for site in sites.values()]):
            yield

    def _tap(self, site: Site) -> Tap:
        def see(seen: Seen) -> torch.Tensor:
            if seen.place is not None:
                found = self._routed(seen)
            else:
                found = at_last(seen.tensor, self.last)
                self._length = seen.tensor.shape[1] if site.kind == "resid_pre" else self._length
            if found is not None:
                self._seen[site.name] = found
            return seen.tensor

        return Tap(site, see, writes=False)

    def _routed(self, seen: Seen) -> torch.Tensor:
        """The rows of last tokens of an expert, `[examples, size]`; zeros for those that it was not given."""
        assert seen.place is not None
        made = seen.tensor.new_zeros(len(self.last), seen.tensor.shape[-1])
        place = torch.arange(len(self.last)) * (seen.length or self._length) + self.last
        for example, wanted in enumerate(place.tolist()):
            there = (seen.place == wanted).nonzero()[:, 0]
            if len(there):
                made[example] = seen.tensor.detach()[there[0]]
        return made

    def activations(self, site: Site) -> torch.Tensor:
        """`[examples, size]` of a site that writes.

        Raises:
            ModelError: its tensor is not one row for each token.
        """
        if site.name not in self._seen:
            raise ModelError(f"{site.name} shows no row for each token of {len(self.last)} examples")
        return self._seen[site.name]

    def layers(self) -> list[Layer]:
        """The blocks in their order."""
        return [self._layer(number) for number in self.blocks]

    def _layer(self, number: int) -> Layer:
        given = self.activations(self.model.site(self._name(self.stack, "resid_pre", number)))
        before, rounding = given.double(), tolerance(given)
        after = self.activations(self.blocks[number]).double()
        there = sorted((site for site in self.branches if site.layer == number), key=lambda site: site.kind != "attn")
        norms = [each for each in self._norms if each[0].startswith(f"{self.blocks[number].module}.")]
        branches = [self._branch(site, norms) for site in there if site.writes or site.name in self._seen]
        branches = [each for each in branches if each.site.writes or bool(each.activations.any())]
        total = sum((each.written for each in branches), torch.zeros_like(before))
        if not _same(before + total, after, rounding):
            if (normalising := self._normalising(before, after, branches, norms, rounding)) is not None:
                return Layer(number, before, after, tuple(branches), normalising, torch.zeros_like(after), rounding)
            branches = _multiplied(after - before, branches, rounding)
            total = sum((each.written for each in branches), torch.zeros_like(before))
        return Layer(number, before, after, tuple(branches), (), after - before - total, rounding)

    def _branch(self, site: Site, norms: Sequence[tuple[str, torch.nn.Module]]) -> Branch:
        weights, given_by = self.model.output_weights(site), self.activations(site)
        once = torch.ones(len(given_by), dtype=torch.float64, device=given_by.device)
        if site.writes is None:
            written = given_by.double() @ weights.detach().double().to(given_by.device)
            return Branch(site, given_by, weights, None, None, once, written)
        bias = _detached(getattr(self.model.module.get_submodule(site.writes), "bias", None))
        returned = self.activations(Site.custom(site.writes)).double()
        for path, module in norms:
            given, made = (self._seen.get(Site.custom(path, each).name) for each in ("input", "output"))
            if given is None or made is None or not torch.equal(given.double(), returned):
                continue
            linear = linear_part(module, self.width)
            if linear is not None:
                norm = FrozenNorm.of(linear, given, made)
                return Branch(site, given_by, weights, bias, norm, once, made.double())
        return Branch(site, given_by, weights, bias, None, once, returned)

    def _normalising(
        self,
        before: torch.Tensor,
        after: torch.Tensor,
        branches: Sequence[Branch],
        norms: Sequence[tuple[str, torch.nn.Module]],
        rounding: float,
    ) -> tuple[FrozenNorm, ...] | None:
        """The norms of a block that normalises each sum of the residual stream and a branch; None where it does not."""
        stream, found = before, []
        for branch in branches:
            for path, module in norms:
                given, made = (self._seen.get(Site.custom(path, each).name) for each in ("input", "output"))
                if given is None or made is None or not _same(given.double(), stream + branch.written, rounding):
                    continue
                linear = linear_part(module, self.width)
                if linear is not None:
                    found.append(FrozenNorm.of(linear, given, made))
                    stream = made.double()
                    break
        return tuple(found) if found and len(found) == len(branches) and _same(stream, after, rounding) else None


def at_last(tensor: torch.Tensor, last: torch.Tensor) -> torch.Tensor | None:
    """`[examples, tokens, size]`, or all tokens in one axis -> `[examples, size]` at these columns; else None."""
    examples = len(last)
    if tensor.ndim == 2 and len(tensor) % examples == 0:
        tensor = tensor.reshape(examples, -1, tensor.shape[-1])
    if tensor.ndim != 3 or len(tensor) != examples or int(last.max()) >= tensor.shape[1]:
        return None
    rows = torch.arange(examples, device=tensor.device)
    return tensor.detach()[rows, last.to(tensor.device)].clone()


def last_columns(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The column of each example's last real token, `[examples]`."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    columns = torch.arange(ids.shape[1], device=ids.device)
    return (mask.long() * (columns + 1)).argmax(1)


@dataclass(frozen=True, eq=False)
class Lens:
    """The readout of one pass, its norm's divisor held: logits as a linear map of the residual stream, then the cap.

    Attributes:
        readout: the readout.
        norm: its norm, frozen; None where there is none.
        examples: how many.
    """

    readout: Readout
    norm: FrozenNorm | None
    examples: int

    @classmethod
    def of(cls, model: Model, readout: Readout, after: torch.Tensor) -> Lens:
        """From the residual stream after the last block, `[examples, d]`."""
        if not readout.norm:
            return cls(readout, None, len(after))
        norm = model.module.get_submodule(readout.norm)
        weight = next(norm.parameters(), after)
        with torch.no_grad():
            made = norm.forward(after.to(weight.device, weight.dtype))
        return cls(readout, FrozenNorm.of(readout.linear_part, after, made.to(after.device)), len(after))

    @property
    def size(self) -> torch.Tensor:
        """`[examples]` float64, what the norm divides by; ones where there is none."""
        return torch.ones(self.examples, dtype=torch.float64) if self.norm is None else self.norm.size

    def directions(self, ids: torch.Tensor) -> torch.Tensor:
        """The direction of the residual stream that makes the logit of each example's token, `[examples, d]` float64.

        Of one example several tokens may be asked. `direction @ residual + bias` is the logit before the soft cap.
        """
        parts = self.readout._parts  # one row of the unembedding; `readout.weight` would be all of them
        made = parts.matrix[ids.to(parts.matrix.device)].double()
        for matrix, _ in reversed(parts.between):
            made = made @ matrix.double().T
        made = made * self.readout.linear_part.gain.to(made)
        made = made - made.mean(-1, keepdim=True) if self.readout.linear_part.centres else made
        return made * self.readout.scale / self.size[:, None].to(made)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Before the soft cap, `[examples, vocabulary]` float64, of a residual stream `[examples, d]`."""
        made = self.readout.directions(x.float()).double() / self.size[:, None].to(x.device)
        return made if self.readout.bias is None else made + self.readout.bias.to(made)

    def capped(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits as the network returns them."""
        cap = self.readout.softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


# Helpers --------------------------------------------------------------------------------------------


def _multiplied(change: torch.Tensor, branches: list[Branch], rounding: float) -> list[Branch]:
    """The branches with factors, where so multiplied they make up the change; else as they are."""
    columns = torch.stack([each.written for each in branches], -1) if branches else change[..., None]
    if not branches or columns.shape[1] < 2 * columns.shape[2]:
        return branches
    solved = torch.linalg.lstsq(columns.cpu(), change.cpu()[..., None], driver="gelsd").solution.to(change)
    if not _same((columns @ solved)[..., 0], change, rounding):
        return branches
    return [
        replace(each, factor=factor, written=each.written * factor[:, None])
        for each, factor in zip(branches, solved[..., 0].unbind(-1), strict=True)
    ]


def _same(left: torch.Tensor, right: torch.Tensor, rounding: float) -> bool:
    if left.shape != right.shape:
        return False
    return bool((left - right).abs().max() <= rounding * right.abs().max())


def _detached(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.detach()
