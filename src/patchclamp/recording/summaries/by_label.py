"""`ByLabel`: other summaries, kept apart for every category of a label."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch

from patchclamp.errors import DataError, unknown
from patchclamp.recording.batch import Batch, Setting
from patchclamp.recording.summaries.firing_rate import FiringRate
from patchclamp.recording.summaries.moments import Moments
from patchclamp.recording.summaries.summary import Summary

MOST_CATEGORIES = 1000


class Group:
    """The summaries of one category: `.count`, and each summary under its name, as `.moments`."""

    def __init__(self, summaries: Mapping[str, Summary], count: int) -> None:
        self._summaries = summaries
        self.count = count

    def __getattr__(self, name: str) -> Any:
        summaries = self.__dict__.get("_summaries", {})
        if name not in summaries:
            kept = ", ".join(summaries)
            raise AttributeError(f"ByLabel keeps no {name!r} of each category; it keeps: {kept}")
        return summaries[name]


class ByLabel(Summary):
    """Other summaries, for every category of one label or of all labels.

    Args:
        label: name of the label; None for every label of the data.
        of: the summaries to keep for each category, classes or instances.

    Raises:
        DataError: `of` is empty, names a summary twice, or holds something else.
    """

    name = "by_label"

    def __init__(self, label: str | None = None, of: Iterable[type[Summary] | Summary] = (Moments, FiringRate)) -> None:
        self.label = label
        self._templates = _templates(of)
        self.needs_tokens = any(each.needs_tokens for each in self._templates.values())

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels, sorted."""
        return tuple(self._categories)

    def categories(self, label: str) -> tuple[str, ...]:
        """The categories of a label.

        Raises:
            UnknownName: no such label.
        """
        if label not in self._categories:
            raise unknown("label", label, self._categories)
        return self._categories[label]

    def of(self, label: str, category: str) -> Group:
        """The summaries of one category.

        Raises:
            UnknownName: no such label or category.
        """
        categories = self.categories(label)
        if category not in categories:
            raise unknown(f"category of {label!r}", category, categories)
        code = categories.index(category)
        return Group(self._groups[label][code], int(self.count(label)[code]))

    def count(self, label: str) -> np.ndarray:
        """[categories] int64: rows (tokens) of each category."""
        self.categories(label)
        return self.array(_count_name(self.labels.index(label)))

    def mean(self, label: str) -> np.ndarray:
        """[size, categories] float64: the mean activation in each category."""
        return np.stack([each.mean for each in self._each(label, Moments)], axis=1)

    def rate(self, label: str) -> np.ndarray:
        """[size, categories, thresholds] float64: the firing rate in each category."""
        return np.stack([each.rate for each in self._each(label, FiringRate)], axis=1)

    @property
    def templates(self) -> Mapping[str, Summary]:
        """The summaries that are kept of each category, by name."""
        return self._templates

    def groups(self, label: str) -> Sequence[Mapping[str, Summary]]:
        """The accumulators of each category, by name."""
        return self._groups[label]

    def count_up(self, label: str, codes: torch.Tensor, rows: torch.Tensor) -> None:
        """Take in so many rows of each of these categories; their summaries are shown them by themselves."""
        self.tensors[_count_name(self.labels.index(label))][codes] += rows

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Example and position of what the summaries of all categories show."""
        groups = [group for groups in self._groups.values() for group in groups]
        found = [super().places(), *(each.places() for group in groups for each in group.values())]
        example, position = (np.concatenate([each.ravel() for each in part]) for part in zip(*found, strict=True))
        return example, position

    @property
    def relative(self) -> bool:
        return any(each.relative for each in self._templates.values())

    def parameters(self) -> dict[str, Any]:
        of = [{"summary": name, "parameters": each.parameters()} for name, each in self._templates.items()]
        return {"label": self.label, "of": of}

    @classmethod
    def from_json(cls, parameters: Mapping[str, Any]) -> Self:
        of = [Summary.from_parameters(each["summary"], each["parameters"]) for each in parameters["of"]]
        return cls(parameters["label"], of)

    def empty(self, setting: Setting) -> dict[str, torch.Tensor]:
        if self.label is not None and self.label not in setting.labels:
            raise unknown("label of the data", self.label, setting.labels)
        chosen = sorted(setting.labels) if self.label is None else [self.label]
        self._categories = {label: tuple(setting.labels[label]) for label in chosen}
        for label, categories in self._categories.items():
            if len(categories) > MOST_CATEGORIES:
                raise DataError(
                    f"the label {label!r} has {len(categories)} categories; ByLabel keeps at most "
                    f"{MOST_CATEGORIES}: name another label, or group them"
                )
        self._groups = {
            label: [{name: each.start(setting) for name, each in self._templates.items()} for _ in categories]
            for label, categories in self._categories.items()
        }
        return {
            _count_name(index): torch.zeros(len(categories), dtype=torch.int64)
            for index, categories in enumerate(self._categories.values())
        }

    def add(self, batch: Batch) -> None:
        for index, (label, categories) in enumerate(self._categories.items()):
            if label not in batch.labels:
                raise unknown(f"label in a batch of {self.site}", label, batch.labels)
            codes = batch.labels[label]
            low, high = int(codes.min()), int(codes.max())
            if low < 0 or high >= len(categories):
                raise DataError(
                    f"a batch of {self.site} has category {low if low < 0 else high} of {label!r}, "
                    f"which has {len(categories)}"
                )
            counts = torch.bincount(codes, minlength=len(categories))
            self.tensors[_count_name(index)] += counts
            for code, part in _parts(batch, codes, counts.tolist()):
                for summary in self._groups[label][code].values():
                    summary.update(part)

    def combine(self, other: Self) -> None:
        for name, counts in other.tensors.items():
            self.tensors[name] += counts
        for label, groups in self._groups.items():
            for mine, theirs in zip(groups, other._groups[label], strict=True):
                for name, summary in mine.items():
                    summary.merge(theirs[name])

    def state(self) -> dict[str, np.ndarray]:
        """Arrays with one row per category; their names begin with the number of the label in `labels`."""
        state = super().state()
        for index, groups in enumerate(self._groups.values()):
            states = [{name: each.state() for name, each in group.items()} for group in groups]
            for name, arrays in states[0].items() if states else ():
                for key in arrays:
                    state[f"{index}.{name}.{key}"] = np.stack([each[name][key] for each in states])
        return state

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        own: dict[str, np.ndarray] = {}
        inner: dict[tuple[str, str], dict[str, np.ndarray]] = {}
        for key, array in state.items():
            index, _, rest = key.partition(".")
            name, dot, array_name = rest.partition(".")
            if dot:
                inner.setdefault((index, name), {})[array_name] = np.asarray(array)
            else:
                own[key] = array
        groups = {}
        for index, label in enumerate(self._groups):
            arrays = {name: inner.pop((str(index), name), {}) for name in self._templates}
            groups[label] = self._restored(label, arrays)
        if inner:
            raise DataError(f"the state of {self.name} has unknown arrays {'.'.join(next(iter(inner)))!r}")
        super().restore(own)
        self._groups = groups

    def held_bytes(self) -> int:
        groups = [group for groups in self._groups.values() for group in groups]
        return super().held_bytes() + sum(each.held_bytes() for group in groups for each in group.values())

    def __repr__(self) -> str:
        return f"ByLabel({self.label!r}, of={list(self._templates.values())!r})"

    def refuse_unlike(self, other: Self) -> None:
        super().refuse_unlike(other)
        if other._categories != self._categories:
            raise DataError(
                f"cannot merge {self.name} of {other.site} into that of {self.site}: the labels or their "
                f"categories differ ({other._categories} and {self._categories})"
            )
        for label, groups in self._groups.items():
            for mine, theirs in zip(groups, other._groups[label], strict=True):
                for name, summary in mine.items():
                    summary.refuse_unlike(theirs[name])

    def _restored(self, label: str, arrays: Mapping[str, Mapping[str, np.ndarray]]) -> list[dict[str, Summary]]:
        """Fresh groups of a label from arrays [categories, ...] by summary and name."""
        groups = self._groups[label]
        for name, each in arrays.items():
            for key, array in each.items():
                if array.ndim == 0 or len(array) != len(groups):
                    raise DataError(
                        f"the state of {self.name} has {name}.{key} of shape {list(array.shape)}; "
                        f"one row for each of the {len(groups)} categories of {label!r} is wanted"
                    )
        restored = []
        for code, group in enumerate(groups):
            copies = {name: copy.copy(summary) for name, summary in group.items()}
            for name, summary in copies.items():
                summary.restore({key: array[code] for key, array in arrays[name].items()})
            restored.append(copies)
        return restored

    def _each(self, label: str, kind: type[Summary]) -> Sequence[Any]:
        self.categories(label)
        if kind.name not in self._templates:
            hint = f"Ask for ByLabel(of=[{kind.__name__}])."
            raise unknown("summary of each category", kind.name, self._templates, hint)
        return [group[kind.name] for group in self._groups[label]]


def _templates(of: Iterable[type[Summary] | Summary]) -> dict[str, Summary]:
    templates: dict[str, Summary] = {}
    for each in of if isinstance(of, Iterable) else (of,):
        if not (isinstance(each, Summary) or (isinstance(each, type) and issubclass(each, Summary))):
            raise DataError(f"ByLabel(of=...) takes summaries such as Moments, not {each!r}")
        template = each if isinstance(each, Summary) else each()
        if template.name in templates:
            raise DataError(f"ByLabel(of=...) names {template.name} twice")
        if template.large:
            raise DataError(
                f"{template.name} keeps every example by itself: it is recorded once, beside ByLabel, and labels are "
                "put to it afterwards"
            )
        templates[template.name] = template
    if not templates:
        raise DataError("ByLabel(of=...) needs at least one summary")
    return templates


def _count_name(index: int) -> str:
    return f"{index}.count"


def _parts(batch: Batch, codes: torch.Tensor, counts: Sequence[int]) -> Iterator[tuple[int, Batch]]:
    """Each category in the batch with the batch of its rows, in their order."""
    if max(counts) == len(batch):
        yield counts.index(len(batch)), batch
        return
    ordered = batch.select(torch.argsort(codes, stable=True))
    start = 0
    for code, count in enumerate(counts):
        if count:
            yield code, ordered.select(slice(start, start + count))
        start += count
