"""Completes, lists and loads checkpoints. A checkpoint is complete or absent.

A checkpoint is a folder ``step-00000100`` with safetensors files, with ``tensors.json``, which describes the tensors,
and with ``manifest.json``, which holds the run's position, the size and sha256 of every file, and its own sha256. The
folder is written under a temporary name, flushed to disk, checked, and renamed. So a folder with the final name is
complete, however the run ended. Reading first checks every byte against the manifest, and never runs code from the
files: see ``SECURITY.md``.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from . import legacy, reader
from .files import remove, sync, write_durably
from .logical import State, logical
from .manifest import FOLDER, LEGACY_SCHEMA, MANIFEST, TENSORS, CheckpointError, encode, printable
from .ranks import gather
from .reshard import fill
from .state import MOMENTS
from .tensors import Opened, Saved

#: how long rank 0 waits until it sees the files of all ranks; network file systems may take seconds
_VISIBLE_S = 10.0


def commit(
    partial: Path,
    final: Path,
    step: int,
    position: dict[str, Any],
    tensors: dict[str, Saved],
    files: dict[str, dict[str, Any]],
) -> None:
    """Turn the folder ``partial`` into the checkpoint ``final``. ``files`` gives the size and sha256 of each file.

    Raises OSError if a file is not there with its size.
    """
    text = json.dumps(reader.to_json(tensors), separators=(",", ":")).encode()
    if len(text) > reader.MAX_TENSORS_BYTES:
        raise ValueError(f"{TENSORS}: {len(text)} bytes are too many to load; shard over fewer ranks")
    files = files | {TENSORS: write_durably(partial / TENSORS, [text])}
    _wait_for(partial, {name: entry["bytes"] for name, entry in files.items()})
    write_durably(partial / MANIFEST, [encode(step, position, files)])
    remove(final)  # a step is saved twice only when the first one was found damaged
    partial.rename(final)
    sync(final.parent)


def _wait_for(folder: Path, sizes: dict[str, int]) -> None:
    """Wait until all files are there with their sizes."""
    until = time.monotonic() + _VISIBLE_S
    while True:
        there = {entry.name: entry.stat(follow_symlinks=False).st_size for entry in os.scandir(folder)}
        lacking = [name for name, size in sizes.items() if there.get(name) != size]
        if not lacking:
            return
        if time.monotonic() > until:
            written, seen = sizes[lacking[0]], there.get(lacking[0], 0)
            what = f"of {lacking[0]}, {written} bytes were written, but rank 0 sees {seen}"
            raise OSError(f"{what}; all ranks must share this folder")
        time.sleep(0.05)


def newest(root: Path) -> Path:
    """Return the complete checkpoint of the latest step. It may be damaged; :func:`choose` finds the newest valid."""
    found = complete(root)
    if not found:
        raise CheckpointError(f"{root}: no complete checkpoint; start without --resume, or give the run's own folder")
    return found[-1]


def complete(root: Path) -> list[Path]:
    """List the folders of complete checkpoints by name, oldest first. Their content is checked when one is read."""
    return [path for path in candidates(root) if path.is_dir()]


def candidates(root: Path) -> list[Path]:
    """List all entries of a folder that have the name of a checkpoint, sorted by step.

    Raises CheckpointError if there is such a folder, but it cannot be read.
    """
    try:
        names = os.listdir(root)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{root}: cannot be read ({error.strerror}); choose another --run-dir") from None
    return [root / name for name in sorted(names) if FOLDER.fullmatch(name)]


def contents(path: Path, manifest: dict[str, Any]) -> dict[str, Saved]:
    """Return the dtype, shape and chunks of every tensor of a checkpoint; ``manifest`` is from ``read_manifest``."""
    return _format(manifest).contents(path, manifest)


def load(path: Path, state: State, manifest: dict[str, Any]) -> None:
    """Fill the tensors of ``state`` in place. Every rank must call this.

    The names, dtypes and shapes of all ranks together must equal the checkpoint's. Generators, moments and the
    placement of experts may differ: what is not saved keeps its value in ``state``, and saved moments of weights that
    this run does not train are skipped.
    """
    saved: dict[str, Saved] = {}
    refusal = None
    try:
        saved = contents(path, manifest)
    except CheckpointError as error:
        refusal = str(error)
    parts_of = {name: logical(name, value) for name, value in state.items()}
    want = _of_all_ranks(parts_of, refusal)
    have = {name: [str(entry.dtype), list(entry.shape)] for name, entry in saved.items()}
    for name in sorted(want.keys() | have.keys()):
        ours, theirs = want.get(name), have.get(name)
        if ours != theirs and not _may_lack(name, want, have):
            what = f"{printable(name)}: this run wants {ours}, the checkpoint has {theirs}"
            raise CheckpointError(f"{path}: {what}; resume with the config that saved it")
    fill(path, {name: value for name, value in parts_of.items() if name in saved}, saved, opener(manifest))


#: tensors of routers that weights of a linear router lack
_ADDED = tuple(f"router.{n}" for n in ("bias_E", "noise_weight", "residual_weight", "task_weight", "task_embedding"))


def load_weights(path: Path, weights: State, saved: dict[str, Saved], opened: Opened) -> None:
    """Fill ``weights`` in place, in their own dtype, from the tensors ``saved`` in folder ``path``.

    Every rank must call this, and reads only its own parts. The names and shapes of all ranks together must be those of
    ``saved``; an expert bias, and what some routers have beyond a linear one, is left alone if it is not saved.
    """
    parts_of = {name: logical(name, value) for name, value in weights.items()}
    want = {name: shape for name, (_, shape) in _of_all_ranks(parts_of).items()}
    have = {name: list(entry.shape) for name, entry in saved.items()}
    for name in sorted(want.keys() | have.keys()):
        ours, theirs = want.get(name), have.get(name)
        if ours != theirs and not (theirs is None and name.endswith(_ADDED)):
            raise CheckpointError(f"{path}: {printable(name)}: this run wants shape {ours}, the file has {theirs}")
    fill(path, {name: value for name, value in parts_of.items() if name in saved}, saved, opened)


def _of_all_ranks(parts_of: dict[str, Any], refusal: str | None = None) -> dict[str, Any]:
    """Return [dtype, shape] of the tensors of all ranks; raise CheckpointError if a rank has a ``refusal``."""
    own = {name: [str(value.dtype), list(value.shape)] for name, value in parts_of.items()}
    parts = gather((own, refusal))  # pipeline stages have different names
    if refusals := [refusal for _, refusal in parts if refusal]:
        raise CheckpointError(refusals[0])
    return {name: entry for part, _ in parts for name, entry in part.items()}


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
    return kind in ("generator", "placement")


def opener(manifest: dict[str, Any]) -> Opened:
    """Return the function that opens the files of a checkpoint."""
    opened: Opened = _format(manifest).opened
    return opened


def _format(manifest: dict[str, Any]) -> Any:
    return legacy if manifest["schema"] == LEGACY_SCHEMA else reader
