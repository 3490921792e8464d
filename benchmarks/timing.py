"""Clocks, samples and yardsticks: how anything here is measured.

On a GPU, CUDA events stand around the work and a write larger than the L2 cache before it; steps are queued without
waiting, so that the time of launching does not count where the device is busy anyway. On a CPU the clock is the
host's. Contestants take turns, each round beginning with another one.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch
from agreement import Red, told
from cost import Rates
from torch import Tensor

#: a step that is timed: calls ``mark`` at its start, between its parts and at its end, and returns its results
Step = Callable[[Callable[[], None]], Any]
_FLUSH_BYTES = 256 << 20


class Timer:
    """Seconds between the marks of a step, on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device) if self.cuda else None

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def sample(self, step: Step, times: int, see: Callable[[Any], None] | None = None) -> list[list[float]]:
        """``times`` runs of ``step``: the seconds of each part. ``see`` gets each run's results, off the clock."""
        runs = []
        for _ in range(times):
            if self._flush is not None:
                self._flush.zero_()
            marks: list[Any] = []
            results = step(lambda marks=marks: marks.append(self._mark()))
            if see is not None:
                see(results)
            del results  # at once, so that the next run finds as much memory
            runs.append(marks)
        self.wait()
        return [[self._between(a, b) for a, b in zip(marks, marks[1:], strict=False)] for marks in runs]

    def _between(self, a: Any, b: Any) -> float:
        return a.elapsed_time(b) / 1e3 if self.cuda else b - a

    def release(self) -> None:
        """Give memory that nobody holds back to the device, so that what is free can be seen."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)


def interleave(
    timer: Timer,
    steps: dict[str, Step],
    rounds: int,
    seconds_each: float,
    must: Sequence[str],
    see: Callable[[str, Any], None] | None = None,
) -> tuple[dict[str, list[list[float]]], dict[str, str]]:
    """The parts' seconds of every run of every step, steps taking turns; and why a step could not be run.

    ``seconds_each`` is about what a step may take in all, after its first runs. ``see`` gets the name and results of
    every run of those in ``must``. An error of theirs is raised as Red, unless memory is what they lack.
    """
    found: dict[str, list[list[float]]] = {}
    failed: dict[str, str] = {}
    inner: dict[str, int] = {}

    def run(name: str, times: int) -> list[list[float]]:
        if name in failed:
            return []
        watch = partial(see, name) if see is not None and name in must else None
        try:
            return timer.sample(steps[name], times, watch)
        except torch.OutOfMemoryError:
            failed[name] = "out of memory"
            torch.cuda.empty_cache()
        except Exception as error:  # a peer may fail in any way that it likes
            if name in must:
                raise Red(f"{name} fails: {told(error)}") from error
            failed[name] = f"fails: {told(error)}"
        return []

    for name in steps:
        run(name, 2)  # compiles, and lets allocators and autotuners settle
        inner[name] = 1
        if timer.cuda:
            cost = sum(map(sum, run(name, 1)))
            inner[name] = min(max(int(seconds_each / rounds / max(cost, 1e-6)), 1), 5)
        found[name] = []
    names = list(steps)
    for index in range(rounds):
        shift = index % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            found[name] += run(name, inner[name])
    return {name: parts for name, parts in found.items() if name not in failed}, failed


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median, and the distance between the quartiles, in microseconds."""
    spread = 0.0
    if len(seconds) > 1:
        low, _, high = quantiles(seconds, n=4, method="inclusive")
        spread = high - low
    return {"median_us": median(seconds) * 1e6, "iqr_us": spread * 1e6, "runs": len(seconds)}


def graphed(call: Callable[[], Any], device: torch.device) -> Callable[[], Any] | None:
    """``call`` as a CUDA graph, without the gaps between its launches; None where it cannot be captured.

    Every replay writes its results into the same tensors.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call()
    except RuntimeError:
        torch.cuda.synchronize(device)
        return None

    def replay() -> Any:
        graph.replay()
        return results

    return replay


def kept_for_backward(call: Callable[[], object], not_counting: Sequence[Tensor]) -> int:
    """Bytes that autograd keeps while ``call`` runs, each memory once; without the tensors of ``not_counting``."""
    ours = {t.untyped_storage().data_ptr() for t in not_counting}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            # a pooled buffer is longer than its tensor
            size = min(storage.nbytes(), tensor.numel() * tensor.element_size())
            kept[storage.data_ptr()] = max(kept.get(storage.data_ptr(), 0), size)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(kept.values())


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The most memory that ``call`` has at once beyond what was there before; None on a CPU, where nobody counts."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def yardstick(timer: Timer, dtype: torch.dtype, runs: int = 10, quick: bool = False) -> Rates:
    """What this machine does now: a square matrix product of random numbers, and a copy, read and written."""
    device = timer.device
    side, length = (8192, 1 << 31) if timer.cuda else (256, 1 << 22) if quick else (2048, 1 << 28)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.randint(-128, 128, (length,), dtype=torch.int8, device=device)
    target, out = torch.empty_like(source), torch.empty_like(a)

    def middle(work: Callable[[], object]) -> float:
        def step(mark: Callable[[], None]) -> None:
            mark()
            work()
            mark()

        timer.sample(step, 3)
        return median(parts[0] for parts in timer.sample(step, runs))

    product = middle(lambda: torch.mm(a, b, out=out))
    copy = middle(lambda: target.copy_(source))
    return Rates(2 * side**3 / product, 2 * length / copy)
