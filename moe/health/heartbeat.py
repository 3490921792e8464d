"""Tells the other ranks what this rank does, and finds the rank for which all others wait.

One thread looks at the main thread many times a second, and counts how often that waits for other ranks. Another one
writes {rank, step, phase, ...} to the store that all ranks share, every few seconds. If the main thread has not moved
for too long, the run hangs, and the ranks' last heartbeats show where: a rank without heartbeats is stopped or has lost
its machine, and one that is not waiting in a collective keeps the others waiting.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, chain, repeat, starmap, takewhile
from operator import attrgetter, is_not, methodcaller
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple, Protocol

#: phase -> how many times as long as a step it may last
PATIENCE = {"setup": 10.0, "first step": 5.0, "step": 1.0, "record": 1.0, "evaluate": 10.0, "save": 10.0, "end": 10.0}
#: how many times as long as a step a collective may take: longer than any phase, because the heartbeats name the cause
COLLECTIVE = 2 * max(PATIENCE.values())

#: seconds between two looks at the main thread
LOOK_S = 0.05
#: seconds without a look after which the whole process must have been stopped in between
STOPPED_S = 1.0
#: looks that are enough to tell how much a rank waits: five seconds of steps
LEAST_LOOKS = 100
#: heartbeats in the timeout of a step, and the most seconds between two
BEATS, MOST_S = 8, 5.0

#: what of a frame makes a :class:`Call`
_DESCRIBE = attrgetter("f_code", "f_lasti", "f_lineno")
_HERE = Path(__file__).resolve().parents[2]


class Store(Protocol):
    """The methods of torch's stores that heartbeats need."""

    def set(self, key: str, value: str, /) -> Any: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...


class Look(NamedTuple):
    """Where a thread is."""

    #: whether it waits for other ranks
    waiting: bool
    #: the innermost function of this package
    place: str
    #: differs from the one before if the thread has moved
    position: tuple[int, ...]


