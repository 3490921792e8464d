"""How commands print numbers and option values."""

from __future__ import annotations

from typing import Any


def counted(count: int, noun: str) -> str:
    """Format a count with its noun, as in "1 rank" and "2 processes"."""
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {noun}{'es' if noun.endswith(('s', 'ch')) else 's'}"


def option_text(value: Any) -> str:
    """Format the value of an option as the command line takes it."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
