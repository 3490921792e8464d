"""A document, as the readers hand it out and before it is tokenised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ...observe.printable import printable
from .token_file import TokenFile

#: characters of a domain's name, after escaping
LONGEST_DOMAIN = 100
#: names that mean something else in records, tables and plots
RESERVED = ("all", "domain")


class Piece(NamedTuple):
    """A part of a document's text."""

    text: str
    #: whether it is trained on
    trained: bool = True
    #: whether special tokens in it become control ids, as in the text of a chat template
    control: bool = False


@dataclass
class Document:
    """One document with its domain, in whose name unprintable characters are escaped.

    It has a text, a conversation, pieces of text, or ids; or it is a flat file of ids.
    """

    domain: str
    #: path relative to data.path, and the place in it, for messages
    name: str
    text: str | None = None
    #: pieces of text in order
    pieces: tuple[Piece, ...] | None = None
    #: messages of a conversation: mappings with ``role`` and ``content``
    messages: list[dict[str, Any]] | None = None
    #: ids of a document that is tokenised already, shape ``(T,)``
    ids: np.ndarray | None = None
    #: ids of a flat token file, whose document boundaries are unknown, shape ``(T,)``
    tokens: TokenFile | None = None

    def __post_init__(self) -> None:
        name = printable(self.domain)
        if len(name) > LONGEST_DOMAIN:
            start = f"{name[:LONGEST_DOMAIN]}..."
            raise ValueError(
                f"data.path={self.name!r}: the domain's name {start!r} has more than {LONGEST_DOMAIN} characters; "
                "shorten it, or choose domains by data.domain_by='kind'"
            )
        if name.strip().lower() in (*RESERVED, ""):
            raise ValueError(
                f"data.path={self.name!r}: a domain cannot be called {name!r}, which means something else in reports; "
                "rename it, or choose domains by data.domain_by='kind'"
            )
        self.domain = name

    @property
    def size(self) -> int:
        """The characters, or the bytes of its ids: a measure of the work to tokenise it."""
        if self.ids is not None:
            return self.ids.nbytes
        if self.pieces is not None:
            return sum(len(piece.text) for piece in self.pieces)
        if self.messages is not None:
            return sum(len(str(message.get("content", ""))) for message in self.messages)
        return len(self.text or "")
