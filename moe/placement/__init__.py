"""Which ranks a layer works on, and which of them owns which expert."""

from .owners import Owners
from .placement import Placement

__all__ = ["Owners", "Placement"]
