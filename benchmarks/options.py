"""Command-line values that are checked before anything is measured, each mistake in one line."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import NoReturn

#: that this process may use
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Parser(argparse.ArgumentParser):
    """Prints a mistake without the usage around it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def at_least(least: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number") from None
    if number < least:
        raise argparse.ArgumentTypeError(f"{number}: give at least {least}")
    return number


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return at_least(1, text)


def threads(text: str) -> int:
    """From 1 to the cores that there are: threads that wait for each other's core measure the scheduler."""
    number = positive(text)
    if number > CORES:
        raise argparse.ArgumentTypeError(f"{number}: there are {CORES} cores for this process; give 1 to {CORES}")
    return number


def _path(text: str) -> Path:
    if not text.strip():  # such as an unset variable of the shell, which would mean the current folder
        raise argparse.ArgumentTypeError(f"{text!r}: give a path")
    return Path(text).expanduser()


def folder(text: str) -> Path:
    """A folder that can be written to; made where there is none."""
    path = _path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}; give a folder that can be written to") from None
    return path


def file(text: str) -> Path:
    """A file that can be written, in a folder that is made where there is none."""
    path = _path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: is a folder; give a file")
    folder(str(path.parent))
    if path.exists() and not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text}: cannot be written; give another file")
    return path
