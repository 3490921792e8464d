"""What a user can choose, as frozen dataclasses that are validated once, when they are made.

Each section is the whole interface of one part of the system; the training-side sections are in
:mod:`equimoe.moe.train.config`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints


def require(ok: bool, where: str, value: Any, remedy: str) -> None:
    """Raise ``ValueError("<where>=<value>: <remedy>")`` unless ``ok``."""
    if not ok:
        raise ValueError(f"{where}={value!r}: {remedy}")


def check_choices(section: object, where: str = "") -> None:
    """Refuse a value that is not among those that the field's type names: those of a ``Literal``, or True and False.

    ``where`` goes before the field's name.
    """
    for name, hint in get_type_hints(type(section)).items():
        allowed = (True, False) if hint is bool else get_args(hint) if get_origin(hint) is Literal else None
        if allowed is not None:
            value = getattr(section, name)
            ok = any(value == choice and type(value) is type(choice) for choice in allowed)
            require(ok, where + name, value, f"use one of {', '.join(map(str, allowed))}")


#: see :mod:`equimoe.moe.routing.score`
Score = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class RouterConfig:
    """From hidden states to expert ids and weights."""

    #: how logits become scores
    score: Score = "softmax"
    #: divide a token's K weights by their sum
    normalize_weights: bool = True
    #: weights are the softmax over the K chosen logits (Mixtral) instead of the chosen scores
    softmax_after_topk: bool = False
    #: factor on the weights, after normalisation (DeepSeek-V3's ``routed_scaling_factor``)
    weight_scale: float = 1.0
    #: coefficient of mean(logsumexp(logits)^2) (ST-MoE); 0 switches it off
    z_loss: float = 0.0
    #: groups of consecutive experts (those of a node), of which a token may choose from the best ``kept_groups`` only,
    #: a group being worth the sum of its two best scores (DeepSeek-V3, arXiv 2412.19437); 1: no such limit
    groups: int = 1
    kept_groups: int = 1

    def reach(self, ranks: int) -> int:
        """To how many of ``ranks`` expert-parallel ranks a token can be sent."""
        return ranks if self.groups == 1 else min(ranks, self.kept_groups * math.ceil(ranks / self.groups))

    def __post_init__(self) -> None:
        check_choices(self, "router.")
        require(self.weight_scale > 0, "router.weight_scale", self.weight_scale, "must be positive")
        require(self.z_loss >= 0, "router.z_loss", self.z_loss, "must not be negative")
        for name in ("groups", "kept_groups"):
            value = getattr(self, name)
            ok = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            require(ok, f"router.{name}", value, "must be an integer of at least 1")
        require(
            self.kept_groups <= self.groups,
            "router.kept_groups",
            self.kept_groups,
            f"must be at most router.groups={self.groups}",
        )


@dataclass(frozen=True)
class ExtraLossConfig:
    """Coefficients of further balance losses beside the main one, each over its own tokens; 0 switches one off."""

    #: one micro-batch of one rank; a hundredth of the global coefficient keeps ranks even (arXiv 2501.11873)
    micro: float = 0.0
    #: each sequence (DeepSeek-V3 has 1e-4)
    sequence: float = 0.0
    #: one micro-batch over all ranks
    data_parallel: float = 0.0
    #: the load of whole expert-parallel ranks, over one micro-batch of all ranks (DeepSeek-V2 has 0.05)
    device: float = 0.0
    #: the tokens sent to each expert-parallel rank, over one micro-batch of all ranks (DeepSeek-V2 has 0.02)
    communication: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            require(value >= 0, f"balance.extra.{name}", value, "must not be negative; 0 switches it off")


@dataclass(frozen=True)
class BalanceConfig:
    """Load balancing: losses (Qiu et al. 2025, arXiv 2501.11873, for ``scope="global"``), and a bias without a loss."""

    #: the tokens over which the load is counted: the whole optimizer step on all ranks, one
    #: micro-batch of one rank, one sequence, or as ``balance.extra`` describes them
    scope: Literal["global", "micro", "sequence", "data_parallel", "device", "communication"] = "global"
    #: weight of the loss; 0 switches it off (the counts are still kept)
    coefficient: float = 0.01
    #: which counts stand for the whole step while it is still running: ``rolling`` those so far;
    #: ``carry`` those so far, and the step before's for the micro-batches to come;
    #: ``exact`` all of them, for which the training loop must count first (:func:`counting_pass`)
    estimator: Literal["rolling", "carry", "exact"] = "rolling"
    #: micro-batches per optimizer step (a layer that runs twice in a forward has two each time); None: as many as were
    #: counted ahead, else as the step before had; in the very first step, as many as there were so far
    micro_batches: int | None = None
    #: what the coefficient of "global" means: ``exact``, the weight of the loss; ``megatron``, as Megatron-Core's
    #: global_aux_loss has it, where the gradient is smaller by the number of data-parallel ranks
    scale_convention: Literal["exact", "megatron"] = "exact"
    #: further losses
    extra: ExtraLossConfig = field(default_factory=ExtraLossConfig)
    #: how far each optimizer step moves the bias that chooses experts (loss-free balancing, arXiv 2408.15664; 0.001 is
    #: usual); 0: no bias. A wholly frozen layer keeps its bias
    bias_update_rate: float = 0.0
    #: by the sign of mean load - load, or in proportion to it as a share of the mean load
    bias_rule: Literal["sign", "proportional"] = "sign"
    #: whose load: the whole step's on all ranks; or the mean of the moves that each micro-batch of each rank asks for,
    #: an experiment's control
    bias_scope: Literal["global", "micro"] = "global"

    def __post_init__(self) -> None:
        check_choices(self, "balance.")
        require(self.coefficient >= 0, "balance.coefficient", self.coefficient, "must not be negative")
        require(
            self.micro_batches is None or self.micro_batches >= 1,
            "balance.micro_batches",
            self.micro_batches,
            "give the number of backward passes per optimizer step, at least 1, or leave it out",
        )
        require(
            self.bias_update_rate >= 0,
            "balance.bias_update_rate",
            self.bias_update_rate,
            "must not be negative; 0.001 is usual",
        )


@dataclass(frozen=True)
class AttentionConfig:
    """How a decoder's blocks attend."""

    #: heads with queries, keys and values of their own or shared in groups, or made from latents (DeepSeek-V2 and V3)
    kind: Literal["grouped", "latent"] = "grouped"
    #: of "grouped": key/value heads; none: as many as query heads
    num_kv_heads: int | None = None
    #: of "grouped": width of a head; none: hidden size / heads
    head_width: int | None = None
    #: of "grouped": RMSNorm of each head's query and key (Qwen3)
    qk_norm: bool = False
    #: the rotation of pair i of a width R is position / rotary_base^(2i/R)
    rotary_base: float = 10000.0
    #: of "latent": width of the queries' latent; 0: queries come from the hidden state
    q_lora_rank: int = 1536
    #: of "latent": width of the latent that keys and values share
    kv_lora_rank: int = 512
    #: of "latent": widths of a head's query and key that are not and that are rotated, and of its value
    qk_nope_width: int = 128
    qk_rope_width: int = 64
    v_width: int = 128

    def __post_init__(self) -> None:
        check_choices(self, "attention.")
        for name in ("num_kv_heads", "head_width", "kv_lora_rank", "qk_nope_width", "qk_rope_width", "v_width"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"attention.{name}", value, "must be at least 1")
        require(self.q_lora_rank >= 0, "attention.q_lora_rank", self.q_lora_rank, "must not be negative; 0: no latent")
        require(self.rotary_base > 1, "attention.rotary_base", self.rotary_base, "must be more than 1; 10000 is usual")
        for name in ("head_width", "qk_rope_width"):
            value = getattr(self, name)
            require(value is None or value % 2 == 0, f"attention.{name}", value, "must be even: pairs are rotated")

    def check(self, hidden_size: int, num_heads: int) -> None:
        """Refuse a model of these sizes, in one line, where the heads do not come out even."""
        if self.kind == "latent":
            return
        kv_heads = self.num_kv_heads or num_heads
        require(
            num_heads % kv_heads == 0, "attention.num_kv_heads", kv_heads, f"must divide model.num_heads={num_heads}"
        )
        require(
            self.head_width is not None or hidden_size % (2 * num_heads) == 0,
            "model.num_heads",
            num_heads,
            f"2 * num_heads must divide model.hidden_size={hidden_size} (rotary embedding halves each head), "
            "or set attention.head_width",
        )


