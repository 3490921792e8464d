"""Checkpoints that are whole or absent.

A checkpoint is a folder ``step-00000100`` of torch DCP shards with ``manifest.json``, which holds the size and
sha256 of every file and the run's position. It is written under another name, flushed, and renamed: a folder
with that name is complete, however the run ended. Reading checks every byte first, and unpickles nothing that
is not on :data:`ALLOWED`: a checkpoint is data, not code.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

SCHEMA = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8})")
_FILE = re.compile(r"\.metadata|__\d+_\d+\.distcp")
_MAX_MANIFEST_BYTES = 64 << 20

#: all that the metadata of a checkpoint may name
ALLOWED = (
    {
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            *("Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties"),
            *("StorageMeta", "_MEM_FORMAT_ENCODING"),
        )
    }
    | {
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        ("pathlib", "PosixPath"),
        ("pathlib", "PurePosixPath"),
        ("pathlib._local", "PosixPath"),
        ("collections", "OrderedDict"),
    }
    | {("torch", str(dtype).removeprefix("torch.")) for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
)


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another run."""


def save(root: Path, step: int, state: dict[str, Tensor], position: dict[str, Any], keep_last: int) -> Path:
    """Write ``state`` (logical name -> tensor or DTensor) and the JSON-able ``position`` as ``root/step-...``.

    Every rank calls it. Of the complete checkpoints, the newest ``keep_last`` stay.
    """
    final = root / f"step-{step:08d}"
    partial = root / f"{final.name}.tmp"
    if _rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _barrier()
    with _one_process_is_fine():
        dcp.save(state, storage_writer=FileSystemWriter(partial, sync_files=True), no_dist=not _distributed())
    tensors = {name: [str(value.dtype), list(value.shape)] for name, value in state.items()}
    parts = _gather((_digest_own(partial), tensors))
    if _rank() == 0:
        manifest = {
            "schema": SCHEMA,
            "step": step,
            "position": position,
            "tensors": {name: entry for _, part in parts for name, entry in part.items()},
            "files": {name: entry for part, _ in parts for name, entry in part.items()},
        }
        _write_durably(partial / MANIFEST, json.dumps(manifest, indent=1).encode())
        if final.exists():  # a step is saved twice only when the first one was found damaged
            shutil.rmtree(final)
        partial.rename(final)
        _sync_folder(root)
        _retire(root, keep_last)
    _barrier()
    return final


def newest(root: Path) -> Path:
    """The complete checkpoint of the latest step."""
    found = complete(root)
    if not found:
        raise CheckpointError(f"{root}: no complete checkpoint; start without --resume, or give the run's own folder")
    return found[-1]


