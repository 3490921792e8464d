"""What the gradients of expert weights cost on a GPU over micro-batches, counted on tensors without memory."""

from __future__ import annotations

import pytest
import torch

from equimoe.kernels.expert_mlp import expert_mlp
from tests.devices.test_auto_device import GB, D, E, F, K, T, order
from tests.helpers.fake_cuda import Watch, needs_fake_cuda, on_fake_cuda

pytest.importorskip("triton", reason="needs triton, which is not to be had on this system")
pytestmark = needs_fake_cuda


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_main_gradients_need_no_other_gradient_of_the_weights(backend: str) -> None:
    """Autocast with fp32 weights: a second micro-batch, whose gradients are added to those of the first."""

    def one(main: bool) -> tuple[float, int]:
        x, dy = (torch.empty(T, D, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        weights = torch.empty(T, K, device="cuda")
        leaves = [torch.empty(shape, device="cuda", requires_grad=True) for shape in ((E, 2 * F, D), (E, D, F))]
        held = [torch.zeros_like(leaf) for leaf in leaves]
        if not main:
            for leaf, grad in zip(leaves, held, strict=True):
                leaf.grad = grad
        with torch.autocast("cuda", torch.bfloat16):
            y = expert_mlp(x, weights, order(), *leaves, backend, main_grads=tuple(held) if main else (None, None))
        with Watch() as watch:
            y.backward(dy)
        assert not watch.waits and not watch.mixed
        return watch.bytes / GB, watch.ops.total()

    fused, plain = on_fake_cuda(lambda: [one(True), one(False)])
    assert fused[0] < plain[0] and fused[1] < plain[1]
