"""The atlas: a folder that holds what is known of a model's neurons, read without torch.

```python
atlas = pc.Atlas.open("demo-atlas")
atlas.neuron("mlp.3:417")                  # a card that draws itself in a terminal and a notebook
atlas.search("return").top(5)              # neurons whose triggers or examples hold the word
atlas.sql("select site, count(*) as n from neurons where striking group by site")
```
"""

from patchclamp.atlas.atlas import TABLES, Atlas
from patchclamp.atlas.card import NeuronCard

__all__ = ["TABLES", "Atlas", "NeuronCard"]
