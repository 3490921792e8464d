"""Every script of docs/engines.md runs as it stands, on two processes, and equals one process."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from equimoe.moe import MoE, MoEConfig

#: DeepSpeed compiles an op when it first runs on a CPU
pytestmark = [pytest.mark.engines, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "engines.md").read_text()
SCRIPTS: dict[str, str] = dict(re.findall(r"\n## (.*?)\n.*?```python\n(.*?)```", PAGE, re.DOTALL))
#: the package that a script needs besides torch
NEEDS = {
    "Accelerate": "accelerate",
    "Lightning": "lightning",
    "Hugging Face Trainer": "transformers",
    "torchtitan": "torchtitan",
    "DeepSpeed, your own script": "deepspeed",
    "DeepSpeed, our training loop": "deepspeed",
    "Megatron-Core, your own script": "megatron",
    "Megatron-Core, our training loop": "megatron",
}
OWN_MODEL = "DeepSpeed, your own script"
#: runs a script in a context in which Megatron-Core needs no GPU
ON_CPU = """import runpy
from tests.helpers.megatron_cpu import megatron_on_cpu
with megatron_on_cpu():
    runpy.run_path("train.py", run_name="__main__")
"""


def test_every_script_is_named() -> None:
    assert SCRIPTS.keys() - NEEDS.keys() == {"DistributedDataParallel", "FSDP2", "FSDP2 and expert parallelism"}
    assert all(f"#{title.lower().replace(',', '').replace(' ', '-')}" in PAGE for title in SCRIPTS)


@cache
def losses(title: str, folder: Path) -> list[float]:
    """The losses that the ranks print."""
    script = folder / "train.py"
    script.write_text(SCRIPTS[title])
    if NEEDS.get(title) == "megatron":
        script = folder / "on_cpu.py"
        script.write_text(ON_CPU)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [float(loss) for loss in re.findall(r"loss ([0-9.]+)", done.stdout)]


@pytest.mark.parametrize("title", SCRIPTS)
def test_a_script_runs_as_it_stands(title: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    package = NEEDS.get(title)
    if package is not None and importlib.util.find_spec(package) is None:
        heavy = "does not install, because it needs a hundred other packages"
        pytest.skip(f"needs {package}, which `make engines` {heavy if package == 'torchtitan' else 'installs'}")
    found = losses(title, tmp_path_factory.mktemp("script"))
    assert len(found) == 2 and max(found) < 0.9
    if package == "megatron":  # a language model learns to count, from ln(64) on
        assert max(found) < 0.4
    elif title != OWN_MODEL:
        assert found == [alone(), alone()]


@cache
def alone() -> float:
    """The loss of one process that holds both ranks' tokens, as the scripts print it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), MoE(MoEConfig(16, 32, num_experts=8, top_k=2)), nn.Linear(16, 16))
    optimizer, loss = torch.optim.AdamW(model.parameters(), lr=1e-2), torch.zeros(())
    for step in range(20):
        generators = [torch.Generator().manual_seed(2 * step + rank) for rank in range(2)]
        x = torch.cat([torch.randn(8, 32, 16, generator=generator) for generator in generators])
        loss = (model(x) - x.flip(-1)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return round(float(loss.detach()), 4)
