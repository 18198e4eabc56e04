"""Act on neurons while a network learns: in your own training loop, at every step."""

from patchclamp.train.clamp import Clamp, clamped, preserved

__all__ = ["Clamp", "clamped", "preserved"]
