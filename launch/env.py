"""The process environment: ranks, devices, the process group, and exit codes."""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import NoReturn, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ..moe.observe.printable import printable
from .output import lasting_output

P = ParamSpec("P")
T = TypeVar("T")

#: exit code that shells use if nobody reads the output: 128 + SIGPIPE
UNREAD = 141

#: exit codes, following sysexits.h, of processes that have said why they end, or need not
CONFIG, DISAGREEMENT, DATA, CHECKPOINT, NON_FINITE, CANNOT_WRITE, HANG, MEMORY = 64, 65, 66, 67, 70, 73, 75, 77
OWN = CONFIG, DISAGREEMENT, DATA, CHECKPOINT, NON_FINITE, CANNOT_WRITE, HANG, MEMORY, UNREAD

#: exit code that shells use after SIGINT: 128 + 2
INTERRUPTED = 130


def command(main: Callable[P, T]) -> Callable[P, T]:
    """Let a command's ``main`` end quietly when nobody reads its output any more, as in ``... --help | head``."""

    @wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            with lasting_output():
                try:
                    return main(*args, **kwargs)
                finally:
                    sys.stdout.flush()
        except BrokenPipeError:
            if not _is_unread():
                raise  # another pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at exit
            sys.exit(UNREAD)

    return run


def _is_unread() -> bool:
    output = select.poll()
    output.register(sys.stdout, 0)  # errors are reported without being asked for
    return any(event & select.POLLERR for _, event in output.poll(0))


@dataclass(frozen=True)
class Process:
    """This process's place among the ranks that torchrun started. The defaults describe a process on its own."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    #: torchrun's restart count
    restarts: int = 0

    @property
    def device(self) -> torch.device:
        """This rank's GPU: the only visible one, or the one at its local rank. Without GPUs, the CPU.

        Raises ValueError if the machine has GPUs but fewer than ranks, instead of silently training on the CPU.
        """
        if not torch.cuda.is_available():
            return torch.device("cpu")
        visible = torch.cuda.device_count()
        if visible == 1:  # some schedulers show each rank only its own GPU
            return torch.device("cuda", 0)
        if visible < self.local_world or visible <= self.local_rank:
            raise ValueError(_too_many(self.local_world, f"sees {visible} GPUs"))
        return torch.device("cuda", self.local_rank)


def _too_many(processes: int, why: str) -> str:
    return (
        f"{processes} processes on a machine that {why}: start one process per GPU (--nproc-per-node), "
        "or train on the CPU (CUDA_VISIBLE_DEVICES='')"
    )


def started() -> bool:
    """Return whether torchrun, or a compatible launcher, started this process as a rank."""
    return "RANK" in os.environ


def this_process() -> Process:
    """Read this process's place from torchrun's environment variables."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
    alone = ("0", "1", "0", "1", "0")
    return Process(*(int(os.environ.get(name, value)) for name, value in zip(names, alone, strict=True)))


@contextmanager
def joined(process: Process, timeout_s: float) -> Iterator[None]:
    """Within the block, join the default process group if there is more than one process."""
    if process.world == 1:
        yield
        return
    timeout = timedelta(seconds=timeout_s)
    store, rank, world = next(rendezvous("env://", timeout=timeout))
    # a restarted attempt must not read the addresses that the previous attempt left in the store
    store = dist.PrefixStore(f"attempt{process.restarts}", store)
    try:
        device = process.device
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.set_device(device)
            claim(device, process, store)
    except ValueError as problem:  # machines may have different GPUs, so local rank 0 of each prints its own error
        stop(Process(rank=process.local_rank), CONFIG, str(problem))
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()


def claim(device: torch.device, process: Process, store: dist.Store) -> None:
    """Reserve a GPU for this rank. Raises ValueError if another rank of the machine has reserved the same one.

    This happens if every rank sees a single GPU, and it is the same GPU for all.
    """
    properties = torch.cuda.get_device_properties(device)
    name = f"gpu/{socket.gethostname()}/{getattr(properties, 'uuid', process.rank)}"
    if store.add(name, 1) > 1:
        raise ValueError(_too_many(process.local_world, "has one GPU for several of them"))


#: for the ranks of a CPU: threads that wait give their core to others, and large tensors use huge pages
CPU_SETTINGS = {"OMP_WAIT_POLICY": "passive", "THP_MEM_ALLOC_ENABLE": "1"}


def start(processes: int, module: str, arguments: list[str]) -> NoReturn:
    """Run a module on ``processes`` local ranks with torchrun, and exit with the code of the rank that failed first.

    torchrun itself always exits with 1, and buries a rank's one-line error under some forty lines of its own.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    for name, value in CPU_SETTINGS.items():
        os.environ.setdefault(name, value)
    logging.disable(logging.ERROR)  # torchrun's failure log would follow the rank's own error line
    try:
        torchrun(["--standalone", f"--nproc-per-node={processes}", "-m", module, *arguments])
    except ChildFailedError as error:
        # torchrun kills the other ranks with a signal, so only our own exit codes identify the cause
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
    """Print one line to stderr on rank 0 and exit with ``code``. For errors that every rank has detected."""
    message = printable(message)
    if process.rank == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # torchrun shows this message at the end of its report
        report = {"message": f"error: {message}", "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(file).write_text(json.dumps({"message": report}))
    sys.exit(code)


def together(process: Process, code: int, work: Callable[[], T], fingerprint: Callable[[T], str] = lambda _: "") -> T:
    """Run ``work`` on every rank; return its result if it succeeded everywhere with the same fingerprint.

    A ValueError or OSError on any rank makes all ranks exit with ``code`` and that rank's message. Different
    fingerprints make them exit with :data:`DISAGREEMENT`.
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
        stop(process, DISAGREEMENT, f"ranks {others}: data or configuration differ from rank 0; give all the same")
    return result  # type: ignore[return-value]
