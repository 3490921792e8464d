"""Importing this makes ``equimoe`` the checkout that the script lies in, whatever is installed beside it.

A figure is recorded with its script's commit, so that commit's code must be what was measured. The package is loaded
from its file: with the checkout on the import path, its folders could hide packages of the same names.
"""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _use() -> None:
    """Raises SystemExit with one line when another equimoe has been imported before."""
    loaded = sys.modules.get("equimoe")
    if loaded is None:
        spec = spec_from_file_location("equimoe", ROOT / "equimoe.py")
        assert spec is not None and spec.loader is not None
        loaded = sys.modules["equimoe"] = module_from_spec(spec)
        spec.loader.exec_module(loaded)
    found = [Path(folder).resolve() for folder in loaded.__path__]
    if found != [ROOT]:
        sys.exit(
            f"equimoe is {found[0]}, and this script is of {ROOT}: measure a checkout with its own script, run alone"
        )


_use()
