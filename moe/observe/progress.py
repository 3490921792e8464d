"""The lines of a training run on the terminal, and its progress bar."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, TextIO

from .metrics import Record
from .printable import WIDTH, fitted, printable, short_count

NOTE_EVERY = 10  # lines after which an unchanged note is repeated


def _number(value: float | None, spec: str) -> str:
    return "nan" if value is None else format(value, spec)


def duration(seconds: float) -> str:
    """Format a duration in at most two units: ``45s``, ``2m 31s``, ``1h 02m``, ``3d 04h``."""
    whole = max(0, round(seconds))
    for size, unit, part, sub in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // part:02d}{sub}"
    return f"{whole}s"


def _rate(tflops: float) -> str:
    """Format a rate in TFLOP/s, or in GFLOP/s where these would begin with zeros."""
    return f"{short_count(tflops)} TFLOP/s" if not tflops < 0.1 else f"{short_count(1000 * tflops)} GFLOP/s"


#: what a progress line shows of a record, the most important first
SHOWN: dict[str, Callable[[float], str]] = {
    "grad_norm": "norm {:.2f}".format,
    "tokens_per_s": lambda rate: f"{short_count(rate)} tok/s",
    "tokens_per_s_per_device": lambda rate: f"{short_count(rate)}/dev",
    "tflops_per_device": _rate,
    "mfu": "MFU {:.0%}".format,
    "memory_bytes": lambda size: f"{size / (1 << 30):.3g} GiB",
    "max_over_mean": "max/mean {:.2f}".format,
    "replicated_straggler": "busiest rank {:.2f}".format,
}


def progress_line(record: Record, steps: int, devices: int = 1) -> str:
    """Format a ``train`` record as one line of at most WIDTH columns, without what finds no room.

    ``left`` is the time for the remaining tokens at the current rate.
    """
    step, rate = record["step"], record.get("tokens_per_s")
    parts = [f"{step:>{len(str(steps))}}/{steps}", f"loss {_number(record.get('loss'), '.4f')}"]
    skipped = {"tokens_per_s_per_device"} if devices == 1 else set()
    for name in (name for name in SHOWN if name in record and name not in skipped):
        parts.append(SHOWN[name](math.nan if record[name] is None else record[name]))
    left = []
    if rate and math.isfinite(rate) and step and record.get("tokens"):
        left = [f"left {duration((steps - step) * record['tokens'] / step / rate)}"]
    while True:
        for space in ("  ", " "):
            line = space.join(parts + left)
            if len(line) <= WIDTH or len(parts) == 2:
                return line
        parts.pop()


def balance_note(record: Record) -> str:
    """Format the number of sequences over which the balance loss counted its load; empty if it is unknown."""
    sequences = record.get("balance_sequences")
    if sequences is None or not math.isfinite(sequences):
        return ""
    return f"balance over: {sequences:.3g} seq" if sequences < 100 else f"balance over: {sequences:.0f} seq"


def _error_note(record: Record) -> str:
    error = record.get("estimator_error")
    return "" if error is None or not math.isfinite(error) else f" (load off by {error:.1%})"


def eval_line(record: Record) -> str:
    """Format an ``eval`` record as one line: the held-out loss, overall and of the domains that find room."""
    domains = [f"{printable(name)}: {_number(entry['loss'], '.4f')}" for name, entry in record["domains"].items()]
    start = f"eval: {record['step']:>4}  held-out loss: {_number(record.get('loss'), '.4f')}  "
    return fitted(start, domains, "  ").rstrip()


class Progress:
    """Prints progress lines to ``stream`` (default: stdout), with a progress bar if it is a terminal.

    Only rank 0 of ``devices`` ranks creates one.
    """

    def __init__(self, steps: int, start: int = 0, stream: TextIO | None = None, devices: int = 1) -> None:
        self.steps, self.devices = steps, devices
        self.stream = sys.stdout if stream is None else stream
        self._bar: Any = None
        #: the last balance note, and the number of lines since it was printed
        self._said, self._since = "", 0
        if self.stream is not None and self.stream.isatty():  # it is None if the shell has closed it
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=start, file=self.stream, unit="step", dynamic_ncols=True, leave=False)

    def advance(self, step: int) -> None:
        """Move the progress bar to ``step`` completed steps."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self._bar is not None:
            self._bar.write(text, file=self.stream)
        elif self.stream is not None:
            print(text, file=self.stream, flush=True)

    def show(self, record: Record) -> None:
        """Print a ``train``, ``eval`` or ``skip`` record as one line. Other kinds are ignored."""
        if record["kind"] == "train":
            self.say(progress_line(record, self.steps, self.devices))
            note = balance_note(record)
            due = note != self._said or self._since >= NOTE_EVERY
            if note and due:
                self.say(note + _error_note(record))
            self._said, self._since = (note, 1) if due else (self._said, self._since + 1)
        elif record["kind"] == "eval":
            self.say(eval_line(record))
        elif record["kind"] == "skip":
            later = f"; {record['postponed']} sequences will be read again" if record["postponed"] else ""
            self.say(f"skipped a step after step {record['step']}: {record['reason']}{later}")

    def close(self) -> None:
        """Remove the progress bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
