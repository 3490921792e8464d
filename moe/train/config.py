"""What a training run can choose. A recipe is a function that returns a whole :class:`TrainConfig`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from ..config import (
    AttentionConfig,
    BalanceConfig,
    CapacityConfig,
    DispatchConfig,
    MoEConfig,
    RecomputeConfig,
    RouterConfig,
    check_choices,
    require,
)
from ..parallel.config import ParallelConfig as ParallelConfig  # one section of a run's configuration


@dataclass(frozen=True)
class ModelConfig:
    """The decoder language model around the MoE layers."""

    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    #: width of the dense feed-forwards
    intermediate_size: int = 512
    num_experts: int = 8
    top_k: int = 2
    #: width of one expert
    moe_intermediate_size: int = 256
    #: every n-th feed-forward, counted from the last of each n, is an MoE layer; 1: all, 0: none
    moe_every: int = 1
    #: the first n feed-forwards are dense whatever ``moe_every`` says
    dense_layers: int = 0
    #: width of the shared experts together (every token takes them); 0: none
    shared_intermediate_size: int = 0
    #: scale the shared experts' output by a sigmoid gate of the token (Qwen2-MoE)
    shared_gate: bool = False
    #: entries of the embedding; None: as many as the tokenizer has
    vocab_size: int | None = None
    #: standard deviation of the first weights; narrow models learn sooner from larger ones, about hidden_size**-0.5
    init_std: float = 0.02
    #: compute activations again in the backward pass (section ``recompute``: which)
    recompute: bool = False
    #: of the routed experts; "gelu" is by the error function, "relu2" the square of ReLU
    activation: Literal["silu", "gelu", "gelu_tanh", "relu2"] = "silu"
    #: experts with a gate, down(act(gate(x)) * up(x)), or without, down(act(up(x)))
    gated: bool = True
    #: experts keep their input alone, and compute the pre-activation again in the backward pass
    recompute_experts: bool = False
    #: which kernels: "reference" (slow, obvious), "torch", "triton", or "auto", the ones measured to be best
    backend: Literal["auto", "torch", "triton", "reference"] = "auto"

    def __post_init__(self) -> None:
        check_choices(self, "model.")
        for name in ("hidden_size", "num_layers", "num_heads", "intermediate_size"):
            require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "must be at least 1")
        for name in ("num_experts", "top_k", "moe_intermediate_size"):
            require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "must be at least 1")
        require(self.moe_every >= 0, "model.moe_every", self.moe_every, "use 1 for every layer, 2 for every second")
        require(
            0 <= self.dense_layers <= self.num_layers,
            "model.dense_layers",
            self.dense_layers,
            f"must lie between 0 and model.num_layers={self.num_layers}",
        )
        require(self.init_std > 0, "model.init_std", self.init_std, "must be positive; 0.02 is usual")
        require(
            self.top_k <= self.num_experts,
            "model.top_k",
            self.top_k,
            f"must be at most model.num_experts={self.num_experts}",
        )
        require(
            self.shared_intermediate_size >= 0,
            "model.shared_intermediate_size",
            self.shared_intermediate_size,
            "must not be negative; 0: no shared experts",
        )
        require(
            not self.shared_gate or self.shared_intermediate_size > 0,
            "model.shared_gate",
            self.shared_gate,
            "needs shared experts; set model.shared_intermediate_size",
        )


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it is cut into sequences."""

    #: a file or folder of text, .jsonl or flat token files; None: the text that comes with Python
    path: str | None = None
    #: "bytes", or a Hugging Face tokenizer.json
    tokenizer: str = "bytes"
    seq_len: int = 256
    #: sequences per optimizer step, over all ranks
    global_batch: int = 16
    #: sequences per forward pass on one rank
    micro_batch: int = 8
    #: share of the documents that is never trained on
    heldout_fraction: float = 0.02
    #: how a document gets its domain: its top folder, its kind of file, or a field of the jsonl
    #: record; "auto": the field where there is one, else the folder, else the kind
    domain_by: Literal["auto", "folder", "kind", "field"] = "auto"
    text_field: str = "text"
    domain_field: str = "domain"
    #: of the built-in text, which is larger than a quick run needs: bytes that are read of each domain; None: all.
    #: Text from ``path`` is always read whole
    builtin_bytes_per_domain: int | None = None
    #: type of a flat token file's entries
    token_dtype: Literal["uint16", "uint32"] = "uint16"

    def __post_init__(self) -> None:
        check_choices(self, "data.")
        for name in ("seq_len", "global_batch", "micro_batch"):
            require(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "must be at least 1")
        require(
            self.path is None or self.path.strip() != "",
            "data.path",
            self.path,
            "is empty; give a file or folder, or leave it out for the text that comes with Python",
        )
        for name, remedy in (
            ("tokenizer", "is empty; use 'bytes' or a path to a tokenizer.json"),
            ("text_field", "is empty; name the field that holds the text"),
            ("domain_field", "is empty; name the field that holds the domain"),
        ):
            require(getattr(self, name).strip() != "", f"data.{name}", getattr(self, name), remedy)
        require(
            self.builtin_bytes_per_domain is None or self.builtin_bytes_per_domain >= 1,
            "data.builtin_bytes_per_domain",
            self.builtin_bytes_per_domain,
            "must be at least 1; leave it out for no limit",
        )
        require(
            0 < self.heldout_fraction < 1,
            "data.heldout_fraction",
            self.heldout_fraction,
            "must lie between 0 and 1; 0.02 is usual",
        )


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 3e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    #: cosine decay, or warmup-stable-decay
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: int = 20
    #: share of the steps over which wsd decays, at the end
    decay_fraction: float = 0.2
    #: the last learning rate as a share of the first
    min_lr_ratio: float = 0.1
    #: largest norm of the gradient; 0 switches clipping off
    grad_clip: float = 1.0

    def __post_init__(self) -> None:
        check_choices(self, "optim.")
        require(self.lr > 0, "optim.lr", self.lr, "must be positive")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optim.{name}", getattr(self, name), "must lie in [0, 1)")
        require(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "must not be negative")
        require(0 < self.decay_fraction <= 1, "optim.decay_fraction", self.decay_fraction, "must lie in (0, 1]")
        require(0 <= self.min_lr_ratio <= 1, "optim.min_lr_ratio", self.min_lr_ratio, "must lie in [0, 1]")
        require(self.grad_clip >= 0, "optim.grad_clip", self.grad_clip, "must not be negative; 0 switches it off")


