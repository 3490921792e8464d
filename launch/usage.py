"""Command lines whose mistakes are reported as one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from . import env


class Parser(argparse.ArgumentParser):
    """Ends with one line and the code of a wrong option, instead of the usage text and 2. Its subparsers do so too."""

    def error(self, message: str) -> NoReturn:
        env.stop(env.Process(), env.CONFIG, f"{message}; see --help")
