"""Creates states and checkpoints to tamper with, and watches what reading them does."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from equimoe.moe import checkpoint
from equimoe.moe.checkpoint.manifest import seal

#: Python audit events that reading a checkpoint must not cause
_ACTIONS = (
    *("pickle.find_class", "os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "shutil.rmtree"),
    *("os.remove", "os.rmdir", "os.rename", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.truncate"),
)
_watches: list[list[str]] = []


def small_state(value: float = 1.0) -> dict[str, torch.Tensor]:
    """Return the state of a made-up model: 2400 bytes."""
    return {f"model.w{i}": torch.full((50, 3), value + i) for i in range(4)}


def forge(path: Path, without: str = "", **changes: Any) -> None:
    """Change a manifest, and make its sizes and digests match the current files, except for one that is left out."""
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    manifest["files"].pop(without, None)
    for name, entry in manifest["files"].items():
        content = (path / name).read_bytes()
        entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest |= changes
    content = json.dumps(manifest, indent=1).encode()
    (path / checkpoint.MANIFEST).write_bytes(seal(content) if "sha256" in manifest else content)


def save_old(root: Path, state: dict[str, torch.Tensor]) -> Path:
    """Save a checkpoint in the format that equimoe 0.1 wrote on one process."""
    path = root / "step-00000001"
    path.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(dict(state), storage_writer=FileSystemWriter(path), no_dist=True)
    files: dict[str, dict[str, Any]] = {name: {} for name in (".metadata", "__0_0.distcp")}
    tensors = {name: [str(value.dtype), list(value.shape)] for name, value in state.items()}
    manifest = {"schema": 1, "step": 1, "position": {}, "tensors": tensors, "files": files}
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    forge(path)
    return path


def load_all(path: Path) -> dict[str, torch.Tensor]:
    """Load every tensor of a checkpoint, whole, in one process."""
    manifest = checkpoint.read_manifest(path)
    state = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in checkpoint.contents(path, manifest).items()}
    checkpoint.load(path, state, manifest)
    return state


@contextlib.contextmanager
def nothing_happens(folder: Path) -> Iterator[None]:
    """Assert that the block unpickles, starts, writes and deletes nothing, in ``folder`` or elsewhere."""
    if not _watches:
        _watches.append([])
        sys.addaudithook(_watch)  # audit hooks cannot be removed
    before = _snapshot(folder)
    _watches.append([])
    try:
        yield
    finally:
        seen = _watches.pop()
    assert seen == []
    assert _snapshot(folder) == before


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if len(_watches) < 2:
        return
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if event in _ACTIONS or writes:
        _watches[-1].append(f"{event} {arguments}")


def _snapshot(folder: Path) -> dict[str, tuple[Any, ...]]:
    return {
        str(path): (path.lstat().st_mode, path.lstat().st_mtime_ns, path.lstat().st_size)
        for path in sorted(folder.rglob("*"))
    }
