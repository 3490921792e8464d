"""Checkpoints: complete or absent, independent of the mesh, and data only.

:func:`save` and :func:`load` are called by every rank; :func:`training_state` gathers what they write and fill.
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
