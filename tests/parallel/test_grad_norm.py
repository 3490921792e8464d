"""The norm of gradients against fp64, for every dtype, and for numbers whose squares fp32 cannot hold."""

from __future__ import annotations

import pytest
import torch

from equimoe.moe.parallel.grad_norm import clip_grad_norm_, clip_gradients_

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-15, 1e-12, 1.0, 1e17, 1e20, 1e30])
def test_the_norm_is_that_of_fp64(dtype: torch.dtype, scale: float) -> None:
    grads = [(torch.randn(size, dtype=torch.float64) * scale).to(dtype) for size in ((300_000,), (5, 7), (0,), ())]
    norm = clip_gradients_(grads, 0.0, CPU)
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(float(torch.cat([g.double().flatten() for g in grads]).norm()), rel=3e-7)


def test_dtypes_may_differ() -> None:
    grads = [torch.full((4,), 3.0, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
    assert float(clip_gradients_(grads, 0.0, CPU)) == pytest.approx(108**0.5, rel=1e-7)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_gradients_that_are_not_finite_are_left_alone(value: float) -> None:
    grads = [torch.tensor([value, 1.0]), torch.ones(3)]
    assert not clip_gradients_(grads, 0.1, CPU).isfinite()
    assert torch.equal(grads[1], torch.ones(3))


def test_no_gradient_at_all() -> None:
    assert float(clip_gradients_([], 1.0, CPU)) == 0.0
    assert float(clip_gradients_([torch.zeros(3)], 1.0, CPU)) == 0.0


def test_one_weight_is_no_list_of_its_rows() -> None:
    """As torch's function takes it."""
    weight = torch.nn.Parameter(torch.ones(3, 4))
    weight.grad = torch.full((3, 4), 2.0)
    assert float(clip_grad_norm_(weight, 1.0)) == pytest.approx(48**0.5)
    assert float(weight.grad.norm()) == pytest.approx(1.0)
