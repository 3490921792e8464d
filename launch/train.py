"""Trains a language model: ``python -m equimoe.launch.train --recipe quickstart --processes 2``.

On several machines, start this command with torchrun.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the seconds of imports needs no traceback

import torch

from ..moe import checkpoint
from ..moe.config import dotted
from ..moe.health import COLLECTIVE, Heartbeat
from ..moe.observe.metrics import METRICS_FILE, MetricsWriter, write_atomically
from ..moe.observe.printable import printable
from ..moe.observe.progress import Progress
from ..moe.observe.trackers import check_installed, tracker_names
from ..moe.parallel import ParallelConfig, build_mesh
from ..moe.parallel.stages import check_pipeline
from ..moe.train.config import OptimConfig, TrainConfig
from ..moe.train.contract import DATA, check_resumed
from ..moe.train.data import Corpus, bigram_loss
from ..moe.train.judge import NonFiniteError
from ..moe.train.loop import Stopped, run
from ..moe.train.optim import rise_on_resume
from ..moe.train.replay import DisagreementError
from ..moe.train.trainer import Trainer
from . import earlier, env, initial, joining, tokens
from .conclusion import conclude, conclude_early, constant_rate, report_if_missing
from .failing import FAILED, Failure, classify
from .folder import RunLock
from .introduction import introduce
from .joining import gathered, together
from .options import Launch, parse, to_yaml
from .output import outlast_readers
from .signals import Signals
from .text import counted

#: errors that all ranks raise together -> exit code
ENDS: dict[type[Exception], int] = {
    NonFiniteError: env.NON_FINITE,
    DisagreementError: env.DISAGREEMENT,
    checkpoint.NonFiniteStateError: env.NON_FINITE,
    checkpoint.SaveError: env.CANNOT_WRITE,
    checkpoint.LostFolderError: env.CANNOT_WRITE,
}
#: how many times as long as a step may last ranks may wait for each other at the start
JOIN = 3.0


@env.command
def main(argv: list[str] | None = None) -> None:
    """Entry point. Exits with the codes of :mod:`equimoe.launch.env`."""
    arguments = sys.argv[1:] if argv is None else argv
    process, launch, refused = env.Process(), None, None
    try:
        process = env.this_process()
        launch = parse(arguments)
        if launch.print_config:
            print(to_yaml(launch.config), end="") if process.rank == 0 else None
            return
        outlast_readers()  # a run of days does not end with the terminal that shows it
        degrees = _degrees_of(launch, process)
        if process.rank == 0:
            check_installed(tracker_names(launch.config.log.trackers))
        torch.set_num_threads(env.threads(process))
    except ValueError as error:
        refused = (env.CONFIG, str(error))
    if refused is not None and process.world == 1:
        env.stop(process, *refused)
    if launch is not None and not env.started() and (launch.processes or 1) > 1:
        env.start(launch.processes or 1, "equimoe.launch.train", arguments)
    own = joining.introduce(process, {} if launch is None else _facts(launch), refused)
    if process.world == 1:
        if own.error:
            env.stop(process, own.code, own.error)
        assert launch is not None
        with Signals(process) as signals:
            _train(Attempt(launch, degrees, process, joining.alone(own), signals, arguments))
        return
    timeout_s = 60.0 if launch is None else launch.config.parallel.timeout_s
    with (
        Signals(process) as signals,
        joining.joined(process, own, JOIN * timeout_s, COLLECTIVE * timeout_s) as meeting,
    ):
        assert launch is not None
        _train(Attempt(launch, degrees, process, meeting, signals, arguments))


def _degrees_of(launch: Launch, process: env.Process) -> ParallelConfig:
    """Return the parallel degrees of the run; raise ValueError if the ranks cannot form them."""
    config, started = launch.config, env.started()
    if started and launch.processes not in (None, process.local_world):
        has = f"torchrun has already started {counted(process.local_world, 'process')} on this machine"
        raise ValueError(f"--processes={launch.processes}: {has}; leave the option out")
    if not started:
        env.check_launcher(launch.processes)
    degrees = config.degrees(process.world if started else launch.processes or 1)
    micro_batches = config.micro_batches(degrees.dp)
    if degrees.pp > 1:
        layers, micro_batch = config.model.num_layers, config.data.micro_batch
        check_pipeline(degrees.schedule, degrees.pp, degrees.stages_of_rank, micro_batches, layers, micro_batch)
    return degrees


def _facts(launch: Launch) -> dict[str, str]:
    """Return what must be the same on all ranks before they start."""
    options = {
        "resume": launch.resume,
        "requeue": launch.requeue,
        "dry-run": launch.dry_run,
        "run-dir": os.path.abspath(launch.run_dir),
        "init.from": launch.init and os.path.abspath(launch.init),
    }
    return {name: str(value) for name, value in dotted(asdict(launch.config) | options)} | joining.versions()


@dataclass
class Attempt:
    """What a rank knows of this attempt at the run."""

    launch: Launch
    degrees: ParallelConfig
    process: env.Process
    meeting: joining.Meeting
    signals: Signals
    #: of this rank, for the command that continues the run
    arguments: list[str]


def _train(attempt: Attempt) -> None:
    """Run the command on this rank, watched by the others."""
    process, meeting = attempt.process, attempt.meeting
    failure, timeout_s = Failure(process, meeting), attempt.launch.config.parallel.timeout_s
    store, holder = meeting.second, meeting.holder
    signals = attempt.signals
    signals.say, signals.restarting = failure.say, failure.restarting
    signals.killed, signals.end_after, signals.stay = failure.killed, failure.end_after, failure.stay
    try:
        with (
            Heartbeat(process.rank, process.world, store, timeout_s, failure.hang, holder) as failure.heartbeat,
            failure.listening(),
            ExitStack() as held,
        ):
            _run(attempt, failure, failure.heartbeat, held)
    except Exception as problem:
        if process.world == 1 and classify(problem, failure.layers)[0] == FAILED:
            env.record_exit(attempt.process, FAILED)
            raise
        failure.error(problem)


def _run(attempt: Attempt, failure: Failure, heartbeat: Heartbeat, held: ExitStack) -> None:
    launch, process = attempt.launch, attempt.process
    config, run_dir = launch.config, launch.run_dir
    # a new folder is not created before everything has been checked
    exists = gathered(process, together(process, env.CANNOT_WRITE, lambda: earlier.exists(run_dir)))[0]
    lock = _lock(attempt, held) if exists else None
    again = gathered(process, lock is not None and _restarted(lock, attempt.meeting))[0]
    ours = together(process, env.CHECKPOINT, lambda: lock is not None and _is_ours(launch, again))
    if gathered(process, ours)[0]:
        process = _own(attempt, failure)
    corpus = tokens.load(config.data, run_dir, process, attempt.meeting, heartbeat)
    together(process, env.DATA, lambda: _check_vocabulary(config, corpus))
    found = _find_checkpoint(launch, process, again)
    notes = [] if found is None else together(process, env.CONFIG, lambda: _check_resumed(launch, found[1]))
    if found is not None and found[1]["step"] >= config.steps:
        if process.rank == 0:
            reached = f"{found[0].name} has reached --steps={config.steps}"
            print(f"{printable(str(run_dir))}: is finished, as {reached}; raise it to train on")
            if not launch.dry_run:
                report_if_missing(run_dir)
            env.record_exit(process, 0)
        return
    patient = replace(attempt.degrees, timeout_s=COLLECTIVE * config.parallel.timeout_s)
    mesh = build_mesh(patient, process.device.type) if process.world > 1 else None
    jointly = partial(together, process, failed_alone=failure.alone)  # these have collectives
    trainer = jointly(env.CONFIG, lambda: Trainer(config, corpus, mesh, process.device))
    if found is not None:
        jointly(env.CHECKPOINT, lambda: trainer.resume(*found, DATA in launch.allow_change))
    elif (init := launch.init) is not None:
        jointly(env.CHECKPOINT, lambda: initial.begin(trainer, init))
    if process.rank == 0:
        introduce(trainer, launch, notes)
    if launch.dry_run:
        return
    if not exists:
        lock = _lock(attempt, held)
        # another job may have made the folder meanwhile, and have ended again
        together(process, env.CHECKPOINT, lambda: lock is None or earlier.check(launch, False, False, False))
    if lock is not None:
        lock.confirm()
        trainer.saver.guard = lock.lost
    process = _own(attempt, failure)
    try:
        checkpoint.probe(run_dir / "checkpoints")
    except OSError as error:
        joining.stop_all(process, env.CANNOT_WRITE, str(error))
    metrics = together(process, env.CANNOT_WRITE, lambda: _open_metrics(trainer, launch, process))
    failure.layers = trainer.layers
    progress = Progress(config.steps, trainer.step, devices=process.world) if process.rank == 0 else None
    attempt.signals.graceful = True
    stopped, result = 0, {}
    try:
        result = run(trainer, run_dir, metrics, progress, heartbeat, lambda: attempt.signals.number)
        attempt.signals.finished = True
    except tuple(ENDS) as error:
        if isinstance(error, checkpoint.LostFolderError):  # the folder of that name belongs to somebody else
            process = replace(process, exit_files=process.exit_files[:-1])
        joining.stop_all(process, ENDS[type(error)], f"after step {trainer.step}: {error}")
    except Stopped as request:
        stopped = request.signal
    finally:
        if progress is not None:
            progress.close()
        if metrics is not None:
            metrics.close()
    heartbeat.enter("end", trainer.step)
    if process.rank == 0:
        if stopped:
            conclude_early(trainer, launch, stopped, attempt.arguments, attempt.process)
        else:
            conclude(trainer, launch, result, attempt.arguments)
    if stopped:
        gathered(process, None)  # torchrun ends all ranks when the first one exits
        held.close()
        message = f"stopped by {signal.Signals(stopped).name} after step {trainer.step}"
        env.leave(process, 128 + stopped, message)
    if process.rank == 0:
        env.record_exit(process, 0)


def _is_ours(launch: Launch, again: bool) -> bool:
    """Return whether the run folder holds the run that this command continues, or one to start again from step 0."""
    saved = bool(checkpoint.complete(launch.run_dir / "checkpoints"))
    begun = (launch.run_dir / METRICS_FILE).exists()
    resuming = launch.resume or launch.requeue or again
    return not launch.dry_run and ((saved or begun) if resuming else (begun and not saved))


def _own(attempt: Attempt, failure: Failure) -> env.Process:
    """Let the run folder's exit code be that of this job, however it ends; return the process that writes it."""
    file, process = attempt.launch.run_dir / env.EXIT_FILE, attempt.process
    if failure.verdict is not None:
        return process

    def remove() -> None:
        if process.rank == 0:
            file.unlink(missing_ok=True)

    together(process, env.CANNOT_WRITE, remove)
    others = [other for other in process.exit_files if other.absolute() != file.absolute()]  # a user may name this one
    process = replace(process, exit_files=(*others, file))
    attempt.process = failure.process = attempt.signals.process = process
    failure.verdict = file
    return process


