"""Command lines whose mistakes are reported as one line."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NoReturn

from ..moe import checkpoint
from ..moe.observe.printable import printable
from . import env


class Parser(argparse.ArgumentParser):
    """Ends with one line and the code of a wrong option, instead of the usage text and 2. Its subparsers do so too."""

    def error(self, message: str) -> NoReturn:
        env.stop(env.Process(), env.CONFIG, _of_the_house(message))


#: types of options -> what their values are
TYPES = {"int": "a whole number", "float": "a number"}


def _of_the_house(message: str) -> str:
    """Write a message of argparse as option, value and remedy."""
    if found := re.fullmatch(r"argument (-\S+): invalid (\w+) value: '(.*)'", message, re.DOTALL):
        return f"{found[1]}={printable(found[3])}: must be {TYPES.get(found[2], 'of type ' + found[2])}"
    if found := re.fullmatch(r"argument (-\S+): invalid choice: '?(.*?)'? \(choose from (.*)\)", message, re.DOTALL):
        return f"{found[1]}={printable(found[2])}: use one of {found[3].replace(chr(39), '')}"
    if found := re.fullmatch(r"argument (-\S+): expected (?:one|at least one) argument", message):
        return f"{found[1]}: give a value, as in {found[1]} VALUE"
    return f"{printable(message)}; see --help"


def in_options(error: Exception, fields: Iterable[str], more: Mapping[str, str]) -> str:
    """Return the text of an error about section ``data`` with the names of a command's own options.

    ``fields`` have options of the same name, and ``more`` says how others are called.
    """
    text = str(error).replace(", or none for the text that comes with Python", "")
    for name, option in {**more, **{name: f"--{name.replace('_', '-')}" for name in fields}}.items():
        text = text.replace(f"data.{name}", option)
    return text


def a_path(text: str) -> Path:
    """Return the path that an option gives; ``~`` is the user's folder, also where the shell does not see it."""
    return Path(text).expanduser()


def check_file(option: str, file: Path) -> None:
    """Raise ValueError, before anything starts, if ``file`` cannot be written because of its place."""
    if file.is_dir():
        raise env.Refused(env.CANNOT_WRITE, f"{option}={file}: is a folder; name a file in it")
    if not file.absolute().parent.is_dir():
        raise env.Refused(env.CANNOT_WRITE, f"{option}={file}: its folder does not exist; create it")


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
