"""Hidden states to routing decisions."""

from .router import Router

__all__ = ["Router"]
