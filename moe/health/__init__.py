"""Watches the ranks of a run. These parts report; the loop and the command decide what follows."""

from .heartbeat import PATIENCE, Heartbeat
from .pulse import Pulse
from .stragglers import stragglers

__all__ = ["PATIENCE", "Heartbeat", "Pulse", "stragglers"]