@dataclass(frozen=True)
class RecomputeConfig:
    """Which activations are computed again in the backward pass, where any are. Routing decisions are always kept."""

    #: whole blocks, or one of their two parts with its norm
    part: Literal["block", "attention", "feed_forward"] = "block"
    #: blocks for which it is done, the first ones; none: all
    layers: int | None = None
    #: keep dispatched rows and results, so that the recomputation exchanges nothing: 4 instead of 6 exchanges per layer
    #: for the memory of about 2 K rows per token (DeepSpeed-TED, arXiv 2303.06318)
    keep_exchanges: bool = False

    def __post_init__(self) -> None:
        check_choices(self, "recompute.")
        require(self.layers is None or self.layers >= 0, "recompute.layers", self.layers, "must not be negative")


@dataclass(frozen=True)
class CapacityConfig:
    """A limit of ceil(factor * K * T / E) rows per expert; without one the layer is dropless."""

    factor: float = 1.25
    #: who stays when an expert is full: the highest weights, or the earliest tokens
    drop: Literal["probability", "position"] = "probability"
    #: whose T tokens share a limit and compete for it: this rank's alone; those of its whole sequences, over the
    #: ranks that hold parts of them; those of all ranks
    scope: Literal["local", "sequence", "global"] = "local"
    #: what is limited: each expert, or all experts of an expert-parallel rank together (DeepSeek-V2, arXiv 2405.04434)
    level: Literal["expert", "device"] = "expert"
    #: exchange ceil(factor * K * T / E) rows per expert whatever was routed, the rest of them empty: the host knows all
    #: sizes without waiting for the device
    pad: bool = False
    #: T of a padded exchange, the same on all ranks and at least what any forward has; None: as many tokens as the
    #: forward has, which must then be equally many on all ranks
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        check_choices(self, "capacity.")
        require(self.factor > 0, "capacity.factor", self.factor, "must be positive; 1.25 is usual")
        require(
            not self.pad or (self.scope, self.level) == ("local", "expert"),
            "capacity.pad",
            self.pad,
            "needs scope='local' and level='expert'; other limits do not bound what one rank sends to one expert",
        )
        require(
            self.max_tokens is None or (self.pad and self.max_tokens >= 1),
            "capacity.max_tokens",
            self.max_tokens,
            "the most tokens of a rank, at least 1, for pad=True; else leave it out",
        )


