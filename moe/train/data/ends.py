"""Finds token files whose documents cannot be told apart, or end with another id than the tokenizer's."""

from __future__ import annotations

import re

import numpy as np

from .sources import named
from .token_file import TokenFile

#: documents of a file that must end with the same id before it is taken for their end
ENOUGH = 8


class Ends:
    """Collects how the documents of token files end. ``end`` is the tokenizer's end-of-document id."""

    def __init__(self, end: int) -> None:
        self._end = end
        #: file -> its documents, whether ``end`` is in one of them, and the last id of all; None: they differ
        self._files: dict[str, tuple[int, bool, int | None]] = {}

    def add(self, name: str, ids: np.ndarray | TokenFile, has_end: bool) -> None:
        """Add a document with at least one id: a flat file, or one of Megatron's, whose name ends with ``:NUMBER``."""
        file, last = re.sub(r"(\.bin):\d+$", r"\1", name, flags=re.IGNORECASE), int(ids[len(ids) - 1])
        count, had_end, before = self._files.get(file, (0, False, last))
        self._files[file] = (count + 1, had_end or has_end, last if last == before else None)

    def notes(self) -> list[str]:
        """Say which files have no ends of documents, and which have others."""
        without = {name: found for name, found in self._files.items() if not found[1]}
        whole = [name for name, (count, _, _) in without.items() if count == 1]
        foreign: dict[int, list[str]] = {}
        for name, (count, _, last) in without.items():
            if count >= ENOUGH and last is not None:
                foreign.setdefault(last, []).append(name)
        remedy = "check data.tokenizer and data.end_of_document"
        notes = [
            f"every document ends with id {last}, not with the tokenizer's {self._end}, in {named(names)}; {remedy}"
            for last, names in foreign.items()
        ]
        if whole:
            notes.append(f"no end-of-document id ({self._end}) in {named(whole)}: read as one document; {remedy}")
        return notes
