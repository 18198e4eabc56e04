"""What a model is shown: texts or tensors, with labels per example.

`Texts` reads lists, iterables, `.txt`, `.jsonl` and `.parquet`; `Tensors` holds input for models
without a tokenizer; `as_data` makes one of them from what a user passed; `corpora` holds text
that needs no download. Importing this package loads neither torch nor pyarrow.
"""

from patchclamp.data import corpora
from patchclamp.data.accept import as_data
from patchclamp.data.tensors import TensorExample, Tensors
from patchclamp.data.texts import Example, Texts

__all__ = ["Example", "TensorExample", "Tensors", "Texts", "as_data", "corpora"]