@dataclass(frozen=True)
class DispatchConfig:
    """How rows reach the ranks of their experts; in effect where experts are split over ranks."""

    #: all_to_all: one exchange, a row per choice. hierarchical: between nodes, then within; a row goes to each node and
    #: rank once, whatever it chose there. overlapped: all_to_all in chunks, while other chunks are computed.
    #: all_gather: every rank sees every token. deepep: DeepSeek's kernels, where package deep_ep is installed
    name: Literal["all_to_all", "hierarchical", "overlapped", "all_gather", "deepep"] = "all_to_all"
    #: of "overlapped"
    chunks: int = 1
    #: of "hierarchical": ranks of the expert axis on a node; None: as the launcher's LOCAL_WORLD_SIZE says
    node_size: int | None = None
    #: how rows travel: as they are computed; rounded to bf16; or to fp8 (e4m3) with a scale per row on the way to the
    #: experts, and to bf16 on the way home and for gradients
    wire: Literal["compute", "bf16", "fp8"] = "compute"
    #: all ranks always have equally many tokens, so that "all_gather" need not ask for their number
    equal_tokens: bool = False

    def __post_init__(self) -> None:
        check_choices(self, "dispatch.")
        require(self.chunks >= 1, "dispatch.chunks", self.chunks, "must be at least 1")
        require(
            self.chunks == 1 or self.name == "overlapped",
            "dispatch.chunks",
            self.chunks,
            f"dispatch.name={self.name!r} does not cut rows into chunks; use 'overlapped'",
        )
        require(
            self.node_size is None or (self.node_size >= 1 and self.name == "hierarchical"),
            "dispatch.node_size",
            self.node_size,
            "the ranks of a node, at least 1, for dispatch.name='hierarchical'; else leave it out",
        )
        require(
            self.wire == "compute" or self.name != "deepep",
            "dispatch.wire",
            self.wire,
            "deepep sends rows as they are computed; use 'compute'",
        )


