"""What a router's product costs on a GPU, counted on tensors without memory."""

from __future__ import annotations

import pytest
import torch

from equimoe.kernels.router_logits import router_logits
from tests.devices.test_auto_device import GB, D, E, T
from tests.helpers.fake_cuda import Watch, needs_fake_cuda, on_fake_cuda

pytest.importorskip("triton", reason="needs triton, which is not to be had on this system")
pytestmark = needs_fake_cuda


def test_a_router_keeps_no_copy_of_the_hidden_states() -> None:
    def one(backend: str) -> tuple[float, float, int]:
        x = torch.empty(T, D, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        weight = torch.empty(E, D, device="cuda", requires_grad=True)
        kept: dict[int, int] = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            if t.untyped_storage()._cdata not in {o.untyped_storage()._cdata for o in (x, weight)}:
                kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
            return t

        with Watch() as watch:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                logits = router_logits(x, weight, backend)
            logits.backward(torch.empty_like(logits))
        assert not watch.waits and not watch.mixed
        return sum(kept.values()) / GB, watch.bytes / GB, watch.ops.total()

    auto, plain = on_fake_cuda(lambda: [one("auto"), one("torch")])
    assert auto[0] == 0 and plain[0] == 4 * T * D / GB, "an fp32 copy"
    assert auto[1] < 0.5 * plain[1] and auto[2] <= 4, (auto, plain)
