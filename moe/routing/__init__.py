"""Routing: chooses the experts of each token, and their gate weights."""

from .router import Router

__all__ = ["Router"]
