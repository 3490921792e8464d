"""Checks of settings, with errors that name the field, its value and a remedy."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin, get_type_hints


def require(ok: bool, where: str, value: Any, remedy: str) -> None:
    """Raise ``ValueError("<where>=<value>: <remedy>")`` unless ``ok``."""
    if not ok:
        raise ValueError(f"{where}={value!r}: {remedy}")


def check_literals(section: object, where: str = "") -> None:
    """Raise ``ValueError`` if a ``Literal`` or bool field of ``section`` holds a value outside its type.

    ``where`` is prefixed to the field's name in the message.
    """
    for name, hint in get_type_hints(type(section)).items():
        allowed = (True, False) if hint is bool else get_args(hint) if get_origin(hint) is Literal else None
        if allowed is not None:
            value = getattr(section, name)
            ok = any(value == choice and type(value) is type(choice) for choice in allowed)
            require(ok, where + name, value, f"use one of {', '.join(map(str, allowed))}")
