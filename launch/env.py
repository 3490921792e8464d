"""The process environment: a rank's place, its device, torchrun, and exit codes."""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import NoReturn, ParamSpec, TypeVar

import torch

from ..moe.observe.metrics import write_atomically
from ..moe.observe.printable import printable
from .output import lasting_output

P = ParamSpec("P")
T = TypeVar("T")

#: file of the run folder with the exit code of a failed run, because torchrun always exits with 1
EXIT_FILE = "exit_code"
#: variables that name files for it: the user's, and the one of ``start``
EXIT_FILES = ("EQUIMOE_EXIT_FILE", "EQUIMOE_START_EXIT_FILE")
#: exit code that shells use if nobody reads the output: 128 + SIGPIPE
UNREAD = 141

#: exit code of a rank that ends with a traceback
FAILED = 1
#: exit codes, following sysexits.h, of processes that have said why they end, or need not
CONFIG, DISAGREEMENT, DATA, CHECKPOINT, NON_FINITE, CANNOT_WRITE, HANG, MEMORY = 64, 65, 66, 67, 70, 73, 75, 77
#: exit codes after a signal, as shells use them: 128 + its number
STOPPED = tuple(128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM))
#: seconds for which ranks wait until another one has told torchrun to end
TOLD_S = 10.0
#: after these, the same command would fail again or was asked to end, so torchrun must not restart the run
FINAL = (CONFIG, DISAGREEMENT, DATA, CHECKPOINT, NON_FINITE, CANNOT_WRITE, MEMORY, *STOPPED)
OWN = (*FINAL, HANG, UNREAD)


