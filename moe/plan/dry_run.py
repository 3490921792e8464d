"""Simulates one optimizer step of one rank of a large job, on fake tensors that use no memory.

The real training code runs the step in a fake process group, and a :class:`~equimoe.moe.plan.record.Recorder` counts
what it would allocate, send and compute. Routing is assumed to be balanced, because fake tensors have no values.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp._fully_shard import _fsdp_param

from ..engines import Batch, build_engine
from ..engines.experts import ExpertPlacement
from ..engines.torch import TorchEngine
from ..parallel import Mesh, build_mesh
from ..parallel.stages import check_pipeline
from ..placement import Owners, Replicas, replicate
from ..train.build import build_model, mixed_precision
from ..train.config import TrainConfig
from ..train.data import load_tokenizer
from ..train.optim import build_optimizer
from .record import Collective, Recorder

CPU = torch.device("cpu")

NOTES = [
    "routing is assumed to be balanced: every rank chooses every expert equally often",
    "memory counts tensors only; the CUDA context, NCCL buffers and fragmentation need more",
]
#: under data.documents=separate; fake tensors have no documents
SEPARATE = (
    "attention is counted as with data.documents=joined; within documents it computes less, the less the shorter they "
    "are, and a dense mask, where docs/data.md says that there is one, needs more memory"
)


@dataclass(frozen=True)
class DryRun:
    """The result of a dry run: what one rank does in one optimizer step."""

    world: int
    rank: int
    #: numbers of the blocks on this rank
    blocks: list[int]
    #: micro-batches per step
    micro_batches: int
    #: micro-batches that were simulated
    simulated: int
    #: parameters of this rank's blocks, including parts that are sharded to other ranks
    parameters: int
    #: bytes of each kind of memory at the peak of the total
    memory: dict[str, int]
    #: bytes of each kind of memory at its own peak
    most: dict[str, int]
    #: (collective, calls, bytes sent) for all micro-batches of a step
    traffic: list[tuple[Collective, int, int]]
    #: floating-point operations of a step by part of the model, including recomputation
    flops: dict[str, int]
    notes: list[str]
    seconds: float


def dry_run(config: TrainConfig, world: int, rank: int, node: int = 8) -> DryRun:
    """Simulate one optimizer step as ``rank`` of ``world``, with ``node`` ranks per node.

    Raises ValueError if the configuration does not fit ``world``.
    """
    start = time.perf_counter()
    degrees = config.degrees(world)
    # Triton's kernels are custom ops, which can run on fake tensors
    dispatch = replace(config.moe.dispatch, memory_mb=None)  # routing is balanced, so nothing exceeds it
    config = replace(config, parallel=degrees, moe=replace(config.moe, backend="triton", dispatch=dispatch))
    # nor does a load that is balanced and known call for further replicas or other owners
    config = replace(config, placement=replace(config.placement, calibrate=None, reshard_every=0))
    micro_batches = config.micro_batches(degrees.dp)
    if degrees.pp > 1:  # check the whole step, because only some of its micro-batches are simulated
        layers, micro_batch = config.model.num_layers, config.data.micro_batch
        check_pipeline(degrees.schedule, degrees.pp, degrees.stages_of_rank, micro_batches, layers, micro_batch)
    simulated = min(micro_batches, _enough(config, degrees.pp, micro_batches))
    vocabulary = (
        config.model.vocab_size or load_tokenizer(config.data.tokenizer, config.data.end_of_document).vocab_size
    )
    with pretended(rank, world, node):
        mesh = build_mesh(config.parallel, warm_up=False) if world > 1 else None
        mode = FakeTensorMode(allow_non_fake_inputs=True)  # rotary positions and ranks are real tensors
        with mode:
            model = build_model(config, vocabulary)
        with _few_chunks():
            engine = _engine(config, model, mesh, simulated)
        recorder = _recorder(config, mesh, node)
        _step(config, engine, recorder, mode, simulated)
        at_peak, most = recorder.peak()
        parts: Iterable[Any] = engine.parts
        blocks = [int(number) for part in parts for number in part.blocks]
    whole = micro_batches / simulated
    traffic = [
        (kind, round(calls * scale), round(recorder.sent[kind] * scale))
        for kind, calls in recorder.calls.items()
        for scale in [1 if kind.when == "once a step" else whole]
    ]
    return DryRun(
        world,
        rank,
        blocks,
        micro_batches,
        simulated,
        sum(p.numel() for p in engine.parameters.values()),
        at_peak,
        most,
        sorted(traffic, key=lambda row: -row[2]),
        {part: round(count * whole) for part, count in recorder.flops.items()},
        [*NOTES, *([SEPARATE] if config.data.documents == "separate" else [])],
        time.perf_counter() - start,
    )


def _enough(config: TrainConfig, pp: int, micro_batches: int) -> int:
    """Return the number of micro-batches after which a rank has reached its peak memory."""
    if pp == 1:
        return 2
    return {"gpipe": micro_batches, "1f1b": pp}.get(config.parallel.schedule, 2 * pp)


def _engine(config: TrainConfig, model: Any, mesh: Mesh | None, simulated: int) -> TorchEngine:
    return build_engine(
        model,
        mesh,
        lambda trainable: build_optimizer(trainable, config.optim),
        max_norm=config.optim.grad_clip,
        micro_batches=simulated,
        shape=(config.data.micro_batch, config.data.seq_len),
        device=CPU,
        dtype=torch.bfloat16 if config.dtype == "bfloat16" else None,
        precision=partial(mixed_precision, config, CPU),
        placement=config.placement,
    )


@contextmanager
def _few_chunks() -> Iterator[None]:
    """Within the block, FSDP2 cuts weights into the parts that it reads instead of one per rank.

    It reads two. With thousands of ranks and hundreds of weights, making the others takes minutes on fake tensors.
    """
    whole = _fsdp_param._chunk_with_empty
    _fsdp_param._chunk_with_empty = _Chunks  # type: ignore[assignment]
    try:
        yield
    finally:
        _fsdp_param._chunk_with_empty = whole


class _Chunks:
    """Stands for the list that torch's function of the same arguments returns, and cuts an entry when it is read."""

    def __init__(self, tensor: Tensor, num_chunks: int, dim: int) -> None:
        self.tensor, self.dim = tensor, dim
        self.length = -(-tensor.shape[dim] // num_chunks)

    def __getitem__(self, index: int) -> Tensor:
        first = index * self.length
        left = self.tensor.shape[self.dim] - first
        return self.tensor.narrow(self.dim, first, min(self.length, left)) if left > 0 else self.tensor.new_empty(0)


def _recorder(config: TrainConfig, mesh: Mesh | None, node: int) -> Recorder:
    pieces, moe = 1 if mesh is None else mesh["cp"].size * mesh["tp"].size, config.moe
    tokens = config.data.micro_batch * config.data.seq_len // pieces
    if moe.router.gate == "slots":  # which are dispatched instead of tokens, those of whole sequences
        tokens = config.data.micro_batch * moe.num_experts * moe.router.slots
    return Recorder(mesh, node, tokens, moe)


def _step(config: TrainConfig, engine: TorchEngine, recorder: Recorder, mode: FakeTensorMode, simulated: int) -> None:
    parameters, optimizer = list(engine.parameters.values()), engine.optimizer
    assert optimizer is not None
    recorder.name("parameters", iter(parameters))
    for part in engine.parts:
        recorder.name("buffers", part.buffers())
        recorder.watch(part)
    optimizer.register_step_pre_hook(
        lambda *_: recorder.name("gradients", (p.grad for p in parameters if p.grad is not None))
    )
    engine.experts.plan = partial(_most_replicas, engine.experts)
    with mode, recorder:
        ids_BS = torch.zeros((config.data.micro_batch, config.data.seq_len), dtype=torch.int64)
        batches = [Batch(ids_BS.clone(), ids_BS.clone(), tasks=ids_BS[:, 0]) for _ in range(simulated)]
        engine.step(batches, config.optim.lr)
        recorder.name("optimizer state", (t for state in optimizer.state.values() for t in state.values()))


def _most_replicas(experts: ExpertPlacement, _loads: Any, owners: Sequence[Owners]) -> list[Replicas]:
    """Plan as many replicas as a step may have: an even load would get none."""
    chosen = range(min((experts.config.overlap, *(of.num_experts for of in owners))))
    return [replicate(chosen, [1.0] * of.num_experts, of, experts.room, experts.node_size) for of in owners]


@contextmanager
def pretended(rank: int, world: int, node: int) -> Iterator[None]:
    """Within the block, act as ``rank`` of ``world``, with ``node`` ranks per machine, in a fake process group.

    Its collectives return immediately and transfer nothing.
    """
    if world == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore  # imported late: a part of torch's tests

    before = os.environ.get("LOCAL_WORLD_SIZE")
    os.environ["LOCAL_WORLD_SIZE"] = str(node)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()
        os.environ.pop("LOCAL_WORLD_SIZE")
        if before is not None:
            os.environ["LOCAL_WORLD_SIZE"] = before
