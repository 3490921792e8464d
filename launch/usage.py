"""Command lines whose mistakes are reported as one line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ..moe import checkpoint
from . import env


class Parser(argparse.ArgumentParser):
    """Ends with one line and the code of a wrong option, instead of the usage text and 2. Its subparsers do so too."""

    def error(self, message: str) -> NoReturn:
        env.stop(env.Process(), env.CONFIG, f"{message}; see --help")


def a_path(text: str) -> Path:
    """Return the path that an option gives; ``~`` is the user's folder, also where the shell does not see it."""
    return Path(text).expanduser()


def run_on_files(run: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> None:
    """Run a command that reads and writes checkpoints. If it fails, end with one line.

    The exit code is 67 if files are damaged or missing, 64 for an option that does not fit, 73 if a file cannot be
    written.
    """
    try:
        run(arguments)
    except checkpoint.CheckpointError as error:
        env.stop(env.Process(), env.CHECKPOINT, str(error))
    except ValueError as error:
        env.stop(env.Process(), env.CONFIG, str(error))
    except OSError as error:
        where = arguments.out if "out" in arguments else arguments.dir
        env.stop(env.Process(), env.CANNOT_WRITE, f"{where}: cannot be written or read ({error.strerror})")
