"""`Texts`: a corpus of texts with labels per example, and labels per word or stretch of text.

A list, any iterable of `str`, a file (`.txt`, `.jsonl`, `.parquet`) or a data set of Hugging Face
`datasets` that is streamed: a pass over the corpus holds one example at a time, however large it is.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from patchclamp.data.labelled import Given, Labelled, one
from patchclamp.data.labels import Unusable, label_name, text_of
from patchclamp.data.near_duplicates import NearDuplicates
from patchclamp.data.sampling import reservoir, whole_number
from patchclamp.data.sources import source_of
from patchclamp.data.token_labels import Span, joined_words, spans_of, values_of, with_unlabelled
from patchclamp.errors import DataError


@dataclass(frozen=True, slots=True)
class Example:
    """One text, the values of its labels, and what a decoder reads (None: the text itself).

    Attributes:
        text: the text.
        labels: label -> its value.
        target: what the decoder of an encoder-decoder model reads.
        token_labels: token label -> labelled spans of the text, in order, none overlapping another.
    """

    text: str
    labels: Mapping[str, str]
    target: str | None = None
    token_labels: Mapping[str, Sequence[Span]] = field(default_factory=dict)


class Texts(Labelled[Example]):
    """Texts with labels, in a fixed order; iterate over it to get `Example`s.

    Args:
        source: texts, or a file of them. A list or any iterable of `str` (a generator can be read
            once only); a path: a `str` that ends in `.txt`, `.jsonl` or `.parquet`, or a
            `pathlib.Path`; or a data set of Hugging Face `datasets`, whole or streaming. `.txt` holds one
            text per line, blank lines are left out.
        labels: `{"language": [one value per example]}`. For a source with columns (`.jsonl`, `.parquet`,
            `datasets`) a label may also be a column: `["language"]`, or `{"language": "lang"}` for the
            column `lang`. Values become `str`; a `ClassLabel` is its name.
        column: column that holds the text.
        targets: what the decoder of an encoder-decoder model reads: a list with one text per example,
            or the name of a column. None: the text itself.
        words: the texts in words, instead of `source`: a list of words for each text, or for a source with
            columns the name of the one that holds such lists. The text is the words with spaces between them.
        token_labels: labels inside the texts, `{"pos": [one list per example]}`, or columns, as for `labels`.
            A list holds a label for each word (of `words`, else of `text.split()`), or spans
            `(start, end, label)` in characters. A token has the label of the span that covers its first
            character that is no space; in no span it is "(none)".
        name: how reports call this corpus; by default the file's name, or "texts".

    Attributes:
        dropped: of `without_near_duplicates`: (index of a text that was left out, index of the text it
            repeats), both in the corpus it was taken from.

    Raises:
        DataError: at once for a missing file, an unknown suffix, no examples, labels or targets of
            the wrong length, a label without a value, a text of a list that is not `str`, token labels of a
            list that do not fit, or a faulty first line of a file; a fault further down in a file or
            iterable is raised when it is reached, with its place.

    Example:
        >>> texts = Texts(["A dog.", "Ein Hund."], labels={"language": ["en", "de"]})
        >>> texts.labels
        {'language': ('de', 'en')}
        >>> for example in texts:
        ...     print(example.text, example.labels["language"])
        A dog. en
        Ein Hund. de
    """

    dropped: tuple[tuple[int, int], ...] = ()

    def __init__(
        self,
        source: str | os.PathLike[str] | Iterable[str] | Any = None,
        labels: Mapping[str, Iterable[object] | str] | Sequence[str] | str | None = None,
        *,
        column: str = "text",
        targets: Iterable[str] | str | None = None,
        words: Iterable[Sequence[str]] | str | None = None,
        token_labels: Mapping[str, Iterable[object] | str] | Sequence[str] | str | None = None,
        name: str | None = None,
    ) -> None:
        if isinstance(source, Labelled):
            raise DataError(f"this is pc.{type(source).__name__} already; use it as it is")
        self._in_words = words is not None
        found = source_of(_given(source, words), name)
        if column != "text" and not found.has_columns:
            raise DataError(f"{name or found.name} has no columns, so column={column!r} means nothing")
        if self._in_words and isinstance(words, str):
            if not found.has_columns:
                raise DataError(f"{name or found.name} has no columns, so words={words!r} means nothing")
            column = words
        super().__init__(found, labels, column, name)
        self._targets: Given | None = self._read_targets(targets)
        self._token_labels: dict[str, Given] = self._read_token_labels(token_labels)
        self._token_categories: dict[str, tuple[str, ...]] | None = None
        if twice := self._labels.keys() & self._token_labels.keys():
            raise DataError(f"{self.name} has {min(twice)!r} as a label and as a token label: name them apart")
        self._check_start(whole=True)

    @property
    def token_labels(self) -> dict[str, tuple[str, ...]]:
        """Token label -> its categories: sorted, and last "(none)", that of tokens without one.

        The first use reads the data through once.
        """
        if self._token_categories is None:
            columns = {label: given for label, given in self._token_labels.items() if isinstance(given, int)}
            seen = self._scan(columns, values_of)
            for label, given in self._token_labels.items():
                if not isinstance(given, int):
                    seen[label] = {value for each in given for value in values_of(each, label)}
            self._token_categories = {label: with_unlabelled(seen[label]) for label in self._token_labels}
        return dict(self._token_categories)

    def take(self, n: int) -> Texts:
        """The first `n` texts (all, if there are fewer), held in memory, with everything that belongs to them.

        Raises:
            DataError: `n` is not a number from 1 on.
        """
        return self._part(itertools.islice(self, whole_number("n", n, least=1)))

    def sample(self, n: int, seed: int = 0) -> Texts:
        """`n` texts drawn at random without replacement, in their order, held in memory; one pass over the data.

        Each set of `n` texts is as likely as any other. The same seed draws the same texts.

        Raises:
            DataError: there are fewer than `n` texts, or `n` is not a number from 1 on.
        """
        return self._part(example for _, example in reservoir(self, whole_number("n", n, least=1), seed, self.name))

    def without_near_duplicates(self, threshold: float = 0.8, seed: int = 0) -> Texts:
        """The texts without those that nearly repeat an earlier one, held in memory; `.dropped` says which.

        Two texts are near duplicates where the sets of their stretches of five words (in lower case) have a
        Jaccard similarity of at least `threshold`. Candidates are found by MinHash and compared exactly: no
        text is dropped that is not one; a pair at a threshold of 0.1 or more is missed at most once in 10,000.
        Of a text of fewer than five words the whole is one stretch.

        Args:
            threshold: in (0, 1]; 1 drops only texts that have the same stretches.
            seed: draws the hashes.

        Raises:
            DataError: the threshold is not in (0, 1].
        """
        seen = NearDuplicates(threshold, seed)
        dropped: list[tuple[int, int]] = []
        kept: list[Example] = []
        for index, example in enumerate(self):
            if (of := seen.add(index, example.text)) is None:
                kept.append(example)
            else:
                dropped.append((index, of))
        part = self._part(kept)
        part.dropped = tuple(dropped)
        return part

    def _part(self, examples: Iterable[Example]) -> Texts:
        """Some of the examples as texts of their own."""
        held = list(examples)
        return Texts(
            [each.text for each in held],
            {label: [each.labels[label] for each in held] for label in self._labels},
            targets=None if self._targets is None else [each.target or "" for each in held],
            token_labels={label: [each.token_labels[label] for each in held] for label in self._token_labels},
            name=self.name,
        )

    def _example(self, index: int, values: Sequence[object]) -> Example:
        words = None
        if self._in_words:
            text, words = joined_words(values[0])
        else:
            text = text_of(values[0])
        labels = self._labels_of(index, values)
        target: str | None = None
        if isinstance(self._targets, int):
            target = text_of(values[self._targets], "the target")
        elif self._targets is not None:
            target = one(self._targets, index, "targets")
        spans: dict[str, Sequence[Span]] = {}
        for label, given in self._token_labels.items():
            of_text = values[given] if isinstance(given, int) else one(given, index, f"token label {label!r}")
            spans[label] = spans_of(of_text, label, text, words)
        return Example(text, labels, target, spans)

    def _read_targets(self, targets: Iterable[str] | str | None) -> Given | None:
        if targets is None:
            return None
        if isinstance(targets, str):
            if not self._source.has_columns:
                raise DataError(f"targets of {self.name} are a list with one text per example, not one str")
            return self._position(targets)
        if isinstance(targets, (bytes, Mapping, set, frozenset)) or not isinstance(targets, Iterable):
            kind = type(targets).__name__
            raise DataError(f"targets of {self.name} are a list with one text per example, not {kind}")
        found: list[str] = []
        for index, target in enumerate(targets):
            try:
                found.append(text_of(target, "the target"))
            except Unusable as reason:
                raise DataError(f"example {index} of {self.name}: {reason}") from None
        return tuple(found)

    def _read_token_labels(self, given: Any) -> dict[str, Given]:
        if given is None:
            return {}
        if not isinstance(given, Mapping):
            return {label_name(each): self._position(each) for each in self._names(given, "pos")}
        found: dict[str, Given] = {}
        for label, values in given.items():
            label_name(label)
            if isinstance(values, str) and self._source.has_columns:
                found[label] = self._position(values)
                continue
            if isinstance(values, (str, bytes, Mapping, set, frozenset)) or not isinstance(values, Iterable):
                raise DataError(
                    f"token label {label!r} of {self.name} takes one list per example, in a list; "
                    f"{values!r:.40} is of type {type(values).__name__}"
                )
            # Copies, so that a later change of a list changes nothing here.
            found[label] = tuple(tuple(each) if isinstance(each, (list, tuple)) else each for each in values)
        return found

    def _lists(self) -> dict[str, tuple[Any, ...]]:
        lists = super()._lists()
        if isinstance(self._targets, tuple):
            lists["targets"] = self._targets
        for label, given in self._token_labels.items():
            if isinstance(given, tuple):
                lists[f"token label {label!r}"] = given
        return lists


def _given(source: Any, words: Any) -> Any:
    """What the texts are read from: the source, or the words in its place."""
    if words is None or isinstance(words, str):
        if source is None and words is not None:
            raise DataError(f"words={words!r} is the name of a column: pass the file or data set that has it")
        return source
    if source is not None:
        raise DataError("give texts or words=, not both: with words= the text is the words with spaces between them")
    # Each list is copied too, so that a later change parts no word from its label.
    if isinstance(words, (list, tuple)):
        return [tuple(each) if isinstance(each, (list, tuple)) else each for each in words]
    return words