@dataclass(frozen=True)
class CheckpointConfig:
    """When a checkpoint is written, and how many stay."""

    #: steps between checkpoints; 0: only the last step
    every: int = 100
    #: how many of the newest complete checkpoints stay
    keep_last: int = 2

    def __post_init__(self) -> None:
        require(self.every >= 0, "checkpoint.every", self.every, "must not be negative; 0 saves only the last step")
        require(self.keep_last >= 1, "checkpoint.keep_last", self.keep_last, "must be at least 1")


@dataclass(frozen=True)
class LogConfig:
    """What is measured, and how often."""

    #: steps between progress lines
    every: int = 10
    #: steps between evaluations on held-out text; 0: only at the end
    eval_every: int = 100
    #: sequences per domain in an evaluation; all that there are when fewer
    eval_sequences: int = 16
    tensorboard: bool = True

    def __post_init__(self) -> None:
        check_choices(self, "log.")
        require(self.every >= 1, "log.every", self.every, "must be at least 1")
        require(self.eval_every >= 0, "log.eval_every", self.eval_every, "must not be negative; 0: only at the end")
        require(self.eval_sequences >= 1, "log.eval_sequences", self.eval_sequences, "must be at least 1")


@dataclass(frozen=True)
class TrainConfig:
    """A whole training run."""

    steps: int = 300
    seed: int = 0
    #: "bfloat16" computes in bf16 from fp32 master weights
    dtype: Literal["float32", "bfloat16"] = "float32"
    model: ModelConfig = field(default_factory=ModelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    capacity: CapacityConfig | None = None
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        check_choices(self)
        require(0 <= self.seed < 1 << 63, "seed", self.seed, "must lie in 0..2**63 - 1")
        require(self.steps >= 1, "steps", self.steps, "must be at least 1")
        self.attention.check(self.model.hidden_size, self.model.num_heads)
        require(
            self.parallel.ep == -1 or self.model.num_experts % self.parallel.ep == 0,
            "parallel.ep",
            self.parallel.ep,
            f"must divide model.num_experts={self.model.num_experts}",
        )

    def degrees(self, world: int) -> ParallelConfig:
        """How ``world`` ranks share the work, with every -1 replaced. Raises ValueError if that does not fit."""
        found = self.parallel.resolve(world, self.model.num_experts)
        require(
            self.model.num_experts % found.ep == 0,
            "parallel.ep",
            found.ep,
            f"which {world} processes make it, must divide model.num_experts={self.model.num_experts}; "
            "set parallel.ep or start another number of processes",
        )
        return found

    def micro_batches(self, data_parallel: int) -> int:
        """Forward passes per optimizer step and rank, for ``data_parallel`` ranks."""
        per_pass = self.data.micro_batch * data_parallel
        require(
            self.data.global_batch % per_pass == 0,
            "data.global_batch",
            self.data.global_batch,
            f"must be a multiple of data.micro_batch * ranks = {self.data.micro_batch} * {data_parallel}; "
            "set one of the two",
        )
        passes = self.data.global_batch // per_pass
        require(
            self.balance.micro_batches in (None, passes),
            "balance.micro_batches",
            self.balance.micro_batches,
            f"data.global_batch, data.micro_batch and {data_parallel} ranks make it {passes}; leave it out",
        )
        return passes

    def moe(self, micro_batches: int) -> MoEConfig:
        """The configuration of each MoE layer."""
        return MoEConfig(
            hidden_size=self.model.hidden_size,
            intermediate_size=self.model.moe_intermediate_size,
            num_experts=self.model.num_experts,
            top_k=self.model.top_k,
            router=self.router,
            balance=replace(self.balance, micro_batches=micro_batches),
            capacity=self.capacity,
            dispatch=self.dispatch,
            shared_intermediate_size=self.model.shared_intermediate_size,
            shared_gate=self.model.shared_gate,
            activation=self.model.activation,
            gated=self.model.gated,
            recompute_experts=self.model.recompute_experts,
            init_std=self.model.init_std,
            backend=self.model.backend,
        )
