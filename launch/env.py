"""The process: its place among the ranks, its device, and how it ends."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")

#: exit codes, after sysexits.h
OWN = CONFIG, DISAGREEMENT, DATA, CHECKPOINT, NON_FINITE, CANNOT_WRITE = 64, 65, 66, 67, 70, 73

#: after a shell's 128 + SIGINT
INTERRUPTED = 130


@dataclass(frozen=True)
class Process:
    """This process among those that torchrun started; alone when nothing did."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    #: how often torchrun has started all of them anew after a failure
    restarts: int = 0

    @property
    def device(self) -> torch.device:
        """This rank's own GPU: the only one that it sees, or the one of its local rank. The CPU where there is no GPU.

        Raises ValueError where a machine has GPUs, but fewer than ranks: to train on the CPU then would be a surprise.
        """
        if not torch.cuda.is_available():
            return torch.device("cpu")
        visible = torch.cuda.device_count()
        if visible == 1:  # schedulers may give every rank its own
            return torch.device("cuda", 0)
        if visible < self.local_world or visible <= self.local_rank:
            raise ValueError(_too_many(self.local_world, f"sees {visible} GPUs"))
        return torch.device("cuda", self.local_rank)


def _too_many(processes: int, why: str) -> str:
    return (
        f"{processes} processes on a machine that {why}: start as many as it has GPUs (--nproc-per-node), "
        "or train on the CPU (CUDA_VISIBLE_DEVICES='')"
    )


def started() -> bool:
    """Whether torchrun, or something like it, has started this process as one of its ranks."""
    return "RANK" in os.environ


def this_process() -> Process:
    """Read torchrun's environment."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
    alone = ("0", "1", "0", "1", "0")
    return Process(*(int(os.environ.get(name, value)) for name, value in zip(names, alone, strict=True)))


@contextmanager
def joined(process: Process, timeout_s: float) -> Iterator[None]:
    """Be part of the default process group, when there is more than one process."""
    if process.world == 1:
        yield
        return
    timeout = timedelta(seconds=timeout_s)
    store, rank, world = next(rendezvous("env://", timeout=timeout))
    # a restarted attempt must not read the addresses that the one before left in the store
    store = dist.PrefixStore(f"attempt{process.restarts}", store)
    try:
        device = process.device
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.set_device(device)
            claim(device, process, store)
    except ValueError as problem:  # not all machines need have the same GPUs, so each says so itself
        stop(Process(rank=process.local_rank), CONFIG, str(problem))
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()


def claim(device: torch.device, process: Process, store: dist.Store) -> None:
    """Take a GPU for this rank. Raises ValueError when another rank of the machine has taken it: each may see one GPU,
    and all the same."""
    properties = torch.cuda.get_device_properties(device)
    name = f"gpu/{socket.gethostname()}/{getattr(properties, 'uuid', process.rank)}"
    if store.add(name, 1) > 1:
        raise ValueError(_too_many(process.local_world, "has one GPU for several of them"))


def start(processes: int, module: str, arguments: list[str]) -> NoReturn:
    """Run a module on this many ranks of this machine, as torchrun does, and end with the exit code of the rank that
    failed first.

    torchrun itself would always end with 1, and hide a rank's one line of error above some forty of its own.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.disable(logging.ERROR)  # what torchrun logs of a failure would come after the rank's line
    try:
        torchrun(["--standalone", f"--nproc-per-node={processes}", "-m", module, *arguments])
    except ChildFailedError as error:
        # after the first failure torchrun ends the other ranks by a signal, which says nothing
        for code in [failure.exitcode for failure in error.failures.values() if failure.exitcode in OWN]:
            sys.exit(code)
        rank, failure = error.get_first_failure()
        how = f"ended with exit code {failure.exitcode}; its traceback is above"
        if failure.exitcode < 0:
            how = f"was killed by {signal.Signals(-failure.exitcode).name}"
        print(f"error: rank {rank} {how}", file=sys.stderr, flush=True)
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
    except SignalException as error:
        print(f"error: stopped by {signal.Signals(error.sigval).name}", file=sys.stderr, flush=True)
        sys.exit(128 + error.sigval)
    sys.exit(0)


def stop(process: Process, code: int, message: str) -> NoReturn:
    """End with one line on stderr, from rank 0, and an exit code; for errors that every rank has found alike."""
    if process.rank == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # torchrun puts this line at the end of its own report
        report = {"message": f"error: {message}", "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(file).write_text(json.dumps({"message": report}))
    sys.exit(code)


def together(process: Process, code: int, work: Callable[[], T], fingerprint: Callable[[T], str] = lambda _: "") -> T:
    """Do ``work`` on every rank, and go on only if all succeeded and came to the same fingerprint.

    A ValueError or OSError on any rank ends all of them with ``code`` and that rank's message; different
    fingerprints with :data:`DISAGREEMENT`.
    """
    error, result = "", None
    try:
        result = work()
    except (ValueError, OSError) as problem:
        error = " ".join(str(problem).split())
    reports: list[tuple[str, str]] = [("", "")] * process.world
    mine = (error, "" if error else fingerprint(result))  # type: ignore[arg-type]
    if process.world > 1:
        dist.all_gather_object(reports, mine)
    else:
        reports = [mine]
    failed = [(rank, text) for rank, (text, _) in enumerate(reports) if text]
    if failed:
        everywhere = len(failed) == process.world and len({text for _, text in failed}) == 1
        stop(process, code, failed[0][1] if everywhere else f"rank {failed[0][0]}: {failed[0][1]}")
    others = [rank for rank, (_, seen) in enumerate(reports) if seen != reports[0][1]]
    if others:
        stop(process, DISAGREEMENT, f"ranks {others} read other data or configuration than rank 0; give all the same")
    return result  # type: ignore[return-value]
