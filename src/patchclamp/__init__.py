"""patchclamp: record, find, describe, prove and edit the neurons of any PyTorch network.

```python
import patchclamp as pc

model = pc.load("all-MiniLM-L6-v2")
recording = pc.record(model, ["Return the first item.", "It raises no error."], sites="mlp.*")
print(recording["mlp.1"].firing_rate.rate)
```

Importing this package is cheap: each public name loads its module, and with it torch or
transformers, only when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchclamp import attribution as attribution
    from patchclamp import decompose as decompose
    from patchclamp import edit as edit
    from patchclamp import find as find
    from patchclamp import statistics as statistics
    from patchclamp import testbed as testbed
    from patchclamp import train as train
    from patchclamp import verify as verify
    from patchclamp.atlas import Atlas as Atlas
    from patchclamp.atlas import NeuronCard as NeuronCard
    from patchclamp.data import Chats as Chats
    from patchclamp.data import Images as Images
    from patchclamp.data import Tensors as Tensors
    from patchclamp.data import Texts as Texts
    from patchclamp.data import corpora as corpora
    from patchclamp.directions import Directions as Directions
    from patchclamp.find.explain import explain as explain
    from patchclamp.intervene import ablate as ablate
    from patchclamp.intervene import clamp as clamp
    from patchclamp.intervene import patch as patch
    from patchclamp.intervene import patch_path as patch_path
    from patchclamp.intervene import scale as scale
    from patchclamp.intervene import steer as steer
    from patchclamp.model import Activations as Activations
    from patchclamp.model import Model as Model
    from patchclamp.model import Site as Site
    from patchclamp.model import load as load
    from patchclamp.neurons import Neurons as Neurons
    from patchclamp.recording import ByLabel as ByLabel
    from patchclamp.recording import ByPosition as ByPosition
    from patchclamp.recording import ByToken as ByToken
    from patchclamp.recording import CoFiring as CoFiring
    from patchclamp.recording import Correlation as Correlation
    from patchclamp.recording import Exemplars as Exemplars
    from patchclamp.recording import FiringRate as FiringRate
    from patchclamp.recording import FractionOfMaximum as FractionOfMaximum
    from patchclamp.recording import Histogram as Histogram
    from patchclamp.recording import MinMax as MinMax
    from patchclamp.recording import ModelCorrelation as ModelCorrelation
    from patchclamp.recording import Moments as Moments
    from patchclamp.recording import NGrams as NGrams
    from patchclamp.recording import OwnQuantile as OwnQuantile
    from patchclamp.recording import Pooled as Pooled
    from patchclamp.recording import RayCluster as RayCluster
    from patchclamp.recording import Recording as Recording
    from patchclamp.recording import RecordingSeries as RecordingSeries
    from patchclamp.recording import Summary as Summary
    from patchclamp.recording import TopExamples as TopExamples
    from patchclamp.recording import correlate as correlate
    from patchclamp.recording import record as record
    from patchclamp.recording import record_over as record_over
    from patchclamp.weights import Weights as Weights

__version__ = "0.1.0"

# Public name -> the module that holds it. A name that equals its module's last part is the module itself.
_HOME = {
    "Activations": "patchclamp.model",
    "Atlas": "patchclamp.atlas",
    "ByLabel": "patchclamp.recording",
    "ByPosition": "patchclamp.recording",
    "ByToken": "patchclamp.recording",
    "Chats": "patchclamp.data",
    "CoFiring": "patchclamp.recording",
    "Correlation": "patchclamp.recording",
    "Directions": "patchclamp.directions",
    "Exemplars": "patchclamp.recording",
    "FiringRate": "patchclamp.recording",
    "FractionOfMaximum": "patchclamp.recording",
    "Histogram": "patchclamp.recording",
    "Images": "patchclamp.data",
    "MinMax": "patchclamp.recording",
    "Model": "patchclamp.model",
    "ModelCorrelation": "patchclamp.recording",
    "Moments": "patchclamp.recording",
    "NGrams": "patchclamp.recording",
    "NeuronCard": "patchclamp.atlas",
    "Neurons": "patchclamp.neurons",
    "OwnQuantile": "patchclamp.recording",
    "Pooled": "patchclamp.recording",
    "RayCluster": "patchclamp.recording",
    "Recording": "patchclamp.recording",
    "RecordingSeries": "patchclamp.recording",
    "Site": "patchclamp.model",
    "Summary": "patchclamp.recording",
    "Tensors": "patchclamp.data",
    "Texts": "patchclamp.data",
    "TopExamples": "patchclamp.recording",
    "Weights": "patchclamp.weights",
    "ablate": "patchclamp.intervene",
    "attribution": "patchclamp.attribution",
    "clamp": "patchclamp.intervene",
    "corpora": "patchclamp.data.corpora",
    "correlate": "patchclamp.recording",
    "decompose": "patchclamp.decompose",
    "edit": "patchclamp.edit",
    "errors": "patchclamp.errors",
    "explain": "patchclamp.find",
    "find": "patchclamp.find",
    "load": "patchclamp.model",
    "patch": "patchclamp.intervene",
    "patch_path": "patchclamp.intervene",
    "record": "patchclamp.recording",
    "statistics": "patchclamp.statistics",
    "record_over": "patchclamp.recording",
    "scale": "patchclamp.intervene",
    # The room of learned steering, which can be called like the intervention of its name.
    "steer": "patchclamp.steer",
    "testbed": "patchclamp.testbed",
    "train": "patchclamp.train",
    "verify": "patchclamp.verify",
}

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'patchclamp' has no attribute {name!r}")
    module = importlib.import_module(home)
    value = module if home.rsplit(".", 1)[-1] == name else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
