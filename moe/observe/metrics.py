"""The records of a run in metrics.jsonl, and their copies in trackers.

metrics.jsonl has one JSON object per line, the record. Its field "kind" says which further fields it has:

* ``run``: config, versions, world_size, device, device_name (of a GPU), parameters, active_parameters, flops_per_token
  (of a training step, see :func:`~equimoe.moe.observe.speed.step_flops`), and peak_flops (dense bf16 operations per
  second of the device, if known). Each resume adds one; the last counts.
* ``baseline``: bigram, {"all": nats per token, domain: nats per token}.
* ``train``: step, loss (nats per label, mean since the last record; null if none), grad_norm, lr, tokens (since step 0,
  over all ranks), skipped (steps that were skipped so far), postponed (sequences of such steps that are still to be
  read once more; in the last step of a run, those that were not), tokens_per_s (over all ranks),
  tokens_per_s_per_device (on a CPU, per rank), tflops_per_device (the model's operations at this rate, without
  recomputation), mfu (their share of the device's peak, if that is known), memory_bytes (of the rank with the most: on
  a GPU, the peak of torch's allocations since the last record; on a CPU, the process's resident memory), elapsed_s (of
  training since step 0),
  domain_loss {domain: loss}, and layers, a list with the fields below for each MoE layer. With several ranks, busy_s
  [rank] (seconds per step since the last record in which it worked instead of waiting for others) and stragglers (the
  ranks that others wait for, slowest first).
* ``skip``: a step that was skipped. step (steps taken so far), reason, loss, grad_norm, sequences, and postponed: how
  many of these sequences will be read once more before the run ends.
* ``checkpoint``: step of a checkpoint that has become complete.
* ``eval``: step, loss, tokens, loss_std (standard deviation of the loss, estimated from those of the sequences;
  missing for a single one), domains {domain: {loss, tokens, loss_std}}, routing {domain: [layer][expert] frequency,
  sum 1}, max_frequency {domain: [layer]} (the largest of these frequencies), score_sum {domain: [layer]} (as below),
  divergence [layer] (Jensen-Shannon divergence between the frequencies of two domains, in bits, mean over all pairs),
  and, for at most 16 domains, divergence_pairs {domain: {later domain: [layer]}}.

Fields of a layer in a ``train`` record. They describe the last step over all ranks. Where parentheses give a summary,
the record itself has a field of the same name that summarises all layers in this way.

* counts [E]: choices of each expert, before any drop.
* max_over_mean (worst layer), cv, entropy (divided by that of a uniform load), dead (number of experts without a
  token): statistics of these counts.
* dropped: share of the last micro-batch's choices that were dropped.
* balance (mean): the global balance loss of the whole step without a coefficient, whether or not it is trained on; 1.0
  is balanced.
* losses {name: value} (mean): every loss that is trained on, without its coefficient, computed from the estimated load
  that the backward passes used. It always contains "global" (equal to balance if not trained on) and "micro" (mean over
  micro-batches). "z" is the mean of logsumexp(logits)^2.
* scaled_losses {name: value} (sum): every loss that is trained on times its coefficient: its part of the training loss.
* balance_tokens, balance_sequences (mean): tokens and sequences over which the main loss counted its load, averaged
  over backward passes.
* estimator_error (mean): distance of that load from the load of the whole step, relative to the latter. For a loss
  within one rank, the step's load is that of the rank.
* gradient_error (mean): the same distance, relative to the distance of the step's load from an even load;
  approximately the relative error of the loss's gradient.
* score_sum (mean): total probability of a token's chosen experts, averaged over tokens; K/E for uniform scores.
* straggler (mean), straggler_max (worst): rows that the router sends to the busiest expert-parallel rank in a
  micro-batch, divided by the mean of the ranks that exchange rows with it; average and maximum over micro-batches and
  groups of ranks. Rows are counted before any drop. 1.0 without expert parallelism.
* replicated_straggler (mean), with parallel.experts="fssdp": the same factor with the replicas of experts that ranks
  held in the step; straggler is what it would be without.
* replicas (mean): replicas of experts on all ranks, each (size of an expert) bytes of weights in every forward.
* copied_bytes (mean): bytes that all ranks sent for them in the step: weights there, and gradients back.
* forecast_error (mean): distance of the load that the replicas were chosen for from that of the step, as shares of all
  choices, relative to the latter.
* projected_straggler {degree: factor} (mean): the same factor for this number of expert-parallel ranks, assuming that
  all of them get text like that of one data-parallel rank's micro-batch. It is rather too high, because different text
  on different ranks evens out the load.

waiting and projected_waiting {degree: share} exist only in the record itself. They estimate the time that ranks wait
for the busiest one, as a share of the time of a step without waiting: the sum over layers of (straggler - 1), or with
replicas of (replicated_straggler - 1), times the routed experts' share of the model's floating-point operations. This
assumes that time is proportional to operations, and that ranks do nothing else meanwhile (no overlapped exchange, no
padding to a capacity).

A number that is not finite is written as null, and its record gets ``"nonfinite": true``. Files of older versions have
fewer fields.
"""

