"""The tokens of a run: by domain, and split into train and held-out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...config import require
from ..config import DataConfig
from .builtin import builtin_documents
from .sources import Budget, check_ids, file_documents
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

    Which documents are held out depends on a hash of their contents alone: in the order of the
    hash, until ``config.heldout_fraction`` of the domain's tokens is reached. A domain that is one
    document, and each flat token file, is cut in two by position instead. A document that occurs
    twice is read once. A domain that is one flat token file stays memory-mapped.

    Raises ``ValueError`` for a path without text, a file that is not what its name says, ids
    beyond the vocabulary, and text too short for one sequence.
    """
    choices = ("auto", "folder", "kind", "field")
    require(config.domain_by in choices, "data.domain_by", config.domain_by, f"use one of {', '.join(choices)}")
    dtypes = ("uint16", "uint32")
    require(config.token_dtype in dtypes, "data.token_dtype", config.token_dtype, f"use one of {', '.join(dtypes)}")
    cap = config.max_bytes_per_domain
    require(cap is None or cap >= 1, "data.max_bytes_per_domain", cap, "must be at least 1; None reads everything")
    budget = Budget(cap)
    parts = _read(config, tokenizer, budget)
    remedy = "give UTF-8 text, .jsonl, or .bin, .tokens or .npy token files"
    require(bool(parts), "data.path", config.path, "; ".join(["no text found", *budget.notes, remedy]))

    dtype = id_dtype(tokenizer.vocab_size)
    train: dict[str, np.ndarray] = {}
    heldout: dict[str, np.ndarray] = {}
    for domain in sorted(parts):
        kept, held = _split(parts.pop(domain), config.heldout_fraction)
        train[domain] = _join(kept, tokenizer.end_of_document, dtype)
        heldout[domain] = _join(held, tokenizer.end_of_document, dtype)
        if len(heldout[domain]) < 2:
            budget.notes.append(f"domain {domain!r} has too few tokens to hold any out and is not evaluated")
    longest = max(map(len, train.values()))
    message = f"no domain has the {config.seq_len + 1} training tokens of one sequence (the longest has {longest}); "
    remedy = message + f"give more text or lower data.seq_len={config.seq_len}"
    require(longest > config.seq_len, "data.path", config.path, remedy)
    short = [repr(domain) for domain, tokens in train.items() if len(tokens) <= config.seq_len]
    if short:
        budget.notes.append(f"too short for one sequence and not trained on: {', '.join(short)}")
    fingerprint = _fingerprint(train, heldout, tokenizer)
    return Corpus(tuple(train), train, heldout, fingerprint, tokenizer.vocab_size, tuple(budget.notes))


def _read(config: DataConfig, tokenizer: Tokenizer, budget: Budget) -> dict[str, list[_Part]]:
    """Every document once, tokenised, by domain."""
    parts: dict[str, list[_Part]] = {}
    seen: set[bytes] = set()
    twice = 0
    documents = builtin_documents(budget) if config.path is None else file_documents(config, budget)
    for document in documents:
        if document.tokens is not None:
            root = Path(config.path or "")
            path = root if root.is_file() else root / document.name
            check_ids(document.tokens, str(path), tokenizer.vocab_size, config.tokenizer)
            part = _Part(hashlib.sha256(document.name.encode()).digest(), document.tokens, flat=True)
        else:
            text = document.text or ""
            digest = hashlib.sha256(text.encode("utf-8", errors="replace")).digest()
            if digest in seen:
                twice += 1
                continue
            seen.add(digest)
            part = _Part(digest, tokenizer.encode(text), flat=False)
        if len(part.tokens):
            parts.setdefault(document.domain, []).append(part)
    if twice and config.path is not None:
        budget.notes.append(f"{twice} documents are copies of others and were left out")
    return parts


def _split(parts: list[_Part], fraction: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Train and held-out token arrays of one domain; independent of the order of ``parts``."""
    parts = sorted(parts, key=lambda part: part.digest)
    whole = [] if len(parts) == 1 else [part for part in parts if not part.flat]
    chosen = _choose(whole, fraction)
    kept = [part.tokens for part in whole if part not in chosen]
    held = [part.tokens for part in whole if part in chosen]
    by_position = [part for part in parts if part not in whole]
    for part in by_position:
        count = len(part.tokens)
        # two tokens are the least that can be evaluated
        cut = count - max(int(count * fraction), min(2, count // 2))
        kept.append(part.tokens[:cut])
        held.append(part.tokens[cut:])
    return kept, held


def _choose(parts: list[_Part], fraction: float) -> list[_Part]:
    """The documents to hold out: at least one of two, never all, and about ``fraction`` of the tokens."""
    if len(parts) < 2:
        return []
    target = fraction * sum(len(part.tokens) for part in parts)
    # the longest is always trained on, so that one long document cannot empty the training side
    longest = max(parts, key=lambda part: (len(part.tokens), part.digest))
    rest = [part for part in parts if part is not longest]
    chosen: list[_Part] = []
    taken = 0
    for part in rest:
        if taken < target and taken + len(part.tokens) <= 1.5 * target:
            chosen.append(part)
            taken += len(part.tokens)
    if taken < target / 2 and len(chosen) < len(rest):
        # all others are long: the shortest of them, rather than next to nothing
        chosen.append(min((part for part in rest if part not in chosen), key=lambda part: len(part.tokens)))
    return chosen


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