class Refused(ValueError):
    """An error whose exit code is not that of a wrong option."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def code_of(error: ValueError) -> int:
    """Return the exit code of an error: ``CONFIG``, unless it knows another one."""
    return error.code if isinstance(error, Refused) else CONFIG


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
    #: torchrun's restart count on this node, and its limit
    restarts: int = 0
    max_restarts: int = 0
    #: files that receive the exit code, because torchrun always exits with 1
    exit_files: tuple[Path, ...] = ()

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
            raise ValueError(too_many(self.local_world, f"sees {visible} GPUs"))
        return torch.device("cuda", self.local_rank)


def too_many(processes: int, why: str) -> str:
    """Return the message about a machine with more processes than GPUs."""
    return (
        f"{processes} processes on a machine that {why}: start one process per GPU (--nproc-per-node), "
        "or train on the CPU (CUDA_VISIBLE_DEVICES='')"
    )


def started() -> bool:
    """Return whether torchrun, or a compatible launcher, started this process as a rank."""
    return "RANK" in os.environ


def under_torchrun() -> bool:
    """Return whether torchrun itself started this process as a rank. Its variable alone is left of something else."""
    return started() and "TORCHELASTIC_RUN_ID" in os.environ


#: the variables of a rank, and the launchers' names for the optional one
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LOCAL_WORLD = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")


def this_process() -> Process:
    """Read this process's place from torchrun's environment variables.

    Raises ValueError if they are incomplete or contradict each other, as those of an earlier session do.
    """
    files = tuple(Path(file) for file in map(os.environ.get, EXIT_FILES) if file)
    given = [name for name in PLACE[:3] if name in os.environ]
    if not given:
        return Process(exit_files=files)
    needed = PLACE[:3] if os.environ.get("WORLD_SIZE") == "1" else PLACE  # a single rank meets nobody
    lacking = [name for name in needed if name not in os.environ]
    if lacking:
        raise ValueError(
            f"{given[0]}={os.environ[given[0]]}: is set, but {', '.join(lacking)} not; start ranks with torchrun, "
            f"which sets all of them, or unset {', '.join(given)}"
        )
    local_name = next((name for name in LOCAL_WORLD if name in os.environ), None)
    rank, world, local_rank = (_number(name) for name in PLACE[:3])
    port = _number("MASTER_PORT", None if world > 1 else "1")
    local_world = 1 if local_name is None else _number(local_name)
    # (variable, its value, whether it fits, what it must be)
    checks = [
        ("WORLD_SIZE", world, world >= 1, "at least 1"),
        ("RANK", rank, 0 <= rank < world, f"in 0..{world - 1}, because WORLD_SIZE={world}"),
        ("MASTER_PORT", port, 1 <= port < 1 << 16, "in 1..65535"),
    ]
    if local_name is not None:
        last = f"in 0..{local_world - 1}, because {local_name}={local_world}"
        checks.append(
            (local_name, local_world, 1 <= local_world <= world, f"in 1..{world}, because WORLD_SIZE={world}")
        )
        checks.append(("LOCAL_RANK", local_rank, 0 <= local_rank < local_world, last))
    for name, value, fits, must in checks:
        if not fits:
            raise ValueError(f"{name}={value}: must be {must}; start ranks with torchrun, or unset {', '.join(PLACE)}")
    restarts, most = (_number(f"TORCHELASTIC_{name}", "0") for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return Process(rank, world, local_rank, local_world, restarts, most, files)


def threads(process: Process) -> int:
    """Return the number of threads that this process computes with. Raises ValueError if OMP_NUM_THREADS is wrong."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    first = given.split(",")[0].strip()  # the numbers after it are those of nested loops
    if not given.strip():
        return max(1, available_cores() // process.local_world)
    if not (first.isascii() and first.isdigit() and len(first) < 5 and int(first) > 0):
        raise ValueError(f"OMP_NUM_THREADS={given}: must begin with a whole number in 1..9999, or be unset")
    return int(first)


def available_cores() -> int:
    """Return the number of CPU cores that this process may use, which is often less than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _number(name: str, default: str | None = None) -> int:
    text = os.environ[name] if default is None else os.environ.get(name, default)
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}={text}: must be a whole number; start ranks with torchrun, or unset it") from None


#: launcher -> its variables with the number of processes that it started
LAUNCHERS = {
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
    "mpirun": ("OMPI_COMM_WORLD_SIZE",),
    "mpiexec": ("PMI_SIZE",),
}


def check_launcher(processes: int | None) -> None:
    """Raise ValueError if another launcher has started several processes, which would all train the same run.

    ``processes`` is the option of that name. A batch script of Slurm may use it; there, SLURM_NTASKS is only what the
    job has asked for.
    """
    for launcher, names in LAUNCHERS.items():
        name = next((name for name in names if os.environ.get(name, "").isdigit()), None)
        if name is None or int(os.environ[name]) < 2:
            continue
        in_step = "SLURM_STEP_ID" in os.environ or os.environ.get("SLURM_PROCID", "0") != "0"
        if launcher == "srun" and ("SLURM_PROCID" not in os.environ or (processes and not in_step)):
            continue
        raise ValueError(
            f"{name}={os.environ[name]}: {launcher} starts the training command itself; let it start one torchrun per "
            "node, as launch/slurm/train.sbatch does, or add --processes to a command of the batch script"
        )


#: for the ranks of a CPU: threads that wait give their core to others, and large tensors use huge pages
CPU_SETTINGS = {"OMP_WAIT_POLICY": "passive", "THP_MEM_ALLOC_ENABLE": "1"}

#: for torchrun: ranks get this many seconds to save after a signal
SHUTDOWN_SETTINGS = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120"}
#: for a torchrun that restarts ranks: every attempt gets a store of its own, too
AGENT_SETTINGS = SHUTDOWN_SETTINGS | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def start(processes: int, module: str, arguments: list[str]) -> NoReturn:
    """Run a module on ``processes`` local ranks with torchrun, and exit with the code of the rank that failed first.

    torchrun itself always exits with 1, and buries a rank's one-line error under some forty lines of its own. It never
    restarts the ranks here, so they use its store: the port of another one could be taken before rank 0 opens it.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    for name, value in (CPU_SETTINGS | SHUTDOWN_SETTINGS).items():
        os.environ.setdefault(name, value)
    logging.disable(logging.ERROR)  # torchrun's failure log would follow the rank's own error line
    with tempfile.TemporaryDirectory(prefix="equimoe-") as folder:
        said = Path(folder, EXIT_FILE)
        os.environ[EXIT_FILES[1]] = str(said)
        try:
            torchrun(["--standalone", f"--nproc-per-node={processes}", "-m", module, *arguments])
        except ChildFailedError as error:
            failures = {rank: failure.exitcode for rank, failure in error.failures.items()}
            code, line = verdict(failures, code_in(said))
            if line:
                print(f"error: {line}", file=sys.stderr, flush=True)
            sys.exit(code)
        except SignalException as error:
            finished = code_in(said) == 0
            sys.exit(0 if finished else 128 + error.sigval)  # the ranks have said how to go on
    sys.exit(0)


def verdict(failures: Mapping[int, int], recorded: int | None) -> tuple[int, str]:
    """Return the exit code of a run, and a line that says why it ended; empty if a rank has said it.

    ``failures`` maps ranks to their exit codes, as far as torchrun has seen them. It ends the others after the first
    one, and may have seen only those, or a rank that another one has killed. ``recorded`` is what a rank has recorded.
    """
    causes = {rank: code for rank, code in failures.items() if abs(code) % 128 != signal.SIGTERM}
    rank, code = min((causes or failures).items(), key=lambda item: item[1])  # those that were killed first
    for known in (recorded, *causes.values()):
        if known in OWN:
            return known, ""
    if recorded and (code > 0 or not causes):
        return recorded, ""
    if code < 0:
        return 128 - code, f"rank {rank} was killed by {signal.Signals(-code).name}"
    return code, f"rank {rank} ended with exit code {code}; its traceback is above"


def stop(
    process: Process, code: int, message: str, printer: int = 0, meet: Callable[[], bool] | None = None
) -> NoReturn:
    """Print one line to stderr on rank ``printer`` and exit with ``code``. Every rank must call this.

    ``meet`` returns once the line has been printed, on all ranks: torchrun ends them all when the first one exits. If
    it returns False, the first of the other ranks prints the line. Without it, ranks that print nothing wait a moment.
    """
    ignore_torchrun(process)
    message = printable(message)
    if process.rank == printer:
        print(f"error: {message}", file=sys.stderr, flush=True)
    if meet is not None and process.world > 1:
        first_other = 1 if printer == 0 else 0
        if not meet() and process.rank == first_other:
            print(f"error: {message}", file=sys.stderr, flush=True)
    elif process.rank != printer and process.world > 1:
        time.sleep(0.3)
    leave(process, code, message)


def leave(process: Process, code: int, message: str, alone: bool = False) -> NoReturn:
    """Exit with ``code``; tell it to torchrun and to ``process.exit_files``. The message has been printed.

    torchrun is told not to restart the run if that would not help: by the first rank of each node, or by this one if it
    is ``alone`` in leaving.
    """
    ignore_torchrun(process)
    record_exit(process, code)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # torchrun shows this message at the end of its report
        report = {"message": f"error: {message} (exit code {code})", "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):  # torchrun fails on a file that is not complete
            write_atomically(Path(file), json.dumps({"message": report}).encode())
    if may_restart(process, code):
        end_agent(process, code, tells=alone or process.local_rank == 0)
    sys.exit(code)


def ignore_torchrun(process: Process) -> None:
    """Go on when torchrun asks this rank to end, as it does when another one has ended: this one is about to."""
    if (process.world > 1 or under_torchrun()) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def record_exit(process: Process, code: int) -> None:
    """Write the exit code to the files that were asked for, and to one for the other ranks of this node."""
    shared = [_shared(process, "exit")] if "TORCHELASTIC_ERROR_FILE" in os.environ else []
    for file in (*process.exit_files, *shared):
        with suppress(OSError):  # nothing may hide the error itself
            if file.name != EXIT_FILE and (file.is_symlink() or (file.exists() and not file.is_file())):
                file.write_text(f"{code}\n")  # a user's pipe, device or link, such as /dev/stdout
            else:
                write_atomically(file, f"{code}\n".encode())


def recorded_exit(process: Process) -> int | None:
    """Return the exit code that a rank of this node has recorded in this attempt; None if none has."""
    return code_in(_shared(process, "exit")) if "TORCHELASTIC_ERROR_FILE" in os.environ else None


def code_in(file: Path) -> int | None:
    """Return the exit code that a file holds; None if it holds none."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def may_restart(process: Process, code: int) -> bool:
    """Return whether torchrun would restart a run that must not be restarted after this exit code."""
    return code in FINAL and process.restarts < process.max_restarts


def end_agent(process: Process, code: int, tells: bool) -> None:
    """Have this node's torchrun end, instead of restarting a run that exits with ``code``; one rank ``tells`` it to.

    The others of the node wait until it has been told: it would restart all ranks if one exited before.
    """
    agent = os.getppid()
    if not is_launcher(agent):
        return
    if tells:
        os.kill(agent, code - 128 if code in STOPPED else signal.SIGTERM)
        with suppress(OSError):  # a full disk: the others wait as long as they may
            _shared(process, "end").touch()
        return
    deadline = time.monotonic() + TOLD_S
    while not agent_told(process) and time.monotonic() < deadline:
        time.sleep(0.02)


def agent_told(process: Process) -> bool:
    """Return whether a rank has told this node's torchrun to end."""
    return _shared(process, "end").exists()


def is_ending(process: Process) -> bool:
    """Return whether a rank of this node has said why the run ends, so that torchrun asks all ranks to."""
    return agent_told(process) or recorded_exit(process) is not None


def _shared(process: Process, what: str) -> Path:
    """Return a file of this attempt for the ranks of this node, which outlives the rank that writes it."""
    reports = os.environ.get("TORCHELASTIC_ERROR_FILE")  # in a folder of this rank, below that of the attempt
    folder = Path(reports).parents[1] if reports else Path(tempfile.gettempdir())
    agent = os.getppid()
    return folder / f"equimoe-{what}-{agent}-{start_time(agent)}-{process.restarts}"


def start_time(pid: int) -> str:
    """Return when a process started, because numbers of processes are used again; empty if unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def is_launcher(pid: int) -> bool:
    """Return whether a process is one that starts ranks; True if its command line is unknown.

    A rank that has lost its torchrun belongs to another process, usually the system's first.
    """
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True
    return b"torch" in command or b"equimoe" in command
