"""NeuroX 1.0.9 cannot do this job: this says why, as its wheel and pip show."""

from __future__ import annotations

from job import Case, Pass

PACKAGE = "neurox"
REASON = (
    "it pins torch 1.8.1 (the oldest for Python 3.11 is 1.13.0), numpy 1.19.5 (no wheel for Python 3.11) and h5py "
    "3.1.0 (its build stops at numpy 1.19.3, which does not compile); and it reads only the residual states "
    "(`output_hidden_states=True` in `neurox/data/extraction/transformers_extractor.py`), not the neurons of an MLP"
)


def load(case: Case) -> Pass:
    """Say why."""
    raise RuntimeError(REASON)
