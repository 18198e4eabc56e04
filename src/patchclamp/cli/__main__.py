"""`python -m patchclamp.cli` is `patchclamp`."""

from patchclamp.cli import app

app(prog_name="patchclamp")
