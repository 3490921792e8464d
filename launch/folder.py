"""The lock of a run folder: only one job at a time writes to it.

The file ``lock`` names the host and the process that holds the folder. Rank 0 holds it with flock, which the kernel
releases however the process ends, and renews the file's time every few seconds, for hosts that flock does not reach.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..moe.observe.printable import printable
from .env import start_time

LOCK = "lock"
#: seconds between renewals, and without one until a lock of another host counts as abandoned
RENEW_S, STALE_S = 5.0, 20.0
#: seconds for a holder on this host that is about to end
ENDING_S = 3.0


class RunLock:
    """Holds a run folder until :meth:`release`. ``agents`` identify the torchruns of the job."""

    def __init__(self, run_dir: Path, agents: Sequence[str]) -> None:
        """Take the lock, creating the folder if needed. Raises ValueError if another job has it or on failure.

        Nothing is written before :meth:`confirm`, so a job that is refused later leaves no trace.
        """
        self.run_dir, self.path, self.agents = run_dir, run_dir / LOCK, sorted(agents)
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise ValueError(f"{self.path}: is a link, which is not followed; delete it") from None
            why = error.strerror or error
            raise ValueError(f"run_dir={str(run_dir)!r}: cannot be written ({why}); choose another folder") from None
        self._record: dict[str, Any] | None = None
        self._done = threading.Event()
        try:
            exclusive = self._flock()
            #: what the previous holder wrote
            self.previous = self._read()
            self._check_previous(exclusive)
        except BaseException:
            os.close(self._file)
            raise

    @property
    def continues(self) -> bool:
        """Whether one of these torchruns also started the job that held the lock before."""
        before = self.previous.get("agents")
        return isinstance(before, list) and any(agent in before for agent in self.agents)

    def confirm(self) -> None:
        """Write who holds the folder, and keep the file's time new."""
        self._record = {"host": socket.gethostname(), "pid": os.getpid(), "process": start_time(os.getpid())}
        self._record |= {"agents": self.agents, "ended": False}
        self._write()
        threading.Thread(target=self._renew, name="run folder's lock", daemon=True).start()

    def lost(self) -> str:
        """Say that the folder is not the one that was locked any more; empty if it still is."""
        try:
            held, there = os.fstat(self._file), os.stat(self.path, follow_symlinks=False)
            if (there.st_dev, there.st_ino) == (held.st_dev, held.st_ino):
                return ""
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError:  # the file system has another problem, which the save will name
            return ""
        what = "was moved, deleted or replaced while the run used it"
        return f"run_dir={str(self.run_dir)!r}: {what}; put it back, and add --resume to continue from its checkpoints"

    def release(self) -> None:
        """Give the folder back."""
        self._done.set()
        if self._record is not None:
            self._record["ended"] = True
            self._write()
        os.close(self._file)

    def _flock(self) -> bool:
        """Take the lock of the file system; return False if it has none."""
        deadline = time.monotonic() + ENDING_S
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ValueError(self._in_use(self._read())) from None
                time.sleep(0.1)
            except OSError:
                return False

    def _check_previous(self, exclusive: bool) -> None:
        """Raise ValueError if the holder before this one still runs; otherwise say that it has been lost."""
        before = self.previous
        if not before or before.get("ended"):
            return
        here = before.get("host") == socket.gethostname()
        if here and not exclusive and start_time(_number(before.get("pid"))) == before.get("process", ""):
            raise ValueError(self._in_use(before))
        if not here and not self._abandoned():
            raise ValueError(self._in_use(before))
        if self.continues:
            return
        holder = f"process {before.get('pid')} on {before.get('host')}"
        note = printable(f"{self.run_dir} was held by {holder}, which has ended; taking it over")
        print(f"note: {note}", file=sys.stderr, flush=True)

    def _abandoned(self) -> bool:
        """Return whether the lock of another host is not renewed any more. This may take some seconds to find out."""
        seen, age = os.fstat(self._file).st_mtime_ns, self._age()
        deadline = time.monotonic() + STALE_S - age
        while time.monotonic() < deadline:
            time.sleep(0.2)
            if self._modified() != seen:
                return False
        return True

    def _age(self) -> float:
        """Seconds since the lock was renewed, by the clock of the file system."""
        probe = self.run_dir / f".{LOCK}.{os.getpid()}"
        try:
            probe.touch()
            age = probe.stat().st_mtime - os.fstat(self._file).st_mtime
            return max(age, 0.0)  # the clock may have been set back since
        except OSError:
            return 0.0
        finally:
            probe.unlink(missing_ok=True)

    def _modified(self) -> int:
        return os.stat(self.path, follow_symlinks=False).st_mtime_ns

    def _in_use(self, holder: dict[str, Any]) -> str:
        return (
            f"run_dir={str(self.run_dir)!r}: is in use by process {holder.get('pid', '?')} on "
            f"{holder.get('host', 'another host')}; stop that job, or choose another --run-dir"
        )

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(os.pread(self._file, 1 << 20, 0))
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self) -> None:
        content = json.dumps(self._record).encode()
        try:
            os.pwrite(self._file, content, 0)
            os.ftruncate(self._file, len(content))
        except OSError:
            pass  # a full disk; flock still holds the folder

    def _renew(self) -> None:
        while not self._done.wait(RENEW_S):
            try:
                os.utime(self._file)
            except OSError:
                continue


def _number(value: Any) -> int:
    return value if isinstance(value, int) else -1
