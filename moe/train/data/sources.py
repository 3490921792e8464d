"""Reads documents from files and folders: text, .jsonl records and flat token files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...config import require
from ...observe.printable import printable
from ..config import DataConfig
from .token_file import TokenFile

JSONL = (".jsonl", ".ndjson")
TOKENS = (".bin", ".tokens", ".npy")
KINDS = {
    ".py": "python", ".pyi": "python", ".md": "markdown", ".txt": "text", "": "text", ".c": "c", ".h": "c",
    ".cc": "cpp", ".cpp": "cpp", ".cxx": "cpp", ".hh": "cpp", ".hpp": "cpp", ".htm": "html", ".js": "javascript",
    ".mjs": "javascript", ".ts": "typescript", ".sh": "shell", ".bash": "shell", ".yml": "yaml", ".rs": "rust",
}  # fmt: skip
#: ids that are processed at a time
CHUNK = 1 << 24


#: characters of a domain's name, after escaping
LONGEST_DOMAIN = 100


@dataclass
class Document:
    """One text, or one flat file of ids, with its domain, in whose name unprintable characters are escaped."""

    domain: str
    #: path relative to data.path, for messages
    name: str
    text: str | None = None
    #: ids of a flat token file, shape ``(T,)``
    tokens: TokenFile | None = None

    def __post_init__(self) -> None:
        name = printable(self.domain)
        if len(name) > LONGEST_DOMAIN:
            start = f"{name[:LONGEST_DOMAIN]}..."
            raise ValueError(
                f"data.path={self.name!r}: the domain's name {start!r} has more than {LONGEST_DOMAIN} characters; "
                "shorten it, or choose domains by data.domain_by='kind'"
            )
        self.domain = name


def by_hash(name: str) -> bytes:
    """Return a sort key that gives the same pseudo-random order on every machine."""
    return hashlib.sha256(name.encode("utf-8", errors="surrogateescape")).digest()


def file_documents(config: DataConfig, notes: list[str]) -> Iterator[Document]:
    """Yield all documents of ``config.path``, in an order that depends only on names.

    Appends remarks for the user to ``notes``. Raises ``ValueError`` for a path or a file that cannot be read.
    """
    assert config.path is not None
    root = Path(config.path)
    remedy = "does not exist or is not accessible; give a file or folder, or None for the text that comes with Python"
    require(os.path.exists(root), "data.path", config.path, remedy)
    files = [(root, root.name)] if root.is_file() else _walk(root)
    require(bool(files), "data.path", config.path, "has no files (hidden ones are skipped); give a folder with text")
    skipped = 0
    for path, name in sorted(files, key=lambda item: by_hash(item[1])):
        suffix = path.suffix.lower()
        if suffix in JSONL:
            yield from _jsonl(path, name, config)
            continue
        domain = _domain(path, name, config)
        if suffix in TOKENS:
            yield _token_file(path, name, domain, config)
            continue
        text = _text(path)
        if text is None:
            skipped += 1
        else:
            yield Document(domain, name, text)
    if skipped:
        notes.append(f"files skipped because they are not UTF-8 text: {skipped} of {len(files)}")


def _walk(root: Path) -> list[tuple[Path, str]]:
    """Return every non-hidden file below ``root``, with its name relative to ``root``."""
    files: list[tuple[Path, str]] = []
    entered: set[str] = set()

    def fail(error: OSError) -> None:
        raise _unreadable(str(error.filename), error)

    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=fail):
        # a symbolic link to a parent folder would recurse forever
        fresh = os.path.realpath(folder) not in entered
        entered.add(os.path.realpath(folder))
        subfolders[:] = sorted(s for s in subfolders if fresh and not s.startswith("."))
        for name in names if fresh else ():
            path = Path(folder, name)
            # keep broken links, so that reading them raises an error; skip pipes and sockets
            if not name.startswith(".") and (path.is_file() or not path.exists()):
                files.append((path, path.relative_to(root).as_posix()))
    return files


def _unreadable(path: Path | str, error: OSError) -> ValueError:
    reason = error.strerror or str(error)
    return ValueError(f"data.path={str(path)!r}: cannot be read ({reason}); make it readable or move it away")


def _domain(path: Path, name: str, config: DataConfig) -> str:
    """Return the domain of a file according to ``config.domain_by``."""
    require(
        config.domain_by != "field",
        "data.domain_by",
        "field",
        f"{str(path)!r} is not a .jsonl file and has no fields; use 'auto', 'folder' or 'kind'",
    )
    top, _, below = name.partition("/")
    if below and config.domain_by != "kind":
        return top
    if config.domain_by == "folder":
        return path.resolve().parent.name or "root"
    suffix = path.suffix.lower()
    return "tokens" if suffix in TOKENS else KINDS.get(suffix, suffix[1:])


def _text(path: Path) -> str | None:
    """Return the content of a text file, or None if it is binary."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None
    try:
        return None if b"\0" in raw else raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _jsonl(path: Path, name: str, config: DataConfig) -> Iterator[Document]:
    """Yield one document per line."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _record(line, path, name, number, config)
    except OSError as error:
        raise _unreadable(path, error) from None


def _record(line: bytes, path: Path, name: str, number: int, config: DataConfig) -> Document:
    where = f"{str(path)!r} line {number}"
    try:
        record: Any = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError covers JSONDecodeError and UnicodeDecodeError
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"data.path={where}: is not JSON ({reason}); write one JSON object per line") from None
    if not isinstance(record, dict):
        raise ValueError(f"data.path={where}: is a JSON {type(record).__name__}; write one JSON object per line")
    fields = ", ".join(map(repr, record)) or "none"
    text = record.get(config.text_field)
    if not isinstance(text, str):
        problem = f"is a {type(text).__name__}, not a string" if config.text_field in record else "is missing"
        message = f"{problem} in {where}; name the field that holds the text, one of: {fields}"
        raise ValueError(f"data.text_field={config.text_field!r}: {message}")
    label = record.get(config.domain_field)
    labelled = isinstance(label, (str, int)) and label != ""
    if config.domain_by == "field" and not labelled:
        message = f"has no text or number in {where}; name the field that holds the domain, one of: {fields}"
        raise ValueError(f"data.domain_field={config.domain_field!r}: {message}")
    domain = str(label) if labelled and config.domain_by in ("auto", "field") else _domain(path, name, config)
    return Document(domain, f"{name}:{number}", text)


def _token_file(path: Path, name: str, domain: str, config: DataConfig) -> Document:
    """Open a flat token file: little-endian ids without a header, or a one-dimensional integer ``.npy``."""
    try:
        ids = _npy(path) if path.suffix.lower() == ".npy" else _flat(path, config)
    except OSError as error:
        raise _unreadable(path, error) from None
    return Document(domain, name, tokens=ids)


def _flat(path: Path, config: DataConfig) -> TokenFile:
    dtype = np.dtype(config.token_dtype).newbyteorder("<")
    size = path.stat().st_size
    remedy = f"its size, {size}, is not a multiple of that of {config.token_dtype}; set data.token_dtype to the file's"
    require(size % dtype.itemsize == 0, "data.path", str(path), remedy)
    return TokenFile(str(path), dtype, 0, size // dtype.itemsize)


def _npy(path: Path) -> TokenFile:
    try:
        ids: Any = np.load(path, mmap_mode="r", allow_pickle=False)  # only for the header
    except (ValueError, EOFError, OverflowError, MemoryError, SyntaxError, RecursionError) as error:
        message = f"is not a plain .npy array ({' '.join(str(error).split())}); save it with np.save"
        raise ValueError(f"data.path={str(path)!r}: {message}") from None
    ok = ids.ndim == 1 and ids.dtype.kind in "iu"
    remedy = f"holds {ids.dtype} of shape {ids.shape}; save a one-dimensional integer array"
    require(ok, "data.path", str(path), remedy)
    return TokenFile(str(path), ids.dtype, ids.offset, len(ids))


def check_ids(ids: np.ndarray | TokenFile, path: str, vocab_size: int, tokenizer: str) -> None:
    """Raise ``ValueError`` that names the first of ``ids`` outside ``[0, vocab_size)``."""
    for start in range(0, len(ids), CHUNK):
        chunk = np.asarray(ids[start : start + CHUNK])
        if chunk.max() < vocab_size and chunk.min() >= 0:
            continue
        position = start + int(np.argmax((chunk >= vocab_size) | (chunk < 0)))
        what = f"id {int(ids[position])} at position {position}"
        if ids[position] < 0:
            raise ValueError(f"data.path={path!r}: {what} is negative; write ids of 0 or more")
        remedy = f"is outside the {vocab_size} ids of data.tokenizer={tokenizer!r}; give the tokenizer of this file"
        raise ValueError(f"data.path={path!r}: {what} {remedy}")
