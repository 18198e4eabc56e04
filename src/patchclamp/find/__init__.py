"""Which neurons matter? One file a method; each gives a table of `Neurons`, best first."""

from patchclamp.find.coverage import coverage, coverage_overlap
from patchclamp.find.expertise import expertise
from patchclamp.find.lape import lape, lape_ternary
from patchclamp.find.profiles import activation_profiles
from patchclamp.find.striking import striking

__all__ = [
    "activation_profiles",
    "coverage",
    "coverage_overlap",
    "expertise",
    "lape",
    "lape_ternary",
    "striking",
]
