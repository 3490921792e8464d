"""Reads checkpoints of schema 1, in torch's distributed format; see :mod:`equimoe.moe.checkpoint.torch_files`.

Equimoe 0.1 wrote this format. Version 0.3 will remove this file, and schema 1 from ``manifest.py`` and ``store.py``. A
run started with 0.1 must have saved a checkpoint with 0.2 by then.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .manifest import METADATA, REMEDY, CheckpointError, reason
from .tensors import Saved
from .torch_files import METADATA_NAMES, described, opened

__all__ = ["contents", "opened"]

_MAX_METADATA_BYTES = 32 << 20


def contents(path: Path, manifest: dict[str, Any]) -> dict[str, Saved]:
    """Return the description of all tensors of the checkpoint in folder ``path``."""
    file = path / METADATA
    if METADATA not in manifest["files"]:
        raise CheckpointError(f"{file}: missing from the manifest; {REMEDY}")
    sizes = {name: entry["bytes"] for name, entry in manifest["files"].items() if name != METADATA}
    try:
        if file.stat().st_size > _MAX_METADATA_BYTES:
            raise ValueError(f"larger than {_MAX_METADATA_BYTES} bytes")
        return described(file.read_bytes(), METADATA_NAMES, sizes, lambda _: True)
    except (OSError, ValueError, KeyError, IndexError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{file}: refused: {reason(error)}") from None
