"""Experts shared out among threads give what one thread gives, bit for bit.

PyTorch itself stays at one thread here (a process whose OpenMP threads have run cannot fork); only the count that
the workers see is patched.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from equimoe.kernels.expert_mlp import expert_mlp, loop, workers
from equimoe.kernels.sort_by_expert import sort_by_expert


@pytest.fixture(autouse=True)
def at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_WORTH_WORKERS", 1)


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(workers, "_threads", lambda: 3)
    threads = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == threads


def make(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """The arguments of one call, and those among them that take gradients."""
    x_SD = torch.randn(150, 24).to(dtype).requires_grad_()
    weights_SK = torch.rand(150, 2).requires_grad_()
    gate_up_EFD, down_EDF = ((torch.randn(*s) / 5).to(dtype).requires_grad_() for s in ((9, 32, 24), (9, 24, 16)))
    order = sort_by_expert(torch.randint(-1, 9, (150, 2)), 9)
    return [x_SD, weights_SK, order, gate_up_EFD, down_EDF], [x_SD, weights_SK, gate_up_EFD, down_EDF]


def run(arguments: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    y_SD = expert_mlp(*arguments)
    return [y_SD.detach(), *torch.autograd.grad(y_SD, leaves, torch.ones_like(y_SD).cos())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, leaves = make(dtype)
    alone = run(arguments, leaves)
    names: set[str] = set()
    mm = torch.mm

    def traced(*args: Tensor, **kwargs: Tensor) -> Tensor:
        names.add(threading.current_thread().name)
        return mm(*args, **kwargs)

    monkeypatch.setattr(torch, "mm", traced)
    for count in (2, 3):
        monkeypatch.setattr(workers, "_threads", lambda count=count: count)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(alone, run(arguments, leaves), strict=True))
    assert len(names) >= 2 and threading.current_thread().name not in names, "the workers did it"


@pytest.mark.usefixtures("three")
def test_without_gradients_and_in_inference_mode() -> None:
    arguments, _ = make(torch.float32)
    expected = expert_mlp(*arguments).detach()
    with torch.no_grad():
        assert torch.equal(expert_mlp(*arguments), expected)
    with torch.inference_mode():
        assert torch.equal(expert_mlp(*arguments), expected)


@pytest.mark.usefixtures("three")
def test_dispatch_modes_see_every_product() -> None:
    arguments, leaves = make(torch.float32)
    kept = int(arguments[2].offsets_E[-1])
    with FlopCounterMode(display=False) as counter:
        run(arguments, leaves)
    assert counter.get_total_flops() == 3 * 2 * kept * 3 * 24 * 16


@pytest.mark.usefixtures("three")
def test_an_error_in_a_worker_arrives() -> None:
    def work(items: Sequence[int]) -> None:
        if 4 in items:
            raise RuntimeError("worker 4")

    with pytest.raises(RuntimeError, match="worker 4"):
        workers.each(range(6), [1] * 6, work)


@pytest.mark.usefixtures("three")
def test_workers_leave_the_thread_setting_of_others_alone() -> None:
    inside: list[int] = []
    workers.each(range(6), [1] * 6, lambda items: inside.append(torch.get_num_threads()))
    assert inside == [1, 1, 1]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=20), count=st.integers(2, 5))
def test_share_out(sizes: list[int], count: int) -> None:
    items = list(range(len(sizes)))
    parts = workers.share_out(items, sizes, count)
    if parts is None:  # only where a fair share was out of reach: the largest item is a good part of it
        assert max(sizes) * count > 0.15 * sum(sizes)
        return
    assert sorted(item for part in parts for item in part) == items
    assert max(sum(sizes[i] for i in part) for part in parts) <= workers._SLACK * sum(sizes) / count


def test_small_layers_stay_in_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_WORTH_WORKERS", 150 * 2 * 3 * 24 * 16 + 1)
    monkeypatch.setattr(loop, "each", lambda *_: pytest.fail("shared out"))
    run(*make(torch.float32))


def test_one_busy_expert_is_not_shared_out() -> None:
    assert workers.share_out(["a", "b"], [100, 1], 2) is None
    assert workers.share_out(["a", "b"], [100, 100], 2) == [["a"], ["b"]]
