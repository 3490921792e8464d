"""Routing: chooses the experts of each token, and their gate weights."""

from .gates import PassedLogits, build_router
from .router import Router

__all__ = ["PassedLogits", "Router", "build_router"]
