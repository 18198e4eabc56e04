"""The data as the model reads it: token ids, tensors or images by example, in batches of similar length.

Each kind has a file of its own; here they come together.
"""

from __future__ import annotations

from patchclamp.recording.forward import Forward, Rows
from patchclamp.recording.tensor_corpus import TensorCorpus
from patchclamp.recording.text_corpus import TextCorpus
from patchclamp.recording.tokenizing import Reading, tokenize

Corpus = TextCorpus | TensorCorpus

__all__ = ["Corpus", "Forward", "Reading", "Rows", "TensorCorpus", "TextCorpus", "tokenize"]
