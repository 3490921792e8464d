"""Measures which channels of a dense model are active on the text of each domain, for ``upcycle --method read-me``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..moe.interop.domains import mean_activity
from ..moe.train.config import DataConfig
from ..moe.train.data import Tokenizer, read_documents
from . import loaded
from .usage import in_options

#: sequences in a forward
BATCH = 8


def activity(
    folder: Path, data: str, tokens: int, tokenizer: str | None = None, end_of_document: str | None = None
) -> dict[str, Tensor]:
    """Return the mean magnitude of all channels [L, F] on the first ``tokens`` tokens of each domain."""
    if tokens < 1:
        raise ValueError(f"--tokens={tokens}: must be at least 1")
    source = loaded.find(folder)
    known = loaded.tokenizer_of(source, tokenizer, end_of_document)
    texts = {domain: _first(documents, known, tokens) for domain, documents in _read(data, known).items()}
    length = min(source.seq_len, max(map(len, texts.values())))
    model = loaded.build(source, None, torch.device("cpu"), length, torch.float32)
    return {domain: mean_activity(model, _batches(ids, length)) for domain, ids in texts.items()}


def _read(data: str, tokenizer: Tokenizer) -> dict[str, list[list[int]]]:
    try:
        found = read_documents(DataConfig(path=data), tokenizer)
    except ValueError as error:
        raise ValueError(in_options(error, (), {"path": "--data"})) from None
    return {domain: [np.asarray(text).tolist() for text in texts] for domain, texts in found.items()}


def _first(documents: list[list[int]], tokenizer: Tokenizer, tokens: int) -> Tensor:
    ids: list[int] = []
    for document in documents:
        ids += [tokenizer.end_of_document, *document]
        if len(ids) >= tokens:
            break
    return torch.tensor(ids[:tokens])


def _batches(ids_T: Tensor, length: int) -> Iterator[Tensor]:
    """Yield token ids as sequences [B, S]; the last one is shorter."""
    whole = len(ids_T) // length * length
    yield from ids_T[:whole].view(-1, length).split(BATCH)
    if whole < len(ids_T):
        yield ids_T[None, whole:]
