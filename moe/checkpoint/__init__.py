"""Checkpoints, which are complete or absent, do not depend on the mesh, and contain only data.

Every rank must call :func:`save` and :func:`load`. :func:`training_state` collects the tensors that they write and
fill.
"""

from .manifest import MANIFEST, CheckpointError, read_manifest
from .state import expect_moments, restore_optimizer, training_state
from .store import complete, contents, load, newest, save

__all__ = [
    "MANIFEST",
    "CheckpointError",
    "complete",
    "contents",
    "expect_moments",
    "load",
    "newest",
    "read_manifest",
    "restore_optimizer",
    "save",
    "training_state",
]
