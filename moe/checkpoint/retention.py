"""Deletes old checkpoints, but never the newest valid ones."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from .files import remove
from .manifest import FOLDER, CheckpointError, read_manifest
from .store import candidates

_Fingerprint = list[tuple[str, int, int, int]]


class Retention:
    """Keeps the newest ``keep_last`` valid checkpoints of a folder. Used on rank 0.

    Whether a checkpoint is valid is found by reading it whole, unless it is unchanged since that was done, or since
    this run saved it.
    """

    def __init__(self, keep_last: int) -> None:
        self._keep_last = keep_last
        self._proven: dict[Path, _Fingerprint] = {}

    def apply(self, root: Path, saved: Path) -> None:
        """Delete the entries that are older than all checkpoints to keep, and unfinished ones. ``saved`` is kept.

        What cannot be deleted causes a warning, but no exception, because the save has succeeded.
        """
        self._proven[saved] = _fingerprint(saved)
        try:
            old = self._superseded(root, saved)
            abandoned = [path for path in root.iterdir() if FOLDER.fullmatch(path.name.removesuffix(".tmp"))]
            old += [path for path in abandoned if path.suffix == ".tmp"]
        except (OSError, CheckpointError) as error:
            warnings.warn(f"{root}: old checkpoints are kept ({error})", RuntimeWarning, stacklevel=2)
            return
        for path in old:
            try:
                remove(path)
            except OSError as error:
                warnings.warn(f"{path}: cannot be deleted ({error.strerror})", RuntimeWarning, stacklevel=2)
            self._proven.pop(path, None)

    def _superseded(self, root: Path, saved: Path) -> list[Path]:
        found, kept = candidates(root), [saved]
        if len(found) <= self._keep_last:
            return []
        for path in reversed(found):
            if len(kept) < self._keep_last and path != saved and self._is_valid(path):
                kept.append(path)
        return [path for path in found if path < min(kept)] if len(kept) == self._keep_last else []

    def _is_valid(self, path: Path) -> bool:
        fingerprint = _fingerprint(path)
        if not fingerprint or self._proven.get(path) != fingerprint:
            try:
                read_manifest(path)
            except CheckpointError:
                return False
            self._proven[path] = fingerprint
        return True


def _fingerprint(path: Path) -> _Fingerprint:
    """Return name, size, time of modification and inode of every file; empty if it is not a folder."""
    if path.is_symlink() or not path.is_dir():
        return []
    entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    found = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
    return [(name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in found]
