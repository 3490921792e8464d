"""Configuration of the MoE layer: frozen dataclasses that validate themselves when they are created."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

from .checks import check_literals, require
from .experts import ZeroComputationConfig
from .routing import BY_EXPERTS, RouterConfig, check_balancing, check_router, check_single_choice


@dataclass(frozen=True)
class ExtraLossConfig:
    """Coefficients of balance losses that are added to the main one; 0 switches a loss off.

    The losses differ in the tokens over which they count the load.
    """

    #: balance each micro-batch of each rank; 1 % of the global coefficient evens out the ranks (arXiv 2501.11873)
    micro: float = 0.0
    #: balance each sequence (DeepSeek-V3 uses 1e-4)
    sequence: float = 0.0
    #: balance each micro-batch over all ranks
    data_parallel: float = 0.0
    #: balance the load of expert-parallel ranks, over one micro-batch of all ranks (DeepSeek-V2 uses 0.05)
    device: float = 0.0
    #: balance the tokens sent to each expert-parallel rank, over one micro-batch of all ranks (DeepSeek-V2 uses 0.02)
    communication: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            require(value >= 0, f"balance.extra.{name}", value, "must not be negative; 0 switches it off")


@dataclass(frozen=True)
class BalanceConfig:
    """Load balancing: balance losses, and a loss-free expert bias.

    The method of ``scope="global"`` is that of Qiu et al. 2025, arXiv 2501.11873.
    """

    #: tokens over which the main loss counts the load. global: the whole optimizer step on all ranks; micro: one
    #: micro-batch of one rank; sequence: one sequence; the others are described at ``balance.extra``
    scope: Literal["global", "micro", "sequence", "data_parallel", "device", "communication"] = "global"
    #: coefficient of the main loss; 0 switches it off (the load is still counted)
    coefficient: float = 0.01
    #: how the load of the whole step is estimated before the step is complete. ``rolling``: the counts so far in this
    #: step; ``carry``: the counts so far, plus the previous step's counts for the remaining micro-batches;
    #: ``adaptive``: between these two, weighted by how well either has predicted earlier steps; ``exact``: the counts
    #: of the whole step, for which the training loop must run a :func:`counting_pass` first
    estimator: Literal["rolling", "carry", "adaptive", "exact"] = "rolling"
    #: micro-batches per optimizer step; a layer that runs twice per forward has two for each. None means, in this
    #: order: the number counted ahead; the number in the previous step; the number seen so far (first step only)
    micro_batches: int | None = None
    #: meaning of the coefficient for scope "global". ``exact``: it multiplies the loss; ``megatron``: as in
    #: Megatron-Core's global_aux_loss, whose gradient is divided by the number of data-parallel ranks
    scale_convention: Literal["exact", "megatron"] = "exact"
    #: coefficients of additional balance losses
    extra: ExtraLossConfig = field(default_factory=ExtraLossConfig)
    #: which choices are the load: all; or first: every token's best only (GShard, arXiv 2006.16668), in the losses, the
    #: expert bias and the metrics of the load
    counts: Literal["all", "first"] = "all"
    #: step size of the expert bias, per optimizer step (loss-free balancing, arXiv 2408.15664; 0.001 is usual);
    #: 0: no expert bias. A wholly frozen layer keeps its bias
    bias_update_rate: float = 0.0
    #: move the expert bias by the sign of (mean load - load), or in proportion to (mean load - load) / mean load
    bias_rule: Literal["sign", "proportional"] = "sign"

    def __post_init__(self) -> None:
        check_literals(self, "balance.")
        require(self.coefficient >= 0, "balance.coefficient", self.coefficient, "must not be negative")
        require(
            self.micro_batches is None or self.micro_batches >= 1,
            "balance.micro_batches",
            self.micro_batches,
            "must be at least 1; give the layer's number of training forwards per optimizer step, or leave it out",
        )
        require(
            self.bias_update_rate >= 0,
            "balance.bias_update_rate",
            self.bias_update_rate,
            "must not be negative; 0.001 is usual",
        )

    def counted(self, top_k: int) -> int:
        """Return how many of a token's choices count."""
        return 1 if self.counts == "first" else top_k

    def rates(self) -> dict[str, float]:
        """Return the strength of each balancing method by the name of its setting; 0 means off."""
        extra = {f"extra.{name}": value for name, value in vars(self.extra).items()}
        return {"coefficient": self.coefficient, **extra, "bias_update_rate": self.bias_update_rate}


