"""The harness that runs distributed tests must itself report a rank that raises, hangs or dies."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.helpers.fork import PATIENCE, run_ranks
from tests.helpers.slow import slow_but


def sum_of_ranks(rank: int, world: int, scale: float) -> torch.Tensor:
    x = torch.full((3,), scale * (rank + 1))
    dist.all_reduce(x)
    return x


def own_pid_then(action: str, culprit: int, path: str, rank: int) -> None:
    """Write this rank's process id to ``path``, then misbehave on the rank ``culprit``."""
    Path(path, str(rank)).write_text(str(os.getpid()))
    dist.barrier()
    if rank == culprit:
        if action == "raise":
            raise KeyError("lost expert")
        if action == "exit":
            raise SystemExit(3)
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if action == "hang":
            time.sleep(3600)
    dist.all_reduce(torch.ones(1))


def misbehave(rank: int, world: int, action: str, culprit: int, path: str) -> None:
    own_pid_then(action, culprit, path, rank)


def assert_all_gone(path: str, world: int) -> None:
    pids = [int(Path(path, str(rank)).read_text()) for rank in range(world)]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_results_come_back_in_rank_order(world: int) -> None:
    results = run_ranks(sum_of_ranks, world, 2.0)
    assert len(results) == world
    for x in results:
        assert torch.equal(x, torch.full((3,), float(world * (world + 1))))
    assert run_ranks(lambda rank, world: rank * 10, world) == [rank * 10 for rank in range(world)]


def test_garbage_collections_of_a_rank_leave_out_what_the_parent_holds() -> None:
    """Else each would visit everything that pytest and torch keep, which takes longer than most tests."""
    held = [[i] for i in range(20_000)]
    assert max(run_ranks(lambda rank, world: len(gc.get_objects()), 2)) < len(held) < len(gc.get_objects())


def test_parameters_that_are_not_named_as_fast_are_slow() -> None:
    found = slow_but([2, ("a", 4)], [1, 2, ("a", 3), ("a", 4)])
    assert [(of.values, [mark.name for mark in of.marks]) for of in found] == [
        ((1,), ["slow"]),
        ((2,), []),
        (("a", 3), ["slow"]),
        (("a", 4), []),
    ]
    with pytest.raises(AssertionError, match=r"\[3\] are not among the values"):
        slow_but([1, 3], [1, 2])


def test_a_result_keeps_its_dtype_and_size() -> None:
    x = torch.randn(1 << 18).bfloat16()  # larger than a pipe's buffer
    back = run_ranks(lambda rank, world: x + rank, 2)
    assert torch.equal(back[0], x) and torch.equal(back[1], x + 1)


def test_ranks_can_run_backward_after_the_parent_did() -> None:
    def gradient(rank: int, world: int) -> torch.Tensor:
        w = torch.ones(4, requires_grad=True)
        (w * (rank + 1)).sum().backward()
        assert w.grad is not None
        dist.all_reduce(w.grad)
        return w.grad

    w = torch.ones(2, requires_grad=True)
    w.pow(2).sum().backward()
    assert torch.equal(run_ranks(gradient, 2)[0], torch.full((4,), 3.0))


@pytest.mark.parametrize("culprit", [0, 2])
def test_the_first_failing_rank_is_reported(culprit: int, tmp_path) -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError, match=rf"(?s)rank {culprit} of 3 failed first: Traceback.*KeyError: 'lost"):
        run_ranks(misbehave, 3, "raise", culprit, str(tmp_path))
    assert time.monotonic() - start < 10
    assert_all_gone(str(tmp_path), 3)


def test_sys_exit_in_a_rank_is_a_failure(tmp_path) -> None:
    with pytest.raises(AssertionError, match="(?s)rank 1 of 2 failed first: .*SystemExit: 3"):
        run_ranks(misbehave, 2, "exit", 1, str(tmp_path))


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_dying_rank_is_reported(culprit: int, tmp_path) -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError, match=rf"rank {culprit} of 3 failed first: died without a report \(SIGKILL\)"):
        run_ranks(misbehave, 3, "kill", culprit, str(tmp_path))
    assert time.monotonic() - start < 10
    assert_all_gone(str(tmp_path), 3)


def test_a_hanging_rank_is_reported_with_its_stack(tmp_path) -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError, match="no result after 3.0 s from rank 0, 1 of 2") as error:
        run_ranks(misbehave, 2, "hang", 1, str(tmp_path), timeout=3.0 / PATIENCE)
    assert 3.0 <= time.monotonic() - start < 10
    stack = str(error.value).split("rank 1 is at:")[1]
    assert "own_pid_then" in stack and "test_fork_harness.py" in stack
    assert_all_gone(str(tmp_path), 2)


def test_a_rank_that_cannot_be_interrupted_is_killed(tmp_path) -> None:
    def stop(rank: int, world: int) -> None:
        (tmp_path / str(rank)).write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)

    with pytest.raises(AssertionError, match="no result after 1.0 s"):
        run_ranks(stop, 2, timeout=1.0 / PATIENCE)
    assert_all_gone(str(tmp_path), 2)


def test_what_a_rank_started_is_killed_with_it(tmp_path) -> None:
    def start_sleeper(rank: int, world: int) -> None:
        sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
        (tmp_path / str(rank)).write_text(str(sleeper.pid))
        raise RuntimeError("leaves a process behind")

    with pytest.raises(AssertionError, match="leaves a process behind"):
        run_ranks(start_sleeper, 1)
    pid = int((tmp_path / "0").read_text())
    for _ in range(50):  # whoever adopts the orphan has to reap it
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        with open(f"/proc/{pid}/stat") as stat:
            if stat.read().rsplit(")", 1)[1].split()[0] == "Z":
                return
        time.sleep(0.1)
    pytest.fail(f"process {pid} is still running")


def test_detail_names_mismatched_collectives() -> None:
    def mismatch(rank: int, world: int) -> None:
        dist.all_reduce(torch.ones(4 if rank else 8))

    with pytest.raises(AssertionError, match="Detected mismatch between collectives"):
        run_ranks(mismatch, 2, timeout=20.0, detail=True)


def test_poison_reaches_every_way_to_empty_memory(poison) -> None:
    x = torch.ones(2)
    for y in (torch.empty(3), torch.empty_like(x), x.new_empty(2, 2), torch.empty(2, dtype=torch.bfloat16)):
        assert y.isnan().all()
    assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).min).all()
    assert torch.empty(2, dtype=torch.bool).all()
    assert torch.empty(2, device="meta").is_meta
    assert poison(torch.zeros(2)).isnan().all()