def _lock(attempt: Attempt, held: ExitStack) -> RunLock | None:
    """Take the run folder until ``held`` ends, on rank 0; all ranks exit if another job has it."""

    def take() -> RunLock | None:
        if attempt.process.rank > 0:
            return None
        lock = RunLock(attempt.launch.run_dir, attempt.meeting.agents)
        held.callback(lock.release)
        return lock

    return together(attempt.process, env.CANNOT_WRITE, take)


def _restarted(lock: RunLock, meeting: joining.Meeting) -> bool:
    """Return whether torchrun has restarted this very job. One that was refused has not held the folder."""
    return lock.continues and (meeting.restarted or env.under_torchrun())


def _check_vocabulary(config: TrainConfig, corpus: Corpus) -> None:
    vocabulary = config.model.vocab_size
    if vocabulary is not None and vocabulary < corpus.vocab_size:
        raise ValueError(
            f"model.vocab_size={vocabulary}: is less than the tokenizer's {corpus.vocab_size} tokens; leave it "
            "out, or choose another --data.tokenizer"
        )


def _find_checkpoint(launch: Launch, process: env.Process, again: bool) -> tuple[Path, dict[str, Any]] | None:
    """Return the path and manifest of the checkpoint to resume from, or None to start a new run.

    After torchrun has restarted a failed run (``again``), with --resume, or under --requeue, that is the run's newest
    valid checkpoint. Exits if the folder of a new run already holds a run.
    """
    root, choice, note = launch.run_dir / earlier.CHECKPOINTS, None, ""
    resuming = launch.resume or launch.requeue or again
    if resuming:
        try:
            choice = checkpoint.choose(root)
        except checkpoint.ViewError as error:
            joining.stop_all(process, env.DISAGREEMENT, str(error))
        except checkpoint.CheckpointError as error:
            joining.stop_all(process, env.CHECKPOINT, str(error))
        note = "" if choice is None else checkpoint.describe(choice)
    why_new = together(process, env.CHECKPOINT, lambda: earlier.check(launch, resuming, again, choice is not None))
    note = note or why_new
    if note and process.rank == 0:
        print(f"note: {printable(note)}", file=sys.stderr, flush=True)
    return None if choice is None else (choice.path, choice.manifest)


