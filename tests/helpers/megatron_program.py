"""Trains a small GPTModel of Megatron-Core, on one GPU per rank, or without GPUs on CPUs.

    torchrun --standalone --nproc-per-node N -m tests.helpers.megatron_program FOLDER SETTINGS

FOLDER has the initial weights, and gets a file from each rank. SETTINGS are those of
:func:`tests.helpers.megatron_models.run`, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist


def main(folder: str, settings: str) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    from tests.helpers.megatron_models import run

    warnings.simplefilter("ignore")
    found = run(dist.get_rank(), dist.get_world_size(), torch.load(Path(folder) / "initial"), **json.loads(settings))
    torch.save(found, Path(folder) / f"rank {dist.get_rank()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
