"""What a run leaves behind for its readers: metrics.jsonl, TensorBoard, and lines on the terminal.

metrics.jsonl holds one JSON object per line. Its kinds:

* ``run``: config, versions, world_size, parameters, active_parameters (one more after each resume; the last counts);
* ``baseline``: bigram, {"all": nats per token, domain: nats per token};
* ``train``: step, loss (nats per token), grad_norm, lr, tokens (since step 0, over all ranks), tokens_per_s (over all
  ranks), elapsed_s, domain_loss {domain: loss}, and layers, a list with the fields below for each MoE layer;
* ``eval``: step, loss, domains {domain: {loss, tokens}}, routing {domain: [layer][expert] frequency, sum 1},
  max_frequency {domain: [layer]}, the largest of these, score_sum {domain: [layer]} as below, divergence [layer], the
  mean over pairs of domains of the Jensen-Shannon divergence between their frequencies, in bits, and, of 16 domains or
  fewer, divergence_pairs {domain: {later domain: [layer]}}.

Fields of a layer in a ``train`` record, of the step that ended last, over all ranks; in parentheses what the record
itself has of all layers, under the same name:

* counts [E], choices of each expert before any drop; max_over_mean of that load (worst layer), cv, entropy (over that
  of a uniform load), dead (experts without a token); dropped, the share of the last micro-batch's choices that found
  no room;
* balance (mean): the balance loss of the whole step, without a coefficient, whatever is trained on; 1.0 is balanced;
* losses {name: value} (mean): each loss that is trained on as the backwards used it, with the estimated load, without
  its coefficient; beside these always "global" (if it is not trained on, that is balance) and "micro", the mean over
  micro-batches. "z" is the mean of logsumexp(logits)^2;
* scaled_losses {name: value} (sum): those trained on times their coefficient: what is added to the training loss;
* balance_tokens, balance_sequences (mean): over how many the main loss counted its load, in the mean over backwards;
  estimator_error (mean): how far that load was from the whole step's, as a share of it (of a loss within one rank,
  from this rank's step); gradient_error (mean): the same as a share of that load's distance from an even one, about
  the relative error of the loss's gradient;
* score_sum (mean): the probability on a token's chosen experts, in the mean over tokens; K/E with indifferent scores;
* straggler (mean), straggler_max (worst): in a micro-batch, the rows that the router sends to the busiest
  expert-parallel rank over the mean of the ranks that exchange rows with it, in the mean over micro-batches (and
  groups of ranks) and at worst. Before any drop, so with a capacity limit it is what routing asks for; 1.0 without
  expert parallelism;
* projected_straggler {degree: factor} (mean): the same for that many expert-parallel ranks, if all of them had the
  mix of text of one data-parallel rank's micro-batch. Ranks with different text even each other out, so this is rather
  too high.

waiting and projected_waiting {degree: share}, of the record alone: an estimate of the time that ranks wait for the
busiest one, as a share of the time of a step without waiting: the sum over layers of (straggler - 1) times the routed
experts' part of the model's floating-point operations. It holds where operations take time in proportion to their
number, and nothing else is done meanwhile (no overlapped exchange, no padding to a capacity).

A number that is not finite is written as null, and its record carries ``"nonfinite": true``. Older files have fewer
fields.
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

import numpy as np
from numpy.typing import NDArray

METRICS_FILE = "metrics.jsonl"
CELL = 12  # pixels of a side of one number in a picture
NOTE_EVERY = 10  # lines after which what has not changed is said again

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
    return record if isinstance(record, dict) and isinstance(record.get("kind"), str) else None


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
        values = {name: value for name, value in record.items() if name not in _NOT_DRAWN}
        yield from _flat("train", values)
        yield from ((f"train_domain/{name}", loss) for name, loss in (record.get("domain_loss") or {}).items())
        for index, layer in enumerate(record.get("layers") or []):
            yield from _flat(f"layer_{index}", {name: value for name, value in layer.items() if name != "counts"})
    if record["kind"] == "eval":
        yield "heldout/loss", record.get("loss")
        yield from ((f"heldout_domain/{name}", entry["loss"]) for name, entry in (record.get("domains") or {}).items())
        for index, bits in enumerate(record.get("divergence") or []):
            yield f"heldout_layer_{index}/divergence", bits
        for field in ("score_sum", "max_frequency"):
            for domain, layers in (record.get(field) or {}).items():
                yield from ((f"heldout_layer_{i}/{field}/{domain}", value) for i, value in enumerate(layers))


def _pictures(record: Record) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """TensorBoard's tags and grey pictures of a record, values from 0 to 1: the experts that domains choose in a layer,
    a row of cells for each domain in their order, dark where never, bright from four times the uniform share on."""
    routing = record.get("routing") if record["kind"] == "eval" else None
    for index, rows in enumerate(zip(*(routing or {}).values(), strict=True)):
        share_NE = np.array(rows, float)
        grey_NE = np.clip(share_NE * share_NE.shape[1] / 4, 0.0, 1.0)
        yield f"heldout_layer_{index}/routing", np.kron(grey_NE, np.ones((CELL, CELL)))


_NOT_DRAWN = {"kind", "step", "tokens", "elapsed_s", "domain_loss", "layers", "nonfinite"}


def _flat(tag: str, values: dict[str, Any]) -> Iterator[tuple[str, float | None]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(f"{tag}/{name}", value)
        elif value is None or isinstance(value, (int, float)):
            yield f"{tag}/{name}", value


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
            if self.path.is_symlink():  # somebody else's run folder may lead anywhere
                raise ValueError(f"{self.path}: is a link, which is not followed; put the file itself there")
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
            for tag, picture_HW in _pictures(record):
                self._board.add_image(tag, picture_HW, record["step"], dataformats="HW")
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


def balance_note(record: Record) -> str:
    """Over how many sequences the balance loss counted its load; empty where that is not known."""
    sequences = record.get("balance_sequences")
    if sequences is None or not math.isfinite(sequences):
        return ""
    return f"balance over: {sequences:.3g} seq" if sequences < 100 else f"balance over: {sequences:.0f} seq"


def _error_note(record: Record) -> str:
    error = record.get("estimator_error")
    return "" if error is None or not math.isfinite(error) else f" (load off by {error:.1%})"


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
        #: what was last said of the balance, and how many lines ago
        self._said, self._since = "", 0
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
            note = balance_note(record)
            due = note != self._said or self._since >= NOTE_EVERY
            self.say(progress_line(record, self.steps) + (f"  {note}{_error_note(record)}" if note and due else ""))
            self._said, self._since = (note, 1) if due else (self._said, self._since + 1)
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
