"""Rewrites checkpoints in one process: the same state in other files, and the model's weights for other programs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .agreement import choose
from .files import new_folder, remove, write_blocks, write_durably
from .manifest import MANIFEST, CheckpointError, read_manifest, reason
from .reader import key_of
from .store import candidates, commit, contents, opener
from .tensors import Chunk, Opened, Saved

#: prefix of the names of weights, among those of moments and other state
WEIGHTS = "model."
INDEX = "model.safetensors.index.json"
#: folders that mean a checkpoint, in errors
WHAT = "a checkpoint or of a run"
#: bytes that are in memory at a time, if a row of a tensor is not larger
BLOCK_BYTES = 4 << 20


def find(folder: Path, what: str = WHAT) -> list[Path]:
    """List the checkpoints that ``folder`` means: itself, or those of a run, oldest first.

    Raises CheckpointError if there is none; ``what`` says which folders the caller takes.
    """
    if not (found := held(folder)):
        raise CheckpointError(f"{folder}: no checkpoint; give the folder of {what}")
    return found


def held(folder: Path) -> list[Path]:
    """List the checkpoints like :func:`find`; there may be none."""
    if (folder / MANIFEST).exists() or (folder / MANIFEST).is_symlink():
        return [folder]
    return candidates(folder) or candidates(folder / "checkpoints")


def newest_valid(folder: Path, what: str = WHAT) -> tuple[Path, dict[str, Any]]:
    """Return the checkpoint that ``folder`` means, verified, and its manifest: itself, or a run's newest valid one.

    For ``what`` see :func:`find`.
    """
    first = find(folder, what)[0]
    if first == folder:
        return folder, read_manifest(folder)
    choice = choose(first.parent)
    assert choice is not None, "there is a candidate"
    return choice.path, choice.manifest


def reshard(source: Path, manifest: dict[str, Any], out: Path, files: int) -> Path:
    """Write the state of a checkpoint as a new one in folder ``out``, in ``files`` files of about equal size.

    Each tensor is split along its first dimension. No process group is needed. Returns the new checkpoint's path.
    Raises ValueError if there are not so many parts.
    """
    saved = contents(source, manifest)
    with Reader(source, saved, opener(manifest)) as reader:
        return rewrite(reader, saved, out, manifest["step"], manifest["position"], files, str(source))


def rewrite(
    source: Source, wanted: dict[str, Saved], out: Path, step: int, position: dict[str, Any], files: int, what: str
) -> Path:
    """Write tensors as a new checkpoint in folder ``out``, in ``files`` files; see :func:`reshard`.

    ``wanted`` gives the dtype and shape of each of the source's tensors, and ``what`` names their source in errors.
    Holds only a block of a tensor in memory.
    """
    most = max([len(wanted), *(entry.shape[0] for entry in wanted.values() if entry.shape)])
    if files > most:
        raise ValueError(f"--files={files}: the tensors of {what} can be split into at most {most} files")
    final = out / f"step-{step:08d}"
    if final.exists():
        raise ValueError(f"--out={out}: already contains {final.name}; choose another folder")
    partial, new = final.with_name(f"{final.name}.tmp"), not out.exists()
    remove(partial)
    partial.mkdir(parents=True)
    try:
        names = [f"rank{number:05d}-000.safetensors" for number in range(files)]
        boxes: dict[str, dict[str, tuple[str, Chunk]]] = {name: {} for name in names}
        tensors = {}
        for index, (name, entry) in enumerate(wanted.items()):
            chunks = list(_divided(name, entry, names, index))
            tensors[name] = Saved(entry.dtype, entry.shape, tuple(chunks))
            for chunk in chunks:
                boxes[chunk.file][str(chunk.place)] = (name, chunk)
        written = {}
        for file, of_file in boxes.items():
            if of_file:
                entries = {key: (wanted[name].dtype, c.sizes) for key, (name, c) in of_file.items()}
                written[file] = write_blocks(partial / file, entries, _blocks_of(source, wanted, of_file))
        commit(partial, final, step, position, tensors, written)
    except BaseException:
        remove(out if new else partial)
        raise
    return final


def _blocks_of(
    source: Source, wanted: dict[str, Saved], boxes: dict[str, tuple[str, Chunk]]
) -> Callable[[str], Iterator[Tensor]]:
    """Return a function that yields the values of a box, whose key it gets, in the wanted dtype."""

    def blocks(key: str) -> Iterator[Tensor]:
        name, chunk = boxes[key]
        for block in source.blocks(name, chunk.offsets, chunk.sizes):
            yield block.to(wanted[name].dtype)

    return blocks


def export(source: Path, manifest: dict[str, Any], out: Path, file_bytes: int) -> list[Path]:
    """Write the model's weights to the new folder ``out``, as safetensors files of at most ``file_bytes`` each.

    Names are those of the model's parameters. A JSON index names the file of each weight. A larger weight gets its own
    file. Returns the files.
    """
    saved = contents(source, manifest)
    weights = {name.removeprefix(WEIGHTS): name for name in saved if name.startswith(WEIGHTS)}
    groups: list[list[str]] = [[]]
    size = 0
    for name, full in weights.items():
        nbytes = bytes_of(saved[full])
        if groups[-1] and size + nbytes > file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    with new_folder(out) as partial:
        places: dict[str, str] = {}
        with Reader(source, saved, opener(manifest)) as reader:
            for number, names in enumerate(groups, 1):
                file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
                entries = {name: (saved[weights[name]].dtype, saved[weights[name]].shape) for name in names}
                write_blocks(partial / file, entries, lambda name: reader.blocks(weights[name]))
                places |= dict.fromkeys(names, file)
        total = sum(bytes_of(saved[full]) for full in weights.values())
        index = {"metadata": {"total_size": total, "step": manifest["step"]}, "weight_map": places}
        write_durably(partial / INDEX, [json.dumps(index, indent=1).encode()])
    return sorted(out.iterdir())


class Source(Protocol):
    """Gives the values of tensors, by boxes."""

    def blocks(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Iterator[Tensor]:
        """Yield a box of a tensor, in blocks that follow each other in memory."""


class Reader:
    """Reads any box of any tensor of a checkpoint. A context manager, which keeps files open."""

    def __init__(self, path: Path, saved: dict[str, Saved], opened: Opened) -> None:
        self._path, self.saved = path, saved
        self._opened, self._open = opened, ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_error: object) -> None:
        self._open.close()

    def blocks(
        self, name: str, offsets: tuple[int, ...] | None = None, sizes: tuple[int, ...] | None = None
    ) -> Iterator[Tensor]:
        """Yield a box of a tensor, by default all of it, in blocks that follow each other in memory."""
        saved = self.saved[name]
        offsets, sizes = (
            (0,) * len(saved.shape) if offsets is None else offsets,
            saved.shape if sizes is None else sizes,
        )
        for at, count in pieces(offsets, sizes, saved.dtype.itemsize):
            yield self.box(name, at, count)

    def box(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """Return a box of a tensor."""
        saved = self.saved[name]
        found = torch.empty(sizes, dtype=saved.dtype)
        for chunk in saved.chunks:
            first = tuple(map(max, offsets, chunk.offsets))
            last = tuple(
                min(o + n, c + m) for o, n, c, m in zip(offsets, sizes, chunk.offsets, chunk.sizes, strict=True)
            )
            if all(begin < end for begin, end in zip(first, last, strict=True)):
                into = tuple(slice(b - o, e - o) for b, e, o in zip(first, last, offsets, strict=True))
                within = tuple(slice(b - c, e - c) for b, e, c in zip(first, last, chunk.offsets, strict=True))
                found[into] = self._read(chunk, within)
        return found

    def _read(self, chunk: Chunk, box: tuple[slice, ...]) -> Tensor:
        if chunk.file not in self._files:
            file = self._path / chunk.file
            try:
                self._files[chunk.file] = self._open.enter_context(self._opened(file))
            except OSError as error:
                why = f"cannot be opened ({reason(error)}); if a run has deleted it meanwhile, try again"
                raise CheckpointError(f"{file}: {why}") from None
        value: Tensor = self._files[chunk.file](chunk, box)
        return value


def pieces(
    offsets: tuple[int, ...], sizes: tuple[int, ...], itemsize: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield the offsets and sizes of pieces of a box: consecutive in memory, and small if a row is not larger."""
    if not sizes:
        yield offsets, sizes
        return
    dim = next((dim for dim, size in enumerate(sizes) if size > 1), 0)
    each = max(1, BLOCK_BYTES // max(1, math.prod(sizes[dim + 1 :]) * itemsize))
    for first in range(0, sizes[dim], each):
        at, count = list(offsets), list(sizes)
        at[dim], count[dim] = offsets[dim] + first, min(each, sizes[dim] - first)
        yield tuple(at), tuple(count)


def _divided(name: str, saved: Saved, files: list[str], index: int) -> Iterator[Chunk]:
    """Split a tensor along its first dimension over ``files``; a shorter one goes whole to one file after another."""
    count = len(files) if saved.shape and saved.shape[0] >= len(files) else 1
    if not math.prod(saved.shape):
        return
    first, rest = 0, saved.shape[1:]
    for part in range(count):
        offsets, sizes = (0,) * len(saved.shape), saved.shape
        if count > 1:
            last = saved.shape[0] * (part + 1) // count
            offsets, sizes, first = (first, *offsets[1:]), (last - first, *rest), last
        file = files[part] if count > 1 else files[index % len(files)]
        yield Chunk(offsets, sizes, file, key_of(name, offsets, sizes == saved.shape))


def bytes_of(saved: Saved) -> int:
    return math.prod(saved.shape) * saved.dtype.itemsize
