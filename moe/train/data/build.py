"""Tokenises the documents of a path into a store, in one process or several, and goes on after a kill.

Documents are tokenised in chunks, each of which becomes a run in a file. When all are there, the runs are merged. The
chunks depend only on the documents, and the merged order only on their digests, so the store has the same bytes
whatever the number of processes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any, Protocol

from ...config import require
from ..config import DataConfig
from . import store
from .document import Document
from .ends import Ends
from .runs import Files, Run, read_run, sorted_run, tokenised, write_run
from .sources import Found, check_ids, documents, find
from .store import Flat
from .token_file import DataError
from .tokenizer import Tokenizer, load_tokenizer

#: characters of documents that are tokenised together
CHUNK = 1 << 24
#: settings that decide what a store holds, besides the files and the tokenizer
OPTIONS = ("domain_by", "text_field", "domain_field", "token_dtype")
#: seconds between looks at a store that another process builds
POLL_S = 0.5


class Progress(Protocol):
    """Shows how far a build is; a progress bar of tqdm is one."""

    def update(self, n: int, /) -> Any:
        """Add characters that were read, or documents that were merged."""

    def reset(self, total: int | None = None) -> Any:
        """Begin the next part."""


@dataclass
class Wanted:
    """A store that a configuration asks for."""

    config: DataConfig
    tokenizer: Tokenizer
    found: Found
    #: where it is, or is to be
    folder: Path
    #: what its manifest says about its sources; equal if and only if the store can be used
    about: dict[str, Any]

    @property
    def manifest(self) -> dict[str, Any]:
        """What the store says about itself, if it is there."""
        return store.manifest_of(self.folder) or {}

    @property
    def complete(self) -> bool:
        """Whether the store is there, and is the one that is asked for."""
        return all(self.manifest.get(name) == value for name, value in self.about.items())

    def build(
        self, workers: int = 1, progress: Progress | None = None, waiting: Callable[[], None] = lambda: None
    ) -> None:
        """Build the store if it is not there; ``waiting`` is called while another process builds it.

        Raises ValueError for documents that cannot be read, and if the folder cannot be written or holds other things.
        """
        try:
            with _held(self.folder, self.about["key"], waiting) as building:
                if not self.complete:
                    _build(self, building, workers, progress)
        except OSError as error:
            why = f"cannot be written ({error.strerror or error})"
            raise DataError(f"data.cache={str(self.folder)!r}: {why}; choose another folder") from None


def wanted(config: DataConfig, tokenizer: Tokenizer, found: Found, folder: Path, within: bool = True) -> Wanted:
    """Describe the store of what was ``found``: in ``folder``, or ``within`` it under a name of its own."""
    read = found.sizes()
    options = {name: getattr(config, name) for name in OPTIONS}
    identity = {"name": config.tokenizer, "identity": tokenizer.identity, "end_of_document": tokenizer.end_of_document}
    root = os.path.abspath(os.path.expanduser(config.path or ""))
    content = [store.VERSION, root, read, options, tokenizer.identity, tokenizer.vocab_size]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    about = {"key": key, "path": root, "tokenizer": identity, "options": options}
    return Wanted(config, tokenizer, found, folder / key[:12] if within else folder, about)


@contextmanager
def _held(folder: Path, key: str, waiting: Callable[[], None]) -> Iterator[Path]:
    """Within the block, no other process builds this store; yield the folder to build it in."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = folder.with_name(f".{folder.name}.building")
    building.mkdir(exist_ok=True)
    lock = os.open(building / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waiting()
                time.sleep(POLL_S)
            except OSError:  # the file system has no locks: nobody else may build here
                building = folder.with_name(f".{folder.name}.building.{os.uname().nodename}.{os.getpid()}")
                break
        building.mkdir(exist_ok=True)  # the process that held it before may have finished it
        plan = building / "plan"
        if not plan.exists() or plan.read_text() != f"{key} {CHUNK}":
            for entry in building.iterdir():
                if entry.name != "lock":
                    entry.unlink()
            plan.write_text(f"{key} {CHUNK}")
        yield building
    finally:
        os.close(lock)


def _build(wanted: Wanted, building: Path, workers: int, progress: Progress | None) -> None:
    notes = wanted.found.notes()
    flat: list[Flat] = []
    chunks = _chunks(documents(wanted.found, notes), wanted, flat, notes, progress)
    stems: list[Path] = []
    with _Tokenisers(wanted, workers) as tokenisers:
        first = 0
        files = Files()
        for chunk in chunks:
            stem = building / f"run-{len(stems):07}"
            stems.append(stem)
            if read_run(stem, wanted.tokenizer.vocab_size, files) is None:
                tokenisers.add(chunk, first, stem)
            first += len(chunk)
    runs = [run for stem in stems if (run := read_run(stem, wanted.tokenizer.vocab_size, files)) is not None]
    if len(runs) < len(stems):
        raise DataError(f"data.cache={str(building)!r}: has lost a file while it was written; start again")
    check_some(runs, flat, wanted.config, notes)
    if progress is not None:
        progress.reset(sum(len(run.index) for run in runs))
    finished = building / "store"
    shutil.rmtree(finished, ignore_errors=True)
    finished.mkdir()
    store.write(finished, runs, flat, wanted.about, notes, wanted.tokenizer, progress)
    _put(finished, wanted.folder)
    shutil.rmtree(building, ignore_errors=True)


def _put(finished: Path, folder: Path) -> None:
    """Give a store its name; one that was there before goes."""
    old = folder.with_name(f".{folder.name}.old.{os.getpid()}")
    with suppress(FileNotFoundError):
        if any(folder.iterdir()) and store.manifest_of(folder) is None:
            raise DataError(f"data.cache={str(folder)!r}: holds other files; give another folder")
        folder.rename(old)
    finished.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def check_some(runs: list[Run], flat: list[Flat], config: DataConfig, notes: list[str]) -> None:
    """Raise ValueError if there are no tokens."""
    if not any(len(run.index) for run in runs) and not flat:
        remedy = "give UTF-8 text, .jsonl, .parquet, .arrow, or .bin, .tokens or .npy token files"
        raise ValueError(f"data.path={config.path!r}: {'; '.join(['no text found', *notes, remedy])}")


def memory_runs(
    found: Iterator[Document], config: DataConfig, tokenizer: Tokenizer, flat: list[Flat], notes: list[str]
) -> list[Run]:
    """Tokenise documents in this process, without files."""
    parts = [tokenised(document, tokenizer) for document in texts(found, config, tokenizer, flat, notes)]
    return [sorted_run([part for part in parts if len(part.ids)], 0, tokenizer.vocab_size)]


def texts(
    found: Iterator[Document], config: DataConfig, tokenizer: Tokenizer, flat: list[Flat], notes: list[str]
) -> Iterator[Document]:
    """Yield the documents with text or ids, add flat token files to ``flat``, and remarks about ids to ``notes``.

    Raises ValueError for ids outside the vocabulary.
    """
    root = Path(config.path or "").expanduser()
    folder = root.parent if root.is_file() else root
    end = tokenizer.end_of_document
    ends = Ends(end)
    for document in found:
        ids = document.ids if document.tokens is None else document.tokens
        if ids is not None and len(ids):
            path = str(folder / document.name)
            ends.add(document.name, ids, check_ids(ids, path, tokenizer.vocab_size, config.tokenizer, end))
            if document.tokens is not None:
                tokens = document.tokens.below(tokenizer.vocab_size)
                flat.append(Flat(document.domain, document.name, path, tokens))
        if document.size:
            yield document
    notes += ends.notes()


def _chunks(
    found: Iterator[Document], wanted: Wanted, flat: list[Flat], notes: list[str], progress: Progress | None
) -> Iterator[list[Document]]:
    """Yield the documents in chunks of at least :data:`CHUNK` characters."""
    chunk: list[Document] = []
    size = 0
    for document in texts(found, wanted.config, wanted.tokenizer, flat, notes):
        chunk.append(document)
        size += document.size
        if progress is not None:
            progress.update(document.size)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


# ---- processes


class _Tokenisers:
    """Tokenises chunks and writes their runs: in this process, or in ``workers`` others, which end with it."""

    def __init__(self, wanted: Wanted, workers: int) -> None:
        self._tokenizer, self._waiting, self._most = wanted.tokenizer, deque[Future[None]](), 2 * workers
        self._pool = None
        if workers > 1 and wanted.config.tokenizer != "bytes":  # bytes are tokenised faster than they are sent
            name = (wanted.config.tokenizer, wanted.config.end_of_document)
            self._pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin, name)

    def __enter__(self) -> _Tokenisers:
        return self

    def add(self, chunk: list[Document], first: int, stem: Path) -> None:
        """Tokenise a chunk whose documents are numbered from ``first``; returns before that is done."""
        if self._pool is None:
            _write(self._tokenizer, chunk, first, stem)
            return
        while len(self._waiting) >= self._most:
            self._finish()
        self._waiting.append(self._pool.submit(_work, chunk, first, stem))

    def _finish(self) -> None:
        try:
            self._waiting.popleft().result()
        except BrokenProcessPool:
            what = "a process that tokenises was killed, perhaps because the memory is full"
            raise DataError(f"{what}; start again with fewer workers; finished parts are not repeated") from None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            while self._waiting and error is None:
                self._finish()
        finally:
            if self._pool is not None:
                self._pool.shutdown(wait=error is None, cancel_futures=True)


