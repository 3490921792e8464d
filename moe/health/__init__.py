"""Watches over a run. Policies are values: the training loop asks, and decides what to do."""

from .finite import finite_everywhere
from .losses import LossWindow
from .replicas import Replicas

__all__ = ["LossWindow", "Replicas", "finite_everywhere"]
