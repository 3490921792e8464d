"""The manifest of a checkpoint: a JSON file with the run's position, and the size and sha256 of every file.

The manifest contains its own sha256, computed with 64 zeros in its place.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import reprlib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

#: the schema that we write: safetensors files, described by tensors.json
SCHEMA = 3
#: the same without a checksum of the manifest, as equimoe wrote it before
UNSEALED_SCHEMA = 2
#: an older schema that we still read: torch's distributed format, see :mod:`equimoe.moe.checkpoint.legacy`
LEGACY_SCHEMA = 1
MANIFEST = "manifest.json"
TENSORS = "tensors.json"
METADATA = ".metadata"
#: appended to errors about damage
REMEDY = "restore it or delete this checkpoint"

#: name of a checkpoint's folder
FOLDER = re.compile(r"step-(\d{8})", re.ASCII)
_SHARDS = re.compile(r"tensors\.json|rank\d{5,}-\d{3,}\.safetensors", re.ASCII)
_FILES = {
    SCHEMA: _SHARDS,
    UNSEALED_SCHEMA: _SHARDS,
    LEGACY_SCHEMA: re.compile(r"\.metadata|__\d+_\d+\.distcp", re.ASCII),
}
_FIELDS = {
    SCHEMA: {"schema", "step", "position", "files", "sha256"},
    UNSEALED_SCHEMA: {"schema", "step", "position", "files"},
    LEGACY_SCHEMA: {"schema", "step", "position", "files", "tensors"},
}
_DESCRIPTION = {SCHEMA: TENSORS, UNSEALED_SCHEMA: TENSORS, LEGACY_SCHEMA: METADATA}
_SEAL = re.compile(rb'"sha256": "([0-9a-f]{64})"\n\}\Z')
_ZEROS = b"0" * 64
_MAX_BYTES = 64 << 20
_MAX_STEP = 99_999_999  # folder names have eight digits


class CheckpointError(ValueError):
    """Raised for a checkpoint that is missing or damaged, or does not fit the run."""


def encode(step: int, position: dict[str, Any], files: dict[str, dict[str, Any]]) -> bytes:
    """Return the content of a manifest. ``files`` maps names to ``{"bytes": size, "sha256": digest}``."""
    fields = {"schema": SCHEMA, "step": step, "position": position, "files": files, "sha256": _ZEROS.decode()}
    return seal(json.dumps(fields, indent=1, allow_nan=False).encode())


def seal(content: bytes) -> bytes:
    """Write the checksum into a manifest whose last field is ``sha256``."""
    found = _SEAL.search(content)
    assert found is not None, "the manifest has no place for its checksum"
    blank = content[: found.start(1)] + _ZEROS + content[found.end(1) :]
    return content[: found.start(1)] + hashlib.sha256(blank).hexdigest().encode() + content[found.end(1) :]


def parse_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of the checkpoint in folder ``path``, and check all that it says except the files' contents.

    Returns its fields; ``digest`` is the sha256 of the manifest as it is.
    """
    file = path / MANIFEST
    if not path.is_dir() and os.path.lexists(path):
        raise CheckpointError(f"{path}: is not a folder, and so not a checkpoint; delete it")
    try:
        content = read_plain(file, _MAX_BYTES)
        manifest = parse_json(content)
        schema, step, position = manifest["schema"], manifest["step"], dict(manifest["position"])
        entries = {
            str(name): {"bytes": entry["bytes"], "sha256": entry["sha256"]}
            for name, entry in dict(manifest["files"]).items()
        }
        if type(step) is not int or not 0 <= step <= _MAX_STEP:
            raise ValueError("step")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: not a readable manifest ({reason(error)}); {REMEDY}") from None
    if type(schema) is not int or schema not in _FILES:
        known = " and ".join(map(str, sorted(_FILES)))
        raise CheckpointError(
            f"{file}: schema={short(schema)}: this version reads {known}; use the version that wrote it"
        )
    sealed = schema != SCHEMA or (_SEAL.search(content) is not None and seal(content) == content)
    if manifest.keys() != _FIELDS[schema] or not sealed:
        raise CheckpointError(f"{file}: sha256 differs from the one that it contains, the file is damaged; {REMEDY}")
    folder = FOLDER.fullmatch(path.resolve().name)
    if folder and int(folder[1]) != step:
        raise CheckpointError(f"{file}: is of step {step}, unlike its folder; rename the folder or delete it")
    _check_listing(path, schema, entries.keys())
    fields = {"schema": schema, "step": step, "position": position, "files": entries}
    return fields | {"digest": hashlib.sha256(content).hexdigest()}


def _check_listing(path: Path, schema: int, listed: Collection[str]) -> None:
    """Check that the folder contains the ``listed`` files, and no other file of a checkpoint."""
    pattern, description = _FILES[schema], _DESCRIPTION[schema]
    try:
        for name in listed:
            if not pattern.fullmatch(name) or not is_plain(path / name):
                raise CheckpointError(f"{path}: {short(name)}: missing, or not a plain file of a checkpoint; {REMEDY}")
        unlisted = sorted(name for name in os.listdir(path) if pattern.fullmatch(name) and name not in listed)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from None
    if unlisted or description not in listed:
        raise CheckpointError(f"{path / min(unlisted, default=description)}: missing from the manifest; {REMEDY}")


def damage(path: Path, manifest: dict[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Check the size and sha256 of the files ``names``; return what is wrong with each damaged one."""
    found = {}
    for name in names:
        file, entry = path / name, manifest["files"][name]
        try:
            size = file.stat().st_size
            if size != entry["bytes"]:
                found[name] = f"{file}: {size} instead of {short(entry['bytes'])} bytes; {REMEDY}"
            elif sha256(file) != entry["sha256"]:
                found[name] = f"{file}: sha256 differs from the manifest's, the file is damaged; {REMEDY}"
        except OSError as error:
            found[name] = f"{file}: cannot be read ({error.strerror}); {REMEDY}"
    return found


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of the checkpoint in folder ``path``, and check the size and sha256 of every file."""
    manifest = parse_manifest(path)
    for text in damage(path, manifest, manifest["files"]).values():
        raise CheckpointError(text)
    return manifest


def read_json(file: Path, max_bytes: int) -> Any:
    """Parse strict JSON from a plain file: duplicate keys, NaN and infinity are errors.

    Raises OSError, ValueError or RecursionError.
    """
    return parse_json(read_plain(file, max_bytes))


def parse_json(content: bytes) -> Any:
    """Parse strict JSON, see :func:`read_json`."""
    return json.loads(content, object_pairs_hook=_unique, parse_constant=_refuse)


def read_plain(file: Path, max_bytes: int) -> bytes:
    """Return the content of a plain file. Raises OSError or ValueError."""
    if not is_plain(file):
        raise ValueError("missing, or not a plain file")
    if file.stat().st_size > max_bytes:
        raise ValueError(f"larger than {max_bytes} bytes")
    return file.read_bytes()


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
