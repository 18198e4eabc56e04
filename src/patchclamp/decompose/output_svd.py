"""What the unembedding can say: its singular components, and those that are active when certain tokens come out.

    W = U S V^T,    z = V^T h,    logits = sum over i of  S_i z_i U[:, i]

`W` `[vocabulary, d]` is the unembedding, `h` `[d]` what enters it, `z` the coordinates of `h`. A component whose
coordinate differs between steps that emit a token of a set and other steps is one that the model says it with. To
lower `S_i` (`edit.damp_components`) is to say it more quietly. The signs of singular vectors are arbitrary, so
components are told by the size of the difference, in pooled standard deviations; the paper takes the signed one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn

from patchclamp.errors import DataError, ModelError, unknown, warn
from patchclamp.model import Model
from patchclamp.model.weights import projection_weights
from patchclamp.published import published

# Above so many rows for each column, the eigenvectors of W^T W are taken: a matrix of d by d.
_TALL = 4
_ROWS_AT_ONCE = 16_384
# Below this share of the largest, a singular value is rounding: squared in the tall way, itself in the other.
_LOST = {True: 1e-6, False: 1e-12}
# Weights that change by this share mix the directions of singular values that are closer than that.
_CLOSE = 1e-4
_SHARE = 0.001


@dataclass(frozen=True, eq=False)
class OutputDecomposition:
    """The singular components of an unembedding, the largest first. Made by `output_svd`.

    Attributes:
        singular_values: `[components]` float64, descending.
        right: `[components, d]` float64: the rows are right singular vectors (`V^T`), of length 1; the entry of each
            that is largest in size is positive.
        lost: indices of components whose singular value is so small that their direction is rounding.
    """

    singular_values: np.ndarray
    right: np.ndarray = field(repr=False)
    lost: tuple[int, ...]
    _matrix: torch.Tensor = field(repr=False)  # [vocabulary, d], looked at, not copied

    def __len__(self) -> int:
        """How many components."""
        return len(self.singular_values)

    def coordinates(self, hidden: ArrayLike | torch.Tensor) -> np.ndarray:
        """What hidden states are made of: `V^T h`, `[..., d]` -> `[..., components]` float64.

        Raises:
            DataError: states of another width, or not finite.
        """
        return _states(hidden, self.right.shape[1]) @ self.right.T

    def left(self, components: Sequence[int] | np.ndarray) -> np.ndarray:
        """What components say: left singular vectors, `[vocabulary, number]` float64, one number for each token.

        Raises:
            DataError: no such component, or one whose singular value is lost in rounding.
        """
        chosen = self.checked(components)
        if gone := sorted(set(chosen.tolist()) & set(self.lost)):
            raise DataError(f"the singular value of component {gone[0]} is rounding: it has no left vector")
        directions = torch.from_numpy(self.right[chosen].T.copy())
        blocks = self._matrix.split(_ROWS_AT_ONCE)
        made = np.concatenate([(each.to("cpu", torch.float64) @ directions).numpy() for each in blocks])
        return made / self.singular_values[chosen]

    def differences(
        self, target: ArrayLike | torch.Tensor, neutral: ArrayLike | torch.Tensor, *, standardised: bool = True
    ) -> np.ndarray:
        """How far the coordinates of two sets of states lie apart, `[components]` float64.

        Args:
            target: `[steps, d]`, states at steps that say what is looked for.
            neutral: `[steps, d]`, states at other steps.
            standardised: the size of the difference of means over the pooled standard deviation; False: the difference
                of means itself, with its sign, as the paper has it.

        Raises:
            DataError: fewer than two states on a side, of another width, or not finite.
        """
        sides = [self.coordinates(each) for each in (target, neutral)]
        for name, each in zip(("target", "neutral"), sides, strict=True):
            if each.ndim != 2 or len(each) < 2:
                raise DataError(
                    f"the {name} states are {list(each.shape[:-1])} steps: at least two are wanted, [steps, d]. "
                    "Where none emits the tokens, give more texts"
                )
        delta = sides[0].mean(0) - sides[1].mean(0)
        if not standardised:
            return delta
        spread = sum(((each - each.mean(0)) ** 2).sum(0) for each in sides) / (len(sides[0]) + len(sides[1]) - 2)
        # States that do not vary along a component differ by rounding there.
        least = 1e-9 * float(np.sqrt(np.mean(np.concatenate(sides) ** 2))) or 1.0
        return np.abs(delta) / np.maximum(np.sqrt(spread), least)

    def select(
        self,
        target: ArrayLike | torch.Tensor,
        neutral: ArrayLike | torch.Tensor,
        count: int | None = None,
        *,
        standardised: bool = True,
    ) -> np.ndarray:
        """The components that differ most between two sets of states, `[count]` int64, most first.

        Args:
            target: as of `differences`.
            neutral: as of `differences`.
            count: how many; None: one in a thousand, and one at least, as in the paper.
            standardised: as of `differences`. With False the largest are chosen, not those farthest below 0.

        Raises:
            DataError: as `differences`; `count` is no number of components.
        """
        score = self.differences(target, neutral, standardised=standardised)
        # Scores of components that are lost would be of a direction that means nothing.
        score[list(self.lost)] = -np.inf
        there = len(self) - len(self.lost)
        count = math.ceil(_SHARE * len(self)) if count is None else count
        if isinstance(count, bool) or not 1 <= count <= there:
            raise DataError(f"count is a whole number from 1 to {there}, not {count!r}")
        chosen = np.argsort(-score, kind="stable")[:count]
        self.warn_of_parts(chosen)
        return chosen

    @property
    def close(self) -> list[tuple[int, ...]]:
        """Groups of neighbours whose singular values are almost equal: only what they span together is identified."""
        groups: list[tuple[int, ...]] = []
        values, group = self.singular_values, [0]
        for index in range(1, len(values) + 1):
            if index < len(values) and values[index - 1] - values[index] <= _CLOSE * values[index - 1]:
                group.append(index)
                continue
            if len(group) > 1:
                groups.append(tuple(group))
            group = [index]
        return groups

    def warn_of_parts(self, components: Sequence[int] | np.ndarray) -> None:
        """Warn where only some components of a group of `close` ones are taken."""
        taken = {int(each) for each in components}
        for group in self.close:
            if taken & set(group) and not set(group) <= taken:
                some = sorted(taken & set(group))
                warn(
                    f"components {', '.join(map(str, group[:6]))}{', ...' if len(group) > 6 else ''} have singular "
                    f"values that differ by less than {_CLOSE:g} of themselves: which direction is component {some[0]} "
                    "is not determined, only what they span together"
                )

    def checked(self, components: Any) -> np.ndarray:
        """Indices of components as int64.

        Raises:
            DataError: none, one twice, or one that there is not.
        """
        listed = np.asarray([components] if np.ndim(components) == 0 else list(components))
        if not listed.size or not np.issubdtype(listed.dtype, np.integer):
            raise DataError(f"components are whole numbers, as [3, 5], not {components!r:.60}")
        if int(listed.min()) < 0 or int(listed.max()) >= len(self) or len(set(listed.tolist())) < len(listed):
            raise DataError(f"components are different numbers from 0 to {len(self) - 1}, not {listed.tolist()}")
        return listed.astype(np.int64)


@published(
    row="S008",
    title="Redefining Experts: Interpretable Decomposition of Language Models for Toxicity Mitigation",
    authors="Shaik et al.",
    year=2025,
    url="https://arxiv.org/abs/2509.16660",
    part="decomposition",
)
def output_svd(model: Model | torch.Tensor | np.ndarray) -> OutputDecomposition:
    """The singular components of a model's unembedding (Shaik et al., 2025).

    The unembedding is taken as it is, without the norm before it: coordinates are of what enters it (`head_states`).
    Computed in float64; where there are many more tokens than dimensions, from the eigenvectors of `W^T W`, which loses
    singular values below a millionth of the largest: a warning says so.

    Args:
        model: a model with an unembedding; or the matrix itself, `[vocabulary, d]`.

    Raises:
        ModelError: no unembedding, or a quantised one.
        DataError: a matrix that is none, or is not finite.
    """
    matrix = head_matrix(model)
    if matrix.ndim != 2 or not matrix.numel() or not bool(torch.isfinite(matrix).all()):
        raise DataError(f"an unembedding is a matrix of finite numbers, [vocabulary, d], not {list(matrix.shape)}")
    tall = matrix.shape[0] > _TALL * matrix.shape[1]
    values, right = _of_gram(matrix) if tall else _of_matrix(matrix)
    right = right * np.sign(np.take_along_axis(right, np.abs(right).argmax(1)[:, None], 1))
    lost = tuple(np.flatnonzero(values <= _LOST[tall] * values[0]).tolist())
    if lost:
        warn(
            f"{len(lost)} of {len(values)} singular values are below {_LOST[tall]:g} of the largest: the directions of "
            "these components are rounding, and they are never selected"
        )
    return OutputDecomposition(values, right, lost, matrix)


def head_matrix(model: Model | torch.Tensor | np.ndarray) -> torch.Tensor:
    """The unembedding of a model as it is, `[vocabulary, d]`: a view of its weights.

    Raises:
        ModelError: no unembedding, or a quantised one.
    """
    if not isinstance(model, Model):
        return torch.as_tensor(model).detach()
    path = model.readout.unembedding
    head: Any = model.module.get_submodule(path)
    return head.weight.detach() if isinstance(head, nn.Embedding) else projection_weights(head, path).T


# States that enter the unembedding -----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class HeadStates:
    """What entered the unembedding, step by step. Made by `head_states`.

    Attributes:
        states: `[steps, d]` float32.
        emitted: `[steps]` int64, the token with the largest logit.
        texts: `[steps]` int64, which text the step belongs to.
    """

    states: np.ndarray = field(repr=False)
    emitted: np.ndarray
    texts: np.ndarray = field(repr=False)

    def emitting(self, tokens: Collection[int]) -> np.ndarray:
        """The states of steps whose most likely token is one of these, `[number, d]`; there may be none."""
        return self.states[np.isin(self.emitted, list(tokens))]

    def not_emitting(self, tokens: Collection[int]) -> np.ndarray:
        """The states of all other steps, `[number, d]`."""
        return self.states[~np.isin(self.emitted, list(tokens))]


def head_states(
    model: Model, texts: Iterable[Any], where: Literal["all", "last"] = "all", *, batch_size: int = 32
) -> HeadStates:
    """The states that enter the unembedding while a model reads texts, and the token that each would emit.

    Args:
        model: with a tokenizer.
        texts: texts, or a data set of them. Each is cut at what the model can take.
        where: "all" for every position; "last" for the step that follows each text, which the paper takes of neutral
            prompts.
        batch_size: texts that are read at a time.

    Raises:
        ModelError: no unembedding, or one that is never called as a module, so that nothing can be read there.
        DataError: no texts.
        UnknownName: `where` is neither.
    """
    if where not in ("all", "last"):
        raise unknown("choice of steps", where, ("all", "last"))
    listed = [each if isinstance(each, str) else each.text for each in texts]
    if not listed:
        raise DataError("head_states is given no texts")
    path = model.readout.unembedding
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(_module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        seen.append((args[0].detach(), output.detach().argmax(-1)))

    states, emitted, numbers = [], [], []
    handle = model.module.get_submodule(path).register_forward_hook(keep)
    try:
        with model.evaluating(), torch.no_grad():
            for start in range(0, len(listed), batch_size):
                inputs = model.inputs(listed[start : start + batch_size])
                seen.clear()
                model.module(**inputs)
                if len(seen) != 1 or seen[0][0].ndim != 3:
                    raise ModelError(
                        f"the unembedding {path} of {model.name} is not called as a module, once in a forward pass: "
                        "what enters it cannot be read"
                    )
                hidden, tokens = seen[0]
                chosen = _chosen(inputs, hidden, where)
                states.append(hidden[chosen].float().cpu().numpy())
                emitted.append(tokens[chosen].cpu().numpy())
                numbers.append(start + chosen.nonzero()[:, 0].cpu().numpy())
    finally:
        handle.remove()
    return HeadStates(np.concatenate(states), np.concatenate(emitted), np.concatenate(numbers))


# Helpers ----------------------------------------------------------------------------------------------


def _chosen(inputs: dict[str, torch.Tensor], hidden: torch.Tensor, where: str) -> torch.Tensor:
    """`[texts, positions]` bool: the steps that are wanted, none of padding."""
    given = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))
    mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    if given is not None and given.shape == mask.shape:
        mask = given.bool().to(hidden.device)
    if where == "all":
        return mask
    place = torch.arange(mask.shape[1], device=mask.device)
    return mask & (place == (place * mask).amax(1, keepdim=True))


def _states(hidden: ArrayLike | torch.Tensor, width: int) -> np.ndarray:
    given = hidden.detach().cpu().double().numpy() if isinstance(hidden, torch.Tensor) else hidden
    states = np.asarray(given, np.float64)
    if not states.ndim or states.shape[-1] != width:
        raise DataError(f"hidden states have width {width}, not {list(states.shape)}")
    if not np.isfinite(states).all():
        raise DataError("a hidden state is not finite")
    return states


def _of_gram(matrix: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    width = matrix.shape[1]
    gram = torch.zeros(width, width, dtype=torch.float64)
    for block in matrix.split(_ROWS_AT_ONCE):
        rows = block.to("cpu", torch.float64)
        gram += rows.T @ rows
    squares, vectors = np.linalg.eigh(gram.numpy())
    return np.sqrt(squares[::-1].clip(0)), np.ascontiguousarray(vectors[:, ::-1].T)


def _of_matrix(matrix: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    _, values, right = np.linalg.svd(matrix.to("cpu", torch.float64).numpy(), full_matrices=False)
    return values, right
