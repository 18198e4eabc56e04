"""What a model is shown: texts, conversations, tensors or images, with labels per example.

`Texts` reads lists, iterables, `.txt`, `.jsonl`, `.parquet` and data sets of the Hugging Face hub; `Chats` reads
conversations; `Tensors` holds input for models without a tokenizer; `Images` reads arrays, files and data sets
of pictures; `as_data` makes one of them from what a user passed; `corpora` holds text that needs no download.
Importing this package loads neither torch nor pyarrow.
"""

from patchclamp.data import corpora
from patchclamp.data.accept import as_data
from patchclamp.data.chats import Chats, Conversation
from patchclamp.data.images import ImageExample, Images
from patchclamp.data.tensors import TensorExample, Tensors
from patchclamp.data.texts import Example, Texts
from patchclamp.data.token_labels import Span

__all__ = [
    "Chats",
    "Conversation",
    "Example",
    "ImageExample",
    "Images",
    "Span",
    "TensorExample",
    "Tensors",
    "Texts",
    "as_data",
    "corpora",
]
