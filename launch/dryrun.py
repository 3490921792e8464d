"""One rank of a large job, on a laptop: ``python -m equimoe.launch.dryrun --recipe deepseek_v3 --world 1024``.

The code of a training run takes one optimizer step on tensors without memory, in a process group that reaches nobody.
What it would have allocated, sent and computed is counted. Routing is taken to be balanced, because nothing is routed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..moe.config import MoEConfig
from ..moe.engines import Batch, build_engine
from ..moe.engines.torch import TorchEngine
from ..moe.parallel import Mesh, build_mesh
from ..moe.parallel.dry import Collective, Recorder
from ..moe.parallel.pipeline import check_pipeline
from ..moe.train.config import TrainConfig
from ..moe.train.data import load_tokenizer
from ..moe.train.loop import build_model
from ..moe.train.optim import build_optimizer
from ..moe.train.step import mixed_precision
from . import env
from .options import parse

USAGE = """usage: python -m equimoe.launch.dryrun --world N [--rank R] [--node N] [--json FILE] [--recipe NAME] ...

  --world INT   ranks of the job
  --rank INT    the rank to look at; default 0
  --node INT    ranks of a node; default 8
  --json FILE   write the findings there, too

All options of python -m equimoe.launch.train that configure a run can be given: --recipe, --config, --SECTION.FIELD.
"""

CPU = torch.device("cpu")

NOTES = [
    "routing is taken to be balanced: every expert is chosen equally often, by every rank",
    "memory is what tensors take; the CUDA context, NCCL's buffers and fragmentation come on top",
]


@dataclass(frozen=True)
class Found:
    """What one rank does in one optimizer step."""

    world: int
    rank: int
    #: blocks of the model that are on this rank
    blocks: list[int]
    #: micro-batches of a step, and how many of them were run
    micro_batches: int
    run: int
    #: parameters of its blocks, over all ranks that share them
    parameters: int
    #: bytes by kind at the moment when most is allocated, and the most of each kind at any moment
    memory: dict[str, int]
    most: dict[str, int]
    #: kind, calls and bytes sent of all micro-batches of a step
    traffic: list[tuple[Collective, int, int]]
    #: floating-point operations of a step, recomputation included, by part of the model
    flops: dict[str, int]
    notes: list[str]
    seconds: float


class _WithTriton(TrainConfig):
    """The kernels whose operations know the shapes of their results without computing them."""

    def moe(self, micro_batches: int) -> MoEConfig:
        return replace(super().moe(micro_batches), backend="triton")


def dry_run(config: TrainConfig, world: int, rank: int, node: int = 8) -> Found:
    """Take a step as ``rank`` of ``world``. Raises ValueError for a configuration that does not fit."""
    start = time.perf_counter()
    config = _WithTriton(**{f.name: getattr(config, f.name) for f in fields(config)})
    degrees = config.degrees(world)
    config = replace(config, parallel=degrees)
    passes = config.micro_batches(degrees.dp)
    if degrees.pp > 1:  # of the whole step: fewer micro-batches are run here
        layers, micro_batch = config.model.num_layers, config.data.micro_batch
        check_pipeline(degrees.schedule, degrees.pp, degrees.stages_of_rank, passes, layers, micro_batch)
    run = min(passes, _enough(config, degrees.pp, passes))
    vocabulary = config.model.vocab_size or load_tokenizer(config.data.tokenizer).vocab_size
    with env.pretended(rank, world, node):
        mesh = build_mesh(config.parallel, warm_up=False) if world > 1 else None
        mode = FakeTensorMode(allow_non_fake_inputs=True)  # positions and ranks are known
        with mode:
            model = build_model(config, vocabulary, run)
        engine = _engine(config, model, mesh, run)
        recorder = _recorder(config, mesh, node, run)
        _step(config, engine, recorder, mode, run)
        at_peak, most = recorder.peak()
        parts: Iterable[Any] = engine.parts
        blocks = [int(number) for part in parts for number in part.blocks]
    whole = passes / run
    traffic = [
        (kind, round(calls * scale), round(recorder.sent[kind] * scale))
        for kind, calls in recorder.calls.items()
        for scale in [1 if kind.when == "once a step" else whole]
    ]
    return Found(
        world,
        rank,
        blocks,
        passes,
        run,
        sum(p.numel() for p in engine.parameters.values()),
        at_peak,
        most,
        sorted(traffic, key=lambda row: -row[2]),
        {part: round(count * whole) for part, count in recorder.flops.items()},
        NOTES,
        time.perf_counter() - start,
    )


def _enough(config: TrainConfig, pp: int, passes: int) -> int:
    """Micro-batches after which a rank holds as many at a time as it ever will."""
    if pp == 1:
        return 2
    return {"gpipe": passes, "1f1b": pp}.get(config.parallel.schedule, 2 * pp)


def _engine(config: TrainConfig, model: Any, mesh: Mesh | None, run: int) -> TorchEngine:
    return build_engine(
        model,
        mesh,
        lambda trainable: build_optimizer(trainable.values(), config.optim),
        max_norm=config.optim.grad_clip,
        micro_batches=run,
        shape=(config.data.micro_batch, config.data.seq_len),
        device=CPU,
        dtype=torch.bfloat16 if config.dtype == "bfloat16" else None,
        precision=partial(mixed_precision, config, CPU),
    )


def _recorder(config: TrainConfig, mesh: Mesh | None, node: int, run: int) -> Recorder:
    pieces = 1 if mesh is None else mesh["cp"].size * mesh["tp"].size
    tokens = config.data.micro_batch * config.data.seq_len // pieces
    return Recorder(mesh, node, tokens, config.moe(run))


def _step(config: TrainConfig, engine: TorchEngine, recorder: Recorder, mode: FakeTensorMode, run: int) -> None:
    parameters, optimizer = list(engine.parameters.values()), engine.optimizer
    assert optimizer is not None
    recorder.name("parameters", iter(parameters))
    for part in engine.parts:
        recorder.name("buffers", part.buffers())
        recorder.watch(part)
    optimizer.register_step_pre_hook(
        lambda *_: recorder.name("gradients", (p.grad for p in parameters if p.grad is not None))
    )
    with mode, recorder:
        ids_BS = torch.zeros((config.data.micro_batch, config.data.seq_len), dtype=torch.int64)
        engine.step([Batch(ids_BS.clone(), ids_BS.clone()) for _ in range(run)], config.optim.lr)
        recorder.name("optimizer state", (t for state in optimizer.state.values() for t in state.values()))


# ---- the command line


def describe(found: Found, config: TrainConfig) -> str:
    """The findings as text."""
    lines = [
        f"rank {found.rank} of {found.world}: blocks {_ranges(found.blocks)} of {config.model.num_layers}, "
        f"with {_amount(found.parameters, 1000)} parameters, which this rank may share with others",
        f"ran {found.run} of a step's {found.micro_batches} micro-batches in {found.seconds:.0f} s; "
        "the numbers are those of a step",
        *found.notes,
        "",
        f"{'memory':<24}{'at the peak':>14}{'most of the kind':>18}",
    ]
    for kind, size in sorted(found.most.items(), key=lambda row: -row[1]):
        lines.append(f"  {kind:<22}{_bytes(found.memory.get(kind, 0)):>14}{_bytes(size):>18}")
    lines.append(f"  {'all':<22}{_bytes(sum(found.memory.values())):>14}")
    lines += ["", f"{'collective':<16}{'axis':<14}{'ranks':>6} {'in one node':<12}{'calls':>9}{'sent':>13}  when"]
    for what, calls, size in found.traffic:
        row = f"{what.verb:<16}{what.axis:<14}{what.ranks:>6} {'yes' if what.inside_node else 'no':<12}"
        lines.append(f"{row}{calls:>9}{_bytes(size):>13}  {what.when}")
    lines += ["", "products, recomputed ones included"]
    for part, count in [*sorted(found.flops.items(), key=lambda row: -row[1]), ("all", sum(found.flops.values()))]:
        lines.append(f"  {part:<22}{_amount(count, 1000):>14}FLOP")
    return "\n".join(lines)


def _bytes(size: int) -> str:
    return _amount(size, 1024) + "B"


def _amount(value: float, base: int) -> str:
    """Three or four digits and a prefix: 12.3 Gi, 1.23 T."""
    prefixes = ["", "Ki", "Mi", "Gi", "Ti", "Pi"] if base == 1024 else ["", "k", "M", "G", "T", "P", "E"]
    while value >= base and len(prefixes) > 1:
        value, prefixes = value / base, prefixes[1:]
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {prefixes[0]}"


def _ranges(numbers: list[int]) -> str:
    """0 1 2 5 as 0-2, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _own(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """This command's options, and the rest."""
    own, rest, left = {"world": "", "rank": "0", "node": "8", "json": ""}, [], list(argv)
    while left:
        name, equals, text = left.pop(0).partition("=")
        if name.startswith("--") and name[2:] in own:
            if not equals and (not left or left[0].startswith("--")):
                raise ValueError(f"{name}: give a value, as in {name} VALUE")
            own[name[2:]] = text if equals else left.pop(0)
            if not own[name[2:]].strip():
                raise ValueError(f"{name}=: is empty; give a value, or leave the option out")
        else:
            rest.append(name + equals + text)
    return own, rest


def _number(own: dict[str, str], name: str, low: int, high: int | None = None) -> int:
    text = own[name]
    if not text:
        raise ValueError(f"--{name}: give the number of ranks, as in --{name} 1024")
    bound = f"of at least {low}" if high is None else f"from {low} to {high}"
    if not text.lstrip("-").isdigit() or int(text) < low or (high is not None and int(text) > high):
        raise ValueError(f"--{name}={text}: must be a whole number {bound}")
    return int(text)


def main(argv: list[str] | None = None) -> None:
    """Entry point; exits with 64 for what does not fit, 73 where the file cannot be written."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(USAGE, end="")
        return
    try:
        own, rest = _own(arguments)
        world, node = _number(own, "world", 1), _number(own, "node", 1)
        rank = _number(own, "rank", 0, world - 1)
        config = parse(rest).config
        if own["json"] and not Path(own["json"]).parent.is_dir():
            env.stop(env.Process(), env.CANNOT_WRITE, f"--json={own['json']}: there is no such folder")
        found = dry_run(config, world, rank, node)
    except ValueError as error:
        env.stop(env.Process(), env.CONFIG, " ".join(str(error).split()))
    print(describe(found, config))
    if own["json"]:
        try:
            Path(own["json"]).write_text(json.dumps(_as_json(found), indent=1) + "\n")
        except OSError as error:
            env.stop(env.Process(), env.CANNOT_WRITE, f"--json={own['json']}: {error.strerror}")


def _as_json(found: Found) -> dict[str, Any]:
    traffic = [asdict(kind) | {"calls": calls, "bytes_sent": size} for kind, calls, size in found.traffic]
    return {f.name: getattr(found, f.name) for f in fields(found)} | {"traffic": traffic}


if __name__ == "__main__":
    main()
