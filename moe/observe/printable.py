"""Makes text safe to print, as names from files that could control a terminal, and formats numbers."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

#: most columns of a line
WIDTH = 100
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


def fitted(start: str, parts: Sequence[str], between: str = ", ", end: str = "") -> str:
    """Return ``start``, the ``parts`` that fit into a line of WIDTH columns, the number of the others, and ``end``.

    At least one part is there.
    """
    for shown in range(len(parts), 0, -1):
        more = [f"and {len(parts) - shown} more"] if shown < len(parts) else []
        line = start + between.join([*parts[:shown], *more]) + end
        if len(line) <= WIDTH or shown == 1:
            return line
    return start + end


def short_count(count: float | None) -> str:
    """Format a number with three digits and a unit, as in 1.23M; "-" for None."""
    if count is None:
        return "-"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"
