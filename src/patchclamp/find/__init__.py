"""Which neurons matter? One file a method; each gives a table of `Neurons`, best first."""

from patchclamp.find.lape import lape, lape_ternary
from patchclamp.find.striking import striking

__all__ = ["lape", "lape_ternary", "striking"]
