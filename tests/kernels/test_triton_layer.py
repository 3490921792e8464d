"""The layer and a training step on the Triton kernels, under the interpreter, beside the torch path."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from equimoe.moe import BalanceConfig, MoEConfig
from equimoe.moe.model import Decoder
from tests.helpers import oracle

triton = pytest.importorskip("triton", reason="needs triton, which is not to be had on this system")

CONFIG = MoEConfig(
    hidden_size=16, intermediate_size=24, num_experts=4, top_k=2, balance=BalanceConfig(coefficient=0.1), init_std=0.2
)


def losses(backend: str) -> tuple[list[float], torch.Tensor]:
    """Three steps of a small model; the losses, and the first expert weights' last gradient."""
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
