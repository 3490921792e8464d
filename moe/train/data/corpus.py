"""The tokens of a run by domain, split into training and held-out tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...config import require
from ..config import DataConfig
from .builtin import Budget, builtin_documents
from .sources import CHUNK, Document, check_ids, file_documents
from .token_file import TokenFile
from .tokenizer import Tokenizer, id_dtype

#: ids in memory or in a file, shape ``(T,)``
Tokens = np.ndarray | TokenFile


@dataclass(frozen=True)
class Corpus:
    """One token stream per domain, with the end-of-document id between documents."""

    #: sorted names; a domain's number is its index here
    domains: tuple[str, ...]
    #: training ids of each domain, shape ``(T,)``, uint16 or uint32; keys in the order of ``domains``
    train: dict[str, Tokens]
    #: held-out ids of each domain, in the same form; may be empty for a domain with very few tokens
    heldout: dict[str, Tokens]
    #: sha256 over all of the above; equal if and only if the data are the same
    fingerprint: str
    vocab_size: int
    #: one-line remarks for the user about what was read
    notes: tuple[str, ...] = ()
    #: uint8, shape ``(T,)``, for domains with instruction data: 1 for an id that is trained on, as a label
    train_masks: Mapping[str, Tokens] = field(default_factory=dict)
    heldout_masks: Mapping[str, Tokens] = field(default_factory=dict)
    #: id that ends a document; None: unknown
    end_of_document: int | None = None


@dataclass(eq=False)
class _Part:
    """A tokenised document."""

    digest: bytes
    tokens: Tokens
    #: whether it comes from a flat token file, whose document boundaries are unknown
    flat: bool


def load_corpus(config: DataConfig, tokenizer: Tokenizer) -> Corpus:
    """Read and tokenise ``config.path``, or the text that comes with Python.

    Of each domain's tokens, ``config.heldout_fraction`` is held out, or up to 1.5 times that. Whole documents are held
    out first, in the order of a hash of their contents, as far as they fit. If they do not suffice, the rest is taken
    from the ends of the other documents, in proportion to their lengths. The split does not depend on the names or the
    order of documents. Each flat token file is split separately. Repeated documents are read once. A domain that
    consists of one flat token file stays in the file.

    Raises ``ValueError`` for a path without text, a file whose content does not match its name, ids outside the
    vocabulary, and text too short for one sequence.
    """
    notes: list[str] = []
    parts = _read(config, tokenizer, notes)
    remedy = "give UTF-8 text, .jsonl, or .bin, .tokens or .npy token files"
    require(bool(parts), "data.path", config.path, "; ".join(["no text found", *notes, remedy]))

    dtype = id_dtype(tokenizer.vocab_size)
    train: dict[str, Tokens] = {}
    heldout: dict[str, Tokens] = {}
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
    end = tokenizer.end_of_document
    return Corpus(tuple(train), train, heldout, fingerprint, tokenizer.vocab_size, tuple(notes), end_of_document=end)


def read_documents(config: DataConfig, tokenizer: Tokenizer) -> dict[str, list[Tokens]]:
    """Read and tokenise all documents of each domain; a flat token file is one. Raises ValueError as load_corpus."""
    notes: list[str] = []
    parts = _read(config, tokenizer, notes)
    require(bool(parts), "data.path", config.path, "; ".join(["no text found", *notes]))
    return {domain: [part.tokens for part in parts[domain]] for domain in sorted(parts)}


def _read(config: DataConfig, tokenizer: Tokenizer, notes: list[str]) -> dict[str, list[_Part]]:
    """Tokenise every document once and group the documents by domain."""
    parts: dict[str, list[_Part]] = {}
    seen: set[bytes] = set()
    twice = 0
    for document in _documents(config, notes):
        if document.tokens is not None:
            root = Path(config.path or "")
            path = root if root.is_file() else root / document.name
            check_ids(document.tokens, str(path), tokenizer.vocab_size, config.tokenizer)
            digest = hashlib.sha256(document.name.encode(errors="surrogateescape")).digest()
            part = _Part(digest, document.tokens.below(tokenizer.vocab_size), flat=True)
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
        notes.append(f"documents skipped because they are copies of others: {twice}")
    return parts


def _documents(config: DataConfig, notes: list[str]) -> Iterator[Document]:
    if config.path is None:
        return builtin_documents(Budget(config.builtin_bytes_per_domain))
    return file_documents(config, notes)


def _split(parts: list[_Part], fraction: float) -> tuple[list[Tokens], list[Tokens]]:
    """Return the training and held-out arrays of one domain. The order of ``parts`` does not matter."""
    parts = sorted(parts, key=lambda part: part.digest)
    texts, flat = [p.tokens for p in parts if not p.flat], [[p.tokens] for p in parts if p.flat]
    kept, held = [], []
    for arrays in (texts, *flat):
        for train, heldout in _divide(arrays, fraction):
            kept += [train] if len(train) else []
            held += [heldout] if len(heldout) else []
    return kept, held


def _divide(arrays: list[Any], fraction: float) -> Iterator[tuple[Tokens, Tokens]]:
    """Yield the training part and the held-out part of each array."""
    total = sum(map(len, arrays))
    # evaluation needs at least two tokens
    target = max(fraction * total, min(2, total // 2))
    # never hold out the longest document as a whole: it may be most of the domain
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
        # round the running sum instead of each part, so that the parts add up exactly
        tail = missing * (seen + len(array)) // others - missing * seen // others
        seen += len(array)
        yield array[: len(array) - tail], array[len(array) - tail :]


def _join(arrays: list[Tokens], separator: int, dtype: np.dtype) -> Tokens:
    """Join arrays into one stream with ``separator`` between them. A single unsigned array is not copied."""
    if len(arrays) == 1 and arrays[0].dtype in (np.uint16, np.uint32):
        return arrays[0]
    between = np.array([separator], dtype)
    pieces = [piece.astype(dtype, copy=False) for array in arrays if len(array) for piece in (between, array)]
    return np.concatenate(pieces[1:]) if pieces else np.empty(0, dtype)


def _fingerprint(train: dict[str, Tokens], heldout: dict[str, Tokens], tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256(f"{tokenizer.vocab_size} {tokenizer.end_of_document}".encode())
    for domain in train:
        for tokens in (train[domain], heldout[domain]):
            digest.update(f"\n{domain} {len(tokens)} {tokens.dtype.itemsize}\n".encode())
            for start in range(0, len(tokens), CHUNK):
                digest.update(np.ascontiguousarray(tokens[start : start + CHUNK]).data)
    return digest.hexdigest()
