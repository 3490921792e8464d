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
    since = trainer.tokens, trainer.started
    last_eval: dict[str, Any] = {}
    pulse = Pulse(trainer.axis, heartbeat)
    wanted = config.log.profile if trainer.axis.rank == 0 else None
    profile = StepProfile(range(0) if wanted is None else steps_of(wanted), run_dir / PROFILE_FOLDER, trainer.device)

    if progress is not None and wanted is not None and trainer.step >= profile.steps[-1]:
        progress.say(f"note: log.profile={wanted}: the run is past these steps")

    def publish(record: dict[str, Any]) -> None:
        if metrics is not None:
            metrics.write(record)
        if progress is not None:
            progress.show(record)

    def publish_saves() -> None:
        for saved in trainer.saver.completed:
            publish({"kind": "checkpoint", "step": saved})
        trainer.saver.completed.clear()

    stop = 0
    try:
        while trainer.step < config.steps and not stop:
            trainer.saver.check()
            publish_saves()
            step, last = trainer.step + 1, trainer.step + 1 == config.steps
            logged = last or step % config.log.every == 0
            profile.begin(step)
            pulse.begin(step)
            norm = trainer.train_step(observed=logged)
            stop = pulse.end(signal(), logged)
            for skip in trainer.skipped:
                publish(skip)
            trainer.skipped.clear()
            if progress is not None:
                progress.advance(step)
            if logged:
                record, now = trainer.record(norm) | pulse.record(), time.perf_counter()
                record |= trainer.speed((trainer.tokens - since[0]) / (now - since[1]))
                record["elapsed_s"] = trainer.elapsed_s
                publish(record)
                if progress is not None and (note := pulse.note()):
                    progress.say(note)
                since = trainer.tokens, time.perf_counter()
            busy = time.perf_counter()
            files = profile.end(step, last or bool(stop))
            if files and progress is not None:
                progress.say(f"profile: {', '.join(printable(str(file)) for file in files)}")
            if last or (config.log.eval_every and step % config.log.eval_every == 0):
                pulse.enter("evaluate")
                last_eval = trainer.evaluate()
                publish(last_eval)
            saves = last or stop or (config.checkpoint.every and step % config.checkpoint.every == 0)
            if config.health.replicas_every and (saves or step % config.health.replicas_every == 0):
                trainer.check_replicas()
            if saves:
                pulse.enter("save")
                trainer.start_saving(run_dir / "checkpoints")
            since = (since[0], since[1] + time.perf_counter() - busy)  # tokens_per_s excludes this time
        pulse.enter("save")
        trainer.saver.wait()
        publish_saves()
        if progress is not None and trainer.step >= config.steps and (unread := trainer.cursor.waiting):
            progress.say(f"note: {unread} postponed sequences were not read again, because the run has ended")
    except BaseException:
        profile.end(trainer.step, True)
        trainer.saver.settle(config.parallel.timeout_s)
        publish_saves()
        raise
    if stop and trainer.step < config.steps:
        raise Stopped(stop)
    return last_eval
