"""What a run leaves behind for its readers: metrics.jsonl, TensorBoard, and lines on the terminal.

metrics.jsonl holds one JSON object per line. Its kinds:

* ``run``: config, versions, world_size, parameters, active_parameters (one more after each resume; the last counts);
* ``baseline``: bigram, {"all": nats per token, domain: nats per token};
* ``train``: step, loss (nats per token), grad_norm, lr, balance (mean over layers of the balance loss divided by its
  coefficient; 1.0 is balanced), max_over_mean (load of the busiest expert over the mean, worst layer), tokens (since
  step 0, over all ranks), tokens_per_s (over all ranks), elapsed_s, domain_loss {domain: loss}, and layers, a list
  with counts [E], balance, max_over_mean, cv, entropy, dead and dropped for each MoE layer;
* ``eval``: step, loss, domains {domain: {loss, tokens}}, routing {domain: [layer][expert] frequency, sum 1}.

A number that is not finite is written as null, and its record carries ``"nonfinite": true``.
"""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

METRICS_FILE = "metrics.jsonl"

Record = dict[str, Any]


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``; a crash leaves the old file or the new one. OSError as the file system gives it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_records(path: Path) -> list[Record]:
    """The records of a metrics file, oldest first.

    The last line of a killed run may be half written and is left out; other unreadable lines are left out with a
    warning. OSError if the file cannot be read.
    """
    lines = path.read_bytes().split(b"\n")
    records, bad = [], 0
    for number, line in enumerate(lines):
        record = _parse(line)
        if record is not None:
            records.append(record)
        elif line.strip() and number < len(lines) - 1:
            bad += 1
    if bad:
        warnings.warn(f"{path}: {bad} unreadable lines left out", RuntimeWarning, stacklevel=2)
    return records


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _json_ready(value: Any) -> tuple[Any, bool]:
    """``value`` in JSON's types, and whether all its numbers are finite; arrays and tensors become lists."""
    if isinstance(value, dict):
        items = {str(key): _json_ready(item) for key, item in value.items()}
        return {key: item for key, (item, _) in items.items()}, all(ok for _, ok in items.values())
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        pairs = [_json_ready(item) for item in value]
        return [item for item, _ in pairs], all(ok for _, ok in pairs)
    if isinstance(value, float) and not math.isfinite(value):
        return None, False
    return (value if isinstance(value, (str, int, float, bool, type(None))) else str(value)), True


def to_line(record: Record) -> bytes:
    """``record`` as one line of valid JSON."""
    ready, finite = _json_ready(record)
    if not finite:
        ready["nonfinite"] = True
    return json.dumps(ready, allow_nan=False).encode() + b"\n"


def _scalars(record: Record) -> Iterator[tuple[str, float | None]]:
    """TensorBoard's tags and values of a record."""
    if record["kind"] == "train":
        for name in ("loss", "grad_norm", "lr", "balance", "max_over_mean", "tokens_per_s"):
            yield f"train/{name}", record.get(name)
        yield from ((f"train_domain/{name}", loss) for name, loss in (record.get("domain_loss") or {}).items())
        for index, layer in enumerate(record.get("layers") or []):
            yield from ((f"layer_{index}/{name}", value) for name, value in layer.items() if name != "counts")
    if record["kind"] == "eval":
        yield "heldout/loss", record.get("loss")
        yield from ((f"heldout_domain/{name}", entry["loss"]) for name, entry in (record.get("domains") or {}).items())


