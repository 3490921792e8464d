"""The manifest of a checkpoint: a JSON file with the run's position, and the size and sha256 of every file."""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from pathlib import Path
from typing import Any

#: the schema that we write: safetensors files, described by tensors.json
SCHEMA = 2
#: an older schema that we still read: torch's distributed format, see :mod:`equimoe.moe.checkpoint.legacy`
LEGACY_SCHEMA = 1
MANIFEST = "manifest.json"
#: appended to errors about damage
REMEDY = "delete this checkpoint to resume from the one before"

_FILES = {
    SCHEMA: re.compile(r"tensors\.json|rank\d{5,}-\d{3,}\.safetensors", re.ASCII),
    LEGACY_SCHEMA: re.compile(r"\.metadata|__\d+_\d+\.distcp", re.ASCII),
}
_MAX_BYTES = 64 << 20
_MAX_STEP = 99_999_999  # folder names have eight digits


class CheckpointError(ValueError):
    """Raised for a checkpoint that is missing or damaged, or does not fit the run."""


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of the checkpoint in folder ``path``, and check the size and sha256 of every file."""
    file = path / MANIFEST
    try:
        manifest = read_json(file, _MAX_BYTES)
        schema, step, position = manifest["schema"], manifest["step"], dict(manifest["position"])
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in dict(manifest["files"]).items()}
        if type(step) is not int or not 0 <= step <= _MAX_STEP:
            raise ValueError("step")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: not a readable manifest ({type(error).__name__}); {REMEDY}") from None
    if type(schema) is not int or schema not in _FILES:
        known = " and ".join(map(str, sorted(_FILES)))
        raise CheckpointError(
            f"{file}: schema={short(schema)}: this version reads {known}; use the version that wrote it"
        )
    for name, (size, digest) in files.items():
        part = path / name
        if not _FILES[schema].fullmatch(name) or not is_plain(part):
            raise CheckpointError(f"{path}: {short(name)}: missing, or not a plain file of a checkpoint; {REMEDY}")
        if part.stat().st_size != size:
            raise CheckpointError(f"{part}: {part.stat().st_size} instead of {short(size)} bytes; {REMEDY}")
        if sha256(part) != digest:
            raise CheckpointError(f"{part}: sha256 differs from the manifest's, the file is damaged; {REMEDY}")
    return {"schema": schema, "step": step, "position": position, "files": manifest["files"]}


def read_json(file: Path, max_bytes: int) -> Any:
    """Parse strict JSON from a plain file: duplicate keys, NaN and infinity are errors.

    Raises OSError, ValueError or RecursionError.
    """
    if not is_plain(file):
        raise ValueError("missing, or not a plain file")
    if file.stat().st_size > max_bytes:
        raise ValueError(f"larger than {max_bytes} bytes")
    return json.loads(file.read_bytes(), object_pairs_hook=_unique, parse_constant=_refuse)


def is_plain(file: Path) -> bool:
    """Return whether ``file`` is a regular file: not a link, pipe, device or folder."""
    return not file.is_symlink() and file.is_file()


def sha256(file: Path) -> str:
    """Return the hexadecimal sha256 of a file's content."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


#: formats a few levels and items only: a crafted file can nest values so deeply that formatting all never ends
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80


def short(value: Any) -> str:
    """Format an untrusted ``value`` for a one-line error, in at most 80 characters."""
    try:
        text = _REPR.repr(list(value) if isinstance(value, tuple) else value)
    except ValueError:  # an integer with thousands of digits
        text = "(unprintable)"
    return text if len(text) <= 80 else text[:77] + "..."


def reason(error: Exception) -> str:
    """Say in one line why reading failed."""
    return printable(str(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__} {error}")


def printable(text: str) -> str:
    """Replace unprintable characters, including line breaks, by "?", and keep at most 300 characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:300]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate keys")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
