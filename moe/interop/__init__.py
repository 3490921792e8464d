"""Models of other libraries: their MoE blocks computed by this package's layer."""

from .adapters import ADAPTERS, Adapter
from .swap import SwappedMoE, swap, unswap

__all__ = ["ADAPTERS", "Adapter", "SwappedMoE", "swap", "unswap"]
