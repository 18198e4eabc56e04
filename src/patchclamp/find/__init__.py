"""Which neurons matter? One file a method; each gives a table of `Neurons`, best first."""

from patchclamp.find.striking import striking

__all__ = ["striking"]