class MetricsWriter:
    """Appends records to ``run_dir/metrics.jsonl`` and mirrors their numbers to ``run_dir/tensorboard``.

    With ``resume_step`` the records of later steps, which the interrupted run had written, are cut off first. Without
    it the file starts anew, and one that is there is kept as ``metrics.previous.jsonl``. ValueError if ``run_dir``
    cannot be written. Later failures give one warning each for the file and for TensorBoard, never an exception:
    a full disk must not end a training run.
    """

    def __init__(self, run_dir: Path, tensorboard: bool = True, resume_step: int | None = None) -> None:
        self.path = Path(run_dir) / METRICS_FILE
        self._warned = False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if resume_step is None:
                if self.path.exists():
                    os.replace(self.path, self.path.with_name("metrics.previous.jsonl"))
            elif self.path.exists():
                self._cut(resume_step)
            self.path.open("ab").close()
            self._size = self.path.stat().st_size
        except OSError as error:
            raise ValueError(
                f"run_dir={str(run_dir)!r}: cannot be written ({error.strerror or error}); choose another folder"
            ) from None
        self._board: Any = self._open_board(0 if resume_step is None else resume_step + 1) if tensorboard else None

    def _cut(self, step: int) -> None:
        records = (_parse(line) for line in self.path.read_bytes().split(b"\n"))
        kept = [record for record in records if record is not None and (record.get("step") or 0) <= step]
        write_atomically(self.path, b"".join(to_line(record) for record in kept))

    def _open_board(self, purge_step: int) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter

            # purge_step hides what an interrupted run wrote for this step and later ones
            return SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=purge_step)
        except (ImportError, OSError) as error:
            warnings.warn(
                f"no TensorBoard files are written ({error}); pip install tensorboard, or set log.tensorboard false",
                RuntimeWarning,
                stacklevel=3,
            )
            return None

    def write(self, record: Record) -> None:
        """Append one record (see the top of the file); it must have a ``kind``, and a ``step`` if it has numbers."""
        line = to_line(record)
        try:
            # Opened anew each time: what a failed write left behind is cut off before the next one.
            with open(self.path, "r+b" if self.path.exists() else "wb") as file:
                file.seek(min(self._size, file.seek(0, os.SEEK_END)))
                file.truncate()
                file.write(line)
                file.flush()
                self._size = file.tell()
        except OSError as error:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"{self.path} cannot be written ({error.strerror or error}); training goes on, metrics are missing",
                    RuntimeWarning,
                    stacklevel=2,
                )
        if self._board is not None:
            self._mirror(record)

    def _mirror(self, record: Record) -> None:
        try:
            for tag, value in _scalars(record):
                if value is not None:
                    self._board.add_scalar(tag, value, record["step"])
            self._board.flush()
        except OSError as error:
            self._board = None
            warnings.warn(
                f"TensorBoard files cannot be written ({error.strerror or error}); training goes on without them",
                RuntimeWarning,
                stacklevel=3,
            )

    def close(self) -> None:
        """Finish the TensorBoard file; the metrics file is complete after every record."""
        board, self._board = self._board, None
        if board is not None:
            try:
                board.close()
            except OSError as error:
                warnings.warn(f"TensorBoard files are incomplete ({error})", RuntimeWarning, stacklevel=2)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# ---- the terminal


def _number(value: float | None, spec: str) -> str:
    return "nan" if value is None else format(value, spec)


def duration(seconds: float) -> str:
    """Two units: ``45s``, ``2m 31s``, ``1h 02m``, ``3d 04h``."""
    whole = max(0, round(seconds))
    for size, unit, part, sub in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // part:02d}{sub}"
    return f"{whole}s"


def progress_line(record: Record, steps: int) -> str:
    """A train record in one line; ``left`` is the time that the remaining tokens take at the present rate."""
    step, rate = record["step"], record.get("tokens_per_s")
    parts = [f"step: {step:>{max(4, len(str(steps)))}}/{steps}", f"loss: {_number(record.get('loss'), '.4f')}"]
    for name, label, spec in (
        ("grad_norm", "grad_norm", ".2f"),
        ("balance", "balance", ".2f"),
        ("max_over_mean", "max/mean", ".2f"),
        ("lr", "lr", ".1e"),
        ("tokens_per_s", "tokens/s", ",.0f"),
    ):
        if name in record:
            parts.append(f"{label}: {_number(record[name], spec)}")
    if rate and math.isfinite(rate) and step and record.get("tokens"):
        parts.append(f"left: {duration((steps - step) * record['tokens'] / step / rate)}")
    return "  ".join(parts)


def eval_line(record: Record) -> str:
    """An eval record in one line: the loss on held-out text, over all and by domain."""
    domains = "  ".join(f"{name}: {_number(entry['loss'], '.4f')}" for name, entry in record["domains"].items())
    return f"eval: {record['step']:>4}  held-out loss: {_number(record.get('loss'), '.4f')}  {domains}".rstrip()


class Progress:
    """Lines on the terminal, above a bar where ``stream`` (default: stdout) is one. Only rank 0 makes one."""

    def __init__(self, steps: int, start: int = 0, stream: TextIO | None = None) -> None:
        self.steps = steps
        self.stream = sys.stdout if stream is None else stream
        self._bar: Any = None
        if self.stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=start, file=self.stream, unit="step", dynamic_ncols=True, leave=False)

    def advance(self, step: int) -> None:
        """Move the bar: ``step`` steps are done."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def say(self, text: str) -> None:
        """Print a line without tearing the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def show(self, record: Record) -> None:
        """Print a train or eval record as a line; other kinds are not shown."""
        if record["kind"] == "train":
            self.say(progress_line(record, self.steps))
        elif record["kind"] == "eval":
            self.say(eval_line(record))

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
