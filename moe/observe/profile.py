"""Profiles some steps of a run: a trace for chrome://tracing or Perfetto, and a snapshot of a GPU's memory."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

PROFILE_FOLDER = "profile"
#: most entries of the history of a GPU's allocations
MAX_ALLOCATIONS = 100_000


def steps_of(text: str) -> range:
    """Return the steps that ``text`` names: those from A to B - 1 for "A:B". Raises ValueError if it names none."""
    found = re.fullmatch(r"\s*(\d{1,15})\s*:\s*(\d{1,15})\s*", text, re.ASCII)
    steps = range(int(found[1]), int(found[2])) if found else range(0)
    if not steps or steps[0] < 1:
        raise ValueError(
            f"log.profile={text!r}: must be FIRST:END with 1 <= FIRST < END, as in 10:13 for the steps 10, 11 and 12"
        )
    return steps


class StepProfile:
    """Profiles the steps ``steps`` of this rank, and writes what it finds to ``folder``.

    ``steps-A-B.trace.json.gz`` is a trace of operations with the memory that they allocate. The stages of MoE layers
    are named route, dispatch, experts, combine and balance. On a GPU, ``steps-A-B.memory.pickle`` is a snapshot of its
    memory with the history of allocations, for https://pytorch.org/memory_viz.

    Whatever fails is said in one warning, and training goes on.
    """

    def __init__(self, steps: range, folder: Path, device: torch.device) -> None:
        self.steps, self.folder, self.device = steps, folder, device
        self._profiler: Any = None

    def begin(self, step: int) -> None:
        """Start to profile if ``step``, which comes next, is one of the steps."""
        if step not in self.steps or self._profiler is not None:
            return
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's own notes would be among the progress lines
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])
        profiler = profile(activities=activities, profile_memory=True)
        try:
            if self.device.type == "cuda":
                torch.cuda.memory._record_memory_history(max_entries=MAX_ALLOCATIONS)
            profiler.start()
        except RuntimeError as error:
            self._give_up(error)
        else:
            self._profiler, self._began = profiler, step

    def end(self, step: int, last: bool = False) -> list[Path]:
        """Stop if ``step`` was the last one to profile, or the run's ``last``; return the files that were written."""
        if self._profiler is None or not (last or step >= self.steps[-1]):
            return []
        profiler, self._profiler = self._profiler, None
        name = f"steps-{self._began}-{step}"
        written = [self.folder / f"{name}.trace.json.gz"]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            profiler.stop()
            profiler.export_chrome_trace(str(written[0]))
            if self.device.type == "cuda":
                written.append(self.folder / f"{name}.memory.pickle")
                torch.cuda.memory._dump_snapshot(str(written[1]))
                torch.cuda.memory._record_memory_history(enabled=None)
        except (OSError, RuntimeError) as error:
            self._give_up(error)
            return []
        return written

    def _give_up(self, error: Exception) -> None:
        self.steps = range(0)
        reason = str(error).split("\n")[0]
        warnings.warn(f"log.profile: cannot profile ({reason}); training continues", RuntimeWarning, stacklevel=3)
