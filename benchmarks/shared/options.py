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

    def parse_arms(
        self, argv: list[str] | None, arms: Mapping[str, object], steps: int, name: str
    ) -> argparse.Namespace:
        """Parse the options of a benchmark that trains every arm with several seeds, and keeps finished runs.

        ``arms`` of the result are the chosen names, in the order of the mapping; ``seeds`` is set.
        """
        self.add_argument("--quick", action="store_true", help="tiny models, one seed: a minute, to try the command")
        self.add_argument("--seeds", type=positive, help="(default 3; quick 1)")
        self.add_argument("--steps", type=positive, help=f"(default {steps})")
        self.add_argument("--arms", metavar="NAME,...", help=f"of {', '.join(arms)} (default: all)")
        self.add_argument("--runs", type=Path, help=f"folder for the runs (default runs/{name}-STEPS)")
        self.add_out()
        args = self.parse_args(argv)
        chosen = args.arms.split(",") if args.arms else list(arms)
        if unknown := set(chosen) - set(arms):
            self.error(f"--arms={','.join(sorted(unknown))}: choose from {', '.join(arms)}")
        args.arms, args.seeds = [arm for arm in arms if arm in chosen], args.seeds or (1 if args.quick else 3)
        return args

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
