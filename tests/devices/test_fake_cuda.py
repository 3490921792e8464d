"""Checks that the watch finds faults that would occur on a GPU; each test plants one."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.fake_cuda import Watch, needs_fake_cuda, on_fake_cuda

pytestmark = needs_fake_cuda

X = "torch.ones(4, 4, device='cuda')"
WAITS = {
    "item": f"{X}.sum().item()",
    "float": f"float({X}.sum())",
    "if": f"bool({X}.sum() > 0)",
    "tolist of many numbers": f"{X}.tolist()",
    "to the host": f"{X}.cpu()",
    "copied into the host's": f"torch.empty(4, 4).copy_({X})",
    "equal": f"torch.equal({X}, {X})",
    "nonzero": f"({X} > 0).nonzero()",
    "by mask": f"{X}[{X} > 0]",
    "written by mask": f"{X}.index_put_(({X} > 0,), {X}.flatten())",
    "unknown length": f"torch.arange(4, device='cuda').repeat_interleave({X}[0].long())",
    "bincount": f"{X}.long().flatten().bincount()",
    "unique": f"{X}.unique()",
}
NO_WAITS = {
    "filled by mask": f"{X}.masked_fill_({X} > 0, 2.0)",
    "set by mask": f"{X}.__setitem__({X} > 0, 2.0)",
    "known length": f"torch.arange(4, device='cuda').repeat_interleave({X}[0].long(), output_size=16)",
    "scalar of the host": f"{X} * torch.tensor(2.0)",
    "where": f"torch.where({X} > 0, {X}, 0.0)",
    "the host's own": "torch.ones(4).sum().item()",
}
MIXED = {
    "index of the device": f"torch.ones(4)[{X}[0].long()]",
    "index of the host": f"{X}[torch.tensor([0, 1])]",
    "sum": f"{X} + torch.ones(4, 4)",
    "AdamW's step": (
        f"torch._fused_adamw_([{X}], [{X}], [{X}], [{X}], [], [torch.tensor(1.0)], lr=0.1, beta1=0.9, beta2=0.9, "
        "weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False)"
    ),
}


def seen(text: str) -> dict[str, Any]:
    # torch itself refuses some of them, after the watch has recorded them
    with Watch() as watch, contextlib.suppress(Exception):
        eval(text, {"torch": torch})
    return {"waits": len(watch.waits), "copies": len(watch.copies), "mixed": len(watch.mixed)}


def test_what_the_watch_sees() -> None:
    cases = {**WAITS, **NO_WAITS, **MIXED}
    found = on_fake_cuda(lambda: {name: seen(text) for name, text in cases.items()})
    assert {name: found[name]["waits"] for name in WAITS} == dict.fromkeys(WAITS, 1)
    assert {name: found[name] for name in NO_WAITS} == dict.fromkeys(NO_WAITS, {"waits": 0, "copies": 0, "mixed": 0})
    assert {name: found[name]["mixed"] for name in MIXED} == dict.fromkeys(MIXED, 1)


def test_copies_to_the_device_are_seen() -> None:
    assert on_fake_cuda(lambda: seen("torch.tensor([1, 2], device='cuda')"))["copies"] == 1
    assert on_fake_cuda(lambda: seen("torch.ones(3).to('cuda')"))["copies"] == 1


def test_waits_of_backward_passes_are_seen() -> None:
    class Waits(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * grad.sum().item()

    def body() -> tuple[int, str]:
        x = torch.ones(3, device="cuda", requires_grad=True)
        with Watch() as watch:
            Waits.apply(x).sum().backward()
        assert x.grad is not None
        return len(watch.waits), str(x.grad.device)

    assert on_fake_cuda(body) == (1, "cuda:0")


def test_a_failure_is_reported_with_its_traceback() -> None:
    def body() -> None:
        raise RuntimeError("planted")

    with pytest.raises(AssertionError, match="planted"):
        on_fake_cuda(body)
