"""Checks of command-line values, made before anything is measured. Each mistake is reported in one line."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn, TypeVar

from benchmarks.checkout import RESULTS

T = TypeVar("T")
#: number of cores that this process may use
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Parser(argparse.ArgumentParser):
    """Takes its description from a script's docstring, and reports errors without the usage text."""

    def __init__(self, doc: str | None) -> None:
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")

    def choose(self, named: Mapping[str, T], argv: list[str] | None) -> dict[str, T]:
        """Parse words, and return the items whose names contain all of them; at least one."""
        self.add_argument("words", nargs="*", metavar="WORD")
        words = self.parse_args(argv).words
        chosen = {name: one for name, one in named.items() if all(word in name for word in words)}
        if not chosen:
            self.error(
                f"{' '.join(words)}: no name contains all of these words; the first name is {next(iter(named))!r}"
            )
        return chosen

    def add_out(self) -> None:
        """Add the option for the folder of the results."""
        self.add_argument("--out", type=folder, default=str(RESULTS), help="folder for results (default %(default)s)")


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: give at least 1")
    return number


def threads(text: str) -> int:
    """Parse a number of threads. More threads than cores would measure the operating system's scheduler."""
    number = positive(text)
    if number > CORES:
        raise argparse.ArgumentTypeError(f"{number}: more threads than this process has cores; give at most {CORES}")
    return number


def _path(text: str) -> Path:
    if not text.strip():  # for example an unset shell variable; Path("") would be the current folder
        raise argparse.ArgumentTypeError(f"{text!r}: give a path")
    return Path(text).expanduser()


def folder(text: str) -> Path:
    """Parse the path of a folder to write to, and create the folder if it does not exist."""
    path = _path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}; give a writable folder") from None
    return path


def file(text: str) -> Path:
    """Parse the path of a file to write, and create its folder if it does not exist."""
    path = _path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: is a folder; give a file")
    folder(str(path.parent))
    if path.exists() and not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text}: is not writable; give another file")
    return path