@dataclass(frozen=True)
class CapacityConfig:
    """Limits each expert to ceil(factor * K * T / E) rows. Without this section the layer is dropless."""

    #: capacity factor
    factor: float = 1.25
    #: which choices a full expert keeps: those with the highest gate weights; those of the earliest tokens; or choice:
    #: tokens' first choices before any second ones, and so on (GShard, arXiv 2006.16668)
    drop: Literal["probability", "position", "choice"] = "probability"
    #: which T tokens share one capacity and compete for it. local: those of this rank; sequence: those of whole
    #: sequences, over all ranks that hold parts of them; global: those of all ranks
    scope: Literal["local", "sequence", "global"] = "local"
    #: what is limited: each expert, or all experts of an expert-parallel rank together (DeepSeek-V2, arXiv 2405.04434)
    level: Literal["expert", "device"] = "expert"
    #: always exchange ceil(factor * K * T / E) rows per expert, padded with empty rows, so that the host knows every
    #: size without waiting for the device
    pad: bool = False
    #: for pad: T in the formula, the same on all ranks and at least the tokens of any forward; None: the tokens of this
    #: forward, which must then be equal on all ranks
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        check_literals(self, "capacity.")
        require(self.factor > 0, "capacity.factor", self.factor, "must be positive; 1.25 is usual")
        require(
            not self.pad or (self.scope, self.level) == ("local", "expert"),
            "capacity.pad",
            self.pad,
            "needs scope='local' and level='expert', the only capacity that bounds the rows from one rank to one "
            "expert; set both, or set pad to False",
        )
        require(
            self.max_tokens is None or (self.pad and self.max_tokens >= 1),
            "capacity.max_tokens",
            self.max_tokens,
            "must be at least 1 and needs capacity.pad=True; give the most tokens of any rank, or leave it out",
        )


@dataclass(frozen=True)
class DispatchConfig:
    """How rows are dispatched to the ranks that own their experts. Has no effect without expert parallelism."""

    #: all_to_all: one exchange, one row per choice. hierarchical: first between nodes, then within a node, and each row
    #: goes to each node and rank at most once. overlapped: all_to_all in chunks, each sent while others are computed.
    #: all_gather: every rank receives every token. deepep: DeepSeek's kernels, if package deep_ep is installed
    name: Literal["all_to_all", "hierarchical", "overlapped", "all_gather", "deepep"] = "all_to_all"
    #: for "overlapped": number of chunks
    chunks: int = 1
    #: for "hierarchical": expert-parallel ranks per node; None: derived from the launcher's LOCAL_WORLD_SIZE
    node_size: int | None = None
    #: dtype in which rows are sent. compute: the dtype they are computed in; bf16; fp8: e4m3 with one scale per row for
    #: dispatch, bf16 for combine and for gradients
    wire: Literal["compute", "bf16", "fp8"] = "compute"
    #: promise that all ranks always have equally many tokens, so that "all_gather" need not exchange their number, nor
    #: "all_to_all" and "overlapped" any sizes if router.select="each_group" has whole groups on every rank (MoGE)
    equal_tokens: bool = False
    #: most MiB that a rank may need for the rows of one layer: those it receives, their results, and what the experts
    #: keep of each for the backward. None: no limit. Needs "all_to_all"
    memory_mb: int | None = None
    #: if ``memory_mb`` is too little. chunk: compute in parts, each of which fits, and compute them once more in the
    #: backward; the run ends only if no parts fit (not with FSDP2). stop: end the run, and name the layer and its
    #: busiest expert
    over_memory: Literal["chunk", "stop"] = "chunk"

    def __post_init__(self) -> None:
        check_literals(self, "dispatch.")
        require(
            self.memory_mb is None or (self.memory_mb >= 1 and self.name == "all_to_all"),
            "dispatch.memory_mb",
            self.memory_mb,
            "must be at least 1 and needs dispatch.name='all_to_all'; set both, or leave it out",
        )
        require(1 <= self.chunks <= 64, "dispatch.chunks", self.chunks, "must be between 1 and 64")
        require(
            self.chunks == 1 or self.name == "overlapped",
            "dispatch.chunks",
            self.chunks,
            f"dispatch.name={self.name!r} does not split rows into chunks; use 'overlapped'",
        )
        require(
            self.node_size is None or (self.node_size >= 1 and self.name == "hierarchical"),
            "dispatch.node_size",
            self.node_size,
            "must be at least 1 and needs dispatch.name='hierarchical'; give the ranks per node, or leave it out",
        )
        require(
            self.wire == "compute" or self.name != "deepep",
            "dispatch.wire",
            self.wire,
            "dispatch.name='deepep' sends rows in the dtype they are computed in; use 'compute'",
        )