def _open_metrics(trainer: Trainer, launch: Launch, process: env.Process) -> MetricsWriter | None:
    if process.rank > 0:
        return None
    new = trainer.step == 0
    names = tracker_names(launch.config.log.trackers)
    metrics = MetricsWriter(launch.run_dir, names, None if new else trainer.step)
    write_atomically(launch.run_dir / earlier.CONFIG_FILE, to_yaml(launch.config).encode())
    metrics.write(trainer.describe(asdict(launch.config) | {"recipe": launch.recipe}))
    if launch.init is not None:
        initial.keep(launch.init, launch.run_dir)
    if new:
        data, log = launch.config.data, launch.config.log
        bigram = bigram_loss(trainer.corpus, trainer.corpus.vocab_size, data.seq_len, log.eval_sequences)
        metrics.write({"kind": "baseline", "bigram": bigram})
    return metrics


def _check_resumed(launch: Launch, manifest: dict[str, Any]) -> list[str]:
    """Return what the user should know about settings that differ from those of the checkpoint, in sentences.

    Raises ValueError if the resumed run would train something else.
    """
    position, config = manifest["position"], launch.config
    if "config" not in position:  # saved by an older version
        return []
    try:
        saved, optim = position["config"], OptimConfig(**position["config"]["optim"])
        changes = check_resumed(saved, config, launch.allow_change)
        rise = rise_on_resume(optim, int(saved["steps"]), config, manifest["step"])
    except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"the configuration in the checkpoint cannot be read ({type(error).__name__})") from None
    notes = [f"resumed with {name} changed from {old!r} to {new!r}" for name, (old, new) in changes.items()]
    if rise is not None:
        last, now = rise
        notes.append(
            f"the changed schedule raises the learning rate from {last:.3g} to {now:.3g} at once; "
            f"to go on with the last one, add {constant_rate(last)}"
        )
    return notes


if __name__ == "__main__":
    main()
