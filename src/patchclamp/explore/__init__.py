"""The explorer: a page and a JSON API that show an atlas, offline, from one command.

```python
from patchclamp.explore import application, serve

serve(pc.Atlas.open("demo-atlas"))                 # what `patchclamp explore demo-atlas` does
app = application(pc.Atlas.open("demo-atlas"))     # the FastAPI application, to mount or to test
```

The page is written by hand in `static/`: no build step, nothing from a network. Whatever comes from
a corpus is untrusted: the scripts only ever set text, and the server forbids inline scripts.
"""

from patchclamp.explore.application import application
from patchclamp.explore.server import serve

__all__ = ["application", "serve"]
