"""Checks the weight that the adaptive estimator gives to the previous step, on steps whose behaviour is known."""

# M micro-batches, E experts, X = E + 1.

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from equimoe.moe.balance.agreement import BINS, DECAY, MODEL, Agreement
from equimoe.moe.balance.estimators import adaptive, carry, rolling

M, E, TOKENS = 8, 16, 1000


def step(load_E: Tensor, noise: float, generator: torch.Generator, micro_batches: int = M) -> Tensor:
    """Return counts and tokens of micro-batches whose shares vary around a load."""
    shares_ME = (load_E + noise * torch.randn(micro_batches, E, generator=generator, dtype=torch.float64)).clamp_min(0)
    counts_ME = (shares_ME / shares_ME.sum(1, keepdim=True) * 2 * TOKENS).round().long()
    return torch.cat((counts_ME, torch.full((micro_batches, 1), TOKENS)), dim=1)


def run(steps: list[Tensor]) -> tuple[Agreement, Tensor | None]:
    agreement, previous_X = Agreement(torch.device("cpu")), None
    for totals_MX in steps:
        agreement.observe(totals_MX, previous_X)
        previous_X = torch.cat((totals_MX.sum(0), torch.tensor([len(totals_MX)])))
    return agreement, previous_X


def weight_after(steps: list[Tensor], n: int) -> float:
    return float(run(steps)[0].weight(n / M))


def even() -> Tensor:
    return torch.full((E,), 1.0 / E, dtype=torch.float64)


def test_a_steady_load_is_carried_and_one_that_jumps_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    steady = [step(even(), 0.03, generator) for _ in range(12)]
    loads = [torch.rand(E, generator=generator, dtype=torch.float64).softmax(0) for _ in range(12)]
    jumping = [step((load * 8).softmax(0), 0.002, generator) for load in loads]
    for n in (1, 2, 4):
        expected = (1 / n) / (1 / n + 1 / M)  # the variances of the means of n and of M micro-batches
        assert weight_after(steady, n) == pytest.approx(expected, abs=0.15)
        assert weight_after(jumping, n) < 0.05


def test_an_order_that_repeats_is_learnt() -> None:
    """The first half of every step has other experts than the second, so what is known says nothing about the rest."""
    generator = torch.Generator().manual_seed(1)
    half_E = torch.cat((torch.full((E // 2,), 2.0 / E), torch.zeros(E // 2))).double()
    steps = [
        torch.cat((step(half_E, 0.001, generator, M // 2), step(half_E.flip(0), 0.001, generator, M // 2)))
        for _ in range(6)
    ]
    assert weight_after(steps, M // 2) > 0.95


def test_the_weight_against_a_loop_over_the_definition() -> None:
    generator = torch.Generator().manual_seed(2)
    steps = [step(even() * (1 + 0.5 * torch.rand(E, generator=generator)), 0.02, generator) for _ in range(5)]
    shares = [(s[:, :-1].double() / s[:, :-1].sum(1, keepdim=True)) for s in steps]
    for n in range(1, M):
        sums, total, pairs, v, change = [0.0, 0.0, 0.0], 0.0, 0.0, 0.0, 0.0
        for age, i in enumerate(range(4, -1, -1)):
            old = DECAY**age
            v += old * float((shares[i] - shares[i].mean(0)).square().sum()) / (M - 1) / M
            total += old
            if i == 0:
                continue
            x, u, q = shares[i][:n].mean(0), shares[i][n:].mean(0), shares[i - 1].mean(0)
            for j, (one, other) in enumerate(((x, u), (q, u), (x, q))):
                sums[j] += old * float((one - other).square().sum())
            change += old * float((shares[i].mean(0) - q).square().sum())
            pairs += old
        v, f, drift = v / total, n / M, max(change / pairs - 2 * v / total, 0.0)
        model = (v * (1 / f + 1 / (1 - f)), drift + v * (1 + 1 / (1 - f)), drift + v * (1 / f + 1))
        a, b, x = (s / pairs + MODEL * m for s, m in zip(sums, model, strict=True))
        want = min(max((a - (a + b - x) / 2) / x, 0.0), 1.0)
        assert weight_after(steps, n) == pytest.approx(want, abs=1e-3)  # counts are whole numbers


def test_fractions_that_were_not_measured_get_the_nearest() -> None:
    generator = torch.Generator().manual_seed(3)
    agreement, _ = run([step(even(), 0.02, generator, 2) for _ in range(3)])
    measured_3B = agreement.values[:-4].view(3, BINS - 1)
    assert (measured_3B > 0).all() and torch.equal(measured_3B, measured_3B[:, :1].expand_as(measured_3B))


def test_in_the_first_two_steps_it_is_rolling() -> None:
    generator = torch.Generator().manual_seed(4)
    first, second = step(even(), 0.02, generator), step(even(), 0.02, generator)
    known_X = second[:2].sum(0)
    for steps in ([], [first]):
        agreement, previous_X = run(steps)
        found, want = (e(known_X, 2, M, previous_X, agreement) for e in (adaptive, rolling))
        assert torch.allclose(found.counts_E / found.tokens, want.counts_E / want.tokens)
        assert float(found.step_tokens) == M * TOKENS and not agreement.values.isnan().any()
    agreement, previous_X = run([first, second])
    found, low, high = (e(known_X, 2, M, previous_X, agreement).counts_E for e in (adaptive, rolling, carry))
    share = found / found.sum()
    assert all((share - other / other.sum()).norm() > 0 for other in (low, high))


def test_after_a_resume_without_a_previous_step_it_is_rolling() -> None:
    known_X = torch.tensor([3, 5, 4])
    found = adaptive(known_X, 1, 4, torch.zeros(4, dtype=torch.int64), Agreement(torch.device("cpu")))
    want = rolling(known_X, 1, 4, None)
    assert torch.allclose(found.counts_E / found.tokens, want.counts_E / want.tokens)
    agreement = Agreement(torch.device("cpu"))
    agreement.observe(torch.tensor([[3, 5, 4], [1, 7, 4]]), torch.zeros(4, dtype=torch.int64))
    assert agreement.values.isfinite().all() and float(agreement.values[-1]) == 0


def test_a_complete_step_needs_no_expectation() -> None:
    generator = torch.Generator().manual_seed(5)
    agreement, previous_X = run([step(even(), 0.02, generator) for _ in range(3)])
    known_X = step(even(), 0.02, generator).sum(0)
    assert torch.equal(adaptive(known_X, M, M, previous_X, agreement).counts_E, known_X[:-1].double())
