"""Makes `equimoe`, `benchmarks` and `tests` the folders of this checkout, whatever is installed.

A result is recorded with the commit of its script, so the script must measure the code of that commit. Every script
imports this module first if it is run as a file:

    if not __package__:
        sys.path[0] = <the folder benchmarks>
        import checkout
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = {"equimoe": ROOT, "benchmarks": ROOT / "benchmarks", "tests": ROOT / "tests"}


def _use(name: str, folder: Path) -> None:
    """Define the package `name` as `folder`. Raise SystemExit if another one has been imported already."""
    package = sys.modules.get(name)
    if package is None:
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        package = sys.modules[name] = module_from_spec(spec)
        del package.__file__  # it is None, for which `inspect` raises an error
    found = Path(next(iter(package.__path__))).resolve()
    if found != folder:
        sys.exit(f"{name} is already imported from {found}, but this script belongs to {ROOT}: run it on its own")


os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch loads; its warnings would disturb the tables
for _name, _folder in PACKAGES.items():
    _use(_name, _folder)
# our folders must not hide installed packages: Hugging Face has one called `kernels`
sys.path[:] = [path for path in sys.path if not Path(path).resolve().is_relative_to(PACKAGES["benchmarks"])]
