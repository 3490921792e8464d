"""Routing: chooses the experts of each token, and their gate weights."""

from .gates import build_router
from .router import Router

__all__ = ["Router", "build_router"]
