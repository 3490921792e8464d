"""Every script of docs/engines.md runs as it stands, on two processes, and all that train the same model agree."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

#: DeepSpeed compiles an op when it first runs on a CPU
pytestmark = [pytest.mark.engines, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "engines.md").read_text()
SCRIPTS: dict[str, str] = dict(re.findall(r"\n## (.*?)\n.*?```python\n(.*?)```", PAGE, re.DOTALL))
#: the package that a script needs besides torch
NEEDS = {
    "Accelerate": "accelerate",
    "Lightning": "lightning",
    "DeepSpeed, your own script": "deepspeed",
    "DeepSpeed, our training loop": "deepspeed",
}
OWN_MODEL = "DeepSpeed, your own script"


def test_every_script_is_named() -> None:
    assert SCRIPTS.keys() - NEEDS.keys() == {"DistributedDataParallel", "FSDP2"}
    assert all(f"#{title.lower().replace(',', '').replace(' ', '-')}" in PAGE for title in SCRIPTS)


@cache
def losses(title: str, folder: Path) -> list[float]:
    """The losses that the ranks print."""
    script = folder / "train.py"
    script.write_text(SCRIPTS[title])
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return [float(loss) for loss in re.findall(r"loss ([0-9.]+)", done.stdout)]


@pytest.mark.parametrize("title", SCRIPTS)
def test_a_script_runs_as_it_stands(title: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    package = NEEDS.get(title)
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}, which `make engines` installs")
    found = losses(title, tmp_path_factory.mktemp("script"))
    assert len(found) == 2 and max(found) < 0.9
    if title != OWN_MODEL:
        assert found == [0.8014, 0.8014]
