"""Signals that ask a rank to stop, and the death of its torchrun."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from .env import FAILED, Process, end_agent, is_ending, is_launcher, may_restart, record_exit, under_torchrun

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
#: seconds in which a repeated signal is the same request: schedulers signal ranks and torchrun, which forwards it
REPEATED_S = 1.0
#: seconds between looks at the parent process
LOOK_S = 1.0
#: prctl's option for the signal that a process gets when its parent ends
PR_SET_PDEATHSIG = 1


class Signals:
    """Records the first signal, so that the loop can save and stop; ends the process at the second.

    Before training (``graceful`` is False) there is nothing to save, and the first signal ends the process. A thread
    receives the signals, because Python runs no handler while the main thread waits in a collective.
    """

    def __init__(self, process: Process) -> None:
        self.process, self.graceful = process, False
        #: whether all steps have been trained, so that nothing is left to stop
        self.finished = False
        #: says that the run ends at once, with an exit code and a line; returns whether this rank is the one that does
        self.say: Callable[[int, str], bool] = self._say_alone
        #: waits until the other ranks have read why the run ends
        self.stay: Callable[[], None] = lambda: None
        #: returns whether torchrun may have sent the signal because it restarts the run
        self.restarting: Callable[[], bool] = lambda: True
        #: returns the other ranks that have ended, after which torchrun asks those that are left to stop
        self.killed: Callable[[], list[int]] = self._missing
        #: ends this rank after others were killed
        self.end_after: Callable[[list[int]], NoReturn] = self._end_after_missing
        #: the signal that asked this rank to stop; 0: none
        self.number = 0
        self._since = 0.0
        self._parent = _bind_to_parent()

    def __enter__(self) -> Signals:
        self._before: dict[int, object] = {}
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may handle signals
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as after nohup
                self._before[number] = signal.signal(number, lambda *_: None)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            if signal.getsignal(number) is not signal.SIG_IGN:  # the process is about to end
                signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._wakeup)
        os.write(self._writer, b"\0")
        self._thread.join()
        os.close(self._reader)
        os.close(self._writer)

    def _listen(self) -> None:
        while True:
            if select.select([self._reader], [], [], LOOK_S)[0]:
                for number in os.read(self._reader, 64):
                    if not number:
                        return
                    if number in self._before:
                        self._receive(number)
            elif self._parent and os.getppid() != self._parent:
                os._exit(128 + signal.SIGKILL)  # torchrun was killed

    def _receive(self, number: int) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGTERM and self._parent and is_ending(self.process):
            if not self.graceful:
                os._exit(128 + number)  # another rank has said why
            return  # the next collective fails
        killed = self.killed() if number == signal.SIGTERM and self._parent else []
        if killed and not self.graceful:
            self.end_after(killed)
        elif killed:
            return  # the next collective fails, and the rank says why
        if not self.number:
            self.number, self._since = number, time.monotonic()
            if self.finished:
                return  # the rank ends in a moment
            if self.graceful:
                grace = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")  # --shutdown-timeout is not visible here
                limit = f"; torchrun ends ranks after {grace} s" if self._parent else ""
                if self.process.rank == 0:
                    text = f"{name}: saving after this step, then stopping; send it again to end at once{limit}"
                    print(text, file=sys.stderr, flush=True)
            else:
                self._end(number, f"stopped by {name} before the first step; nothing is lost")
        elif time.monotonic() - self._since > REPEATED_S:
            self._end(number, f"ended at once by a second {name}; the newest checkpoint is the last one saved")

    def _end(self, number: int, text: str) -> None:
        code = 128 + number
        speaks = self.say(code, text)
        if may_restart(self.process, code) and not self.restarting():
            end_agent(self.process, code, tells=speaks)
        self.stay()
        os._exit(code)

    def _missing(self) -> list[int]:
        """Return -1 for each rank of this node that has ended: which ones is unknown before all have joined."""
        return [-1] * (self.process.local_world - len(_children(self._parent)))

    def _end_after_missing(self, _: list[int]) -> NoReturn:
        if os.getpid() == min(_children(self._parent)):
            record_exit(self.process, FAILED)
            why = "another rank of this node has ended before all had joined"
            print(f"error: rank {self.process.rank}: {why}", file=sys.stderr, flush=True)
        os._exit(FAILED)

    def _say_alone(self, code: int, text: str) -> bool:
        """Say why the run ends before the ranks know each other."""
        if self.process.rank > 0:
            return False
        record_exit(self.process, code)
        print(f"error: {text}", file=sys.stderr, flush=True)
        return True


def _children(pid: int) -> list[int]:
    """Return the running child processes of a process."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, parent = file.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(file.parent.name))
    return found


def _bind_to_parent() -> int:
    """Make this rank end when its torchrun does; return torchrun's process id, or 0 without torchrun."""
    if not under_torchrun():
        return 0
    parent = os.getppid()
    if sys.platform == "linux":  # reaches also a rank that is stopped
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent or not is_launcher(parent):  # torchrun was killed while this process started
        why = f"its parent, process {os.getppid()}, is not torchrun"
        remedy = "if torchrun runs, let a script in between start this command with exec"
        print(f"error: rank {os.environ['RANK']}: {why}; {remedy}", file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGKILL)
    return parent
