"""Finds the data files of a path, and reads their documents in an order that depends only on names."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...config import require
from ...observe.metrics import METRICS_FILE
from ...observe.printable import printable
from ..config import DataConfig
from .document import Document
from .formats import COMPRESSED, READERS, TOKENS, UNITS, NotTextError, saved_dataset, suffix_of, text, unreadable
from .records import Place, Reader
from .token_file import TokenFile

KINDS = {
    ".py": "python", ".pyi": "python", ".md": "markdown", ".txt": "text", "": "text", ".c": "c", ".h": "c",
    ".cc": "cpp", ".cpp": "cpp", ".cxx": "cpp", ".hh": "cpp", ".hpp": "cpp", ".htm": "html", ".js": "javascript",
    ".mjs": "javascript", ".ts": "typescript", ".sh": "shell", ".bash": "shell", ".yml": "yaml", ".rs": "rust",
}  # fmt: skip
#: ids that are processed at a time
CHUNK = 1 << 24
#: bytes of files whose text is kept in memory, and how many times as long the text of a compressed file may be
SHORT, EXPANDED = 1 << 26, 8
COMPRESSED_KINDS = (*COMPRESSED, ".parquet")
#: files that are named in a remark, of all that it is about
NAMED = 3

#: kind of a file inside a data folder that is not data -> names that it has
NOT_DATA = {
    "of a tokenizer": r"tokenizer(_config)?\.json|tokenizer\.model|.*\.tiktoken|special_tokens_map\.json|"
    r"added_tokens\.json|vocab\.(json|txt|bpe)|merges\.txt|spiece\.model|chat_template\.(jinja|json)",
    "logs": r".*\.(log|out|err)(\.\d+)?|events\.out\.tfevents\..*",
    "JSON, whose records are read only if the file is named itself": r".*\.json(\.gz|\.zst)?",
    "checksums and locks": r".*\.(md5|sha\d+|lock|idx)|_SUCCESS|(md5|sha\d+)sums?(\.txt)?",
}
#: how remarks about them begin
LEFT_OUT = "left out, "
#: folders inside a data folder that are not data: what they are, and files that show it
RUN = ("runs", {METRICS_FILE, "config.yaml"})
STORE = ("stores of tokens", {"manifest.json", "0.ids"})
#: entries of a run folder before the run's first record
BEGUN = {"lock", "exit_code", "tokens", "checkpoints", "config.yaml", METRICS_FILE}
#: files of a folder that ``save_to_disk`` has written: of a dataset, and of several splits
DATASET, SPLITS = {"state.json", "dataset_info.json"}, "dataset_dict.json"


@dataclass
class Found:
    """The data below a path."""

    places: list[tuple[Place, Reader]]
    #: kind -> names of files and folders that are left out
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """Say what is left out."""
        return [f"{LEFT_OUT}{kind}: {named(names)}" for kind, names in self.left_out.items()]

    @property
    def short(self) -> bool:
        """Whether everything fits into memory easily."""
        return (
            sum(size * (EXPANDED if name.endswith(COMPRESSED_KINDS) else 1) for name, size, _ in self.sizes()) <= SHORT
        )

    def sizes(self) -> list[tuple[str, int, int]]:
        """Return name, size and time of modification of every file. Raises ValueError for one that is gone."""
        found = []
        for place, _ in self.places:
            files = [place.path, place.path.with_suffix(".idx")] if place.path.suffix == ".bin" else [place.path]
            for path in sorted(place.path.iterdir()) if place.path.is_dir() else files:
                if path.exists() or path == place.path:
                    try:
                        seen = path.stat()
                    except OSError as error:
                        raise unreadable(path, error) from None
                    found.append((f"{place.name}: {path.name}", seen.st_size, seen.st_mtime_ns))
        return found


def named(names: list[str]) -> str:
    """Return the first few of names, and the number of the others."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(printable, names[:NAMED])) + more


def by_hash(name: str) -> bytes:
    """Return a sort key that gives the same pseudo-random order on every machine."""
    return hashlib.sha256(name.encode("utf-8", errors="surrogateescape")).digest()


def find(config: DataConfig, cache: Path | None = None) -> Found:
    """Find the data of ``config.path``, in the order in which they are read; ``cache`` is none of them.

    Raises ValueError for a path that does not exist or has no files.
    """
    assert config.path is not None
    root = Path(config.path).expanduser()
    ids = root.with_name(f"{root.name.removesuffix('.idx')}.bin")  # Megatron's options have no suffix
    meant = (
        f"give {str(ids)!r}" if ids.is_file() else "give a file or folder, or none for the text that comes with Python"
    )
    require(os.path.exists(root), "data.path", config.path, f"does not exist or is not accessible; {meant}")
    if root.is_file():
        require(root.suffix.lower() != ".idx", "data.path", config.path, f"is an index of Megatron; {meant}")
        return Found([_place(root, root.name, config)])
    require(
        root.is_dir(), "data.path", config.path, "is neither a file nor a folder, such as a pipe; write it to a file"
    )
    files, left_out = _walk(root, None if cache is None else os.path.realpath(cache))
    remedy = "; ".join(["has no files (hidden ones are skipped)", *Found([], left_out).notes()])
    require(bool(files), "data.path", config.path, f"{remedy}; give a folder with text")
    files.sort(key=lambda item: by_hash(item[1]))
    return Found([_place(path, name, config) for path, name in files], left_out)


