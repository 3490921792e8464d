"""Saves the checkpoints of a run, one at a time, while training goes on."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from . import ranks
from .files import free_bytes, remove
from .logical import State, logical
from .manifest import printable
from .retention import Retention
from .store import commit
from .tensors import DTYPES, Saved
from .writer import (
    STATE,
    LostFolderError,
    NonFiniteStateError,
    SaveError,
    ShardWriter,
    StagedPlanner,
    Stager,
    background_group,
)


class Saver:
    """Saves states in the background. At most one save is in flight. Every rank must call every method."""

    def __init__(self, keep_last: int) -> None:
        #: the newest ``keep_last`` valid checkpoints are kept
        self._retention = Retention(keep_last)
        self._stager: Stager | None = None
        self._flight: tuple[Future[Any], ShardWriter, Path] | None = None
        #: steps whose checkpoints have become complete since the loop last took them
        self.completed: list[int] = []
        #: says on rank 0 why the folder is not this run's any more; empty if it is
        self.guard: Callable[[], str] = lambda: ""

    def start(self, root: Path, step: int, state: State, position: dict[str, Any]) -> Path:
        """Begin to write ``state`` (logical name -> tensor or DTensor) and ``position`` (JSON) as ``root/step-...``.

        Waits for the save before. When this returns, the values have been copied and may change. Returns the path that
        the checkpoint will have. Raises what :meth:`wait` raises about the save before.
        """
        self.wait()
        for name, value in state.items():
            if value.dtype not in DTYPES:
                raise ValueError(f"{name}: a checkpoint cannot hold {value.dtype}; convert it first")
        if self._stager is None:
            self._stager = Stager(background_group())
            # DCP warns in its thread about a missing process group, which a run of one process does not need
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        final = root / f"step-{step:08d}"
        partial = root / f"{final.name}.tmp"

        def finish(tensors: dict[str, Saved], files: dict[str, dict[str, Any]]) -> None:
            commit(partial, final, step, position, tensors, files)
            self._retention.apply(root, final)

        writer = ShardWriter(partial, finish, self.guard)
        future = dcp.async_save(
            {STATE: {name: logical(name, value) for name, value in state.items()}},
            storage_writer=writer,
            planner=StagedPlanner(self._stager),
            async_stager=self._stager,
            process_group=self._stager.group,
        )
        self._flight = cast("Future[Any]", future), writer, final
        return final

    def check(self) -> None:
        """Raise what :meth:`wait` raises if the save in flight has ended on all ranks. Otherwise do nothing.

        Call it between two steps: all ranks then learn about a failed save in the same step.
        """
        if self._flight is None:
            return
        done = torch.tensor(int(self._flight[0].done()))
        if ranks.distributed():
            dist.all_reduce(done, dist.ReduceOp.MIN)
        if done:
            self.wait()

    def wait(self) -> None:
        """Wait for the save in flight, if any.

        Raises SaveError if it could not be written, LostFolderError if the folder is not this run's any more, and
        NonFiniteStateError if a tensor is not finite, on every rank.
        """
        if self._flight is None:
            return
        future, writer, final = self._flight
        error = future.exception()
        self._flight = None
        if error is None:
            self.completed.append(_step_of(final))
            return
        lost = ranks.gather(writer.guard())[0]
        failure = LostFolderError(lost) if lost else _failure(error, writer, final)
        _discard(writer)
        raise failure

    def settle(self, seconds: float) -> None:
        """Give the save in flight some time to end. For a run that ends with another error, which this never replaces.

        What a failed save has written is deleted.
        """
        if self._flight is None:
            return
        future, writer, final = self._flight
        try:
            error = future.exception(seconds)
        except (TimeoutError, CancelledError):
            return
        self._flight = None
        if error is None:
            self.completed.append(_step_of(final))
        else:
            _discard(writer)

    def close(self) -> None:
        """Wait for the save in flight, and leave the process group of saves."""
        try:
            self.wait()
        finally:
            if self._stager is not None and self._stager.group is not None:
                dist.destroy_process_group(self._stager.group)
            self._stager = None


def save(root: Path, step: int, state: State, position: dict[str, Any], keep_last: int) -> Path:
    """Save one checkpoint, see :meth:`Saver.start`, and wait for it. Every rank must call this."""
    saver = Saver(keep_last)
    try:
        return saver.start(root, step, state, position)
    finally:
        saver.close()


def _discard(writer: ShardWriter) -> None:
    """Delete what a failed save has written, on rank 0."""
    if ranks.rank() == 0 and not writer.guard():
        with contextlib.suppress(OSError):
            remove(writer.folder)


def _step_of(final: Path) -> int:
    return int(final.name.removeprefix("step-"))


def _failure(error: BaseException, writer: ShardWriter, final: Path) -> Exception:
    """Say in one line why a save failed: the reason of the lowest failed rank."""
    where, cause = "", error
    if isinstance(error, CheckpointException):
        rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
        where = f"rank {rank}: " if ranks.distributed() else ""
    if isinstance(cause, NonFiniteStateError):
        return NonFiniteStateError(f"{final}: not saved: {where}{cause}; resume from an earlier checkpoint")
    why = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause) or type(cause).__name__
    free = free_bytes(final.parent)
    sizes = [f"it needs {writer.total} bytes"] if writer.total else []
    sizes += [] if free is None else [f"{free} are free"]
    remedy = "; ".join([", ".join(sizes), "make room there or choose another --run-dir, and resume"])
    return SaveError(f"{final}: cannot be written: {where}{printable(why.splitlines()[0])}; {remedy}")
