"""Training with DeepSpeed (extra ``deepspeed``). Only this package imports it."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported; it would guess otherwise

try:
    from .engine import DeepSpeedEngine, build_deepspeed_engine
    from .layer import MoE
except ImportError as error:
    raise ImportError(f"{__name__}: {error}; install DeepSpeed with pip install 'equimoe[deepspeed]'") from None

__all__ = ["DeepSpeedEngine", "MoE", "build_deepspeed_engine"]