@dataclass(frozen=True)
class MoEConfig:
    """One Mixture-of-Experts layer."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    router: RouterConfig = field(default_factory=RouterConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    capacity: CapacityConfig | None = None
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)
    #: of the routed experts; "gelu" is by the error function, "relu2" the square of ReLU
    activation: Literal["silu", "gelu", "gelu_tanh", "relu2"] = "silu"
    #: the routed experts compute down(act(gate(x)) * up(x)); without a gate, down(act(up(x)))
    gated: bool = True
    #: keep the experts' input alone for the backward pass, which computes the pre-activation again: less memory, one
    #: more matrix product
    recompute_experts: bool = False
    #: width of the shared experts together (every token takes them); 0: none
    shared_intermediate_size: int = 0
    #: scale the shared experts' output by a sigmoid gate of the token (Qwen2-MoE)
    shared_gate: bool = False
    #: which kernels: "reference" (slow, obvious), "torch", "triton", or "auto", the ones measured to be best
    backend: Literal["auto", "torch", "triton", "reference"] = "auto"
    #: standard deviation of the initial weights
    init_std: float = 0.02

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("hidden_size", "intermediate_size", "num_experts", "top_k"):
            value = getattr(self, name)
            ok = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            require(ok, name, value, "must be an integer of at least 1")
        require(
            self.top_k <= self.num_experts,
            "top_k",
            self.top_k,
            f"must be at most num_experts={self.num_experts}",
        )
        self._check_single_choice()
        groups, kept = self.router.groups, self.router.kept_groups
        require(self.num_experts % groups == 0, "router.groups", groups, f"must divide num_experts={self.num_experts}")
        held = kept * (self.num_experts // groups)
        require(
            self.top_k <= held,
            "router.kept_groups",
            kept,
            f"they hold {held} experts; keep enough for top_k={self.top_k}",
        )
        require(
            self.capacity is None or not self.capacity.pad or self.dispatch.name in ("all_to_all", "overlapped"),
            "capacity.pad",
            True,
            f"dispatch.name={self.dispatch.name!r} has no padded form; use 'all_to_all' or 'overlapped'",
        )
        require(
            self.shared_intermediate_size >= 0,
            "shared_intermediate_size",
            self.shared_intermediate_size,
            "must not be negative; 0 means no shared experts",
        )
        require(
            not (self.shared_gate and self.shared_intermediate_size == 0),
            "shared_gate",
            self.shared_gate,
            "needs shared experts; set shared_intermediate_size",
        )

    def _check_single_choice(self) -> None:
        """Refuse a router that the task's loss cannot reach: one weight divided by the sum of itself is always 1."""
        if self.top_k > 1 or self.num_experts == 1:
            return
        for name in ("softmax_after_topk", "normalize_weights"):
            require(
                not getattr(self.router, name),
                f"router.{name}",
                True,
                "with top_k=1 every weight is then 1, and the task's loss cannot train the router; set it to False, so "
                "that the weight is the score (Switch)",
            )
