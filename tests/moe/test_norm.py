"""RMSNorm and rotary positions: values and gradients against fp64, in every dtype and layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from equimoe.moe.model.norm import RMSNorm
from equimoe.moe.model.rotary import rotary_tables, rotate
from tests.conftest import poison_

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def rows(dtype: torch.dtype, layout: str) -> Tensor:
    """Rows of 6 values, in a layout that attention has."""
    if layout == "of heads":
        return (
            torch.randn(2, 5, 3 * 4 * 6).unflatten(-1, (3, 4, 6)).to(dtype).split((2, 2), 3)[0].permute(0, 2, 3, 1, 4)
        )
    return torch.randn(*{"dense": (2, 5, 6), "no": (0, 6), "one": (6,)}[layout]).to(dtype)


def gradients(y: Tensor, inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    return [y, *torch.autograd.grad(y, inputs, dy)]


def close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", ["dense", "of heads", "no", "one"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("mixed", [False, True], ids=["", "fp32 weight"])
def test_the_norm_equals_torchs_in_fp64(dtype: torch.dtype, layout: str, mixed: bool) -> None:
    norm = RMSNorm(6, eps=1e-3)
    torch.nn.init.normal_(norm.weight)
    norm = norm.to(torch.promote_types(dtype, torch.float32) if mixed else dtype)
    x = rows(dtype, layout).requires_grad_()
    dy = torch.randn(x.shape).to(dtype)
    y = norm(x)
    assert y.dtype == dtype
    found = gradients(y, [x, norm.weight], dy)
    assert [t.dtype for t in found] == [dtype, dtype, norm.weight.dtype]
    wide_x, wide_weight = (t.detach().double().requires_grad_() for t in (x, norm.weight))
    wide = F.rms_norm(wide_x, (6,), wide_weight, 1e-3)
    close(found, gradients(wide, [wide_x, wide_weight], dy.double()), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_has_the_bits_of_torch(dtype: torch.dtype) -> None:
    x, norm = torch.randn(50, 64).to(dtype), RMSNorm(64, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    assert torch.equal(norm(x), F.rms_norm(x, (64,), norm.weight, 1e-5))


def test_the_norm_under_autocast_and_recomputation() -> None:
    x, norm = torch.randn(7, 8, requires_grad=True), RMSNorm(8, eps=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        within = gradients(norm(x), [x, norm.weight], torch.ones(7, 8))
        again = gradients(checkpoint(norm, x, use_reentrant=False), [x, norm.weight], torch.ones(7, 8))
    outside = gradients(norm(x), [x, norm.weight], torch.ones(7, 8))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(within, again, outside, strict=True))


def test_the_norm_keeps_one_number_per_row() -> None:
    x, norm, kept = torch.randn(7, 8, requires_grad=True), RMSNorm(8, eps=1e-5), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
        norm(x)
    assert sorted(kept) == [7, 8, 56]


@pytest.fixture
def tables() -> tuple[Tensor, Tensor]:
    return rotary_tables(5, 6, 10_000.0)


@pytest.mark.parametrize("layout", ["dense", "of heads"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_rotation_equals_complex_numbers_in_fp64(
    dtype: torch.dtype, layout: str, tables: tuple[Tensor, Tensor]
) -> None:
    x = rows(dtype, layout).requires_grad_()
    dy = torch.randn(x.shape).to(dtype)
    found = gradients(rotate(x, *tables), [x], dy)
    assert all(t.dtype == dtype for t in found)
    wide = x.detach().double().requires_grad_()
    turned = torch.complex(*wide.chunk(2, -1)) * torch.complex(*(t.double() for t in tables))
    close(found, gradients(torch.cat((turned.real, turned.imag), -1), [wide], dy.double()), TOLERANCE[dtype])


def test_rotations_compile_and_overwrite_nothing(tables: tuple[Tensor, Tensor]) -> None:
    x, norm = torch.randn(2, 5, 6, requires_grad=True), RMSNorm(6, eps=1e-5)

    def both(x: Tensor) -> Tensor:
        return rotate(norm(x), *tables)

    expected = gradients(both(x), [x, norm.weight], torch.ones(2, 5, 6))
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    close(gradients(compiled(x), [x, norm.weight], torch.ones(2, 5, 6)), expected, 1e-5)
    y, dy = both(x), torch.ones(2, 5, 6)
    torch.autograd.grad(y, [x], dy, retain_graph=True)
    assert torch.equal(dy, torch.ones(2, 5, 6)) and torch.equal(y, both(x))
    with torch.no_grad():
        poison_(dy)
    assert torch.equal(torch.autograd.grad(y, [x], torch.ones(2, 5, 6))[0], expected[1])


def test_the_norm_takes_what_torchs_takes() -> None:
    """Several dimensions, and torch's own epsilon."""
    for shape, how in (((2, 4), {"eps": 1e-5}), ((4,), {}), ((2, 4), {"elementwise_affine": False})):
        x, norm = torch.randn(3, 2, 4), RMSNorm(shape, **how)
        assert torch.equal(norm(x), F.rms_norm(x, shape, norm.weight, norm.eps))