#: the tokenizer of a worker process
_own: list[Tokenizer] = []


def _begin(name: str, end_of_document: str | None) -> None:
    """Prepare a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (connection.wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _own.append(load_tokenizer(name, end_of_document))


def _work(chunk: list[Document], first: int, stem: Path) -> None:
    _write(_own[0], chunk, first, stem)


def _write(tokenizer: Tokenizer, chunk: list[Document], first: int, stem: Path) -> None:
    parts = [tokenised(document, tokenizer) for document in chunk]
    write_run(sorted_run(parts, first, tokenizer.vocab_size), stem)


def open_path(config: DataConfig, tokenizer: Tokenizer, cache: Path | None) -> Wanted | Found | Path:
    """Return what to do for ``config.path``: a store to build or read, data to keep in memory, or the store it is."""
    path = Path(config.path or "").expanduser()
    if path.is_dir() and store.manifest_of(path) is not None:
        return path
    cache = cache if config.cache is None else Path(config.cache).expanduser()
    require(
        cache is None or not cache.is_file(), "data.cache", str(cache), "is a file; give a folder, which may be new"
    )
    found = find(config, cache)
    if cache is None or found.short:
        return found
    return wanted(config, tokenizer, found, cache)


def wanted_store(config: DataConfig, tokenizer: Tokenizer, cache: Path | None) -> Wanted | None:
    """Return the store that ``load_corpus`` with the same arguments reads; None if it needs none, or is given one."""
    source = None if config.path is None else open_path(config, tokenizer, cache)
    return source if isinstance(source, Wanted) else None


def store_at(config: DataConfig, tokenizer: Tokenizer, folder: Path) -> Wanted:
    """Return the store of ``config.path`` that is to be in ``folder`` itself. Raises ValueError if others are there."""
    if folder.exists() and store.manifest_of(folder) is None and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"data.cache={str(folder)!r}: holds other files; give a new or an empty folder")
    return wanted(config, tokenizer, find(config, folder), folder, within=False)