from __future__ import annotations

import errno
import json
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from .files import write_atomically as write_atomically  # re-exported
from .mirror import Mirror, Record

METRICS_FILE = "metrics.jsonl"


def read_records(path: Path) -> list[Record]:
    """Return the records of a metrics file, oldest first.

    A killed run may leave an incomplete last line, which is skipped. Other unreadable lines are skipped with a warning.
    Raises OSError if the file cannot be read.
    """
    if not path.is_file():  # reading a device or a pipe may never end
        raise OSError(errno.EINVAL, "is not a regular file" if path.exists() else "No such file or directory")
    lines = path.read_bytes().split(b"\n")
    records, bad = [], 0
    for number, line in enumerate(lines):
        record = _parse(line)
        if record is not None:
            records.append(record)
        elif line.strip() and number < len(lines) - 1:
            bad += 1
    if bad:
        warnings.warn(f"{path}: skipped unreadable lines: {bad}", RuntimeWarning, stacklevel=2)
    return records


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    step = record.get("step", 0)
    return record if isinstance(step, int) and 0 <= step < 1 << 62 else None


def _json_ready(value: Any) -> tuple[Any, bool]:
    """Convert ``value`` to JSON types, and return whether all its numbers are finite. Tensors become lists."""
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
    """Encode ``record`` as one line of valid JSON."""
    ready, finite = _json_ready(record)
    if not finite:
        ready["nonfinite"] = True
    return json.dumps(ready, allow_nan=False).encode() + b"\n"


class MetricsWriter:
    """Appends records to ``run_dir/metrics.jsonl`` and copies them to ``trackers``, names of :data:`TRACKERS`.

    With ``resume_step``, records of later steps, left by the interrupted run, are removed first. Without it, the file
    starts empty, and an existing one is kept as ``metrics.previous.jsonl``.

    Raises ValueError if ``run_dir`` cannot be written. Later failures cause one warning each for the file and for every
    tracker, but no exception, because a full disk must not end a training run.
    """

    def __init__(self, run_dir: Path, trackers: Sequence[str] = (), resume_step: int | None = None) -> None:
        self.path = Path(run_dir) / METRICS_FILE
        self._warned = False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_symlink():  # in a folder from somebody else, it may point anywhere
                raise ValueError(f"{self.path}: is a link, which is not followed; put the file itself there")
            if self.path.exists() and not self.path.is_file():  # opening a pipe may never end
                raise ValueError(f"{self.path}: is not a regular file; delete it, or choose another folder")
            if resume_step is None:
                if self.path.exists():
                    os.replace(self.path, self.path.with_name("metrics.previous.jsonl"))
            elif self.path.exists():
                self._cut(resume_step)
            self.path.open("ab").close()
            self._size = self.path.stat().st_size
            self._place = self._folder()
        except OSError as error:
            raise ValueError(
                f"run_dir={str(run_dir)!r}: cannot be written ({error.strerror or error}); choose another folder"
            ) from None
        self._mirror = Mirror(Path(run_dir), trackers, resume_step)

    def _folder(self) -> tuple[int, int]:
        """Identify the folder, because another one may get its name."""
        found = self.path.parent.stat()
        return found.st_dev, found.st_ino

    def _cut(self, step: int) -> None:
        lines = ((line, _parse(line)) for line in self.path.read_bytes().split(b"\n"))
        kept = [line for line, record in lines if record is not None and record.get("step", 0) <= step]
        write_atomically(self.path, b"".join(line + b"\n" for line in kept))

    def write(self, record: Record) -> None:
        """Append one record, see the module's docstring. Records of kind "train" and "eval" need a ``step``."""
        line = to_line(record)
        try:
            if self._folder() != self._place:
                raise OSError(errno.ENOENT, "its folder was replaced")
            # truncate to the last complete record first, because a failed write may have left a partial line
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
                    f"{self.path} cannot be written ({error.strerror or error}); training continues without metrics",
                    RuntimeWarning,
                    stacklevel=2,
                )
        self._mirror.write(record)

    def close(self) -> None:
        """Close the trackers. The metrics file needs no closing: it is complete after every record."""
        self._mirror.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
