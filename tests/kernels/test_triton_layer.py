"""The layer and a training step with Triton's kernels, under the interpreter, agree with the torch backend."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from equimoe.moe import BalanceConfig, MoEConfig
from equimoe.moe.model import Decoder
from tests.helpers import oracle

triton = pytest.importorskip("triton", reason="needs triton, which is not installed")

CONFIG = MoEConfig(
    hidden_size=16, intermediate_size=24, num_experts=4, top_k=2, balance=BalanceConfig(coefficient=0.1), init_std=0.2
)


def losses(backend: str) -> tuple[list[float], torch.Tensor]:
    """Train a small model for three steps. Return the losses and the first layer's last gradient of gate_up_proj."""
    torch.manual_seed(0)
    model = Decoder(
        vocab_size=11,
        seq_len=8,
        num_layers=2,
        num_heads=2,
        intermediate_size=16,
        moe=replace(CONFIG, backend=backend),  # type: ignore[arg-type]
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.randint(0, 11, (2, 9))
    curve = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        curve.append(float(loss.detach()))
    return curve, model.moe_layers()[0].experts.gate_up_proj.grad


def test_same_losses_and_gradients_as_torch() -> None:
    (ours, our_grad), (theirs, their_grad) = losses("triton"), losses("torch")
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert oracle.relative_error(our_grad, their_grad) < 1e-4


USER = """
import torch
from equimoe.moe import MoE, MoEConfig

found = []
for backend in ("torch", "triton"):
    torch.manual_seed(0)
    layer = MoE(MoEConfig(16, 24, 4, 2, backend=backend, init_std=0.2))
    x = torch.randn(20, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().square().sum().backward()
    found.append([y.float(), x.grad, *(p.grad for p in layer.parameters())])
print(max(float((a - b).norm() / a.norm()) for a, b in zip(*found)))
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels themselves")
def test_bf16_is_right_in_a_users_process_too() -> None:
    """Triton's interpreter multiplies the bits of bf16 as integers, unless we correct it also outside of pytest."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", USER], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.05  # rounding to bf16
