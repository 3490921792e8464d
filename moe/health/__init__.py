"""Watches over a run. These parts report, and policies are values: the loop and the command decide what follows."""

from .finite import finite_everywhere
from .heartbeat import COLLECTIVE, Heartbeat
from .losses import LossWindow
from .pulse import Pulse
from .replicas import Replicas
from .stragglers import stragglers

__all__ = ["COLLECTIVE", "Heartbeat", "LossWindow", "Pulse", "Replicas", "finite_everywhere", "stragglers"]
