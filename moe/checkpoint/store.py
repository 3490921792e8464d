"""Saves, lists and loads checkpoints. A checkpoint is complete or absent.

A checkpoint is a folder ``step-00000100`` with safetensors files, with ``tensors.json``, which describes the tensors,
and with ``manifest.json``, which holds the run's position, and the size and sha256 of every file. The folder is written
under a temporary name, flushed to disk, and renamed. So a folder with the final name is complete, however the run
ended. Reading first checks every byte against the manifest, and never runs code from the files: see ``SECURITY.md``.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from . import legacy, reader
from .manifest import LEGACY_SCHEMA, MANIFEST, SCHEMA, CheckpointError, printable, sha256
from .reshard import distributed, fill, sync, write
from .state import MOMENTS
from .tensors import DTYPES, Saved

_NAME = re.compile(r"step-(\d{8})", re.ASCII)


def save(root: Path, step: int, state: dict[str, Tensor], position: dict[str, Any], keep_last: int) -> Path:
    """Write ``state`` (logical name -> tensor or DTensor) and ``position`` (JSON) as ``root/step-...``.

    Every rank must call this. Keeps the newest ``keep_last`` complete checkpoints, and deletes older ones.
    """
    for name, value in state.items():
        if value.dtype not in DTYPES:
            raise ValueError(f"{name}: a checkpoint cannot hold {value.dtype}; convert it first")
    final = root / f"step-{step:08d}"
    partial = root / f"{final.name}.tmp"
    if _rank() == 0:
        _remove(partial)
        partial.mkdir(parents=True)
    _barrier()
    tensors = write(partial, state)
    if _rank() == 0:
        text = json.dumps(reader.to_json(tensors), separators=(",", ":")).encode()
        if len(text) > reader.MAX_TENSORS_BYTES:
            raise ValueError(f"{reader.TENSORS}: {len(text)} bytes are too many to load; shard over fewer ranks")
        _write_durably(partial / reader.TENSORS, text)
    files = {name: entry for part in _gather(_digest_own(partial)) for name, entry in part.items()}
    if _rank() == 0:
        manifest = {"schema": SCHEMA, "step": step, "position": position, "files": files}
        _write_durably(partial / MANIFEST, json.dumps(manifest, indent=1).encode())
        _remove(final)  # a step is saved twice only when the first one was found damaged
        partial.rename(final)
        sync(root)
        _retire(root, keep_last)
    _barrier()
    return final


def newest(root: Path) -> Path:
    """Return the complete checkpoint of the latest step."""
    found = complete(root)
    if not found:
        raise CheckpointError(f"{root}: no complete checkpoint; start without --resume, or give the run's own folder")
    return found[-1]


def complete(root: Path) -> list[Path]:
    """List the folders of complete checkpoints by name, oldest first. Their content is checked when one is read."""
    return sorted(path for path in root.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir())


def contents(path: Path, manifest: dict[str, Any]) -> dict[str, Saved]:
    """Return the dtype, shape and chunks of every tensor of a checkpoint; ``manifest`` is from ``read_manifest``."""
    return _format(manifest).contents(path, manifest)


def load(path: Path, state: dict[str, Tensor], manifest: dict[str, Any]) -> None:
    """Fill the tensors of ``state`` in place. Every rank must call this.

    The names, dtypes and shapes of all ranks together must equal the checkpoint's. Generators and moments may differ: a
    rank without a saved generator keeps its own, a weight without saved moments keeps those in ``state``, and saved
    moments of weights that this run does not train are skipped.
    """
    saved: dict[str, Saved] = {}
    refusal = None
    try:
        saved = contents(path, manifest)
    except CheckpointError as error:
        refusal = str(error)
    own = {name: [str(value.dtype), list(value.shape)] for name, value in state.items()}
    parts = _gather((own, refusal))  # pipeline stages have different names
    refusals = [refusal for _, refusal in parts if refusal]
    if refusals:
        raise CheckpointError(refusals[0])
    want = {name: entry for part, _ in parts for name, entry in part.items()}
    have = {name: [str(entry.dtype), list(entry.shape)] for name, entry in saved.items()}
    for name in sorted(want.keys() | have.keys()):
        ours, theirs = want.get(name), have.get(name)
        if ours != theirs and not _may_lack(name, want, have):
            what = f"{printable(name)}: this run wants {ours}, the checkpoint has {theirs}"
            raise CheckpointError(f"{path}: {what}; resume with the config that saved it")
    fill(path, {name: value for name, value in state.items() if name in saved}, saved, _format(manifest).opened)


def _may_lack(name: str, want: dict[str, Any], have: dict[str, Any]) -> bool:
    """Return whether a tensor may be missing from the run or from the checkpoint: see :func:`load`."""
    if name in want and name in have:
        return False
    kind, _, rest = name.partition(".")
    weight, _, key = rest.rpartition(".")
    if kind == "optimizer" and key in MOMENTS:
        lacking = have if name in want else want
        none = not any(f"optimizer.{weight}.{moment}" in lacking for moment in MOMENTS)
        return none and f"model.{weight}" in lacking
    return kind == "generator"


def _format(manifest: dict[str, Any]) -> Any:
    return legacy if manifest["schema"] == LEGACY_SCHEMA else reader


def _retire(root: Path, keep_last: int) -> None:
    for old in complete(root)[:-keep_last]:
        _remove(old)
    for abandoned in root.glob("step-*.tmp"):
        _remove(abandoned)


def _remove(folder: Path) -> None:
    """Delete a folder if it exists. If it is a symbolic link, delete only the link."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def _digest_own(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the size and sha256 of the files that this rank has written."""
    own = sorted(folder.glob(f"rank{_rank():05d}-*.safetensors"))
    own += [folder / reader.TENSORS] if _rank() == 0 else []
    return {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in own}


def _write_durably(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    sync(file)
    sync(file.parent)


def _rank() -> int:
    return dist.get_rank() if distributed() else 0


def _barrier() -> None:
    if distributed():
        dist.barrier()


def _gather(value: Any) -> list[Any]:
    if not distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
