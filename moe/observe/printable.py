"""Makes text from files safe to print: names that could control a terminal, or that it cannot encode."""

from __future__ import annotations

import unicodedata

#: characters that reorder text: the bidirectional controls of Unicode (UAX #9)
BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
#: categories of control characters, surrogates, line and paragraph separators
UNSAFE = ("Cc", "Cs", "Zl", "Zp")


def printable(text: str) -> str:
    """Return ``text`` with every control character, surrogate and bidirectional control written as an escape.

    A newline becomes ``\\n`` and an escape character ``\\x1b``, so that text from a file can neither start a new line
    nor change the colours, the title or the direction of a terminal.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        letter.encode("unicode_escape").decode() if letter in BIDI or unicodedata.category(letter) in UNSAFE else letter
        for letter in text
    )
