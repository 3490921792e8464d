"""Merged linear experts: the same as mixing their outputs, at the cost of one, and without looking ahead."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from equimoe.moe.experts import MergedLinear, importance_loss

B, S, I, O, E, K = 3, 12, 6, 5, 4, 2  # noqa: E741


def layer(segment: int | None = 4, top_k: int = K) -> MergedLinear:
    torch.manual_seed(0)
    found = MergedLinear(I, O, E, top_k, segment, init_std=0.7).double()
    torch.nn.init.normal_(found.bias)
    return found


def tokens(length: int = S) -> Tensor:
    return torch.randn(B, length, I, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def mixture(merged: MergedLinear, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mix the outputs of the experts, token by token."""
    length = merged.segment or x.shape[1]
    rows = []
    for t in range(x.shape[1]):
        first = x.shape[1] if merged.segment is None else t // length * length
        valid = [[s for s in range(first) if mask is None or bool(mask[b, s])] for b in range(len(x))]
        before = torch.zeros_like(merged.start) if merged.segment is None else merged.start
        seen = torch.stack([sum(row[s] for s in v) / len(v) if v else before for row, v in zip(x, valid, strict=True)])
        logits = seen @ merged.router.T
        chosen, ids = logits.topk(merged.top_k)
        gates = torch.zeros_like(logits).scatter(1, ids, chosen.softmax(-1))
        outputs = torch.einsum("bi,eoi->beo", x[:, t], merged.weight) + merged.bias
        rows.append(torch.einsum("be,beo->bo", gates, outputs))
    return torch.stack(rows, 1)


@pytest.mark.parametrize("top_k", [1, 2, E])
@pytest.mark.parametrize(("segment", "length"), [(None, 12), (4, 12), (4, 10), (1, 5), (20, 12)])
def test_outputs_and_gradients_are_those_of_the_mixture(segment: int | None, length: int, top_k: int) -> None:
    merged, gradients = layer(segment, top_k), []
    for function in (merged, lambda x: mixture(merged, x)):
        x = tokens(length).requires_grad_()
        y = function(x)
        gradients.append([y, *torch.autograd.grad(y.square().sum(), [x, *merged.parameters()], allow_unused=True)])
    for got, want in zip(*gradients, strict=True):
        assert (got is None) == (want is None)
        if got is not None and want is not None:
            torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


MASKS = {
    "every third": lambda length: torch.arange(B * length).view(B, length) % 3 > 0,
    "padding on the left": lambda length: torch.arange(length) >= torch.tensor([[5], [0], [length]]),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("segment", "length"), [(None, 12), (4, 10), (1, 5)])
def test_masked_tokens_enter_no_mean(segment: int | None, length: int, mask: str) -> None:
    """Whatever they are: the third sequence of the second mask has no valid token. They get an output themselves."""
    mask_BS, merged, found = MASKS[mask](length), layer(segment), []
    for function in (merged, lambda x, mask: mixture(merged, x, mask)):
        x = tokens(length).requires_grad_()
        y = function(x, mask_BS)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *merged.parameters()], allow_unused=True)])
    for got, want in zip(*found, strict=True):
        if got is not None and want is not None:
            torch.testing.assert_close(got, want)
    with torch.no_grad():
        broken = merged(tokens(length).masked_fill(~mask_BS[..., None], float("nan")), mask_BS)
        assert torch.equal(broken[mask_BS], found[0][0][mask_BS])
        assert torch.equal(merged(tokens(length), torch.ones_like(mask_BS)), merged(tokens(length)))


def test_gates_are_those_of_fp32_under_autocast() -> None:
    merged, x = layer().float(), tokens().float()
    want = merged.gates(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = merged.gates(x)
        assert merged(x).dtype == torch.bfloat16
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("segment", [1, 4, 5])
def test_no_output_depends_on_later_tokens(segment: int) -> None:
    merged, x = layer(segment), tokens()
    with torch.no_grad():
        before = merged(x)
        for t in range(S):
            changed = x.clone()
            changed[:, t] += 3.0
            after = merged(changed)
            assert torch.equal(after[:, :t], before[:, :t]) and not torch.equal(after[:, t], before[:, t])


def test_a_whole_sequence_looks_ahead() -> None:
    merged, x = layer(None), tokens()
    changed = x.clone()
    changed[:, -1] += 3.0
    assert not torch.allclose(merged(changed)[:, 0], merged(x)[:, 0])


@pytest.mark.parametrize("segment", [None, 4])
def test_it_costs_one_expert_and_the_merge(segment: int | None) -> None:
    merged, x = layer(segment), tokens()
    with FlopCounterMode(display=False) as counter:
        merged(x)
    length = segment or S
    segments = B * S // length
    one_expert, merge, router = 2 * B * S * O * I, 2 * segments * K * (O * I + O), 2 * segments * E * I
    assert counter.get_total_flops() == one_expert + merge + router


def test_the_importance_loss_is_zero_for_equal_shares() -> None:
    ids = torch.tensor([[[0, 1], [2, 3]]])
    equal, uneven = torch.full((1, 2, 2), 0.5), torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    assert float(importance_loss(equal, ids, 4)) == 0
    assert float(importance_loss(uneven, ids, 4)) == pytest.approx(1.0)  # sums 1, 0, 1, 0


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="top_k=5: must be between 1 and num_experts=4"):
        layer(top_k=5)
    with pytest.raises(ValueError, match="segment=0: must be at least 1"):
        layer(segment=0)
