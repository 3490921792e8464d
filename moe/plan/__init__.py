"""Predicts what a run needs before it is started: memory, traffic and floating-point operations of a rank."""

from .dry_run import DryRun, dry_run, pretended
from .memory_formulas import Memory, memory
from .sizes import Sizes, sizes

__all__ = ["DryRun", "Memory", "Sizes", "dry_run", "memory", "pretended", "sizes"]
