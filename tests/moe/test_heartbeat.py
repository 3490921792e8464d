"""The watch over a thread must not change what the thread does."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator

import pytest
import torch

from equimoe.moe.health import Heartbeat, heartbeat


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Heartbeat]:
    """Watch the main thread a thousand times a second, and not twenty times."""
    monkeypatch.setattr(heartbeat, "LOOK_S", 0.001)
    with Heartbeat(0, 1, None, 60.0, pytest.fail) as watch:
        yield watch


class Thing:
    """Something that a function has as a variable."""


def use(seconds: float, ended_in: list[int]) -> weakref.ref[Thing]:
    thing = Thing()
    weakref.finalize(thing, lambda: ended_in.append(threading.get_ident()))
    time.sleep(seconds)
    return weakref.ref(thing)


def test_the_variables_of_a_function_end_with_it_and_in_its_thread(watched: Heartbeat) -> None:
    ended_in: list[int] = []
    for turn in range(200):
        assert use(turn % 10 * 0.0003, ended_in)() is None
    assert set(ended_in) == {threading.get_ident()}
    assert "test_heartbeat" not in watched._look.place and watched._look.position  # it was watched


def test_torchs_guards_end_in_their_thread() -> None:
    """Printing a tensor holds one as a variable; ended in another thread, it overwrote the state of this one."""
    x = torch.randn(768)
    before = torch._C._dispatch_tls_local_exclude_set()
    end = time.monotonic() + 2
    while time.monotonic() < end:
        repr(x)
    assert torch._C._dispatch_tls_local_exclude_set() == before


def test_where_a_thread_is() -> None:
    waits, waiting = threading.Event(), threading.Event()

    def outer() -> None:
        waits.set()
        waiting.wait()

    thread = threading.Thread(target=outer, daemon=True)
    thread.start()
    waits.wait()
    assert thread.ident is not None
    codes = [call.code for call in heartbeat.calls_of(thread.ident)]
    assert outer.__code__ in codes and codes[-1] is threading.Thread._bootstrap.__code__  # type: ignore[attr-defined]
    waiting.set()
    thread.join()
    assert heartbeat.calls_of(thread.ident) == []
