"""Checks a layer on one GPU: all its tensors are on the device, and the host neither waits nor copies anything."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from equimoe.moe import BalanceConfig, CapacityConfig, ExtraLossConfig, MoE, MoEConfig, RouterConfig, counting_pass
from tests.helpers.fake_cuda import Watch, needs_fake_cuda, on_fake_cuda

pytestmark = needs_fake_cuda

BASE = MoEConfig(hidden_size=32, intermediate_size=48, num_experts=8, top_k=2)
EXTRA = ExtraLossConfig(micro=0.01, sequence=0.01, data_parallel=0.01, device=0.01, communication=0.01)
CASES: dict[str, MoEConfig] = {
    "plain": BASE,
    "not gated": replace(BASE, gated=False, activation="relu2"),
    "recomputed": replace(BASE, recompute_experts=True),
    "shared": replace(BASE, shared_intermediate_size=16, shared_gate=True),
    "bias": replace(
        BASE,
        router=RouterConfig(score="sigmoid", groups=4, kept_groups=2, z_loss=0.01),
        balance=BalanceConfig(bias_update_rate=0.001),
    ),
    "capacity": replace(BASE, capacity=CapacityConfig()),
    "capacity by position": replace(BASE, capacity=CapacityConfig(drop="position", scope="sequence")),
    "capacity, padded": replace(BASE, capacity=CapacityConfig(pad=True, max_tokens=256)),
    "every loss": replace(BASE, balance=BalanceConfig(estimator="carry", extra=EXTRA)),
    "exact": replace(BASE, balance=BalanceConfig(estimator="exact")),
}


def train(config: MoEConfig, precision: str, masked: bool) -> dict[str, Any]:
    """Run a step of two micro-batches, or two steps for "carry"; return what the watch saw and where tensors are."""
    weights = torch.bfloat16 if precision == "bf16" else torch.float32
    torch.set_default_dtype(weights)  # fake modules cannot be converted, so convert the dtype here
    with torch.device("cuda"):
        layer = MoE(config)
        x = torch.randn(4, 16, 32, dtype=weights)
        mask = torch.ones(4, 16, dtype=torch.bool) if masked else None
    torch.set_default_dtype(torch.float32)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    exact, looks_back = (config.balance.estimator == name for name in ("exact", "carry"))
    with Watch() as watch, torch.autocast("cuda", torch.bfloat16, enabled=precision == "autocast"):
        for _ in range(1 + looks_back):
            if exact:
                with counting_pass():
                    layer(x, mask)
                    layer(x, mask)
            for _ in range(2):
                layer(x.requires_grad_(), mask).float().square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    state = (t for moments in optimizer.state.values() for t in moments.values())
    tensors = [layer.stats.counts, layer.stats.tokens, layer.stats.dropped_choices, *state, *layer.buffers()]
    left = {str(t.device) for t in (*tensors, x.grad) if t is not None}
    own = any(name.startswith("equimoe.") for name in watch.ops)
    return {"waits": watch.waits, "copies": watch.copies, "mixed": watch.mixed, "left on": left, "own kernels": own}


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_all_is_on_the_device_and_the_host_does_not_wait(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton", reason="needs triton, which is not to be had on this system")

    def body() -> dict[str, dict[str, Any]]:
        found = {}
        for name, config in CASES.items():
            config = replace(config, backend=backend)  # type: ignore[arg-type]
            for precision in ("fp32", "bf16", "autocast") if name in ("plain", "shared") else ("autocast",):
                found[f"{name}, {precision}"] = train(
                    config, precision, masked=precision == "autocast" and not config.router.z_loss
                )
        return found

    clean = {"waits": [], "copies": [], "mixed": [], "left on": {"cuda:0"}, "own kernels": backend == "triton"}
    assert {name: seen for name, seen in on_fake_cuda(body).items() if seen != clean} == {}
