"""A folder with tokenised documents, which every rank and every restart reads instead of the text.

    manifest.json   what was read, how, and the sizes and digests of the files
    0.ids           ids of the first domain: documents in the order of their digests, an end-of-document id after each
    0.documents     for each document: where it starts, its length, and the digest of its contents
    0.mask          for domains with instruction data: one byte for each id, 1 if it is trained on
    splits.json     fingerprints of the corpus for the held-out fractions that were asked for

Flat token files are not copied: the manifest says where they are.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ...observe.printable import printable
from .runs import Part, Run, merged
from .split import Shelf
from .token_file import DataError, TokenFile
from .tokenizer import Tokenizer, id_dtype

FORMAT, VERSION = "equimoe tokens", 1
MANIFEST, SPLITS = "manifest.json", "splits.json"
DOCUMENTS = np.dtype([("start", "<u8"), ("length", "<u8"), ("digest", "S32")])
#: bytes that are read or written at a time
BLOCK = 1 << 22


@dataclass(frozen=True)
class Flat:
    """A flat token file that a domain has."""

    domain: str
    #: relative to data.path
    name: str
    path: str
    tokens: TokenFile

    @property
    def digest(self) -> bytes:
        """What the order of the files of a domain depends on."""
        return hashlib.sha256(self.name.encode(errors="surrogateescape")).digest()


@dataclass(frozen=True)
class Library:
    """The tokens of a corpus by domain, before it is split."""

    shelves: dict[str, Shelf]
    #: remarks about what was read
    notes: tuple[str, ...]
    #: the folder that holds them; None: they are in memory
    folder: Path | None = None


# ---- in memory


def in_memory(runs: Sequence[Run], flat: Sequence[Flat], notes: Sequence[str], tokenizer: Tokenizer) -> Library:
    """Return the documents of ``runs`` and the flat files as a library."""
    parts: dict[str, list[Part]] = {}
    copies = 0
    for part in merged(runs):
        if part is None:
            copies += 1
        else:
            parts.setdefault(part.domain, []).append(part)
    shelves, end = {}, np.array([tokenizer.end_of_document], id_dtype(tokenizer.vocab_size))
    for domain in sorted({*parts, *(file.domain for file in flat)}):
        of_domain = parts.pop(domain, [])
        ids = np.concatenate([end[:0], *(piece for part in of_domain for piece in (np.asarray(part.ids), end))])
        mask = None
        if any(part.mask is not None for part in of_domain):
            mask = np.concatenate([piece for part in of_domain for piece in (_mask_of(part), np.ones(1, np.uint8))])
        lengths = np.array([len(part.ids) for part in of_domain], np.int64)
        shelves[domain] = Shelf(ids, mask, lengths, _of(domain, flat))
    return Library(shelves, (*notes, *copied(copies)))


def _mask_of(part: Part) -> np.ndarray:
    return np.ones(len(part.ids), np.uint8) if part.mask is None else np.asarray(part.mask)


def _of(domain: str, flat: Sequence[Flat]) -> list[TokenFile]:
    return [file.tokens for file in sorted(flat, key=lambda file: file.digest) if file.domain == domain]


def copied(count: int) -> list[str]:
    """Say how many documents were copies of others."""
    return [f"documents skipped because they are copies of others: {count}"] if count else []


# ---- in files


class _Written:
    """A file that is written in pieces, with its size and digest."""

    def __init__(self, path: Path) -> None:
        self.name, self._file, self._digest, self.size = (
            path.name,
            path.open("wb", buffering=BLOCK),
            hashlib.sha256(),
            0,
        )

    def write(self, array: np.ndarray) -> None:
        raw = array.tobytes()
        self._file.write(raw)
        self._digest.update(raw)
        self.size += len(raw)

    def close(self) -> dict[str, Any]:
        """Return what the manifest says about the file."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"size": self.size, "sha256": self._digest.hexdigest()}


class _Domain:
    """The files of one domain while they are written."""

    def __init__(self, stem: Path, end: np.ndarray, masked: bool) -> None:
        self._ids, self._documents = _Written(stem.with_suffix(".ids")), _Written(stem.with_suffix(".documents"))
        self._mask = _Written(stem.with_suffix(".mask")) if masked else None
        self._end, self._at, self.count = end, 0, 0

    def add(self, part: Part) -> None:
        """Write a document."""
        entry = np.array([(self._at, len(part.ids), part.digest)], DOCUMENTS)
        self._documents.write(entry)
        step = BLOCK // self._end.itemsize
        for start in range(0, len(part.ids), step):
            self._ids.write(np.asarray(part.ids[start : start + step]))
        self._ids.write(self._end)
        if self._mask is not None:
            self._mask.write(_mask_of(part))
            self._mask.write(np.ones(1, np.uint8))
        self._at += len(part.ids) + 1
        self.count += 1

    def close(self) -> dict[str, Any]:
        """Return what the manifest says about the domain."""
        files = [self._ids, self._documents, *([] if self._mask is None else [self._mask])]
        return {
            "documents": self.count,
            "tokens": self._at - self.count,
            "files": {file.name: file.close() for file in files},
        }


