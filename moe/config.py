"""What a user can choose, as frozen dataclasses that are validated once, when they are made.

Each section is the whole interface of one part of the system; the training-side sections are in
:mod:`equimoe.moe.train.config`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


def require(ok: bool, where: str, value: Any, remedy: str) -> None:
    """Raise ``ValueError("<where>=<value>: <remedy>")`` unless ``ok``."""
    if not ok:
        raise ValueError(f"{where}={value!r}: {remedy}")


@dataclass(frozen=True)
class RouterConfig:
    """From hidden states to expert ids and weights."""

    #: how logits become scores
    score: Literal["softmax", "sigmoid"] = "softmax"
    #: divide a token's K weights by their sum
    normalize_weights: bool = True
    #: weights are the softmax over the K chosen logits (Mixtral) instead of the chosen scores
    softmax_after_topk: bool = False
    #: factor on the weights, after normalisation (DeepSeek-V3's ``routed_scaling_factor``)
    weight_scale: float = 1.0
    #: coefficient of mean(logsumexp(logits)^2) (ST-MoE); 0 switches it off
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        require(self.score in ("softmax", "sigmoid"), "router.score", self.score, "use 'softmax' or 'sigmoid'")
        require(self.weight_scale > 0, "router.weight_scale", self.weight_scale, "must be positive")
        require(self.z_loss >= 0, "router.z_loss", self.z_loss, "must not be negative")


@dataclass(frozen=True)
class BalanceConfig:
    """The load-balancing loss (Qiu et al. 2025, arXiv 2501.11873, for ``scope="global"``)."""

    #: the tokens over which the load is counted: the whole optimizer step on all ranks, one
    #: micro-batch of one rank, or one sequence
    scope: Literal["global", "micro", "sequence"] = "global"
    #: weight of the loss; 0 switches it off (the counts are still kept)
    coefficient: float = 0.01
    #: which counts stand for the whole step while it is still running: ``rolling`` those so far;
    #: ``exact`` all of them, for which the training loop must count first (:func:`counting_pass`)
    estimator: Literal["rolling", "exact"] = "rolling"
    #: backward passes per optimizer step; None: as many as the previous step had
    micro_batches: int | None = None
    #: how the data-parallel engine joins the ranks' gradients: DDP and FSDP take the mean
    grad_reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        scopes, estimators = ("global", "micro", "sequence"), ("rolling", "exact")
        require(self.scope in scopes, "balance.scope", self.scope, f"use one of {', '.join(scopes)}")
        require(
            self.estimator in estimators, "balance.estimator", self.estimator, f"use one of {', '.join(estimators)}"
        )
        require(self.coefficient >= 0, "balance.coefficient", self.coefficient, "must not be negative")
        require(
            self.micro_batches is None or self.micro_batches >= 1,
            "balance.micro_batches",
            self.micro_batches,
            "give the number of backward passes per optimizer step, at least 1, or leave it out",
        )
        require(
            self.grad_reduction in ("mean", "sum"),
            "balance.grad_reduction",
            self.grad_reduction,
            "use 'mean' (DDP, FSDP) or 'sum'",
        )


@dataclass(frozen=True)
class CapacityConfig:
    """A limit of ceil(factor * K * T / E) rows per expert; without one the layer is dropless."""

    factor: float = 1.25
    #: who stays when an expert is full: the highest weights, or the earliest tokens
    drop: Literal["probability", "position"] = "probability"

    def __post_init__(self) -> None:
        require(self.factor > 0, "capacity.factor", self.factor, "must be positive; 1.25 is usual")
        require(self.drop in ("probability", "position"), "capacity.drop", self.drop, "use 'probability' or 'position'")


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
    #: width of the shared experts together (every token takes them); 0: none
    shared_intermediate_size: int = 0
    #: scale the shared experts' output by a sigmoid gate of the token (Qwen2-MoE)
    shared_gate: bool = False
    #: which kernels: "reference" (slow, obvious), "torch", "triton", or "auto", the ones measured to be best
    backend: Literal["auto", "torch", "triton", "reference"] = "auto"
    #: standard deviation of the initial weights
    init_std: float = 0.02

    def __post_init__(self) -> None:
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
        require(
            self.backend in ("auto", "torch", "triton", "reference"),
            "backend",
            self.backend,
            "use 'auto', 'torch', 'triton' or 'reference'",
        )
