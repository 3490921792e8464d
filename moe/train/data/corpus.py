"""The tokens of a run: by domain, and split into train and held-out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...config import require
from ..config import DataConfig
from .builtin import Budget, builtin_documents
from .sources import Document, check_ids, file_documents
from .tokenizer import Tokenizer, id_dtype


@dataclass(frozen=True)
class Corpus:
    """Token streams by domain; in each, the end-of-document id stands between two documents."""

    #: sorted; a domain's number is its place here
    domains: tuple[str, ...]
    #: ids to train on per domain, shape ``(T,)``, uint16 or uint32; keys in the order of ``domains``
    train: dict[str, np.ndarray]
    #: ids that are never trained on, likewise; may be empty for a domain of very few tokens
    heldout: dict[str, np.ndarray]
    #: sha256 over all of the above: equal exactly when the run sees the same data
    fingerprint: str
    vocab_size: int
    #: what a user should know about what was read, one line each
    notes: tuple[str, ...] = ()


@dataclass(eq=False)
class _Part:
    """A tokenised document."""

    digest: bytes
    tokens: np.ndarray
    #: a flat token file: no document borders are known in it
    flat: bool


def load_corpus(config: DataConfig, tokenizer: Tokenizer) -> Corpus:
    """Read and tokenise ``config.path``, or the text that comes with Python.

    ``config.heldout_fraction`` of each domain's tokens is held out, or up to half as much more: whole
    documents in the order of a hash of their contents, as far as they fit; if they do not suffice, the
    rest is cut off the ends of the other documents, in proportion to their lengths. Names and order do
    not matter. Each flat token file is cut by itself. A document that occurs twice is read once. A
    domain that is one flat token file stays memory-mapped.

    Raises ``ValueError`` for a path without text, a file that is not what its name says, ids
    beyond the vocabulary, and text too short for one sequence.
    """
    notes: list[str] = []
    parts = _read(config, tokenizer, notes)
    remedy = "give UTF-8 text, .jsonl, or .bin, .tokens or .npy token files"
    require(bool(parts), "data.path", config.path, "; ".join(["no text found", *notes, remedy]))

    dtype = id_dtype(tokenizer.vocab_size)
    train: dict[str, np.ndarray] = {}
    heldout: dict[str, np.ndarray] = {}
    for domain in sorted(parts):
        kept, held = _split(parts.pop(domain), config.heldout_fraction)
        train[domain] = _join(kept, tokenizer.end_of_document, dtype)
        heldout[domain] = _join(held, tokenizer.end_of_document, dtype)
        if len(heldout[domain]) < 2:
            notes.append(f"domain {domain!r} has too few tokens to hold any out and is not evaluated")
    longest = max(map(len, train.values()))
    message = f"no domain has the {config.seq_len + 1} training tokens of one sequence (the longest has {longest}); "
    remedy = message + f"give more text or lower data.seq_len={config.seq_len}"
    require(longest > config.seq_len, "data.path", config.path, remedy)
    short = [repr(domain) for domain, tokens in train.items() if len(tokens) <= config.seq_len]
    if short:
        notes.append(f"too short for one sequence and not trained on: {', '.join(short)}")
    fingerprint = _fingerprint(train, heldout, tokenizer)
    return Corpus(tuple(train), train, heldout, fingerprint, tokenizer.vocab_size, tuple(notes))


def _read(config: DataConfig, tokenizer: Tokenizer, notes: list[str]) -> dict[str, list[_Part]]:
    """Every document once, tokenised, by domain."""
    parts: dict[str, list[_Part]] = {}
    seen: set[bytes] = set()
    twice = 0
    for document in _documents(config, notes):
        if document.tokens is not None:
            root = Path(config.path or "")
            path = root if root.is_file() else root / document.name
            check_ids(document.tokens, str(path), tokenizer.vocab_size, config.tokenizer)
            part = _Part(hashlib.sha256(document.name.encode()).digest(), document.tokens, flat=True)
        else:
            text = document.text
            if not text:
                continue
            digest = hashlib.sha256(text.encode("utf-8", errors="replace")).digest()
            if digest in seen:
                twice += 1
                continue
            seen.add(digest)
            part = _Part(digest, tokenizer.encode(text), flat=False)
        if len(part.tokens):
            parts.setdefault(document.domain, []).append(part)
    if twice and config.path is not None:
        notes.append(f"{twice} documents are copies of others and were left out")
    return parts


def _documents(config: DataConfig, notes: list[str]) -> Iterator[Document]:
    if config.path is None:
        return builtin_documents(Budget(config.builtin_bytes_per_domain))
    return file_documents(config, notes)


def _split(parts: list[_Part], fraction: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Train and held-out token arrays of one domain; independent of the order of ``parts``."""
    parts = sorted(parts, key=lambda part: part.digest)
    texts, flat = [p.tokens for p in parts if not p.flat], [[p.tokens] for p in parts if p.flat]
    kept, held = [], []
    for arrays in (texts, *flat):
        for train, heldout in _divide(arrays, fraction):
            kept += [train] if len(train) else []
            held += [heldout] if len(heldout) else []
    return kept, held


def _divide(arrays: list[np.ndarray], fraction: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The part of each array to train on, and the part to hold out."""
    total = sum(map(len, arrays))
    # two tokens are the least that can be evaluated
    target = max(fraction * total, min(2, total // 2))
    # the longest is always trained on, so that one long document cannot empty the training side
    longest = max(range(len(arrays)), key=lambda i: len(arrays[i]), default=0)
    whole, taken = set(), 0
    for i, array in enumerate(arrays):
        if i != longest and taken < target and taken + len(array) <= 1.5 * target:
            whole.add(i)
            taken += len(array)
    missing, others, seen = max(int(target) - taken, 0), total - taken, 0
    for i, array in enumerate(arrays):
        if i in whole:
            yield array[:0], array
            continue
        # rounding the running sum, not each share, makes the sum of all shares exact
        share = missing * (seen + len(array)) // others - missing * seen // others
        seen += len(array)
        yield array[: len(array) - share], array[len(array) - share :]


def _join(arrays: list[np.ndarray], separator: int, dtype: np.dtype) -> np.ndarray:
    """One stream with ``separator`` between the arrays; a single unsigned array is not copied."""
    if len(arrays) == 1 and arrays[0].dtype in (np.uint16, np.uint32):
        return arrays[0]
    between = np.array([separator], dtype)
    pieces = [piece.astype(dtype, copy=False) for array in arrays if len(array) for piece in (between, array)]
    return np.concatenate(pieces[1:]) if pieces else np.empty(0, dtype)


def _fingerprint(train: dict[str, np.ndarray], heldout: dict[str, np.ndarray], tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256(f"{tokenizer.vocab_size} {tokenizer.end_of_document}".encode())
    for domain in train:
        for tokens in (train[domain], heldout[domain]):
            digest.update(f"\n{domain} {len(tokens)} {tokens.dtype.itemsize}\n".encode())
            digest.update(np.ascontiguousarray(tokens).data)
    return digest.hexdigest()