def write(
    folder: Path,
    runs: Sequence[Run],
    flat: Sequence[Flat],
    about: dict[str, Any],
    notes: Sequence[str],
    tokenizer: Tokenizer,
    progress: Any = None,
) -> None:
    """Write a complete store into ``folder``, which exists; the manifest comes last."""
    names = sorted({name for run in runs for name in run.domains} | {file.domain for file in flat})
    masked = {run.domains[i] for run in runs for i in np.unique(run.index["domain"][run.index["masked"] == 1])}
    end = np.array([tokenizer.end_of_document], id_dtype(tokenizer.vocab_size))
    domains = {name: _Domain(folder / str(i), end, name in masked) for i, name in enumerate(names)}
    copies = 0
    for part in merged(runs):
        if part is None:
            copies += 1
        else:
            domains[part.domain].add(part)
        if progress is not None:
            progress.update(1)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        **about,
        "dtype": end.dtype.name,
        "notes": [*notes, *copied(copies)],
        "domains": {name: domain.close() | {"flat": _described(name, flat)} for name, domain in domains.items()},
    }
    write_json(folder / MANIFEST, manifest)


def write_json(path: Path, content: Any) -> None:
    """Write a file of JSON, as a whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with unfinished.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)


def _described(domain: str, flat: Iterable[Flat]) -> list[dict[str, Any]]:
    found = []
    for file in sorted(flat, key=lambda file: file.digest):
        if file.domain == domain:
            seen = os.stat(file.path)
            stamp = {"size": seen.st_size, "mtime_ns": seen.st_mtime_ns}
            layout = {"dtype": file.tokens.dtype.str, "offset": file.tokens.offset, "length": len(file.tokens)}
            found.append({"name": file.name, "path": os.path.abspath(file.path)} | stamp | layout)
    return found


def manifest_of(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a store; None if the folder is none. Raises ValueError for one that cannot be read."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        return None
    if found.get("version") != VERSION:
        raise ValueError(
            f"data.path={str(folder)!r}: is a store of version {found.get('version')!r}, and this code reads version "
            f"{VERSION}; delete it and tokenise again"
        )
    return found


def read(folder: Path, tokenizer: Tokenizer) -> Library:
    """Open a store. Raises ValueError if a file is missing or has another size, or for another tokenizer."""
    manifest = manifest_of(folder)
    if manifest is None:
        raise ValueError(f"data.path={str(folder)!r}: is no store of tokens; tokenise again")
    if manifest["tokenizer"]["identity"] != tokenizer.identity:
        name = printable(str(manifest["tokenizer"]["name"]))
        raise ValueError(
            f"data.path={str(folder)!r}: was tokenised with {name}, as it was then; give data.tokenizer={name}, and "
            "data.end_of_document if it was set, or tokenise again"
        )
    shelves = {}
    for number, (name, about) in enumerate(manifest["domains"].items()):
        _check_sizes(folder, about)
        stem, limit = folder / str(number), tokenizer.vocab_size
        documents = np.fromfile(stem.with_suffix(".documents"), DOCUMENTS)
        count = about["tokens"] + about["documents"]
        ids = TokenFile(str(stem.with_suffix(".ids")), np.dtype(manifest["dtype"]), 0, count).below(limit)
        mask_path = stem.with_suffix(".mask")
        masked = mask_path.name in about["files"]
        mask = TokenFile(str(mask_path), np.dtype(np.uint8), 0, count).below(2) if masked else None
        lengths = documents["length"].astype(np.int64)
        shelves[name] = Shelf(ids, mask, lengths, [_open_flat(file, limit) for file in about["flat"]])
    return Library(shelves, tuple(manifest["notes"]), folder)


def _open_flat(file: dict[str, Any], limit: int) -> TokenFile:
    path = file["path"]
    try:
        seen = os.stat(path)
        same = (seen.st_size, seen.st_mtime_ns) == (file["size"], file["mtime_ns"])
        if same:
            return TokenFile(path, np.dtype(file["dtype"]), file["offset"], file["length"]).below(limit)
    except OSError as error:
        raise DataError(f"data.path={path!r}: cannot be read ({error.strerror or error}); put it back") from None
    raise DataError(f"data.path={path!r}: has changed since the store was made; tokenise again")


def _check_sizes(folder: Path, about: dict[str, Any]) -> None:
    for name, file in about["files"].items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            why = f"cannot be read ({error.strerror or error})"
        else:
            if size == file["size"]:
                continue
            why = f"has {size} bytes instead of {file['size']}"
        raise DataError(f"data.path={str(folder / name)!r}: {why}; delete the folder and tokenise again")


def check(folder: Path) -> dict[str, Any]:
    """Compare every file of a store with its digest, and return the manifest. Raises ValueError for a difference."""
    manifest = manifest_of(folder)
    if manifest is None:
        raise ValueError(f"{folder}: is no complete store of tokens; tokenise again")
    for about in manifest["domains"].values():
        _check_sizes(folder, about)
        for name, file in about["files"].items():
            digest = hashlib.sha256()
            with (folder / name).open("rb") as opened:
                _update(digest, opened)
            if digest.hexdigest() != file["sha256"]:
                raise DataError(f"data.path={str(folder / name)!r}: is damaged; delete the folder and tokenise again")
        for file in about["flat"]:
            _open_flat(file, 1 << 62)
    return manifest


def _update(digest: Any, file: IO[bytes]) -> None:
    while block := file.read(BLOCK):
        digest.update(block)


# ---- fingerprints of splits


def known_fingerprint(folder: Path, name: str) -> str | None:
    """Return the fingerprint that :func:`keep_fingerprint` kept under a name."""
    try:
        found = json.loads((folder / SPLITS).read_text(encoding="utf-8"))[name]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, str) else None


def keep_fingerprint(folder: Path, name: str, fingerprint: str) -> None:
    """Keep a fingerprint, if the folder can be written."""
    try:
        found = json.loads((folder / SPLITS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = {}
    with suppress(OSError):
        write_json(folder / SPLITS, found | {name: fingerprint})
