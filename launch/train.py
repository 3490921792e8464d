"""Trains a language model: ``python -m equimoe.launch.train --recipe quickstart --processes 2``.

On several machines, start this command with torchrun.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import sys
from collections.abc import Mapping, Sized
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..moe import checkpoint
from ..moe.dispatch import OverBudgetError
from ..moe.observe.metrics import METRICS_FILE, MetricsWriter, Progress, read_records, write_atomically
from ..moe.observe.printable import printable
from ..moe.parallel import ParallelConfig, build_mesh
from ..moe.parallel.degrees import DENSE_DEGREES, EXPERT_DEGREES
from ..moe.parallel.pipeline import check_pipeline
from ..moe.train.config import DataConfig, OptimConfig, TrainConfig
from ..moe.train.contract import DATA, check_resumed
from ..moe.train.data import Corpus, DataError, bigram_loss, load_corpus, load_tokenizer
from ..moe.train.judge import NonFiniteError
from ..moe.train.loop import Trainer, run
from ..moe.train.optim import rise_on_resume
from ..moe.train.replay import DisagreementError
from . import env
from .memory import is_out_of_memory, out_of_memory_line
from .options import Launch, parse, to_yaml
from .report import write_report
from .text import counted, short_count


@env.command
def main(argv: list[str] | None = None) -> None:
    """Entry point. Exits with the codes of :mod:`equimoe.launch.env`."""
    arguments = sys.argv[1:] if argv is None else argv
    process = env.this_process()
    try:
        launch = parse(arguments)
        config = launch.config
        if launch.print_config:
            print(to_yaml(config), end="") if process.rank == 0 else None
            return
        started = env.started()
        if started and launch.processes not in (None, process.local_world):
            has = f"torchrun has already started {counted(process.local_world, 'process')} on this machine"
            raise ValueError(f"--processes={launch.processes}: {has}; leave the option out")
        world = process.world if started else launch.processes or 1
        degrees = config.degrees(world)
        micro_batches = config.micro_batches(degrees.dp)
        if degrees.pp > 1:
            layers, micro_batch = config.model.num_layers, config.data.micro_batch
            check_pipeline(degrees.schedule, degrees.pp, degrees.stages_of_rank, micro_batches, layers, micro_batch)
    except ValueError as error:
        env.stop(process, env.CONFIG, str(error))
    if world > process.world:
        env.start(world, "equimoe.launch.train", arguments)
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", (os.cpu_count() or 1) // process.world or 1))))
    try:
        with env.joined(process, config.parallel.timeout_s):
            _train(launch, degrees, process, arguments)
    except KeyboardInterrupt:
        sys.exit(env.INTERRUPTED) if started else env.stop(process, env.INTERRUPTED, "stopped by SIGINT")


def _train(launch: Launch, degrees: ParallelConfig, process: env.Process, arguments: list[str]) -> None:
    config, run_dir = launch.config, launch.run_dir
    env.together(process, env.CONFIG, lambda: None, lambda _: _digest(config))
    corpus = env.together(process, env.DATA, lambda: _read_corpus(config), lambda found: found.fingerprint)
    found = env.together(process, env.CHECKPOINT, lambda: _find_checkpoint(launch, process))
    mesh = build_mesh(degrees, process.device.type) if process.world > 1 else None
    trainer = env.together(process, env.CONFIG, lambda: Trainer(config, corpus, mesh, process.device))
    notes = [] if found is None else env.together(process, env.CONFIG, lambda: _check_resumed(launch, found[1]))
    if found is not None:
        env.together(process, env.CHECKPOINT, lambda: trainer.resume(*found, DATA in launch.allow_change))
    if process.rank == 0:
        _introduce(trainer, launch, notes)
    if launch.dry_run:
        return
    metrics = env.together(process, env.CANNOT_WRITE, lambda: _open_metrics(trainer, launch, process))
    progress = Progress(config.steps, trainer.step) if process.rank == 0 else None
    try:
        result = run(trainer, run_dir, metrics, progress)
    except NonFiniteError as error:
        env.stop(process, env.NON_FINITE, f"step {trainer.step + 1}: {error}")
    except DataError as error:
        _stop_here(process, env.DATA, f"step {trainer.step + 1}: {error}")
    except OverBudgetError as error:  # on every rank
        env.stop(process, env.MEMORY, f"step {trainer.step + 1}, {out_of_memory_line(error, trainer.layers)}")
    except DisagreementError as error:
        env.stop(process, env.DISAGREEMENT, f"step {trainer.step}: {error}")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        line = out_of_memory_line(error, trainer.layers)
        _stop_here(process, env.MEMORY, f"step {trainer.step + 1}, out of memory: {line}")
    finally:
        if progress is not None:
            progress.close()
        if metrics is not None:
            metrics.close()
    if process.rank == 0:
        _conclude(trainer, launch, result, arguments)


def _stop_here(process: env.Process, code: int, message: str) -> NoReturn:
    """Print a line on this rank, which may be the only one to know the problem, and exit with ``code``."""
    env.stop(replace(process, rank=0), code, f"rank {process.rank}, {message}" if process.world > 1 else message)


def _digest(config: TrainConfig) -> str:
    versions = f"{sys.version_info[:2]} {torch.__version__}"
    return hashlib.sha256(f"{to_yaml(config)}{versions}".encode()).hexdigest()


def _read_corpus(config: TrainConfig) -> Corpus:
    corpus = load_corpus(config.data, load_tokenizer(config.data.tokenizer))
    vocabulary = config.model.vocab_size
    if vocabulary is not None and vocabulary < corpus.vocab_size:
        raise ValueError(
            f"model.vocab_size={vocabulary}: is less than the tokenizer's {corpus.vocab_size} tokens; leave it out"
        )
    return corpus


def _find_checkpoint(launch: Launch, process: env.Process) -> tuple[Path, dict[str, Any]] | None:
    """Return the path and manifest of the checkpoint to resume from, or None to start a new run.

    After torchrun restarts a failed run, that is the run's newest checkpoint, or None if there is none yet. Raises
    ValueError if the folder of a new run already holds a run.
    """
    root = launch.run_dir / "checkpoints"
    again = process.restarts > 0
    if again and not checkpoint.complete(root):
        return None
    if not launch.resume and not again:
        if (launch.run_dir / METRICS_FILE).exists() or checkpoint.complete(root):
            raise ValueError(
                f"run_dir={str(launch.run_dir)!r}: already holds a run; add --resume, or choose another --run-dir"
            )
        return None
    path = checkpoint.newest(root)
    manifest = checkpoint.read_manifest(path)
    if manifest["step"] >= launch.config.steps:
        raise ValueError(f"steps={launch.config.steps}: {path} is already at step {manifest['step']}; raise --steps")
    return path, manifest


def _open_metrics(trainer: Trainer, launch: Launch, process: env.Process) -> MetricsWriter | None:
    if process.rank > 0:
        return None
    new = trainer.step == 0
    metrics = MetricsWriter(launch.run_dir, launch.config.log.tensorboard, None if new else trainer.step)
    write_atomically(launch.run_dir / "config.yaml", to_yaml(launch.config).encode())
    metrics.write(trainer.describe(asdict(launch.config) | {"recipe": launch.recipe}))
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
            f"to go on with the last one, add {_constant(last)}"
        )
    return notes


def _constant(rate: float) -> str:
    return f"--optim.schedule constant --optim.lr {rate:.4g}"


def _introduce(trainer: Trainer, launch: Launch, notes: list[str]) -> None:
    corpus, config = trainer.corpus, trainer.config
    print(f"{launch.recipe}: {trainer.parameters:,} parameters, {trainer.active_parameters:,} active per token")
    print(
        f"{counted(len(trainer.moe_numbers), 'MoE layer')} of {counted(config.moe.num_experts, 'expert')}, "
        f"top-{config.moe.top_k}; {counted(trainer.axis.size, 'rank')}{_degrees(trainer)}, "
        f"{counted(trainer.micro_batches, 'micro-batch')} per step"
    )
    kept, held = (sum(map(len, streams.values())) for streams in (corpus.train, corpus.heldout))
    print(f"text: {printable(_source(config.data))}")
    print(f"training: {short_count(kept)} tokens ({_sizes(corpus.train)})")
    print(f"held out: {short_count(held)} tokens, {held / (kept + held):.1%} ({_sizes(corpus.heldout)})")
    for note in (*corpus.notes, *notes):
        print(f"note: {printable(note)}")
    sys.stdout.flush()


def _source(data: DataConfig) -> str:
    if data.path is not None:
        return data.path
    cap = data.builtin_bytes_per_domain
    return "built-in, from the Python installation" + (
        "" if cap is None else f", {short_count(cap)} bytes of each domain"
    )


def _sizes(streams: Mapping[str, Sized]) -> str:
    return ", ".join(f"{domain} {short_count(len(stream))}" for domain, stream in streams.items())


def _degrees(trainer: Trainer) -> str:
    if trainer.mesh is None:
        return ""
    degrees = trainer.mesh.degrees
    split = {name: getattr(degrees, name) for name in (*DENSE_DEGREES, *EXPERT_DEGREES)}
    return f" ({degrees.data_parallel}, {', '.join(f'{name} {size}' for name, size in split.items() if size > 1)})"


def _conclude(trainer: Trainer, launch: Launch, result: dict[str, Any], arguments: list[str]) -> None:
    run_dir, config = launch.run_dir, launch.config
    report = _report(run_dir)  # first: whatever happens to the terminal, the page exists
    try:
        records = read_records(run_dir / METRICS_FILE)
    except OSError:  # a full disk did not end the run, and the missing file does not either
        records = []
    bigram: dict[str, float] = next((record["bigram"] for record in records if record["kind"] == "baseline"), {})
    trained: dict[str, Any] = next(
        (record for record in reversed(records) if record["kind"] == "train"), {"layers": []}
    )
    print("\nheld-out loss (nats per token), compared with a bigram model of the whole training text:")
    rows = [(d, entry["loss"]) for d, entry in result["domains"].items()] + [("all", result["loss"])]
    for domain, loss in rows:
        print(f"  {printable(domain):<16} {loss:.4f}   bigram {bigram.get(domain, float('nan')):.4f}")
    dead = sum(int(layer["dead"]) for layer in trained["layers"])
    print(f"dead experts in the last step: {dead} of {len(trained['layers']) * config.moe.num_experts}")
    print(f"checkpoint: {printable(str(checkpoint.newest(run_dir / 'checkpoints')))}")
    print(f"metrics:    {printable(str(run_dir / METRICS_FILE))}")
    print(f"report:     {report}")
    longer = replace(config, steps=2 * config.steps)
    command = printable(_command(arguments, env.this_process(), longer.steps))
    if (rise := rise_on_resume(config.optim, config.steps, longer, config.steps)) is None:
        print(f"continue:   {command}", flush=True)
    else:
        print(f"continue:   {command} {_constant(rise[0])}")
        print(f"            without the last two options, the learning rate would rise to {rise[1]:.2g}", flush=True)


def _report(run_dir: Path) -> str:
    """Write the report; return its path, or why there is none. A finished run does not fail for it."""
    try:
        return printable(str(write_report(run_dir)))
    except (ValueError, OSError) as problem:
        return f"not written: {printable(str(problem))}"


def _command(arguments: list[str], process: env.Process, steps: int) -> str:
    """Return the command that continues this run, for the folder in which it was started."""
    kept, skip = [], False
    for argument in arguments:
        name = argument.split("=")[0]
        if not skip and name not in ("--resume", "--steps", "--processes"):
            kept.append(argument)
        skip = not skip and argument in ("--steps", "--processes")
    more = [*kept, "--resume", "--steps", str(steps)]
    if process.local_world < process.world:
        return f"run the same command on every machine with the options {shlex.join(more)}"
    python = os.path.relpath(sys.executable) if sys.executable.startswith(os.getcwd() + os.sep) else sys.executable
    processes = ["--processes", str(process.world)] if process.world > 1 else []
    return shlex.join([python, "-m", "equimoe.launch.train", *processes, *more])


if __name__ == "__main__":
    main()