def documents(found: Found, notes: list[str]) -> Iterator[Document]:
    """Yield all documents, and append remarks about files that are no text to ``notes``.

    Raises ``ValueError`` for a file that cannot be read.
    """
    skipped = []
    for place, reader in found.places:
        try:
            yield from reader(place)
        except NotTextError as error:
            skipped.append(f"{place.name} ({error})")
    if skipped:
        count = f"{len(skipped)} of {len(found.places)}"
        notes.append(f"files left out because they are not UTF-8 text: {count}: {named(skipped)}")


def _place(path: Path, name: str, config: DataConfig) -> tuple[Place, Reader]:
    suffix = suffix_of(path)
    is_folder = path.is_dir()
    reader = saved_dataset if is_folder else READERS.get(suffix, text)
    domain = _domain(path, name, config, reader)
    return Place(path, name, config, domain, "row" if is_folder else UNITS.get(suffix, "line")), reader


def _domain(path: Path, name: str, config: DataConfig, reader: Reader) -> str:
    """Return the domain of a file according to ``config.domain_by``."""
    suffix = suffix_of(path)
    if config.domain_by == "field" and (reader is text or suffix in TOKENS):
        raise ValueError(
            f"data.domain_by='field': {str(path)!r} is not a .jsonl file and has no fields; use 'auto', 'folder' or "
            "'kind'"
        )
    top, _, below = name.partition("/")
    if below and config.domain_by != "kind":
        return top
    if reader is saved_dataset:
        return path.resolve().name or "root"
    if config.domain_by == "folder":
        return path.resolve().parent.name or "root"
    return "tokens" if suffix in TOKENS else KINDS.get(suffix, suffix[1:])


def _walk(root: Path, cache: str | None) -> tuple[list[tuple[Path, str]], dict[str, list[str]]]:
    """Return every data file below ``root`` with its name relative to ``root``, and what is left out, by kind."""
    files: list[tuple[Path, str]] = []
    left_out: dict[str, list[str]] = {}
    entered: set[str] = set()

    def fail(error: OSError) -> None:
        raise unreadable(str(error.filename), error)

    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=fail):
        here, real = Path(folder), os.path.realpath(folder)
        # a symbolic link to a parent folder would recurse forever
        if real in entered or real == cache:
            subfolders[:] = []
            continue
        entered.add(real)
        name = here.relative_to(root).as_posix()
        kind, is_dataset = _kind_of_folder(here, set(names), set(subfolders))
        if kind:
            damaged = "is a store of tokens whose manifest.json is damaged; tokenise again, with another --out"
            require(here != root or kind != STORE[0], "data.path", str(root), damaged)
            left_out.setdefault(kind, []).append(f"{root.name if here == root else name}/")
        if kind or is_dataset:
            files += [(here, root.name if here == root else name)] if is_dataset else []
            subfolders[:] = []
            continue
        subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
        if SPLITS in names:
            subfolders[:] = _splits(here, subfolders, left_out)
        for file in sorted(names):
            path = here / file
            # keep broken links, so that reading them raises an error; skip pipes and sockets
            if file.startswith(".") or not (path.is_file() or not path.exists()):
                continue
            kind = next((kind for kind, pattern in NOT_DATA.items() if re.fullmatch(pattern, file, re.I)), "")
            if not kind:
                files.append((path, path.relative_to(root).as_posix()))
            elif not (path.suffix == ".idx" and path.with_suffix(".bin").name in names) and file != SPLITS:
                left_out.setdefault(kind, []).append(path.relative_to(root).as_posix())
    return files, left_out


def _kind_of_folder(folder: Path, names: set[str], subfolders: set[str]) -> tuple[str, bool]:
    """Return what a folder is that is not data, and whether it is a saved dataset."""
    for kind, files in (RUN, STORE):
        if files <= names:
            return kind, False
    entries = names | subfolders
    if "lock" in names and entries <= BEGUN:
        return RUN[0], False
    return "", names >= DATASET


def _splits(folder: Path, subfolders: list[str], left_out: dict[str, list[str]]) -> list[str]:
    """Of the splits of a saved dataset, return the one for training."""
    try:
        splits = json.loads((folder / SPLITS).read_text())["splits"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        splits = subfolders
    if "train" not in splits:
        return subfolders
    others = [name for name in subfolders if name != "train"]
    if others:
        left_out.setdefault("splits that are not for training", []).extend(f"{folder.name}/{name}/" for name in others)
    return ["train"]


def check_ids(ids: np.ndarray | TokenFile, path: str, vocab_size: int, tokenizer: str, end: int) -> bool:
    """Return whether ``end`` is one of ``ids``. Raises ``ValueError`` for the first of them outside
    ``[0, vocab_size)``."""
    found = False
    for start in range(0, len(ids), CHUNK):
        chunk = np.asarray(ids[start : start + CHUNK])
        if chunk.max() < vocab_size and chunk.min() >= 0:
            found = found or bool((chunk == end).any())
            continue
        position = start + int(np.argmax((chunk >= vocab_size) | (chunk < 0)))
        what = f"id {int(ids[position])} at position {position}"
        if ids[position] < 0:
            raise ValueError(f"data.path={path!r}: {what} is negative; write ids of 0 or more")
        remedy = f"is outside the {vocab_size} ids of data.tokenizer={tokenizer!r}; give the tokenizer of this file"
        raise ValueError(f"data.path={path!r}: {what} {remedy}")
    return found
