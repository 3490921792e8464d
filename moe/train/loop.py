"""The training loop: steps, evaluations, records and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..health import Heartbeat, Pulse
from ..observe.metrics import MetricsWriter
from ..observe.printable import printable
from ..observe.profile import PROFILE_FOLDER, StepProfile, steps_of
from ..observe.progress import Progress
from .trainer import Trainer


class Stopped(Exception):  # noqa: N818  (nothing is wrong)
    """Raised after a checkpoint was saved because a rank got a signal."""

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal


def run(
    trainer: Trainer,
    run_dir: Path,
    metrics: MetricsWriter | None,
    progress: Progress | None,
    heartbeat: Heartbeat | None = None,
    signal: Callable[[], int] = lambda: 0,
) -> dict[str, Any]:
    """Train to the last configured step, evaluating and saving checkpoints, and return the last ``eval`` record.

    Rank 0 passes ``metrics`` and ``progress``; other ranks pass None. ``signal`` returns the signal that asked this
    rank to stop, or 0. If any rank got one, all save after the same step, and raise Stopped.
    """
    config, trainer.started = trainer.config, time.perf_counter()
    loop = _Loop(trainer, run_dir, _Output(metrics, progress), Pulse(trainer.axis, heartbeat))
    stop = 0
    try:
        while trainer.step < config.steps and not stop:
            stop = loop.step(signal)
        loop.finish()
    except BaseException:
        loop.abandon()
        raise
    if stop and trainer.step < config.steps:
        raise Stopped(stop)
    return loop.last_eval


class _Output:
    """Where records and notes go: on rank 0, to files, trackers and the terminal; on other ranks, nowhere."""

    def __init__(self, metrics: MetricsWriter | None, progress: Progress | None) -> None:
        self._metrics, self._progress = metrics, progress

    def publish(self, record: dict[str, Any]) -> None:
        if self._metrics is not None:
            self._metrics.write(record)
        if self._progress is not None:
            self._progress.show(record)

    def say(self, note: str) -> None:
        if self._progress is not None:
            self._progress.say(note)

    def advance(self, step: int) -> None:
        if self._progress is not None:
            self._progress.advance(step)


class _Loop:
    """What happens in and around each step."""

    def __init__(self, trainer: Trainer, run_dir: Path, output: _Output, pulse: Pulse) -> None:
        self.trainer, self.config, self.run_dir = trainer, trainer.config, run_dir
        self.output, self.pulse = output, pulse
        self.last_eval: dict[str, Any] = {}
        #: tokens and time since which the speed is measured
        self._since = trainer.tokens, trainer.started
        wanted = self.config.log.profile if trainer.axis.rank == 0 else None
        steps = range(0) if wanted is None else steps_of(wanted)
        self._profile = StepProfile(steps, run_dir / PROFILE_FOLDER, trainer.device)
        if wanted is not None and trainer.step >= steps[-1]:
            output.say(f"note: log.profile={wanted}: the run is past these steps")

    def step(self, signal: Callable[[], int]) -> int:
        """Train a step, and record, evaluate and save after it if that is due. Return the signal that stops the run."""
        trainer, config = self.trainer, self.config
        trainer.saver.check()
        self._publish_saves()
        step, last = trainer.step + 1, trainer.step + 1 == config.steps
        logged = last or step % config.log.every == 0
        self._profile.begin(step)
        self.pulse.begin(step)
        norm = trainer.train_step(observed=logged)
        stop = self.pulse.end(signal(), logged)
        for skip in trainer.skipped:
            self.output.publish(skip)
        trainer.skipped.clear()
        self.output.advance(step)
        if logged:
            self._record(norm)
        busy = time.perf_counter()
        self._look_and_save(step, last, stop)
        tokens, since = self._since
        self._since = tokens, since + time.perf_counter() - busy  # tokens_per_s excludes this time
        return stop

    def _record(self, norm: Any) -> None:
        """Publish what was measured since the last record."""
        trainer, pulse = self.trainer, self.pulse
        record, now = trainer.record(norm) | pulse.record(), time.perf_counter()
        tokens, since = self._since
        record |= trainer.speed((trainer.tokens - tokens) / (now - since))
        record["elapsed_s"] = trainer.elapsed_s
        self.output.publish(record)
        if note := pulse.note():
            self.output.say(note)
        self._since = trainer.tokens, time.perf_counter()

    def _look_and_save(self, step: int, last: bool, stop: int) -> None:
        """Write a profile, evaluate, compare replicas and save, as far as it is due after this step."""
        config, trainer = self.config, self.trainer
        if files := self._profile.end(step, last or bool(stop)):
            self.output.say(f"profile: {', '.join(printable(str(file)) for file in files)}")
        if last or (config.log.eval_every and step % config.log.eval_every == 0):
            self.pulse.enter("evaluate")
            self.last_eval = trainer.evaluate()
            self.output.publish(self.last_eval)
        saves = last or stop or (config.checkpoint.every and step % config.checkpoint.every == 0)
        if config.health.replicas_every and (saves or step % config.health.replicas_every == 0):
            trainer.check_replicas()
        if saves:
            self.pulse.enter("save")
            trainer.start_saving(self.run_dir / "checkpoints")

    def finish(self) -> None:
        """Wait for the last save."""
        self.pulse.enter("save")
        self.trainer.saver.wait()
        self._publish_saves()
        if self.trainer.step >= self.config.steps and (unread := self.trainer.cursor.waiting):
            self.output.say(f"note: {unread} postponed sequences were not read again, because the run has ended")

    def abandon(self) -> None:
        """Keep what is there of a profile and a save when an error ends the run."""
        self._profile.end(self.trainer.step, True)
        self.trainer.saver.settle(self.config.parallel.timeout_s)
        self._publish_saves()

    def _publish_saves(self) -> None:
        for saved in self.trainer.saver.completed:
            self.output.publish({"kind": "checkpoint", "step": saved})
        self.trainer.saver.completed.clear()
