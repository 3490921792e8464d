"""Routers route on the device, and the host waits for none of them, as seen on tensors without memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from equimoe.moe import BalanceConfig, DispatchConfig, MoE, MoEConfig, RouterConfig
from equimoe.moe.parallel import ParallelConfig, build_mesh, parallelize
from equimoe.moe.plan import pretended
from tests.helpers.fake_cuda import Watch, needs_fake_cuda, on_fake_cuda, real_tensors

pytestmark = needs_fake_cuda

NONE = BalanceConfig(coefficient=0.0)
#: name -> router, top-k, and the balance
ROUTERS: dict[str, tuple[RouterConfig, int, BalanceConfig]] = {
    "expert choice": (RouterConfig(select="expert_choice", normalize_weights=False), 2, NONE),
    "expert choice, capped": (RouterConfig(select="expert_choice", normalize_weights=False, cap=4), 2, NONE),
    "by position": (RouterConfig(select="expert_choice_by_position", normalize_weights=False), 2, NONE),
    "hash": (RouterConfig(gate="hash", vocabulary=50), 2, NONE),
    "task": (RouterConfig(gate="task", tasks=50), 2, BalanceConfig()),
    "slots": (RouterConfig(gate="slots", slots=2), 1, NONE),
}


@pytest.mark.parametrize("masked", [False, True])
def test_no_router_waits(masked: bool) -> None:
    def one(router: RouterConfig, top_k: int, balance: BalanceConfig) -> dict[str, Any]:
        with torch.device("cuda"):
            layer = MoE(MoEConfig(32, 48, 8, top_k, router, balance))
            x, codes = torch.randn(4, 16, 32, requires_grad=True), torch.zeros(4, 16, dtype=torch.int64)
            mask = torch.ones(4, 16, dtype=torch.bool) if masked else None
        with Watch(reads=64) as watch:
            layer(x, mask, codes).float().square().sum().backward()
        return {"waits": watch.waits, "copies": watch.copies, "mixed": watch.mixed}

    found = on_fake_cuda(lambda: {name: one(*arguments) for name, arguments in ROUTERS.items()})
    assert found == dict.fromkeys(ROUTERS, {"waits": [], "copies": [], "mixed": []})


def test_moge_needs_no_sizes() -> None:
    """The all-to-all of the other routers waits for them."""

    def waits(equal_tokens: bool) -> list[str]:
        router, dispatch = RouterConfig(select="each_group", groups=4), DispatchConfig(equal_tokens=equal_tokens)
        with real_tensors():
            mesh = build_mesh(ParallelConfig(ep=4), "cuda", warm_up=False)
        with torch.device("cuda"):
            layer, x = MoE(MoEConfig(32, 48, 16, 16, router, dispatch=dispatch)), torch.randn(64, 32)
        parallelize(layer, mesh, reduced=True)
        with Watch(reads=64) as watch:
            for _ in range(2):  # in the first pass, layers without an engine check that all ranks have the same sums
                watch.waits.clear()
                layer(x).square().sum().backward()
        return watch.waits

    def body() -> list[list[str]]:
        found = []
        for equal_tokens in (True, False):
            with pretended(0, 4, 4):
                found.append(waits(equal_tokens))
        return found

    even, others = on_fake_cuda(body)
    assert even == [] and others == ["moe/collectives/no_gradient.py:on_host"]
