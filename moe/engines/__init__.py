"""Engines: own data parallelism and the optimizer step."""

from ..parallel import LossFunction
from .base import Accept, Batch, Computed, Engine, OptimizerFactory, StepResult
from .build import build_engine

__all__ = [
    "Accept",
    "Batch",
    "Computed",
    "Engine",
    "LossFunction",
    "OptimizerFactory",
    "StepResult",
    "build_engine",
]
