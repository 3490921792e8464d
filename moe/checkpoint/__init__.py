"""Checkpoints, which are complete or absent, do not depend on the mesh, and contain only data.

Every rank must call :func:`save` and :func:`load`. :func:`training_state` collects the tensors that they write and
fill. A :class:`Saver` saves while training goes on.
"""

from .agreement import Choice, ViewError, choose, describe, probe
from .logical import Boxes, State, box_of, owned, tensors_of
from .manifest import MANIFEST, CheckpointError, read_manifest
from .saver import Saver, save
from .state import expect_moments, restore_optimizer, training_state
from .store import complete, contents, load, load_weights, newest
from .tensors import Opened, Saved
from .writer import LostFolderError, NonFiniteStateError, SaveError

__all__ = [
    "MANIFEST",
    "Boxes",
    "CheckpointError",
    "Choice",
    "LostFolderError",
    "NonFiniteStateError",
    "Opened",
    "SaveError",
    "Saved",
    "Saver",
    "State",
    "ViewError",
    "box_of",
    "choose",
    "complete",
    "contents",
    "describe",
    "expect_moments",
    "load",
    "load_weights",
    "newest",
    "owned",
    "probe",
    "read_manifest",
    "restore_optimizer",
    "save",
    "tensors_of",
    "training_state",
]
