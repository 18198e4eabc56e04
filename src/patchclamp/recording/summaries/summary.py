"""`Summary`: a statistic of every neuron of a site that is learned batch by batch and can be merged.

The user passes a template, `FiringRate(0.0)`. `start(setting)` makes from it a fresh accumulator
for one site; `update(batch)` shows it a batch; `merge(other)` adds what another one has seen;
`state()` and `restore(state)` turn it into plain arrays and back.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import numpy as np
import torch

from patchclamp.errors import DataError, unknown
from patchclamp.recording.batch import Batch, Calibration, Setting

_registry: dict[str, type[Summary]] = {}


class Summary(ABC):
    """Base of all summaries.

    To add one, write one subclass:

    ```python
    class Energy(Summary):
        \"\"\"The mean square of each neuron.\"\"\"

        name = "energy"                                # recording["mlp.3"].energy

        def empty(self, setting):                      # the accumulators of one site: named tensors
            return {"count": torch.zeros((), dtype=torch.int64),
                    "total": torch.zeros(setting.size, dtype=torch.float64)}

        def add(self, batch):                          # one batch, at least one row
            self.tensors["count"] += len(batch)
            self.tensors["total"] += batch.values.double().square().sum(0)

        def combine(self, other):                      # what another one of the same kind has seen
            self.tensors["count"] += other.tensors["count"]
            self.tensors["total"] += other.tensors["total"]

        @property
        def mean_square(self):                         # the result, as numpy
            return self.array("total") / int(self.tensors["count"])
    ```

    The rest follows: checks, devices, `state`, `restore` and `nbytes`. An `__init__` with parameters
    also needs `parameters()`, which gives them back as JSON; names in `agree` are tensors that must be
    equal before two accumulators may be merged (resolved thresholds, for instance). The result must
    not depend on how the rows are split into batches or on their order.

    Attributes:
        name: the attribute under which a recording shows it; also its name in stores.
        needs_tokens: whether it reads `Batch.token`.
        large: names of arrays in `state()` that grow with the data. They count against no limit of memory
            (`Setting.scratch` says where they go), are saved in a file of their own, and mapped when read again.
        tensors: the accumulators, by name, on the device of the last batch. Only after `start`.
        site, size: name and number of neurons of the site. Only after `start`.
    """

    name: ClassVar[str]
    needs_tokens: bool = False
    agree: ClassVar[tuple[str, ...]] = ()
    large: ClassVar[tuple[str, ...]] = ()

    tensors: dict[str, torch.Tensor]
    site: str
    size: int

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "name" not in cls.__dict__:
            return
        if not cls.name.isidentifier():
            raise DataError(f"a summary is shown as an attribute: {cls.name!r} cannot be its name")
        known = _registry.get(cls.name)
        # A notebook cell that is run again defines the same class again.
        if known is not None and _full_name(known) != _full_name(cls):
            raise DataError(f"a summary is called {cls.name!r} already: {_full_name(known)}")
        _registry[cls.name] = cls

    # What a subclass writes -----------------------------------------------------------------------

    @abstractmethod
    def empty(self, setting: Setting) -> dict[str, torch.Tensor]:
        """The accumulators of one site before the first batch; their shapes never change."""

    @abstractmethod
    def add(self, batch: Batch) -> None:
        """Take in one batch of at least one row; it has the right size, and `tensors` are on its device."""

    @abstractmethod
    def combine(self, other: Any) -> None:
        """Take in what `other` has seen; it is of the same kind, parameters, size and device."""

    def parameters(self) -> dict[str, Any]:
        """What `__init__` took, as JSON: `Summary.from_parameters(name, parameters)` makes the same again."""
        return {}

    @classmethod
    def from_json(cls, parameters: Mapping[str, Any]) -> Self:
        """The inverse of `parameters()`."""
        return cls(**parameters)

    @property
    def relative(self) -> bool:
        """Whether `start` needs a calibration, because a threshold is relative."""
        return False

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Example and position of what this summary shows: a recording keeps the text there. -1 marks no example."""
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)

    # What a recording calls -----------------------------------------------------------------------

    @staticmethod
    def named(name: str) -> type[Summary]:
        """The class of this name.

        Raises:
            UnknownName: no summary has that name.
        """
        if name not in _registry:
            raise unknown("summary", name, _registry, "One of your own must be imported first.")
        return _registry[name]

    @staticmethod
    def from_parameters(name: str, parameters: Mapping[str, Any]) -> Summary:
        """The template that `name` and `parameters()` describe.

        Raises:
            UnknownName: no summary has that name.
            DataError: its class does not take these parameters.
        """
        kind = Summary.named(name)
        try:
            return kind.from_json(parameters)
        except (TypeError, KeyError, AttributeError) as error:
            given = f"{parameters!r}: {error}"
            raise DataError(f"the summary {name} cannot be made from {given}") from error

    def start(self, setting: Setting) -> Self:
        """A fresh accumulator for one site; the template itself is not changed.

        Raises:
            DataError: the setting lacks what this summary needs.
        """
        started = copy.copy(self)
        started.site, started.size = setting.site, setting.size
        started.tensors = started.empty(setting)
        return started

    def reopen(self, setting: Setting, state: Mapping[str, np.ndarray]) -> Self:
        """The accumulator that had this `state`.

        The state brings its thresholds and tokens: the setting needs the size and the labels of the
        recording, but neither calibration nor tokens.

        Raises:
            DataError: the state does not fit, as in `restore`.
        """
        started = self.start(_needing_nothing(setting))
        started.restore(state)
        return started

    def update(self, batch: Batch) -> None:
        """Take in one batch.

        Raises:
            DataError: it has another number of neurons, or lacks the tokens or labels that are needed.
        """
        if batch.size != self.size:
            raise DataError(f"{self.site} has {self.size} neurons; the batch has {batch.size}")
        if self.needs_tokens and batch.token is None:
            raise DataError(f"{type(self).__name__} needs token ids, and this batch of {self.site} has none")
        if len(batch):
            self._move(batch.values.device)
            self.add(batch)

    def merge(self, other: Self) -> None:
        """Take in what `other` has seen, in place. Associative and free of order up to the stated tolerance.

        Raises:
            DataError: kind, parameters, size, thresholds or tokens differ; the message says which.
        """
        self.refuse_unlike(other)
        self.combine(other._moved(self._device()))

    def state(self) -> dict[str, np.ndarray]:
        """Everything it holds, as arrays of numbers (copies)."""
        return {name: self.array(name) for name in self.tensors}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Become what had this `state()`; unchanged where it does not fit.

        Raises:
            DataError: an array is missing, unknown, misshaped or not of numbers; the message names it.
        """
        fitting = {
            name: self._fitting(name, tensor, _array_of(state, name, self.name))
            for name, tensor in self.tensors.items()
        }
        if extra := sorted(set(state) - set(fitting)):
            raise DataError(f"the state of {self.name} has an unknown array {extra[0]!r}")
        self.tensors = fitting

    def nbytes(self, sites: Sequence[Setting]) -> int:
        """Bytes that the accumulators of these sites hold."""
        # On the device "meta", tensors have a shape and no memory.
        with torch.device("meta"):
            return sum(self.start(_needing_nothing(setting)).held_bytes() for setting in sites)

    # For subclasses -------------------------------------------------------------------------------

    def refuse_unlike(self, other: Any) -> None:
        """Raise the DataError of `merge` where `other` cannot be merged into this one."""
        if type(other) is not type(self):
            raise DataError(f"cannot merge {type(other).__name__} into {type(self).__name__}")
        if other.parameters() != self.parameters():
            raise DataError(f"cannot merge {other!r} into {self!r}: the parameters differ")
        if other.size != self.size:
            raise DataError(f"cannot merge {other.site}, {other.size} neurons, into {self.site}, {self.size}")
        for name in self.agree:
            if not np.array_equal(self.array(name), other.array(name)):
                raise DataError(f"cannot merge {self.name} of {other.site} into {self.site}: the {name} differ")

    def array(self, name: str) -> np.ndarray:
        """A copy of one accumulator as numpy."""
        return self.tensors[name].detach().cpu().numpy().copy()

    def held_bytes(self) -> int:
        """Bytes that this one accumulator holds now."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def __repr__(self) -> str:
        parameters = ", ".join(f"{key}={value!r}" for key, value in self.parameters().items())
        return f"{type(self).__name__}({parameters})"

    def _device(self) -> torch.device:
        return next(iter(self.tensors.values())).device if self.tensors else torch.device("cpu")

    def _move(self, device: torch.device) -> None:
        if self.tensors and self._device() != device:
            self.tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}

    def _moved(self, device: torch.device) -> Self:
        moved = copy.copy(self)
        moved._move(device)
        return moved

    def _fitting(self, name: str, tensor: torch.Tensor, array: np.ndarray) -> torch.Tensor:
        if array.dtype.kind not in "iuf":
            raise DataError(f"the state of {self.name} has {array.dtype} in {name!r}: numbers are wanted")
        if array.shape != tuple(tensor.shape):
            raise DataError(
                f"the state of {self.name} has {name!r} of shape {list(array.shape)}; "
                f"{list(tensor.shape)} is wanted for {self.site}"
            )
        given = torch.from_numpy(np.array(array, order="C"))
        if given.is_floating_point() != tensor.is_floating_point():
            wanted = "fractions" if tensor.is_floating_point() else "whole numbers"
            raise DataError(f"the state of {self.name} has {array.dtype} in {name!r}: {wanted} are wanted")
        # A wider type than expected means that wider values arrived: keep them.
        dtype = given.dtype if given.element_size() > tensor.element_size() else tensor.dtype
        return given.to(device=tensor.device, dtype=dtype)


def whole(where: str, name: str, number: Any, at_least: int) -> int:
    """Check a whole number that a user gave.

    Raises:
        DataError: it is none, or too small; the message begins with `where`.
    """
    if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < at_least:
        raise DataError(f"{where}: {name} is a whole number >= {at_least}, not {number!r}")
    return int(number)


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _array_of(state: Mapping[str, np.ndarray], name: str, summary: str) -> np.ndarray:
    if name not in state:
        raise DataError(f"the state of {summary} lacks the array {name!r}")
    return np.asarray(state[name])


def _needing_nothing(setting: Setting) -> Setting:
    """The setting with stand-ins for what only decides over values, or what a state brings."""
    zeros = np.zeros(setting.size, dtype=np.float32)
    tokens = np.empty(0, dtype=np.int64) if setting.tokens is None else setting.tokens
    examples = 0 if setting.examples is None else setting.examples
    calibration = Calibration(zeros, lambda q: zeros, lambda q: zeros)
    return replace(setting, tokens=tokens, calibration=calibration, examples=examples)