@dataclass(frozen=True)
class MoEConfig:
    """The whole configuration of one MoE layer."""

    #: width of the hidden states
    hidden_size: int
    #: width of one expert; the mean if they have ``widths``
    intermediate_size: int
    #: number of routed experts
    num_experts: int
    #: experts that each token chooses
    top_k: int
    router: RouterConfig = field(default_factory=RouterConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    capacity: CapacityConfig | None = None
    #: widths of the experts one by one, such as "64,32,32", whose mean is ``intermediate_size``; None: all are equally
    #: wide. The balance losses then weigh an expert's load by width / mean width (HMoE, arXiv 2408.10681), and every
    #: expert-parallel rank gets consecutive experts with the same sum of widths
    widths: str | None = None
    #: further experts, which compute next to nothing; None: none
    zero_computation: ZeroComputationConfig | None = None
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)
    #: activation of the routed experts; "gelu" uses the error function, "relu2" is the square of ReLU
    activation: Literal["silu", "gelu", "gelu_tanh", "relu2"] = "silu"
    #: the routed experts compute down(act(gate(x)) * up(x)); if False, down(act(up(x)))
    gated: bool = True
    #: recompute the experts' pre-activation in the backward pass: saves memory, costs one more matrix product
    recompute_experts: bool = False
    #: total width of the shared experts, which process every token; 0: none
    shared_intermediate_size: int = 0
    #: multiply the shared experts' output by a sigmoid gate computed from the token (Qwen2-MoE)
    shared_gate: bool = False
    #: kernels to use: "reference" (slow and obvious), "torch", "triton", or "auto", those that measured fastest
    backend: Literal["auto", "torch", "triton", "reference"] = "auto"
    #: standard deviation of the initial weights
    init_std: float = 0.02

    def __post_init__(self) -> None:
        check_literals(self)
        for name in ("hidden_size", "intermediate_size", "num_experts", "top_k"):
            value = getattr(self, name)
            ok = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            require(ok, name, value, "must be an integer of at least 1")
        require(
            self.top_k <= self.all_experts,
            "top_k",
            self.top_k,
            f"must be at most num_experts={self.num_experts}"
            + (f" and the {self.all_experts - self.num_experts} of zero_computation" if self.zero_computation else ""),
        )
        if self.widths is not None:
            self._check_widths()
        self._check_single_choice()
        if self.zero_computation is not None:
            self._check_zero_computation()
        check_router(self.router, self.all_experts, self.top_k)
        check_balancing(self.router, self.balance.rates())
        even = self.router.select in BY_EXPERTS or self.router.gate == "slots"
        remedy = "the router gives every expert equally many rows; leave it out"
        require(self.capacity is None or not even, "capacity", self.capacity, remedy)
        if self.router.gate == "slots":
            for name in ("scope", "counts"):
                value, plain = getattr(self.balance, name), getattr(BalanceConfig, name)
                remedy = f"router.gate='slots' makes no choices; use {plain!r}"
                require(value == plain, f"balance.{name}", value, remedy)
        require(
            self.capacity is None or not self.capacity.pad or self.dispatch.name in ("all_to_all", "overlapped"),
            "capacity.pad",
            True,
            f"dispatch.name={self.dispatch.name!r} cannot pad; use 'all_to_all' or 'overlapped'",
        )
        require(
            self.capacity is None or not self.capacity.pad or self.dispatch.memory_mb is None,
            "dispatch.memory_mb",
            self.dispatch.memory_mb,
            "has no effect with capacity.pad=True, which fixes the number of rows; leave it out",
        )
        require(
            self.shared_intermediate_size >= 0,
            "shared_intermediate_size",
            self.shared_intermediate_size,
            "must not be negative; 0 means no shared experts",
        )
        require(self.init_std >= 0, "init_std", self.init_std, "must not be negative; 0.02 is usual")
        require(
            not (self.shared_gate and self.shared_intermediate_size == 0),
            "shared_gate",
            self.shared_gate,
            "needs shared experts; set shared_intermediate_size",
        )

    @property
    def all_experts(self) -> int:
        """Number of experts that a token chooses among: the MLPs, and those of ``zero_computation``."""
        return self.num_experts + (0 if self.zero_computation is None else self.zero_computation.number)

    @property
    def mlps_per_token(self) -> float:
        """Number of MLPs that a token chooses on average if the load is balanced."""
        shares = self.load_shares
        return self.top_k if shares is None else self.top_k * sum(shares[: self.num_experts])

    @property
    def load_shares(self) -> tuple[float, ...] | None:
        """Each expert's share of the choices if the load is balanced; None: all equal."""
        free = self.zero_computation
        if free is None:
            return None
        whole = self.num_experts + free.number / free.tau
        return (1 / whole,) * self.num_experts + (1 / free.tau / whole,) * free.number

    @property
    def load_weights(self) -> tuple[float, ...] | None:
        """Weight of each expert's load in the balance losses; None: all 1."""
        free, mean = self.zero_computation, self.intermediate_size
        if free is None and self.widths is None:
            return None
        of_mlps = tuple(width / mean for width in self.expert_widths)
        return of_mlps if free is None else of_mlps + (free.tau,) * free.number

    @property
    def expert_widths(self) -> tuple[int, ...]:
        """Width of each MLP."""
        if self.widths is None:
            return (self.intermediate_size,) * self.num_experts
        return tuple(map(int, self.widths.split(",")))

    @property
    def row_width(self) -> int:
        """Width of a row of the experts' stacked weights: the largest that divides the width of every expert."""
        return math.gcd(*self.expert_widths)

    @property
    def chunks(self) -> tuple[int, ...] | None:
        """Number of rows of the stacked weights that each expert has; None: one."""
        return None if self.widths is None else tuple(width // self.row_width for width in self.expert_widths)

    def rows_of(self, experts: Sequence[int]) -> list[int]:
        """Return the rows of the experts' stacked weights that belong to ``experts``."""
        if self.chunks is None:
            return list(experts)
        first = [0, *accumulate(self.chunks)]
        return [row for e in experts for row in range(first[e], first[e + 1])]

    def splits_over(self, ranks: int) -> bool:
        """Return whether consecutive experts can be given to this number of ranks so that all hold equal widths."""
        ends = [0, *accumulate(self.expert_widths)]
        return ends[-1] % ranks == 0 and {ends[-1] // ranks * rank for rank in range(ranks)} <= set(ends)

    def _check_single_choice(self) -> None:
        check_single_choice(self.router, self.all_experts, self.top_k)

    def _check_widths(self) -> None:
        assert self.widths is not None
        words = self.widths.split(",") if isinstance(self.widths, str) else []
        require([w.strip() for w in words] != [""], "widths", self.widths, "is empty; give widths, or leave it out")
        ok = len(words) == self.num_experts and all(w.strip().isdecimal() and int(w) > 0 for w in words)
        remedy = f"must be {self.num_experts} whole numbers of at least 1, one per expert, in a text with commas"
        require(ok, "widths", self.widths, remedy)
        whole = sum(self.expert_widths)
        remedy = f"must be the mean of widths, {whole / self.num_experts:g}"
        require(whole == self.num_experts * self.intermediate_size, "intermediate_size", self.intermediate_size, remedy)
        self._check_weighted_loads("widths")

    def _check_zero_computation(self) -> None:
        """Raise ``ValueError`` for settings that have no meaning for experts that no rank owns."""
        router, capacity = self.router, self.capacity
        remedy = "gives its slots to experts that ranks own, not to those of zero_computation; use another gate"
        require(router.gate != "slots", "router.gate", router.gate, remedy)
        require(router.groups == 1, "router.groups", router.groups, "zero_computation has no groups of experts; use 1")
        if capacity is not None:
            remedy = "zero_computation has experts on no device; use 'expert'"
            require(capacity.level == "expert", "capacity.level", capacity.level, remedy)
            remedy = "experts of zero_computation get more rows than others and no exchange; leave it out"
            require(not capacity.pad, "capacity.pad", True, remedy)
        self._check_weighted_loads("zero_computation")

    def _check_weighted_loads(self, setting: str) -> None:
        """Raise ``ValueError`` for balancing that does not know the weights of loads."""
        scope, rates = self.balance.scope, self.balance.rates()
        for name in ("device", "communication"):
            remedy = f"balances ranks by their choices, which {setting} weighs by expert; use another scope"
            require(scope != name, "balance.scope", scope, remedy)
            value = rates[f"extra.{name}"]
            require(value == 0, f"balance.extra.{name}", value, remedy)
        value = rates["bias_update_rate"]
        remedy = f"evens out choices, which {setting} weighs by expert; set it to 0"
        require(value == 0, "balance.bias_update_rate", value, remedy)
