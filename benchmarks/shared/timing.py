"""Measures time, memory, and the machine's matrix-product and copy rates.

On a GPU, CUDA events enclose the work, after a write that is larger than the L2 cache. Steps are queued without
waiting, so that launch overhead does not count while the device is busy. On a CPU, the host's clock is read.
Contestants take turns, and each round starts with another one.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.shared.agreement import WrongResult, brief

#: a timed step: it calls ``mark`` at its start, between its parts and at its end, and returns its results
Step = Callable[[Callable[[], None]], Any]
_FLUSH_BYTES = 256 << 20


class Rates(NamedTuple):
    """Measured rates of the machine: operations per second of a matrix product, bytes per second of a copy."""

    flops: float
    bytes: float


class Timer:
    """Measures the seconds between the marks of a step on one device."""

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
        """Run ``step`` several times; return the seconds of its parts. ``see`` gets each run's results, untimed."""
        runs = []
        for _ in range(times):
            if self._flush is not None:
                self._flush.zero_()
            marks: list[Any] = []
            results = step(lambda marks=marks: marks.append(self._mark()))
            if see is not None:
                see(results)
            del results  # now, so that the next run starts with the same free memory
            runs.append(marks)
        self.wait()
        return [[self._between(a, b) for a, b in zip(marks, marks[1:], strict=False)] for marks in runs]

    def _between(self, a: Any, b: Any) -> float:
        return a.elapsed_time(b) / 1e3 if self.cuda else b - a

    def release(self) -> None:
        """Return unused memory to the device, so that its free memory can be read."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)


@dataclass
class Context:
    """Settings and tools that all measurements of one run share."""

    timer: Timer
    dtype: torch.dtype
    backend: str
    rates: Rates
    #: name -> function that builds a contestant for a shape
    builders: dict[str, Callable[..., Any]]
    rounds: int
    seconds_each: float
    #: name -> reason, for contestants that are left out of all shapes or of the current one
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.timer.device


def interleave(
    timer: Timer,
    steps: dict[str, Step],
    rounds: int,
    seconds_each: float,
    must: Sequence[str],
    see: Callable[[str, Any], None] | None = None,
) -> tuple[dict[str, list[list[float]]], dict[str, str]]:
    """Time several steps in turns; return the seconds of the parts of every run, and why steps could not run.

    ``seconds_each`` is roughly the total time for one step, after its first runs. ``see`` gets the name and the results
    of every run of the steps in ``must``. If one of these fails, and not for lack of memory, raise WrongResult.
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
        except Exception as error:  # a peer may raise anything
            if name in must:
                raise WrongResult(f"{name} fails: {brief(error)}") from error
            failed[name] = f"fails: {brief(error)}"
        return []

    for name in steps:
        run(name, 2)  # compiles, and warms up allocators and autotuners
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
    """Return the median and the interquartile range in microseconds."""
    spread = 0.0
    if len(seconds) > 1:
        low, _, high = quantiles(seconds, n=4, method="inclusive")
        spread = high - low
    return {"median_us": median(seconds) * 1e6, "iqr_us": spread * 1e6, "runs": len(seconds)}


def graphed(call: Callable[[], Any], device: torch.device) -> Callable[[], Any] | None:
    """Capture ``call`` as a CUDA graph, to remove the gaps between its launches. Return None if that is impossible.

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
    """Return the bytes that autograd saves during ``call``, each storage once, without those of ``not_counting``."""
    ours = {t.untyped_storage().data_ptr() for t in not_counting}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            # a pooled buffer may be larger than its tensor
            size = min(storage.nbytes(), tensor.numel() * tensor.element_size())
            kept[storage.data_ptr()] = max(kept.get(storage.data_ptr(), 0), size)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(kept.values())


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Return the peak memory of ``call`` beyond what was allocated before. None on a CPU, where nothing counts it."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def yardstick(timer: Timer, dtype: torch.dtype, runs: int = 10, quick: bool = False) -> Rates:
    """Measure the machine's current rates: a square matrix product of random numbers, and a copy (read + write)."""
    device = timer.device
    side, length = (8192, 1 << 31) if timer.cuda else (256, 1 << 22) if quick else (2048, 1 << 28)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.randint(-128, 128, (length,), dtype=torch.int8, device=device)
    target, out = torch.empty_like(source), torch.empty_like(a)

    def median_seconds(work: Callable[[], object]) -> float:
        def step(mark: Callable[[], None]) -> None:
            mark()
            work()
            mark()

        timer.sample(step, 3)
        return median(parts[0] for parts in timer.sample(step, runs))

    product = median_seconds(lambda: torch.mm(a, b, out=out))
    copy = median_seconds(lambda: target.copy_(source))
    return Rates(2 * side**3 / product, 2 * length / copy)
