"""Reads the sequences of the next steps in other processes, while the current step is computed."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from . import reading
from .packing import Batches
from .stream import described
from .token_file import DataError

#: steps that are read ahead
STEPS = 4

Found = tuple[np.ndarray, "np.ndarray | None"]


class Ahead:
    """Takes the place of the reader of ``batches``: what was expected comes from processes, all else is read at once.

    Streams that are in memory need no processes. The processes end with this object, and with this process.
    """

    def __init__(self, batches: Batches, workers: int) -> None:
        self._batches, self._next = batches, 0
        self._workers: list[_Worker] = []
        #: what was asked for -> who reads it, oldest first
        self._asked: dict[bytes, _Worker] = {}
        #: sequences -> what was asked for them
        self._known: dict[tuple[int, ...], bytes] = {}
        try:
            streams = {"ids": list(map(described, batches.streams)), "masks": list(map(described, batches.masks))}
        except ValueError:
            return
        self._workers = [_Worker(json.dumps(streams)) for _ in range(workers)]
        if self._workers:
            batches.fetch = self.fetch

    def expect(self, steps: Sequence[Sequence[int]]) -> None:
        """Begin to read the sequences of the next steps, of each of which this rank reads these."""
        if not self._workers:
            return
        known: dict[tuple[int, ...], bytes] = {}
        for numbers in map(tuple, steps):
            known[numbers] = self._known.get(numbers) or self._ask(numbers)
        self._known = known

    def _ask(self, numbers: tuple[int, ...]) -> bytes:
        places = np.stack(self._batches.places(numbers), axis=1)
        key = places.tobytes()
        if key not in self._asked:
            worker = self._workers[self._next % len(self._workers)]
            self._next += 1
            self._asked[key] = worker
            worker.ask(key, len(places), self._batches.seq_len + 1)
        return key

    def fetch(self, domain_B: np.ndarray, start_B: np.ndarray, size: int) -> Found:
        """Return the ids and masks of these places, see :meth:`Batches.read_streams`."""
        key = np.stack((domain_B, start_B), axis=1).tobytes()
        worker = self._asked.pop(key, None)
        found = None if worker is None else worker.answer(key, len(domain_B), size)
        for skipped in [k for k, w in self._asked.items() if k not in w.asked]:  # of a step that was not taken
            del self._asked[skipped]
        return self._batches.read_streams(domain_B, start_B, size) if found is None else found

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.close()
        self._workers, self._batches.fetch = [], self._batches.read_streams


class _Worker:
    """One process, and a thread that receives what it has read."""

    def __init__(self, streams: str) -> None:
        program = [sys.executable, str(Path(reading.__file__).resolve())]
        env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
        assert process.stdin is not None and process.stdout is not None
        self.process, self._requests = process, process.stdin
        #: what the process still has to read, in order
        self.asked: deque[bytes] = deque()
        self._answers: queue.SimpleQueue[tuple[int, bytes] | None] = queue.SimpleQueue()
        threading.Thread(target=_receive, args=(process.stdout, self._answers), name="reading", daemon=True).start()
        self.close = weakref.finalize(self, _end, process)
        self._write(streams.encode() + b"\n")

    def _write(self, content: bytes) -> None:
        try:
            self._requests.write(content)
            self._requests.flush()
        except (BrokenPipeError, ValueError):
            pass  # its end is seen when its answer is read

    def ask(self, places: bytes, count: int, size: int) -> None:
        """Ask for sequences."""
        self.asked.append(places)
        self._write(reading.HEADER.pack(count, size) + places)

    def answer(self, places: bytes, count: int, size: int) -> Found | None:
        """Wait for what was asked for, and drop what was asked for before; None if the process has ended."""
        while self.asked:
            asked, got = self.asked.popleft(), self._answers.get()
            if got is None:
                self.asked.clear()
                self._answers.put(None)
                return None
            kind, raw = got
            if asked != places:
                continue
            if kind == reading.ERROR:
                raise DataError(raw.decode(errors="replace"))
            ids = np.frombuffer(raw, np.uint32, count * size).reshape(count, size)
            masks = np.frombuffer(raw, np.uint8, offset=ids.nbytes) if kind == reading.IDS_AND_MASKS else None
            return ids, None if masks is None else masks.reshape(count, size)
        return None


def _receive(answers: IO[bytes], into: queue.SimpleQueue[tuple[int, bytes] | None]) -> None:
    while len(header := answers.read(reading.HEADER.size)) == reading.HEADER.size:
        kind, size = reading.HEADER.unpack(header)
        raw = answers.read(size)
        if len(raw) < size:
            break
        into.put((kind, raw))
    into.put(None)


def _end(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except OSError:
                continue
    process.kill()
    process.wait()
