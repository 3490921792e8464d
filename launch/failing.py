"""Decides what a rank prints and returns when a run fails, so that the rank with the cause says it, and only once.

When a rank fails, the others lose their connection to it a moment later. They stay quiet: their errors are only a
consequence.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TypeVar

import torch.distributed as dist

from ..moe import MoE
from ..moe.health import Heartbeat
from ..moe.observe.printable import printable
from ..moe.train.data import DataError
from ..moe.train.decisions import RecordError
from .env import (
    CANNOT_WRITE,
    DATA,
    FAILED,
    HANG,
    MEMORY,
    Process,
    code_in,
    end_agent,
    ignore_torchrun,
    leave,
    may_restart,
    record_exit,
    recorded_exit,
)
from .joining import Meeting
from .memory import is_out_of_memory, out_of_memory_line

T = TypeVar("T")

#: parts of the messages with which backends report that another rank has gone
LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Socket closed",
    "connectFullMesh",
    "Application timeout caused pair closure",
    "Timed out waiting",
    "remote process exited",
    "NCCL communicator was aborted",
)
#: seconds for the rank with the cause to report it, before another one says that it has lost a rank
PATIENCE_S = 2.0
#: seconds in which all ranks of a node get a signal that torchrun sends
SAME_SIGNAL_S = 0.5
#: seconds for which the rank that holds the store stays, so that others find that the end was reported
HOLDER_STAYS_S = 1.5
#: seconds for a rank whose part of the setup has failed to find out that all ranks' parts have
ALONE_S = 3.0
#: seconds between looks whether another rank has said why the run ends
LISTEN_S = 0.5


def classify(problem: Exception, layers: Mapping[int, MoE]) -> tuple[int, str]:
    """Return the exit code for an exception of a rank with these ``layers``, and what to say about it."""
    text = " ".join(str(problem).split())
    if is_out_of_memory(problem):
        return MEMORY, f"out of memory: {out_of_memory_line(problem, layers)}"
    if isinstance(problem, RecordError):
        return CANNOT_WRITE, text
    return (DATA, text) if isinstance(problem, DataError) else (FAILED, f"{type(problem).__name__}: {text}")


class Failure:
    """What happens on this rank when the run fails. ``heartbeat`` knows the step and the phase.

    ``known`` returns the exit code of an error that this class does not know, and what to say about it.
    """

    def __init__(
        self, process: Process, meeting: Meeting, known: Callable[[Exception], tuple[int, str] | None] = lambda _: None
    ) -> None:
        self.process, self.meeting, self.known = process, meeting, known
        self.heartbeat: Heartbeat | None = None
        #: this rank's MoE layers by block number, once they exist
        self.layers: Mapping[int, MoE] = {}
        #: the file of the run folder with the exit code; another rank may have written it
        self.verdict: Path | None = None
        #: whether this rank has reported the cause
        self._claimed = False
        #: held while a thread of this rank says why the run ends, or ends the rank because another one has
        self._saying = threading.Lock()
        #: ranks that keep the others waiting
        self._silent: list[int] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block, end this rank soon after another one has said why the run ends.

        Its collective need not fail before the store has gone, in which the reason is.
        """
        store, done = self.meeting.second, threading.Event()

        def listen(store: dist.Store) -> None:
            try:
                while not store.check(["cause"]):
                    if done.wait(LISTEN_S):
                        return
                rank, code = json.loads(store.get("cause"))
            except RuntimeError:  # the store has gone
                return
            if rank != self.process.rank and not done.wait(LISTEN_S):  # the main thread may notice by itself
                self._follow(rank, code)

        if store is not None:
            threading.Thread(target=listen, args=(store,), name="cause", daemon=True).start()
        try:
            yield
        finally:
            done.set()

    def alone(self, code: int, text: str) -> None:
        """End the run with this rank's error, unless all ranks report one within a moment.

        Otherwise, the others would wait for this one in a collective that it never reaches.
        """
        store, world = self.meeting.store, self.process.world
        if world == 1 or store is None:
            return
        _within(PATIENCE_S, lambda: store.set(f"failed/{self.process.rank}", ""))
        deadline = time.monotonic() + ALONE_S
        while time.monotonic() < deadline:
            if _within(PATIENCE_S, lambda: store.check([f"failed/{rank}" for rank in range(world)])):
                return
            time.sleep(0.05)
        ignore_torchrun(self.process)
        self._fail(code, printable(f"rank {self.process.rank}: {text}"))

    def hang(self, line: str, silent: list[int]) -> None:
        """End this rank, because nothing moves. Called by a thread; the main thread waits in a collective."""
        self._silent = silent
        first = min(rank for rank in range(self.process.world) if rank not in silent)
        if self.process.rank != first:  # it knows best; torchrun ends all ranks when the first one exits
            self._wait_for_cause()
        self._report(HANG, line, self.process.rank == first)
        self._kill_silent()
        _end(HANG)

    def error(self, problem: Exception) -> NoReturn:
        """End this rank after an exception."""
        ignore_torchrun(self.process)
        text = " ".join(str(problem).split())
        if _is_lost(problem):
            self._lost(text)
        code, what = self.known(problem) or classify(problem, self.layers)
        line = printable(f"rank {self.process.rank}{self._place()}: {what}")
        self._fail(code, line, problem if code == FAILED else None)

    def quietly(self, code: int) -> None:
        """Let all ranks end with ``code`` without a word."""
        if self._claim(code) is None:
            record_exit(self.process, code)
            self.stay()

    def stay(self) -> None:
        """Wait a moment if this rank holds the store, in which the others look for the reason why the run ends."""
        if self.process.world > 1 and self.process.rank == self.meeting.holder:
            time.sleep(HOLDER_STAYS_S)

    def say(self, code: int, line: str) -> bool:
        """Say that the run ends with ``code``, unless another rank has; return whether this one does."""
        return self._say(code, line, self.process.rank == 0) is None and (self._claimed or self.process.rank == 0)

    def restarting(self) -> bool:
        """Return whether torchrun may have sent this rank a signal because it restarts the run.

        It does after a rank was killed. If that was on another node, all ranks of this one get the signal.
        """
        store, own = self.meeting.store, self.meeting.places[self.process.rank][0]
        if self.killed():
            return True
        if store is None or all(host == own for host, _ in self.meeting.places):
            return False
        _within(PATIENCE_S, lambda: store.set(f"signalled/{self.process.rank}", ""))
        others = [r for r, (host, _) in enumerate(self.meeting.places) if host == own and r != self.process.rank]
        asked, deadline = [f"signalled/{r}" for r in others], time.monotonic() + SAME_SIGNAL_S
        while time.monotonic() < deadline:
            if self.killed() or bool(_within(PATIENCE_S, lambda: store.check(asked))):
                return True
            time.sleep(0.05)
        return False

    def killed(self) -> list[int]:
        """Return the other ranks of this node that have ended."""
        places = enumerate(self.meeting.places)
        return [rank for rank, (host, pid) in places if rank != self.process.rank and _has_ended(host, pid)]

    def end_after(self, killed: list[int]) -> NoReturn:
        """End this rank, which torchrun has asked to stop because others were killed. Called by a thread."""
        alive = [rank for rank in range(self.process.world) if rank not in killed]
        self._report(FAILED, self._ended(killed), self.process.rank == min(alive))
        _end(FAILED)

    def _ended(self, killed: list[int]) -> str:
        line = "; ".join(f"rank {r} (process {self.meeting.places[r][1]}) has ended without a word" for r in killed)
        return f"rank {self.process.rank}{self._place()}: {line}, as if it was killed"

    def _place(self) -> str:
        return "" if self.heartbeat is None else f", step {self.heartbeat.step}, phase {self.heartbeat.phase}"

    def _follow(self, rank: int | None, code: int) -> NoReturn:
        """End this rank, because ``rank`` has said why the run ends (None: an unknown one)."""
        self._saying.acquire()  # for good: one thread ends this rank
        if may_restart(self.process, code):  # the rank with the cause tells its own torchrun
            per_node = self.process.local_world
            told = rank is not None and rank // per_node == self.process.rank // per_node
            end_agent(self.process, code, tells=self.process.local_rank == 0 and not told)
        self._kill_silent()
        _end(code)

    def _lost(self, text: str) -> NoReturn:
        """End this rank because another one has gone: quietly, if that one has said why."""
        beat = self.heartbeat
        hung = beat is not None and beat.stalled > 0.9 * beat.limit(beat.phase)
        gone = self._wait_for_cause()
        alive = [rank for rank in range(self.process.world) if rank not in gone]
        line = f"rank {self.process.rank}{self._place()}: lost the connection to another rank ({text[:200]})"
        code = HANG if hung else FAILED
        # without the store, the first rank that is left speaks for all
        self._report(code, self._ended(gone) if gone else line, self.process.rank == min(alive))
        _end(code)

    def _wait_for_cause(self) -> list[int]:
        """Give another rank time to say what has happened, and end if one does; return the ranks that have ended."""
        deadline, gone = time.monotonic() + PATIENCE_S, []
        while time.monotonic() < deadline:
            cause = self._cause()
            if cause is not None:
                self._follow(*cause)
            gone = [rank for rank, (host, pid) in enumerate(self.meeting.places) if _has_ended(host, pid)]
            time.sleep(0.1)
        return gone

    def _fail(self, code: int, line: str, problem: Exception | None = None) -> NoReturn:
        """Say that this rank's error ends the run, and end it."""
        self._report(code, line, True, problem)
        self.stay()
        _end(code, self.process, line)

    def _report(self, code: int, line: str, speaks: bool, problem: Exception | None = None) -> None:
        """Say why the run ends, or end this rank if another one has. ``problem`` is shown with its traceback."""
        first = self._say(code, line, speaks, problem)
        if first is not None:
            self._follow(*first)

    def _say(
        self, code: int, line: str, speaks: bool, problem: Exception | None = None
    ) -> tuple[int | None, int] | None:
        """Say why the run ends, unless another rank has: return its number and exit code.

        Without the store, the rank that ``speaks`` does. The threads of a rank take turns.
        """
        with self._saying:
            first = self._claim(code)
            if first is None and (self._claimed or speaks):
                record_exit(self.process, code)
                print(f"error: {line}", file=sys.stderr, flush=True)
                if problem is not None:
                    traceback.print_exception(problem, file=sys.stderr)
            return first

    def _kill_silent(self) -> None:
        """Kill the ranks of this machine that do not react, for which torchrun would wait half a minute.

        It must not see that they have ended before the reason is said.
        """
        for rank in self._silent:
            host, pid = self.meeting.places[rank]
            if host == socket.gethostname() and rank != self.process.rank:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)

    # ---- the cause, in the store that all ranks share, or in the run folder if the store's holder has ended

    def _claim(self, code: int) -> tuple[int | None, int] | None:
        """Report this rank as the cause; return rank and exit code of the one that was first, None if this one was.

        None, too, if neither the store nor the run folder tells, because the store's holder was killed.
        """
        store, own = self.meeting.store, json.dumps([self.process.rank, code])
        if store is None:
            return None
        found = _within(PATIENCE_S, lambda: store.compare_set("cause", "", own))
        self._claimed = found is not None and found.decode() == own
        if self._claimed:
            return None
        return self._written() if found is None else json.loads(found)

    def _cause(self) -> tuple[int | None, int] | None:
        store = self.meeting.store
        if store is None:
            return None
        found = _within(PATIENCE_S, lambda: store.get("cause") if store.check(["cause"]) else None)
        return self._written() if found is None else json.loads(found)

    def _written(self) -> tuple[None, int] | None:
        """Return the exit code that another rank has left on this node, or in the run folder."""
        found = recorded_exit(self.process)
        if found is None and self.verdict is not None:
            found = code_in(self.verdict)
        return None if found is None else (None, found)


def _end(code: int, process: Process | None = None, line: str = "") -> NoReturn:
    """End the process at once, so that the other ranks notice. Leaving torch's groups would wait for them."""
    try:
        if process is not None:
            leave(process, code, line, alone=True)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _within(limit_s: float, work: Callable[[], T]) -> T | None:
    """Return the result of ``work``; None if it fails or takes too long, as a store does that has ended."""
    found: list[T] = []

    def run() -> None:
        with contextlib.suppress(RuntimeError):
            found.append(work())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    return found[0] if found else None


def _is_lost(problem: Exception) -> bool:
    return isinstance(problem, dist.DistError) or (
        isinstance(problem, RuntimeError) and any(part in str(problem) for part in LOST)
    )


def _has_ended(host: str, pid: int) -> bool:
    """Return whether a process of this machine has ended; False for those of other machines."""
    if host != socket.gethostname():
        return False
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return Path("/proc/self/stat").exists()
    except OSError:
        return False
