"""Runs a function on several forked gloo ranks: four ranks take 0.1 s, where torchrun takes seconds.

The parent has imported torch already, so a rank costs only a fork. A rank that raises, hangs or dies ends the test
within its time limit. The report names the rank that failed first, not ranks that failed because they lost a peer.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives  # noqa: F401  (slow to import: once here, not once per rank)

#: seconds after the first failure in which other ranks may report an earlier one
GRACE_S = 0.3
#: how many times as long as they say tests may take, on a machine that runs others beside them
PATIENCE = float(os.environ.get("EQUIMOE_TEST_PATIENCE", "1"))


def run_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout: float = 60.0, detail: bool = False) -> list[Any]:
    """Call ``fn(rank, world, *args)`` on ``world`` forked ranks with an initialised gloo group.

    ``fn`` may be a closure; its results must be picklable, and are returned in rank order. ``timeout`` (seconds, times
    :data:`PATIENCE`) limits the whole call; after it, all ranks are killed. ``detail`` makes torch check that all ranks
    run the same collectives (``TORCH_DISTRIBUTED_DEBUG=DETAIL``).

    Raises AssertionError with the traceback of the rank that failed first, or with the stacks of all hanging ranks.
    """
    fork, timeout = multiprocessing.get_context("fork"), timeout * PATIENCE
    processes: list[Any] = []
    pipes: list[Connection] = []
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        try:
            for rank in range(world):
                here, there = fork.Pipe()
                process = fork.Process(
                    target=_rank_main, args=(there, fn, rank, world, args, Path(folder), timeout, detail)
                )
                process.start()
                there.close()  # close it before the next fork: a copy in another rank would hide this rank's death
                processes.append(process)
                pipes.append(here)
            return _gather(processes, pipes, Path(folder), time.monotonic() + timeout, timeout)
        finally:
            for process in processes:
                _kill(process.pid)
            for process in processes:
                process.join()
            for pipe in pipes:
                pipe.close()


def _gather(processes: list[Any], pipes: list[Connection], folder: Path, deadline: float, timeout: float) -> list[Any]:
    """Wait for one report per rank; raise for the first failure or at the deadline."""
    results: dict[int, Any] = {}
    failures: list[tuple[float, int, str]] = []  # (when, rank, what)
    while len(results) + len(failures) < len(pipes):
        done = results.keys() | {rank for _, rank, _ in failures}
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in done}
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            rank = waiting[pipe]  # type: ignore[index]
            try:
                ok, when, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except (EOFError, ConnectionResetError):
                processes[rank].join(5.0)
                # a rank's death causes what its peers report, so it sorts before their reports
                failures.append((0.0, rank, f"died without a report ({_exit_text(processes[rank].exitcode)})"))
                continue
            if ok:
                results[rank] = value
            else:
                failures.append((when, rank, value))
                deadline = min(deadline, time.monotonic() + GRACE_S)
        if failures:
            deadline = min(deadline, time.monotonic() + GRACE_S)
    if failures:
        raise AssertionError(_failure_text(sorted(failures), len(pipes)))
    if len(results) < len(pipes):
        missing = [rank for rank in range(len(pipes)) if rank not in results]
        raise AssertionError(_hang_text(missing, processes, folder, len(pipes), timeout))
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(
    pipe: Connection,
    fn: Callable[..., Any],
    rank: int,
    world: int,
    args: tuple[Any, ...],
    folder: Path,
    timeout: float,
    detail: bool,
) -> None:
    gc.freeze()  # a garbage collection would touch, and so copy, every page that is shared with the parent
    os.setsid()  # a process group for each rank, so that everything it starts can be killed with it
    _die_with_parent()
    with open(folder / f"stack-{rank}", "w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
        try:
            _join_group(rank, world, folder, timeout, detail)
            message = pickle.dumps((True, time.monotonic(), fn(rank, world, *args)))
        except BaseException:  # catch SystemExit and pytest's outcomes too: no rank may end without a report
            message = pickle.dumps((False, time.monotonic(), traceback.format_exc()))
        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.suppress(OSError):
            pipe.send_bytes(message)
            # stay connected until all ranks have reported: a rank that leaves makes its peers fail
            pipe.poll(None)
    os._exit(0)


def _join_group(rank: int, world: int, folder: Path, timeout: float, detail: bool) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    if any(name == "lo" for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host name of a container may not resolve
    if detail:
        dist.set_debug_level(dist.DebugLevel.DETAIL)
    limit = datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=limit)


def _die_with_parent() -> None:
    """Have the kernel kill this rank when the test process dies, because nobody else would clean up."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _kill(pid: int) -> None:
    for kill in (os.killpg, os.kill):  # the process group does not exist yet if the rank has only just been forked
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def _exit_text(code: int | None) -> str:
    if code is None:
        return "still exiting"
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _failure_text(failures: list[tuple[float, int, str]], world: int) -> str:
    (_, rank, what), *others = failures
    lines = [f"rank {rank} of {world} failed first: {what.rstrip()}"]
    lines += [f"afterwards rank {other}: {text.rstrip().splitlines()[-1]}" for _, other, text in others]
    return "\n".join(lines)


def _hang_text(missing: list[int], processes: list[Any], folder: Path, world: int, timeout: float) -> str:
    for rank in missing:
        with contextlib.suppress(ProcessLookupError):
            os.kill(processes[rank].pid, signal.SIGUSR1)
    time.sleep(GRACE_S)  # let the signal handlers write the stacks
    lines = [f"no result after {timeout} s from rank {', '.join(map(str, missing))} of {world}"]
    for rank in missing:
        stack = folder / f"stack-{rank}"
        lines.append(f"rank {rank} is at:\n{stack.read_text() if stack.exists() else '(has not started)'}")
    return "\n".join(lines)
