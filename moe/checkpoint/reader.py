"""Reads the files of a checkpoint: tensors.json describes the tensors, and safetensors files hold their values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .manifest import REMEDY, TENSORS, CheckpointError, printable, read_json, reason, short
from .tensors import DTYPE_OF_NAME, DTYPES, Chunk, Saved

MAX_TENSORS_BYTES = 1 << 30


def contents(path: Path, manifest: dict[str, Any]) -> dict[str, Saved]:
    """Return the description of all tensors, after checking that the files hold exactly their chunks."""
    if TENSORS not in manifest["files"]:
        raise CheckpointError(f"{path / TENSORS}: missing from the manifest; {REMEDY}")
    file, name = path / TENSORS, ""
    try:
        found = {}
        for name, entry in read_json(file, MAX_TENSORS_BYTES).items():
            found[name] = _saved(name, entry)
            found[name].check()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        where = f"{short(name)}: " if name else ""
        raise CheckpointError(f"{file}: refused: {where}{reason(error)}") from None
    by_file: dict[str, dict[str, tuple[str, list[int]]]] = {part: {} for part in manifest["files"] if part != TENSORS}
    for name, saved in found.items():
        for chunk in saved.chunks:
            if chunk.file not in by_file:
                raise CheckpointError(f"{file}: refused: {short(name)}: {short(chunk.file)} is not in the manifest")
            by_file[chunk.file][str(chunk.place)] = (DTYPES[saved.dtype], list(chunk.sizes))
    for part, expected in by_file.items():
        _check_header(path / part, expected)
    return found


def to_json(tensors: dict[str, Saved]) -> dict[str, Any]:
    """Return the value of tensors.json, which :func:`contents` reads."""
    return {
        name: {
            "dtype": str(saved.dtype).removeprefix("torch."),
            "shape": saved.shape,
            "chunks": [[chunk.file, chunk.offsets, chunk.sizes] for chunk in saved.chunks],
        }
        for name, saved in tensors.items()
    }


def key_of(name: str, offsets: tuple[int, ...], whole: bool) -> str:
    """Return the key of a chunk in its safetensors file. The key of a whole tensor is its name."""
    return name if whole else f"{name}@{','.join(map(str, offsets))}"


@contextmanager
def opened(file: Path) -> Iterator[Callable[[Chunk, tuple[slice, ...]], Tensor]]:
    """See :data:`equimoe.moe.checkpoint.tensors.Opened`."""
    with safe_open(file, framework="pt", device="cpu") as content:

        def read(chunk: Chunk, box: tuple[slice, ...]) -> Tensor:
            tensor: Tensor = content.get_slice(chunk.place)[box] if box else content.get_tensor(chunk.place)
            return tensor

        yield read


def _saved(name: str, entry: Any) -> Saved:
    shape = tuple(entry["shape"])
    chunks = []
    for file, offsets, sizes in entry["chunks"]:
        if type(file) is not str:
            raise ValueError(f"a chunk has file={short(file)}, which is not text")
        key = key_of(name, tuple(offsets), tuple(sizes) == shape)
        chunks.append(Chunk(tuple(offsets), tuple(sizes), file, key))
    if entry["dtype"] not in DTYPE_OF_NAME:
        raise ValueError(f"dtype={short(entry['dtype'])} is not one that a checkpoint holds")
    return Saved(DTYPE_OF_NAME[entry["dtype"]], shape, tuple(chunks))


def listed(file: Path, called: Path | None = None, remedy: str = REMEDY) -> dict[str, tuple[str, list[int]]]:
    """Return the dtype, by its name in safetensors files, and the shape of each tensor of a safetensors file.

    ``called`` is the name that it has in errors, if it is another.
    """
    try:
        with safe_open(file, framework="pt", device="cpu") as content:
            parts = {key: content.get_slice(key) for key in content.keys()}  # noqa: SIM118
            return {key: (part.get_dtype(), list(part.get_shape())) for key, part in parts.items()}
    except (OSError, SafetensorError) as error:
        why = reason(error) if isinstance(error, OSError) else f"is damaged or incomplete ({printable(str(error))})"
        raise CheckpointError(f"{called or file}: refused: {why}; {remedy}") from None


def _check_header(file: Path, expected: dict[str, tuple[str, list[int]]]) -> None:
    """Check that the header of a safetensors file agrees with tensors.json."""
    found = listed(file)
    if found.keys() != expected.keys():
        odd = min(found.keys() ^ expected.keys())
        raise CheckpointError(f"{file}: refused: {short(odd)} is in this file or in {TENSORS}, not in both")
    for key, (dtype, sizes) in expected.items():
        if found[key] != (dtype, sizes):
            raise CheckpointError(f"{file}: refused: {short(key)} is not {dtype} of {sizes}")
