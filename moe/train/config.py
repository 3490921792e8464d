"""Configuration of a training run. A recipe is a function that returns a complete :class:`TrainConfig`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Literal

from ..config import (
    AttentionConfig,
    MoEConfig,
    PlacementConfig,
    RecomputeConfig,
    check_literals,
    require,
)
from ..config.routing import check_causal
from ..observe.profile import steps_of
from ..parallel.degrees import ParallelConfig as ParallelConfig  # re-exported: a section of TrainConfig
from .sections import (
    CheckpointConfig,
    DataConfig,
    DeepSpeedConfig,
    HealthConfig,
    LogConfig,
    MegatronConfig,
    ModelConfig,
    OptimConfig,
    RoutingConfig,
)


@dataclass(frozen=True)
class TrainConfig:
    """The complete configuration of a training run."""

    #: optimizer steps
    steps: int = 300
    #: seed of the initial weights and of the data order
    seed: int = 0
    #: dtype of the computation; "bfloat16" keeps fp32 master weights
    dtype: Literal["float32", "bfloat16"] = "float32"
    #: who reduces gradients and runs the optimizer: this package (replicated weights or FSDP2), DeepSpeed, or
    #: Megatron-Core
    engine: Literal["torch", "deepspeed", "megatron"] = "torch"
    model: ModelConfig = field(default_factory=ModelConfig)
    #: every MoE layer; its ``hidden_size`` and ``init_std`` are those of the whole model
    moe: MoEConfig = field(default_factory=partial(MoEConfig, 256, 256, num_experts=8, top_k=2))
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    megatron: MegatronConfig = field(default_factory=MegatronConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        check_literals(self)
        require(0 <= self.seed < 1 << 63, "seed", self.seed, "must lie in 0..2**63 - 1")
        require(self.steps >= 1, "steps", self.steps, "must be at least 1")
        if self.log.profile is not None and steps_of(self.log.profile)[-1] > self.steps:
            raise ValueError(
                f"log.profile={self.log.profile!r}: steps={self.steps}; profile earlier steps, or raise it"
            )
        dispatch = self.moe.dispatch
        require(
            dispatch.memory_mb is None or dispatch.over_memory == "stop" or self.parallel.data_parallel != "fsdp",
            "moe.dispatch.over_memory",
            dispatch.over_memory,
            "parallel.data_parallel='fsdp' gathers weights for a whole forward and not for its parts; use 'stop', or "
            "data_parallel='ddp'",
        )
        for name in ("deepspeed", "megatron"):
            section = getattr(self, name)
            given = [f.name for f in fields(section) if getattr(section, f.name) != f.default]
            if given and self.engine != name:
                raise ValueError(
                    f"{name}.{given[0]}={getattr(section, given[0])}: has no effect with engine={self.engine!r}; set "
                    f"engine={name!r}, or leave it out"
                )
        if self.optim.name != "adamw" and self.engine != "torch":
            raise ValueError(f"optim.name={self.optim.name!r}: engine={self.engine!r} runs AdamW; use engine='torch'")
        for name in ("record", "replay"):
            folder, twice = getattr(self.routing, name), self.health.replay_every
            what = f"health.replay_every={twice} computes steps twice; set it to 0"
            require(folder is None or twice == 0, f"routing.{name}", folder, what)
        self._check_placement()
        self._check_choosing()
        self.attention.check(self.moe.hidden_size, self.model.num_heads)
        sparse = self.parallel.experts == "fssdp"
        require(
            sparse or self.parallel.ep == -1 or self.moe.splits_over(self.parallel.ep),
            "parallel.ep",
            self.parallel.ep,
            f"must divide moe.num_experts={self.moe.num_experts}{self._widths}",
        )

    @property
    def _widths(self) -> str:
        if self.moe.widths is None:
            return ""
        possible = [str(n) for n in range(1, self.moe.num_experts + 1) if self.moe.splits_over(n)]
        return f", and moe.widths={self.moe.widths} into runs with equal sums (possible: {', '.join(possible)})"

    def _check_placement(self) -> None:
        fssdp = self.parallel.experts == "fssdp"
        if fssdp and self.engine != "torch":
            raise ValueError(f"parallel.experts='fssdp': engine={self.engine!r} owns the experts; use engine='torch'")
        if fssdp and self.moe.widths is not None:
            raise ValueError(f"moe.widths={self.moe.widths}: parallel.experts='fssdp' moves equal experts; use 'ep'")
        if fssdp and self.moe.balance.counts == "first":
            raise ValueError("parallel.experts='fssdp': plans replicas by all choices; set moe.balance.counts='all'")
        if fssdp and self.moe.dispatch.name == "deepep":
            raise ValueError("parallel.experts='fssdp': moe.dispatch.name='deepep' knows no replicas; use 'all_to_all'")
        if self.placement.calibrate is not None and self.moe.dispatch.memory_mb is not None:
            raise ValueError(
                f"placement.calibrate={self.placement.calibrate}: moe.dispatch.memory_mb computes in parts, which "
                "cannot follow replicas that change from forward to forward; leave one of them out"
            )
        given = [f.name for f in fields(self.placement) if getattr(self.placement, f.name) != f.default]
        if given and not fssdp:
            raise ValueError(
                f"placement.{given[0]}={getattr(self.placement, given[0])}: has no effect with parallel.experts='ep'; "
                "set parallel.experts='fssdp', or leave it out"
            )
        if fssdp:
            values = (2 + self.moe.gated) * self.moe.hidden_size * self.moe.intermediate_size
            self.placement.replicas_per_rank(
                values // max(self.parallel.etp, 1) * (2 if self.dtype == "bfloat16" else 4)
            )

    def _check_choosing(self) -> None:
        """Raise ``ValueError`` if experts would choose among tokens to come, or among too few tokens."""
        router, experts, micro_batch = self.moe.router, self.moe.all_experts, self.data.micro_batch
        check_causal(router, "moe.")
        for name in ("record", "replay"):
            folder = getattr(self.routing, name)
            remedy = "moe.router.gate='slots' makes no choices; leave it out"
            require(folder is None or router.gate != "slots", f"routing.{name}", folder, remedy)
        least = math.ceil(experts / self.moe.top_k)
        require(
            router.select != "expert_choice_by_position" or micro_batch >= least,
            "data.micro_batch",
            micro_batch,
            f"moe.router.select={router.select!r} lets {experts} experts choose among these sequences, whose tokens "
            f"have moe.top_k={self.moe.top_k} experts on average; set it to at least {least}",
        )

    def degrees(self, world: int) -> ParallelConfig:
        """Return the parallel degrees for ``world`` ranks, with every -1 resolved.

        Raises ValueError if they do not multiply to ``world`` or do not divide the experts.
        """
        found = self.parallel.resolve(world, self.moe.num_experts)
        require(
            self.moe.splits_over(found.ep) or found.experts == "fssdp",
            "parallel.ep",
            found.ep,
            f"the value resolved for world size {world} must divide moe.num_experts={self.moe.num_experts}"
            f"{self._widths}; set parallel.ep or change the number of processes",
        )
        require(
            not self.model.tie_embeddings or found.pp == 1,
            "model.tie_embeddings",
            True,
            f"embedding and head are in different stages of parallel.pp={found.pp}; set parallel.pp=1, or leave it out",
        )
        self._check_tokens(found)
        return found

    def _check_tokens(self, degrees: ParallelConfig) -> None:
        """Raise ``ValueError`` if a forward's tokens cannot be split over ranks, or do not fit the layer's settings."""
        seq_len, cp, tp = self.data.seq_len, degrees.cp, degrees.tp
        pieces = tp if degrees.sequence_parallel else 1
        require(
            seq_len % (cp * pieces) == 0,
            "data.seq_len",
            seq_len,
            f"must be a multiple of parallel.cp * parallel.tp = {cp} * {pieces}; change one of them",
        )
        capacity, dispatch = self.moe.capacity, self.moe.dispatch
        pads, held = capacity is not None and capacity.pad and degrees.ep > 1, seq_len // cp
        if held % tp:
            remedy = f"parallel.tp={tp} ranks share {held} positions of each sequence and have unequal tokens; "
            limited = not pads or (capacity is not None and capacity.max_tokens is not None)
            require(limited, "moe.capacity.pad", True, remedy + "set moe.capacity.max_tokens, or change data.seq_len")
            remedy += "set it to False, or change data.seq_len"
            require(not dispatch.equal_tokens, "moe.dispatch.equal_tokens", dispatch.equal_tokens, remedy)
        if capacity is not None and capacity.max_tokens is not None and pads:
            tokens = self.data.micro_batch * math.ceil(held / tp)
            remedy = f"a forward has {tokens} tokens per rank; set it to at least {tokens}, or leave it out"
            require(tokens <= capacity.max_tokens, "moe.capacity.max_tokens", capacity.max_tokens, remedy)
            remedy = f"a forward has {tokens} tokens per rank, and almost all rows would be empty; set it to {tokens}"
            require(capacity.max_tokens <= 1000 * tokens, "moe.capacity.max_tokens", capacity.max_tokens, remedy)

    def _batch_that_fits(self, data_parallel: int) -> str:
        """Say which batch sizes near the present ones fit the ranks."""
        whole, micro_batch = self.data.global_batch, self.data.micro_batch
        larger = f"set data.global_batch={-(-whole // (micro_batch * data_parallel)) * micro_batch * data_parallel}"
        smaller = next((m for m in range(micro_batch, 0, -1) if whole % (m * data_parallel) == 0), None)
        return larger if smaller is None else f"set data.micro_batch={smaller}, or {larger.removeprefix('set ')}"

    def micro_batches(self, data_parallel: int) -> int:
        """Return the micro-batches per optimizer step on each of ``data_parallel`` data-parallel ranks."""
        together = self.data.micro_batch * data_parallel
        require(
            self.data.global_batch % together == 0,
            "data.global_batch",
            self.data.global_batch,
            "must be a multiple of data.micro_batch * data-parallel ranks = "
            f"{self.data.micro_batch} * {data_parallel}; {self._batch_that_fits(data_parallel)}",
        )
        micro_batches = self.data.global_batch // together
        require(
            self.moe.balance.micro_batches in (None, micro_batches),
            "moe.balance.micro_batches",
            self.moe.balance.micro_batches,
            f"data.global_batch, data.micro_batch and data-parallel size {data_parallel} give {micro_batches}; "
            "leave it out",
        )
        return micro_batches
