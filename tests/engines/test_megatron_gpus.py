"""The layer in a GPTModel on GPUs, in bf16, compared with one process on a CPU in fp32.

Where there is no GPU, the same program runs on CPUs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core", reason="needs Megatron-Core, which `make engines` installs")
pytestmark = pytest.mark.engines

from tests.helpers.fork import run_ranks  # noqa: E402
from tests.helpers.megatron_models import Run, run  # noqa: E402
from tests.helpers.megatron_tensors import Whole, joined  # noqa: E402

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"
ROOT = Path(__file__).resolve().parents[2]
#: relative errors. On CPUs, those of bf16 are 0.002 and 0.05, or 0.21 if a token near the border between two experts
#: goes to the other one; without the balance loss, the router's gradient has 0.5.
LOSS, GRADIENT = 0.01, 0.3
BALANCE = {"moe_aux_loss_coeff": 1.0}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one GPU": (1, {}),
    "TransformerEngine": (1, {"engine": True}),
    "ep": (2, {EP: 2}),
    "ep, distributed optimizer": (2, {EP: 2, "distributed_optimizer": True}),
    "pp": (2, {PP: 2}),
    "tp, sequence parallel": (2, {TP: 2, ETP: 2, "sequence_parallel": True}),
    "TransformerEngine, tp, ep": (2, {TP: 2, EP: 2, "sequence_parallel": True, "engine": True}),
    "TransformerEngine, tp, pp, ep": (4, {TP: 2, PP: 2, EP: 2, "sequence_parallel": True, "engine": True}),
}


@cache
def one_process() -> Run:
    """Train in fp32 on a CPU. The fork happens before this process uses a GPU."""
    return run_ranks(partial(on_cpu, steps=2, micro_batches=4, **BALANCE), 1)[0]


def on_cpu(rank: int, world: int, **how: Any) -> Run:
    torch.cuda.is_available = lambda: False  # only in this forked rank
    return run(rank, world, **how)


def program(folder: Path, world: int, **how: Any) -> list[Run]:
    torch.save(joined([one_process().parts["initial"]]), folder / "initial")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command += [
        "-m",
        "tests.helpers.megatron_program",
        str(folder),
        json.dumps({"steps": 2, "bf16": True, **BALANCE, **how}),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank {rank}", weights_only=False) for rank in range(world)]


def error(found: Whole, right: Whole, name: str) -> float:
    return float((found[name] - right[name]).norm() / right[name].norm())


def compare(runs: list[Run], sharded: bool) -> None:
    """Gradients of the first step are compared, unless the distributed optimizer has sharded them."""
    right = one_process()
    for found in runs:
        assert found.losses == pytest.approx(right.losses, rel=LOSS)
        assert found.norms == pytest.approx(right.norms, rel=GRADIENT)
    for kind in ("weights",) if sharded else ("gradients", "weights"):
        whole, wanted = joined([found.parts[kind] for found in runs]), joined([right.parts[kind]])
        assert whole.keys() == wanted.keys()
        for name in wanted:
            assert error(whole, wanted, name) < GRADIENT, name


@pytest.mark.gpu
@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", CASES)
def test_on_gpus(case: str, tmp_path: Path) -> None:
    world, how = CASES[case]
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs")
    if how.get("engine") and importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("needs TransformerEngine")
    compare(program(tmp_path, world, **how), how.get("distributed_optimizer", False))


@pytest.mark.parametrize("case", [case for case, (world, how) in CASES.items() if world < 4 and "engine" not in how])
def test_the_same_training_on_cpus(case: str) -> None:
    world, how = CASES[case]
    initial = joined([one_process().parts["initial"]])
    runs = run_ranks(partial(on_cpu, initial=initial, steps=2, bf16=True, **BALANCE, **how), world)
    compare(runs, how.get("distributed_optimizer", False))


@pytest.mark.skipif(torch.cuda.is_available(), reason="it runs on GPUs")
@pytest.mark.timeout(300)
def test_the_program_runs(tmp_path: Path) -> None:
    compare(program(tmp_path, 2, **{EP: 2}), False)
