"""Training with DeepSpeed (extra ``deepspeed``). Only this package imports it."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported; it would guess otherwise

from .engine import DeepSpeedEngine, build_deepspeed_engine  # noqa: E402
from .layer import MoE  # noqa: E402

__all__ = ["DeepSpeedEngine", "MoE", "build_deepspeed_engine"]
