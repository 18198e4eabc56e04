"""What `--data` names: a file of texts, or a corpus that comes with patchclamp."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from patchclamp.errors import DataError

if TYPE_CHECKING:
    from patchclamp.data import Texts

_CORPORA = ("python_docs",)


def corpus(source: str, column: str, labels: tuple[str, ...], limit: int | None) -> Texts:
    """The texts that `--data` names, at most `limit` of them.

    Raises:
        DataError: it is neither a corpus nor a file, or a corpus was asked for columns of a file.
    """
    import patchclamp as pc

    if source in _CORPORA:
        if labels:
            raise DataError(f"{source} brings its own labels: --label names a column of a file")
        return getattr(pc.corpora, source)(limit=limit)
    if not Path(source).exists():
        raise DataError(f"there is no file {source!r}, and no corpus is called so. The corpora: {', '.join(_CORPORA)}.")
    texts = pc.Texts(Path(source), labels=list(labels) or None, column=column)
    return texts if limit is None else _first(texts, limit)


def _first(texts: Texts, limit: int) -> Texts:
    import patchclamp as pc

    examples = list(itertools.islice(texts, limit))
    labels = {name: [example.labels[name] for example in examples] for name in texts.labels}
    return pc.Texts([example.text for example in examples], labels=labels or None, name=texts.name)
