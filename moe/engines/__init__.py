"""Who owns data parallelism and the optimizer's step."""

from .base import Batch, Engine, Loss, OptimizerFactory, StepResult
from .build import build_engine

__all__ = ["Batch", "Engine", "Loss", "OptimizerFactory", "StepResult", "build_engine"]
