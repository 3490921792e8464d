"""The tokens of a run by domain, split into training and held-out tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ...config import require
from ..config import DataConfig
from . import store
from .build import Wanted, check_some, memory_runs, open_path
from .builtin import Budget, builtin_documents
from .sources import CHUNK, LEFT_OUT, documents
from .split import Streams, split
from .store import Flat, Library
from .stream import Tokens
from .tokenizer import Tokenizer, id_dtype


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
    #: the folder of the tokens; None: they are in memory
    folder: Path | None = None


def load_corpus(config: DataConfig, tokenizer: Tokenizer, cache: Path | None = None) -> Corpus:
    """Read and tokenise ``config.path``, or the text that comes with Python.

    Short text is kept in memory. Long text is tokenised into a store in ``config.cache``, or in the folder ``cache``,
    unless it is there already, and read from there when it is needed. Without either folder, all text stays in memory.

    Of each domain's tokens, ``config.heldout_fraction`` is held out, or up to 1.5 times that: whole documents if they
    fit, else the ends of all. The split does not depend on the names or the order of documents. Each flat token file is
    split separately, and stays where it is. Repeated documents are read once.

    Raises ``ValueError`` for a path without text, a file whose content does not match its name, ids outside the
    vocabulary, and text too short for one sequence.
    """
    library = _library(config, tokenizer, cache)
    notes, streams = list(library.notes), {}
    dtype = id_dtype(tokenizer.vocab_size)
    for domain, shelf in library.shelves.items():
        streams[domain] = split(shelf, config.heldout_fraction, tokenizer.end_of_document, dtype)
        if len(streams[domain].heldout) < 2:
            notes.append(f"domain {domain!r} has too few tokens to hold any out and is not evaluated")
    train, heldout = ({domain: getattr(s, name) for domain, s in streams.items()} for name in ("train", "heldout"))
    longest = max(map(len, train.values()))
    message = f"no domain has the {config.seq_len + 1} training tokens of one sequence (the longest has {longest}); "
    remedy = message + f"give more text or lower data.seq_len={config.seq_len}"
    require(longest > config.seq_len, "data.path", config.path, remedy)
    short = [repr(domain) for domain, tokens in train.items() if len(tokens) <= config.seq_len]
    if short:
        notes.append(f"too short for one sequence and not trained on: {', '.join(short)}")
    train_masks, heldout_masks = (
        {domain: mask for domain, s in streams.items() if (mask := getattr(s, name)) is not None}
        for name in ("train_mask", "heldout_mask")
    )
    fingerprint = _known_fingerprint(library.folder, config, streams, tokenizer)
    return Corpus(
        tuple(train),
        train,
        heldout,
        fingerprint,
        tokenizer.vocab_size,
        tuple(notes),
        train_masks,
        heldout_masks,
        tokenizer.end_of_document,
        library.folder,
    )


def read_documents(config: DataConfig, tokenizer: Tokenizer) -> dict[str, list[Tokens]]:
    """Read and tokenise all documents of each domain; a flat token file is one. Raises ValueError as load_corpus."""
    return {domain: [ids for ids, _ in found] for domain, found in read_labelled(config, tokenizer).items()}


def read_labelled(config: DataConfig, tokenizer: Tokenizer) -> dict[str, list[tuple[Tokens, Tokens | None]]]:
    """Read all documents as :func:`read_documents` does, with their loss masks; None: every id is trained on."""
    return {domain: shelf.documents() for domain, shelf in _library(config, tokenizer, None).shelves.items()}


def _library(config: DataConfig, tokenizer: Tokenizer, cache: Path | None) -> Library:
    """Return the tokens of a path, from memory or from a store, which is built if it is missing."""
    flat: list[Flat] = []
    if config.path is None:
        budget = Budget(config.builtin_bytes_per_domain)
        runs = memory_runs(builtin_documents(budget), config, tokenizer, flat, [])
        return store.in_memory(runs, flat, budget.notes(), tokenizer)
    source = open_path(config, tokenizer, cache)
    if isinstance(source, Path):
        return store.read(source, tokenizer)
    if isinstance(source, Wanted):
        if not source.complete:
            source.build()
        library = store.read(source.folder, tokenizer)
        # other files may be left out now
        notes = [note for note in library.notes if not note.startswith(LEFT_OUT)]
        return replace(library, notes=(*source.found.notes(), *notes))
    notes = source.notes()
    runs = memory_runs(documents(source, notes), config, tokenizer, flat, notes)
    check_some(runs, flat, config, notes)
    return store.in_memory(runs, flat, notes, tokenizer)


def _known_fingerprint(
    folder: Path | None, config: DataConfig, streams: dict[str, Streams], tokenizer: Tokenizer
) -> str:
    """Return the fingerprint; a store keeps it, because all of its tokens have to be read for it."""
    if folder is None:
        return _fingerprint(streams, tokenizer)
    name = repr(config.heldout_fraction)
    found = store.known_fingerprint(folder, name)
    if found is None:
        found = _fingerprint(streams, tokenizer)
        store.keep_fingerprint(folder, name, found)
    return found


def _fingerprint(streams: dict[str, Streams], tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256(f"{tokenizer.vocab_size} {tokenizer.end_of_document}".encode())
    for domain, s in streams.items():
        for tokens in (s.train, s.heldout, *(mask for mask in (s.train_mask, s.heldout_mask) if mask is not None)):
            digest.update(f"\n{domain} {len(tokens)} {tokens.dtype.itemsize}\n".encode())
            for start in range(0, len(tokens), CHUNK):
                digest.update(np.ascontiguousarray(tokens[start : start + CHUNK]).data)
    return digest.hexdigest()
