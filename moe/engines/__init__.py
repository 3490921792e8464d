"""Engines: own data parallelism and the optimizer step."""

from .base import Batch, Engine, Loss, OptimizerFactory, StepResult
from .build import build_engine

__all__ = ["Batch", "Engine", "Loss", "OptimizerFactory", "StepResult", "build_engine"]
