"""Tokenised documents in runs: sorted by digest, in memory or in files, and merged into one order.

The order of digests depends on nothing but the documents, so it is the same whatever process tokenised which of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from .document import Document
from .stream import Tokens
from .token_file import TokenFile
from .tokenizer import Tokenizer, id_dtype

#: one document of a run. ``order`` is its place in reading order, ``domain`` an index into the run's domains
INDEX = np.dtype(
    [("digest", "S32"), ("order", "<u8"), ("start", "<u8"), ("length", "<u8"), ("domain", "<u4"), ("masked", "u1")]
)
#: documents whose index is sorted at a time
SORTED = 1 << 20
#: files of runs that are open at a time
OPEN = 200


@dataclass
class Part:
    """A tokenised document."""

    domain: str
    digest: bytes
    ids: Tokens
    #: uint8, 1 for each id that is trained on; None: all are
    mask: Tokens | None = None


def tokenised(document: Document, tokenizer: Tokenizer) -> Part:
    """Return the ids of a document, the digest of its contents, and its loss mask."""
    if document.ids is not None:
        ids = document.ids[: len(document.ids) - _ends(document.ids, tokenizer.end_of_document)]
        raw = ids.astype("<u4").tobytes()
        return Part(document.domain, hashlib.sha256(b"ids" + raw).digest(), ids.astype(id_dtype(tokenizer.vocab_size)))
    if document.text is not None:
        raw = document.text.encode("utf-8", errors="replace")
        return Part(document.domain, hashlib.sha256(raw).digest(), tokenizer.encode(document.text))
    content = json.dumps(document.messages if document.pieces is None else document.pieces).encode()
    pieces = document.pieces
    if pieces is None:
        assert document.messages is not None
        pieces = tokenizer.conversation(document.messages, document.name)
    ids, mask = tokenizer.encode_pieces(pieces)
    cut = len(ids) - _ends(ids, tokenizer.end_of_document)
    return Part(document.domain, hashlib.sha256(b"pieces" + content).digest(), ids[:cut], mask[:cut])


def _ends(ids: np.ndarray, end: int) -> int:
    """Return the number of end-of-document ids at the end of a document; the store adds its own."""
    others = np.flatnonzero(ids != end)
    return len(ids) - (int(others[-1]) + 1 if len(others) else 0)


class Run:
    """Documents in the order of their digests, and where their ids are."""

    def __init__(self, index: np.ndarray, domains: Sequence[str], ids: Tokens, mask: Tokens | None) -> None:
        self.index, self.domains, self._ids, self._mask = index, list(domains), ids, mask

    def part(self, row: np.void) -> Part:
        """Return the document of a row of the index."""
        start, stop = int(row["start"]), int(row["start"] + row["length"])
        mask = None if self._mask is None or not row["masked"] else self._mask[start:stop]
        return Part(self.domains[row["domain"]], bytes(row["digest"]).ljust(32, b"\0"), self._ids[start:stop], mask)


def sorted_run(parts: Sequence[Part], first: int, vocab_size: int) -> Run:
    """Return the run of documents that are numbered from ``first`` in reading order."""
    domains = sorted({part.domain for part in parts})
    index = np.zeros(len(parts), INDEX)
    index["digest"] = [part.digest for part in parts]
    index["order"] = np.arange(first, first + len(parts))
    index["length"] = [len(part.ids) for part in parts]
    index["domain"] = [domains.index(part.domain) for part in parts]
    index["masked"] = [part.mask is not None for part in parts]
    order = np.lexsort((index["order"], index["digest"]))
    index = index[order]
    index["start"] = np.cumsum(index["length"]) - index["length"]
    parts = [parts[i] for i in order]
    dtype = id_dtype(vocab_size)
    ids = np.concatenate([np.empty(0, dtype), *(np.asarray(part.ids) for part in parts)])
    mask = None
    if index["masked"].any():
        masks = [np.ones(len(p.ids), np.uint8) if p.mask is None else np.asarray(p.mask) for p in parts]
        mask = np.concatenate([np.empty(0, np.uint8), *masks])
    return Run(index, domains, ids, mask)


def write_run(run: Run, stem: Path) -> None:
    """Write a run to files that begin with ``stem``; the last one makes it complete."""
    np.asarray(run._ids).tofile(stem.with_suffix(".ids"))
    if run._mask is not None:
        np.asarray(run._mask).tofile(stem.with_suffix(".mask"))
    run.index.tofile(stem.with_suffix(".index"))
    sizes = {suffix: _size(stem.with_suffix(f".{suffix}")) for suffix in ("ids", "mask", "index")}
    unfinished = stem.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({"domains": run.domains, "sizes": sizes}))
    unfinished.rename(stem.with_suffix(".json"))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


class Files:
    """Opens files of ids, and keeps some of them open."""

    def __init__(self) -> None:
        self.open = lru_cache(maxsize=OPEN)(self._open)

    @staticmethod
    def _open(path: Path, dtype: np.dtype) -> TokenFile:
        return TokenFile(str(path), dtype, 0, path.stat().st_size // dtype.itemsize)


def read_run(stem: Path, vocab_size: int, files: Files) -> Run | None:
    """Return the run that :func:`write_run` wrote; None if it is not complete."""
    try:
        about = json.loads(stem.with_suffix(".json").read_text())
        if any(_size(stem.with_suffix(f".{suffix}")) != size for suffix, size in about["sizes"].items()):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    index = np.memmap(stem.with_suffix(".index"), INDEX, "r") if about["sizes"]["index"] else np.empty(0, INDEX)
    return _FileRun(index, about["domains"], stem, vocab_size, files, bool(about["sizes"]["mask"]))


class _FileRun(Run):
    """A run in files, which are opened when a document is read."""

    def __init__(
        self, index: np.ndarray, domains: Sequence[str], stem: Path, vocab_size: int, files: Files, masked: bool
    ) -> None:
        super().__init__(index, domains, np.empty(0), None)
        self._stem, self._dtype, self._files, self._masked = stem, id_dtype(vocab_size), files, masked

    def part(self, row: np.void) -> Part:
        ids = self._files.open(self._stem.with_suffix(".ids"), self._dtype)
        mask = self._files.open(self._stem.with_suffix(".mask"), np.dtype(np.uint8)) if self._masked else None
        return Run(self.index, self.domains, ids, mask).part(row)


def merged(runs: Sequence[Run]) -> Iterator[Part | None]:
    """Yield the documents of all runs in the order of their digests; None for a copy of the one before.

    Of several copies, the first in reading order is kept.
    """
    documents = sum(len(run.index) for run in runs)
    edges = np.linspace(0, 256, min(max(documents // SORTED, 1), 256) + 1).astype(int)
    cuts = [
        np.r_[0, np.searchsorted(run.index["digest"], [bytes([edge]) for edge in edges[1:-1]]), len(run.index)]
        for run in runs
    ]
    for place in range(len(edges) - 1):
        pieces = [run.index[cut[place] : cut[place + 1]] for run, cut in zip(runs, cuts, strict=True)]
        index = np.concatenate([np.empty(0, INDEX), *pieces])
        source = np.repeat(np.arange(len(runs)), [len(piece) for piece in pieces])
        order = np.lexsort((index["order"], index["digest"]))
        index, source = index[order], source[order]
        copy = np.r_[False, index["digest"][1:] == index["digest"][:-1]][: len(index)]
        for row, run, again in zip(index, source, copy, strict=True):
            yield None if again else runs[int(run)].part(row)
