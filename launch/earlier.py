"""What an earlier attempt at a run has left in its folder, and whether this attempt may go on there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..moe import checkpoint
from ..moe.observe.metrics import METRICS_FILE, read_records
from .env import EXIT_FILE
from .folder import LOCK
from .options import Launch

CHECKPOINTS = "checkpoints"
CONFIG_FILE = "config.yaml"
#: what a run reads or writes in its folder; opening a pipe of that name would never end
FILES = (METRICS_FILE, LOCK, EXIT_FILE, CONFIG_FILE)


def exists(run_dir: Path) -> bool:
    """Return whether the run folder exists. Raises ValueError if it cannot be one."""
    remedy = "choose another --run-dir"
    try:
        str(run_dir).encode()
    except UnicodeEncodeError:  # safetensors could not open the checkpoints
        raise ValueError(f"run_dir={str(run_dir)!r}: is not UTF-8; {remedy}") from None
    for place in (run_dir, *run_dir.absolute().parents):
        try:
            kind = os.stat(place).st_mode
        except (FileNotFoundError, NotADirectoryError):
            if place.is_symlink():
                raise ValueError(f"run_dir={str(run_dir)!r}: {place} is a link to nothing; {remedy}") from None
            continue
        except OSError as error:
            raise ValueError(f"run_dir={str(run_dir)!r}: cannot be used ({error.strerror}); {remedy}") from None
        if not stat.S_ISDIR(kind):
            raise ValueError(f"run_dir={str(run_dir)!r}: {place} is not a folder; {remedy}")
        if not os.access(place, os.W_OK | os.X_OK):
            raise ValueError(f"run_dir={str(run_dir)!r}: cannot be written; {remedy}")
        if place == run_dir:
            _check_files(run_dir)
        return place == run_dir
    return False


def _check_files(run_dir: Path) -> None:
    for name in FILES:
        try:
            kind = os.lstat(run_dir / name).st_mode
        except OSError:
            continue
        if not stat.S_ISREG(kind) and not stat.S_ISLNK(kind):  # each file has its own rule for links
            raise ValueError(f"{run_dir / name}: is not a regular file; delete it, or choose another --run-dir")


def check(launch: Launch, resuming: bool, again: bool, found: bool) -> str:
    """Say why a run that has begun before starts at step 0; empty unless it does. ``found``: it has a checkpoint.

    Raises ValueError if the run folder and the options do not fit, or if a run that is to go on has lost its
    checkpoints: starting again would hide that.
    """
    run_dir, root = launch.run_dir, launch.run_dir / CHECKPOINTS
    if not resuming and checkpoint.complete(root):
        raise ValueError(f"run_dir={str(run_dir)!r}: already holds a run; add --resume, or choose another --run-dir")
    known = (run_dir / METRICS_FILE).exists()
    lost = _lost(run_dir) if known and not found else ""
    if lost and resuming:
        raise ValueError(f"{root}: {lost}; put it back (is its disk mounted?), or choose another --run-dir")
    if launch.resume and not (found or known or again or launch.requeue):
        what = "no complete checkpoint; start without --resume, or give the run's own folder"
        raise ValueError(f"{root}: {what}")
    if lost:
        return f"{root}: {lost}; starting from step 0"
    early = f"{run_dir}: the earlier attempt ended before its first checkpoint; starting again from step 0"
    return early if known and not found else ""


def _lost(run_dir: Path) -> str:
    """Say what a run without checkpoints has lost; empty if it never had one.

    A run makes the folder of its checkpoints before its metrics, and records each checkpoint when it is complete.
    """
    root = run_dir / CHECKPOINTS
    records = read_records(run_dir / METRICS_FILE)
    saved = [record.get("step", 0) for record in records if record["kind"] == "checkpoint"]
    if saved:
        return f"holds no checkpoint, although the run has saved one in step {max(saved)}"
    if not root.is_dir():
        return "is not a folder" if root.exists() else "is missing, although the run had begun"
    return ""