class Heartbeat:
    """Watches the thread that creates it. ``on_hang`` gets one line, and the ranks that keep the others waiting.

    ``timeout_s`` is the limit for a step; other phases are given :data:`PATIENCE` times as long. ``store`` must be a
    connection of its own; ``holder`` is the rank that holds the store's memory, None if no rank does. :meth:`enter` is
    cheap: the loop calls it several times a step.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        store: Store | None,
        timeout_s: float,
        on_hang: Callable[[str, list[int]], None],
        holder: int | None = 0,
    ) -> None:
        self.rank, self.world, self.timeout_s, self.on_hang, self.holder = rank, world, timeout_s, on_hang, holder
        self.step, self.phase = 0, "setup"
        self._store, self._thread_id = store, threading.get_ident()
        self._looks, self._waits = 0, 0
        self._moved = self._talked = time.monotonic()
        self._last: tuple[Any, ...] = ()
        self._look = Look(False, "", ())
        #: rank -> (its heartbeat, when it was last seen to be new)
        self._others: dict[int, tuple[dict[str, Any], float]] = {}
        self._done = threading.Event()
        self._interval = min(timeout_s / BEATS, MOST_S)
        # the one that talks may be held up by a store that is stopped
        names = {"heartbeat": self._talk, "watch": self._watch}
        self._threads = [threading.Thread(target=work, name=name, daemon=True) for name, work in names.items()]

    def __enter__(self) -> Heartbeat:
        for thread in self._threads:
            if self._store is not None or thread.name == "watch":  # one process is watched, too, but talks to nobody
                thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(1.0)

    def enter(self, phase: str, step: int) -> None:
        """Say which phase of which step begins."""
        self.phase, self.step = phase, step

    def waited(self) -> float | None:
        """Return the fraction of the steps in which this rank waited; None before there are enough looks at it."""
        return self._waits / self._looks if self._looks >= LEAST_LOOKS else None

    def forget(self) -> None:
        """Begin to measure again."""
        self._looks = self._waits = 0

    @property
    def stalled(self) -> float:
        """Seconds since the thread last moved."""
        return time.monotonic() - self._moved

    def limit(self, phase: str) -> float:
        """Return the seconds that a phase may last."""
        return PATIENCE.get(phase, 1.0) * self.timeout_s

    # ---- the thread that watches this rank

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._done.wait(LOOK_S):
            looked, last = time.monotonic(), looked
            if looked - last > STOPPED_S:  # the whole process was stopped, as by Ctrl-Z
                self._moved += looked - last
            calls = calls_of(self._thread_id)
            if not calls:
                return
            self._look = look(calls)
            if self.phase.endswith("step"):
                self._looks += 1
                self._waits += self._look.waiting
            now = (self.phase, self.step, self._look.position)
            if now != self._last:
                self._last, self._moved = now, time.monotonic()
            stalled = self.stalled
            if stalled > max(self.limit(phase) for phase in (self.phase, *self._phases())):
                self.on_hang(*self._diagnose(stalled))
                return

    # ---- the thread that talks to the others

    def _talk(self) -> None:
        beats, wait = 0, 0.0
        while not self._done.wait(wait):
            beats, wait = beats + 1, self._interval
            own = {"rank": self.rank, "step": self.step, "phase": self.phase, "beat": beats}
            own |= {"waiting": self._look.waiting, "place": self._look.place}
            try:
                assert self._store is not None
                self._store.set(f"heartbeat/{self.rank}", json.dumps(own))
                if self.stalled > self.limit(self.phase) / 2:
                    self._read(self._store)
                self._talked = time.monotonic()
            except (RuntimeError, ValueError):
                continue  # the store has ended

    def _read(self, store: Store) -> None:
        """Note which ranks have sent a new heartbeat."""
        for rank in range(self.world):
            key = f"heartbeat/{rank}"
            found = json.loads(store.get(key)) if store.check([key]) else {}
            seen = self._others.get(rank)
            if found and (seen is None or seen[0]["beat"] != found["beat"]):
                # the first heartbeat that is read may be an old one
                self._others[rank] = (found, time.monotonic() if seen is not None else 0.0)

    # ---- both

    def _fresh(self) -> dict[int, dict[str, Any]]:
        """Return the heartbeats of the ranks that still send them."""
        oldest = time.monotonic() - self._silence
        return {rank: found for rank, (found, when) in list(self._others.items()) if when >= oldest}

    @property
    def _silence(self) -> float:
        """Seconds without a heartbeat after which a rank is silent."""
        return max(2.5 * self._interval, 1.0)

    def _phases(self) -> list[str]:
        return [found["phase"] for found in self._fresh().values()]

    def _diagnose(self, stalled: float) -> tuple[str, list[int]]:
        """Say which ranks keep the others waiting."""
        what = f"no progress for {stalled:.0f} s in step {self.step}, phase {self.phase}: "
        if self._store is None:
            return f"{what}the process is {_where({'place': self._look.place})}", []
        if time.monotonic() - self._talked > self._silence:  # nobody can be asked
            if self.holder is None or self.holder == self.rank:
                return f"{what}the store at MASTER_ADDR is silent", []
            return f"{what}rank {self.holder} is silent, which holds the store", [self.holder]
        fresh = self._fresh() | {self.rank: {"waiting": self._look.waiting, "place": self._look.place}}
        silent = [rank for rank in range(self.world) if rank not in fresh]
        if silent:
            last = {rank: self._others[rank][0] for rank in silent if rank in self._others}
            where = {rank: f" (last seen in {_where(last[rank])})" if rank in last else "" for rank in silent}
            return what + "; ".join(f"rank {rank} is silent{where[rank]}" for rank in silent[:8]), silent
        busy = [rank for rank, found in sorted(fresh.items()) if not found["waiting"]]
        if busy:
            told = [f"rank {rank} keeps the others waiting, {_where(fresh[rank])}" for rank in busy[:8]]
            return what + "; ".join(told), busy if len(busy) < self.world else []
        places = [f"rank {rank} {_where(found)}" for rank, found in sorted(fresh.items())]
        return f"{what}all ranks wait for each other: {', '.join(places[:8])}", []


def _where(beat: dict[str, Any]) -> str:
    step = f"step {beat['step']}, phase {beat['phase']}, " if "step" in beat else ""
    return f"{step}at {beat.get('place') or 'an unknown place'}"


class Call(NamedTuple):
    """A call that a thread is in."""

    code: CodeType
    #: the last bytecode instruction that it has run, and that one's line
    instruction: int
    line: int | None


def calls_of(thread_id: int) -> list[Call]:
    """Return the calls that a thread is in, the innermost first; none if the thread has ended.

    A frame that is held here while the other thread leaves it keeps that function's variables alive, and they end in
    this thread. Memory would be freed late, and torch has guards that are variables and restore the state of their own
    thread when they end. So the frames live only within one call into C, during which no other thread runs Python.
    """
    innermost = map(methodcaller("get", thread_id), starmap(sys._current_frames, [()]))
    frames = accumulate(chain(innermost, repeat("f_back")), getattr)
    return [Call(*of) for of in tuple(map(_DESCRIBE, takewhile(partial(is_not, None), frames)))]


def look(calls: Sequence[Call]) -> Look:
    """Describe where a thread is, from the calls that it is in."""
    position = tuple(number for call in calls for number in (id(call.code), call.instruction))
    own = next((call for call in calls if _own(call.code)), None)
    place = "" if own is None else f"{_own(own.code)}:{own.line} ({own.code.co_name})"
    return Look(_waits(calls[0].code), place, position)


def _waits(code: CodeType) -> bool:
    """Return whether a function is one that waits for other ranks: torch's, or one of those that call ``wait``."""
    file = code.co_filename
    if "/torch/distributed/" in file:
        return True
    own = _own(code)
    return own.startswith(("moe/collectives/", "moe/engines/")) and code.co_name in ("wait", "get", "deliver")


def _own(code: CodeType) -> str:
    """Return the file of a function in this package, relative to the package; empty for others."""
    prefix = f"{_HERE}/"
    inside = code.co_filename.removeprefix(prefix) if code.co_filename.startswith(prefix) else ""
    return inside if inside.startswith(("moe/", "launch/", "kernels/")) else ""
