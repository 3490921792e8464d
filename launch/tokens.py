"""Tokenises a run's text before its first step: once per folder, while the other ranks wait.

Rank 0 builds the store. If the folder of the stores is local to each node, the first rank of every node builds one.
"""

from __future__ import annotations

import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..moe.health import Heartbeat
from ..moe.observe.printable import printable
from ..moe.train.config import DataConfig
from ..moe.train.data import Corpus, Tokenizer, Wanted, load_corpus, load_tokenizer, wanted_store
from . import env
from .joining import Meeting, gathered, together

#: the folder of the stores in a run folder
TOKENS = "tokens"
#: seconds between reports of the rank that builds, and between looks of those that wait
REPORT_S, LOOK_S = 1.0, 0.1
#: most processes that tokenise
MOST = 16


def load(data: DataConfig, run_dir: Path, process: env.Process, meeting: Meeting, heartbeat: Heartbeat) -> Corpus:
    """Load the corpus on every rank, after its text has been tokenised. All ranks exit if one cannot."""
    cache = run_dir / TOKENS

    def look() -> tuple[Tokenizer, Wanted | None, bool]:
        tokenizer = load_tokenizer(data.tokenizer, data.end_of_document)
        wanted = wanted_store(data, tokenizer, cache)
        return tokenizer, wanted, wanted is None or wanted.complete

    tokenizer, wanted, complete = together(process, env.DATA, look)
    if not all(gathered(process, complete)):
        together(process, env.DATA, lambda: _prepare(wanted, process, meeting, heartbeat))
    return together(
        process, env.DATA, lambda: load_corpus(data, tokenizer, cache), "data", lambda found: found.fingerprint[:12]
    )


def _prepare(wanted: Wanted | None, process: env.Process, meeting: Meeting, heartbeat: Heartbeat) -> None:
    """Build the store, or wait for the rank that does."""
    if meeting.store is None:
        if wanted is not None:
            _build(wanted, process, Report(heartbeat, None, "", process.rank == 0))
        return
    # rank 0's mark tells who sees its folder
    mark = gathered(process, f".seen-{uuid.uuid4().hex}")[0]
    if wanted is not None and process.rank == 0:
        _mark(wanted, mark)
    gathered(process, None)
    sees = wanted is not None and (wanted.folder.parent / mark).exists()
    builder = 0 if sees else process.rank - process.local_rank
    gathered(process, None)
    if wanted is not None and process.rank == 0:
        with suppress(OSError):
            (wanted.folder.parent / mark).unlink(missing_ok=True)
    report = Report(heartbeat, meeting.store, f"{mark}/{builder}", process.rank == 0)
    if process.rank != builder:
        report.wait()
        return
    error = ""
    try:
        if wanted is not None and not wanted.complete:
            _build(wanted, process, report)
    except (ValueError, OSError) as problem:
        error = " ".join(str(problem).split())
        raise
    finally:
        report.end(error)


def _mark(wanted: Wanted, mark: str) -> None:
    with suppress(OSError):  # the build says what is wrong
        wanted.folder.parent.mkdir(parents=True, exist_ok=True)
        (wanted.folder.parent / mark).touch()


def _build(wanted: Wanted, process: env.Process, report: Report) -> None:
    if process.rank == 0:
        print(f"tokenising into {printable(str(wanted.folder))}; later starts read the tokens from there", flush=True)
    # the other ranks of the node have nothing to do meanwhile
    workers = min(env.available_cores(), MOST) if wanted.config.tokenizer != "bytes" else 1
    with report.told():
        wanted.build(workers, report, report.beat)
        load_corpus(wanted.config, wanted.tokenizer, wanted.folder.parent)  # keeps its fingerprint


class Report:
    """Shows how far a build is, to the user and to the ranks that wait: they must not take it for a hang."""

    def __init__(self, heartbeat: Heartbeat, store: Any, key: str, shows: bool) -> None:
        self._heartbeat, self._store, self._key = heartbeat, store, key
        self._bar = tqdm(unit="", unit_scale=True, leave=False, disable=None if shows and sys.stderr.isatty() else True)
        self._bar.set_description("reading")
        self._beats = 0

    # ---- the rank that builds

    def update(self, n: int) -> None:
        self._bar.update(n)
        self.beat()

    def reset(self, total: int | None = None) -> None:
        self._bar.reset(total)
        self._bar.set_description("merging")

    def beat(self) -> None:
        """Tell this rank's watch that it goes on, although it may seem to wait at one place."""
        self._beats += 1
        self._heartbeat.enter("setup", self._beats)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Within the block, a thread tells the others that this rank works: its own watch sees if it hangs."""
        done = threading.Event()

        def tell() -> None:
            times = 0
            while not done.wait(REPORT_S):
                times += 1
                self._tell(f"at {times}")

        thread = threading.Thread(target=tell, name="tokens", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self._bar.close()

    def end(self, error: str) -> None:
        """Let the others go on, or end with the same error."""
        self._tell(f"error {error}" if error else "done")
        self._heartbeat.enter("setup", 0)

    def _tell(self, text: str) -> None:
        if self._store is not None:
            self._store.set(self._key, text)

    # ---- the ranks that wait

    def wait(self) -> None:
        """Wait for the end of the build. Raises ValueError with the builder's error."""
        said = ""
        while said != "done":
            time.sleep(LOOK_S)
            if not self._store.check([self._key]):
                continue
            now = self._store.get(self._key).decode()
            if now.startswith("error "):
                raise ValueError(now.removeprefix("error "))
            if now != said:
                said, self._beats = now, self._beats + 1
                self._heartbeat.enter("setup", self._beats)
        self._heartbeat.enter("setup", 0)