def complete(root: Path) -> list[Path]:
    """Folders with a complete checkpoint's name, oldest first. Bytes are checked when one is read."""
    return sorted(path for path in root.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir())


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, after every file has been found to be what it says."""
    file = path / MANIFEST
    try:
        if file.stat().st_size > _MAX_MANIFEST_BYTES:
            raise ValueError("too large")
        manifest = json.loads(file.read_bytes())
        files, schema = dict(manifest["files"]), manifest["schema"]
        known = [(str(name), int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()]
        position, tensors = dict(manifest["position"]), dict(manifest["tensors"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: not a readable manifest ({type(error).__name__}); {_REMEDY}") from None
    if schema != SCHEMA:
        raise CheckpointError(f"{file}: schema={schema!r}: this version reads {SCHEMA}; use the version that wrote it")
    for name, size, digest in known:
        part = path / name
        if not _FILE.fullmatch(name) or part.is_symlink() or not part.is_file():
            raise CheckpointError(f"{part}: missing, or not a plain file of a checkpoint; {_REMEDY}")
        if part.stat().st_size != size:
            raise CheckpointError(f"{part}: {part.stat().st_size} bytes instead of {size}; {_REMEDY}")
        if _sha256(part) != digest:
            raise CheckpointError(f"{part}: sha256 differs from the manifest's, the file is damaged; {_REMEDY}")
    return {"step": manifest["step"], "position": position, "tensors": tensors, "files": files}


def load(path: Path, state: dict[str, Tensor], manifest: dict[str, Any]) -> None:
    """Fill ``state``'s tensors in place; all ranks' names, dtypes and shapes must be exactly the checkpoint's.

    (But for ``generator.*``: each rank has its own, and reads its own.) Every rank calls it.
    """
    own = {name: [str(value.dtype), list(value.shape)] for name, value in state.items()}
    want = {name: entry for part in _gather(own) for name, entry in part.items()}  # pipeline stages have different ones
    have = {name: entry for name, entry in manifest["tensors"].items() if name in want or name[:10] != "generator."}
    for name in sorted(want.keys() | have.keys()):
        ours, theirs = want.get(name), have.get(name)
        if ours != theirs:
            raise CheckpointError(f"{path}: {name}: this run wants {ours}, the checkpoint has {theirs}; same config?")
    reader = _SafeReader(path)
    reader.read_metadata()  # refused here in one line, before DCP makes a page of it
    try:
        with _one_process_is_fine():
            dcp.load(cast(dict[str, Any], state), storage_reader=reader, no_dist=not _distributed())
    except CheckpointException as error:
        causes = "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in error.failures.items())
        raise CheckpointError(f"{path}: refused: {causes[:300]}") from None


def training_state(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, generators: dict[str, Tensor]
) -> dict[str, Tensor]:
    """All tensors of a run under logical names that do not depend on the mesh. Makes the optimizer's state if new."""
    state: dict[str, Tensor] = {f"model.{name}": p.detach() for name, p in parameters.items()}
    for name, parameter in parameters.items():
        moments = optimizer.state[parameter]
        if not moments:
            moments["step"] = torch.zeros((), dtype=torch.float32)
            moments["exp_avg"] = torch.zeros_like(parameter, requires_grad=False)
            moments["exp_avg_sq"] = torch.zeros_like(parameter, requires_grad=False)
        state |= {f"optimizer.{name}.{key}": value for key, value in moments.items()}
    state |= {f"generator.{name}": value for name, value in generators.items()}
    return state


_REMEDY = "delete this checkpoint to resume from the one before"


class _SafeReader(FileSystemReader):
    """DCP's reader, whose metadata is unpickled by an allow-list and may hold tensors alone.

    (DCP reads tensors themselves with ``weights_only=True``; anything that is not a tensor it would unpickle freely.)
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        file = Path(self.path) / ".metadata"
        try:
            with file.open("rb") as stream:
                metadata = _AllowListed(stream).load()
            storage = metadata.storage_data
            tensors = metadata.state_dict_metadata
            ok = all(isinstance(entry, TensorStorageMetadata) for entry in tensors.values())
            ok = ok and all(_FILE.fullmatch(info.relative_path) for info in storage.values())
        except (pickle.UnpicklingError, OSError, EOFError, AttributeError, TypeError, ImportError) as error:
            raise CheckpointError(f"{file}: refused: {error}") from None
        if not ok:
            raise CheckpointError(f"{file}: refused: holds something that is not a tensor of this checkpoint")
        if metadata.storage_meta is None:
            raise CheckpointError(f"{file}: refused: no storage metadata")
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _AllowListed(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"the metadata names {module}.{name}, which no checkpoint of ours does")
        return super().find_class(module, name)


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    """DCP warns when there is no process group; a run of one process has none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _retire(root: Path, keep_last: int) -> None:
    for old in complete(root)[:-keep_last]:
        shutil.rmtree(old)
    for abandoned in root.glob("step-*.tmp"):
        shutil.rmtree(abandoned)


def _digest_own(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of the files that this rank has written."""
    own = sorted(folder.glob(f"__{_rank()}_*.distcp")) + ([folder / ".metadata"] if _rank() == 0 else [])
    return {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in own}


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write_durably(file: Path, content: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    _sync_folder(file.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _rank() -> int:
    return dist.get_rank() if _distributed() else 0


def _barrier() -> None:
    if _distributed():
        dist.barrier()


def _gather(value: Any) -> list[Any]:
    if not _distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
