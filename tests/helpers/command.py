"""Runs a command, usually ``equimoe.launch.train``, on forked ranks as torchrun does, without seconds of imports."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

import equimoe.launch.page as page
import equimoe.launch.train as train
from tests.helpers.fork import PATIENCE

Main = Callable[[list[str]], None]
Within = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Ended:
    """How the ranks ended: exit codes, seconds, and the output of each."""

    codes: list[int]
    seconds: float
    out: list[str]
    err: list[str]

    @property
    def errors(self) -> list[str]:
        """All lines of all ranks' stderr."""
        return [line for text in self.err for line in text.splitlines()]


def one_line(ended: Ended, code: int, *words: str) -> None:
    """Assert that all ranks ended with ``code``, soon, and that one line, with these words, says why."""
    assert ended.codes == [code] * len(ended.codes), ended
    assert len(ended.errors) == 1 and all(word in ended.errors[0] for word in words), ended.errors
    assert ended.seconds < 30


def launch(
    argv: list[str],
    world: int = 1,
    cwd: Path | None = None,
    timeout: float = 60.0,
    within: Within = nullcontext,
    main: Main = train.main,
) -> Ended:
    """Call a command's ``main`` on ``world`` ranks, in the context that ``within`` returns.

    A rank that does not finish in time gets the exit code -9. Reports have no figures, whose drawing takes seconds.
    """
    fork, start, port = multiprocessing.get_context("fork"), time.monotonic(), _free_port()
    with tempfile.TemporaryDirectory(prefix="command-") as folder:
        ranks = [
            fork.Process(target=_main, args=(main, argv, rank, world, port, folder, cwd, within))
            for rank in range(world)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(max(0.0, start + timeout * PATIENCE - time.monotonic()))
            if rank.is_alive():
                rank.kill()
                rank.join()
        texts = [[Path(folder, f"{kind}{r}").read_text() for r in range(world)] for kind in ("out", "err")]
    return Ended([rank.exitcode for rank in ranks], time.monotonic() - start, *texts)


def print_to(writer: int) -> None:
    """Connect this rank's stdout and stderr to a pipe."""
    for descriptor in (1, 2):
        os.dup2(writer, descriptor)
    os.close(writer)
    _open_streams()


def _open_streams() -> None:
    sys.stdout, sys.stderr = (os.fdopen(d, "w", buffering=1, closefd=False) for d in (1, 2))


def _main(
    main: Main, argv: list[str], rank: int, world: int, port: int, folder: str, cwd: Path | None, within: Within
) -> None:
    gc.freeze()
    torch.set_num_threads(1)
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ["OMP_NUM_THREADS"] = "1"
    for descriptor, kind in ((1, "out"), (2, "err")):
        file = os.open(f"{folder}/{kind}{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
    _open_streams()
    if cwd is not None:
        os.chdir(cwd)
    with mock.patch.object(page, "PLOTS", ()), within():
        main(argv)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
