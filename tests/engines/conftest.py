"""Leaves out what DeepSpeed would compile on a CPU: an all-reduce in shared memory, which no test needs."""

from __future__ import annotations

import contextlib
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
with contextlib.suppress(ImportError):
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
