"""Engines: own data parallelism and the optimizer step."""

from ..parallel import LossFunction
from .base import Batch, Engine, OptimizerFactory, StepResult
from .build import build_engine

__all__ = ["Batch", "Engine", "LossFunction", "OptimizerFactory", "StepResult", "build_engine"]
