"""Configuration of the router.  E experts, K top-k."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from .checks import check_literals, require

#: score functions, defined in :mod:`equimoe.moe.routing.score`
Score = Literal["softmax", "sigmoid"]
#: how experts are chosen, defined in :mod:`equimoe.moe.routing.selections`
Select = Literal[
    "top_k", "each_group", "top_p", "sinkhorn", "base", "expert_choice", "expert_choice_by_position", "even"
]
#: those by which experts choose tokens
BY_EXPERTS: tuple[Select, ...] = ("expert_choice", "expert_choice_by_position")
#: those that give experts equal loads in training, and need no balance loss
BALANCED: tuple[Select, ...] = ("sinkhorn", "base", *BY_EXPERTS)
#: those that may give a token fewer experts than the ids have room for
UP_TO_K: tuple[Select, ...] = ("top_p", *BY_EXPERTS)


#: fields that only one gate has
OF_GATE = {
    "cosine": ("projection", "temperature"),
    "hash": ("vocabulary",),
    "task": ("tasks", "task_width"),
    "slots": ("slots",),
}
#: gates that choose no experts by their scores -> why no loss can balance them
UNBALANCED = {"hash": "has nothing to train", "slots": "gives every expert equally many rows"}
#: fields of choices by scores
_OF_CHOICE = (
    "score",
    "softmax_after_topk",
    "z_loss",
    "groups",
    "select",
    "entropy_loss",
    "random_second",
    "jitter",
    "random_steps",
)


@dataclass(frozen=True)
class RouterConfig:
    """How the router turns hidden states into expert ids and gate weights."""

    #: score function applied to the logits
    score: Score = "softmax"
    #: divide each token's K gate weights by their sum
    normalize_weights: bool = True
    #: compute gate weights as a softmax over the K chosen logits (Mixtral) instead of taking the chosen scores
    softmax_after_topk: bool = False
    #: multiply the gate weights by this factor, after normalisation (DeepSeek-V3's ``routed_scaling_factor``)
    weight_scale: float = 1.0
    #: coefficient of the z-loss mean(logsumexp(logits)^2) (ST-MoE); 0 switches it off
    z_loss: float = 0.0
    #: number of groups of consecutive experts, usually one per node. A token chooses only from the ``kept_groups`` best
    #: groups (DeepSeek-V2 and V3); 1: no group limit
    groups: int = 1
    #: number of groups that each token may choose from
    kept_groups: int = 1
    #: what ranks groups: the sum of their two best scores (DeepSeek-V3, arXiv 2412.19437), or their best score
    #: (DeepSeek-V2, arXiv 2405.04434)
    group_worth: Literal["two_best", "best"] = "two_best"
    #: how experts are chosen. top_k: the K best. top_p: the fewest best ones, at most K, whose scores sum to at least
    #: ``top_p`` (arXiv 2403.07652, HMoE). each_group: the K/groups best of every group, so that with one group
    #: per rank all ranks get equally many rows (MoGE, arXiv 2505.21411). sinkhorn: in training, the K best of a matrix
    #: whose columns have equal sums (S-BASE, arXiv 2202.01169). base: in training, the assignment of equally many
    #: tokens to every expert with the highest logits (BASE, arXiv 2103.16716). These two look at the tokens of one
    #: micro-batch on one rank, need balance.coefficient=0, and choose the K best in evaluation. expert_choice: every
    #: expert chooses the K T / E best tokens of a micro-batch on one rank (arXiv 2202.09368), so that a token has K
    #: experts on average; expert_choice_by_position: among the tokens at the same position of different sequences.
    #: even: for measurements only, all experts in turn, whatever the logits
    select: Select = "top_k"
    #: for "expert_choice" and "expert_choice_by_position": most experts of a token; None: all
    cap: int | None = None
    #: allow, in a decoder, a router that decides about a token by later tokens too: select "expert_choice", or gate
    #: "slots". The decoder then sees something of the tokens that it is to predict
    sees_future: bool = False
    #: for select "top_p": the sum of scores that suffices; HMoE uses 0.6
    top_p: float = 0.6
    #: coefficient of the mean entropy of a token's scores, so that "top_p" needs fewer experts (HMoE, arXiv 2408.10681,
    #: uses 0.03, and prints the opposite sign); 0 switches it off
    entropy_loss: float = 0.0
    #: in training, compute a token's second choice with probability min(1, 2 g), if g is its share of the token's gate
    #: weights (GShard, arXiv 2006.16668); it counts as a dropped choice otherwise
    random_second: bool = False
    #: what computes the logits. linear: one product; noisy: adds normal noise in training, of a size that it learns
    #: (Shazeer et al., arXiv 1701.06538); cosine: a learned factor times the cosine between a projection of the hidden
    #: state and a direction per expert (X-MoE, arXiv 2204.09179); hash: none, a fixed random table of token ids decides
    #: (arXiv 2106.04426), and needs balance.coefficient=0; task: a product with the hidden state and an embedding of
    #: the token's task (arXiv 2204.07689); slots: mixtures of a sequence's tokens go to the experts (SoftMoE, arXiv
    #: 2308.00951), with top_k=1 and balance.coefficient=0; residual: one product, plus another one of the logits of
    #: the MoE layer before (MoE++, arXiv 2410.07348)
    gate: Literal["linear", "noisy", "cosine", "hash", "task", "slots", "residual"] = "linear"
    #: for gate "hash": number of token ids; None: the decoder's vocabulary
    vocabulary: int | None = None
    #: for gate "task": number of tasks. In the training command, a sequence's task is its domain
    tasks: int | None = None
    #: for gate "task": width of a task's embedding
    task_width: int = 16
    #: for gate "slots": mixtures of each sequence that an expert processes; sequence length / number of experts is
    #: usual
    slots: int = 1
    #: for gate "cosine": width of the projection; None: half the number of experts
    projection: int | None = None
    #: for gate "cosine": what the cosines are divided by. Learned from this value on, but the balance loss keeps this
    #: value; X-MoE uses 0.3 with softmax and 0.07 with sigmoid scores
    temperature: float = 0.3
    #: in training, multiply each value of the hidden states by a random number between 1 - jitter and 1 + jitter, for
    #: the router only (Switch, arXiv 2101.03961, uses 0.01); 0: do not
    jitter: float = 0.0
    #: in the first n steps of a run, mix the logits with normal noise of their own mean and deviation: all noise at
    #: first, none at the end (stochastic routing warmup of Ling, arXiv 2503.05139); 0: do not
    random_steps: int = 0

    def reach(self, ranks: int) -> int:
        """Return the largest number of ``ranks`` expert-parallel ranks that one token can be sent to."""
        if self.groups == 1 or self.select == "each_group":
            return ranks
        return min(ranks, self.kept_groups * math.ceil(ranks / self.groups))

    def projected(self, num_experts: int) -> int:
        """Return the width of the projection of gate "cosine"."""
        return self.projection or max(num_experts // 2, 1)

    def width(self, num_experts: int, top_k: int) -> int:
        """Return the largest number of experts that a token can have."""
        if self.select not in BY_EXPERTS:
            return top_k
        return num_experts if self.cap is None else self.cap

    def __post_init__(self) -> None:
        check_literals(self, "router.")
        remedy = "must be an integer of at least 1; half the number of experts is usual"
        ok = self.projection is None or (type(self.projection) is int and self.projection >= 1)
        require(ok, "router.projection", self.projection, remedy)
        require(self.temperature > 0, "router.temperature", self.temperature, "must be positive; 0.3 is usual")
        for gate, names in OF_GATE.items():
            if self.gate != gate:
                self._keep_default(*names, setting=f"router.gate={self.gate!r}")
        for name in ("vocabulary", "tasks", "task_width", "slots"):
            value = getattr(self, name)
            ok = value is None or (type(value) is int and value >= 1)
            require(ok, f"router.{name}", value, "must be an integer of at least 1")
        require(
            self.gate != "task" or self.tasks is not None, "router.tasks", None, "router.gate='task' needs it; set it"
        )
        if self.gate in UNBALANCED:
            self._keep_default(*_OF_CHOICE, setting=f"router.gate={self.gate!r}, which chooses by no score")
        if self.gate == "slots":
            self._keep_default("weight_scale", setting="router.gate='slots', which has no gate weights")
        require(self.weight_scale > 0, "router.weight_scale", self.weight_scale, "must be positive")
        require(0 <= self.jitter < 1, "router.jitter", self.jitter, "must be at least 0 and less than 1; 0.01 is usual")
        ok = type(self.random_steps) is int and self.random_steps >= 0
        require(ok, "router.random_steps", self.random_steps, "must be an integer of at least 0; 0 switches it off")
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
        if self.select != "top_k":
            self._keep_default("kept_groups", "group_worth", setting=f"router.select={self.select!r}")
        require(self.entropy_loss >= 0, "router.entropy_loss", self.entropy_loss, "must not be negative; 0.03 is usual")
        require(0 < self.top_p <= 1, "router.top_p", self.top_p, "must be above 0 and at most 1; 0.6 is usual")
        if self.select == "top_p":
            need = "router.select='top_p' sums scores to 1; use 'softmax'"
            require(self.score == "softmax", "router.score", self.score, need)
        else:
            self._keep_default("top_p", setting=f"router.select={self.select!r}")
        if self.select in (*BALANCED, "top_p", "even"):
            self._keep_default("groups", setting=f"router.select={self.select!r}")
        if self.select in BY_EXPERTS:
            for name in ("normalize_weights", "softmax_after_topk", "random_second"):
                remedy = f"router.select={self.select!r} weights experts by their scores; set it to False"
                require(not getattr(self, name), f"router.{name}", True, remedy)
        else:
            self._keep_default("cap", setting=f"router.select={self.select!r}")
        if self.causal:
            self._keep_default("sees_future", setting="a router that sees no later token")

    @property
    def needs_balance(self) -> bool:
        """Whether a loss or a bias must balance the load."""
        return self.select not in BALANCED and self.gate not in UNBALANCED

    @property
    def causal(self) -> bool:
        """Whether a token's experts do not depend on later tokens of its sequence, or only in training."""
        return self.select != "expert_choice" and self.gate != "slots"

    def _keep_default(self, *names: str, setting: str) -> None:
        for name in names:
            value, plain = getattr(self, name), getattr(RouterConfig, name)
            require(value == plain, f"router.{name}", value, f"has no effect with {setting}; leave it out")


def check_router(router: RouterConfig, num_experts: int, top_k: int) -> None:
    """Raise ``ValueError`` if the router does not fit the layer's numbers of experts and choices."""
    remedy = f"is a rule for two choices; set top_k to 2 instead of {top_k}, or leave it out"
    require(not router.random_second or top_k == 2, "router.random_second", True, remedy)
    groups, kept = router.groups, router.kept_groups
    require(num_experts % groups == 0, "router.groups", groups, f"must divide num_experts={num_experts}")
    if router.select == "each_group":
        remedy = f"must divide top_k={top_k}, because every group gets equally many choices; change either"
        require(top_k % groups == 0, "router.groups", groups, remedy)
        return
    if router.select in BY_EXPERTS:
        cap = router.width(num_experts, top_k)
        remedy = f"must be from top_k={top_k}, the experts of a token on average, to the {num_experts} experts"
        require(type(cap) is int and top_k <= cap <= num_experts, "router.cap", router.cap, remedy)
    if router.gate == "slots":
        require(top_k == 1, "top_k", top_k, "must be 1 for router.gate='slots', which mixes the results of all experts")
    if router.select == "base":
        require(top_k == 1, "top_k", top_k, "must be 1 for router.select='base'; or use router.select='sinkhorn'")
    held = kept * (num_experts // groups)
    require(
        top_k <= held,
        "router.kept_groups",
        kept,
        f"the number of experts in the kept groups, {held}, is less than top_k={top_k}; keep more groups",
    )


def check_causal(router: RouterConfig, section: str = "") -> None:
    """Raise ``ValueError`` if the router may not be in a decoder, because it looks at later tokens."""
    name, other = ("select", "'expert_choice_by_position'") if router.gate != "slots" else ("gate", "another")
    remedy = (
        f"decides about a token by later tokens too, which a decoder is to predict; use {other}, or set "
        f"{section}router.sees_future=True to train on them nevertheless"
    )
    require(router.causal or router.sees_future, f"{section}router.{name}", getattr(router, name), remedy)


def in_decoder(router: RouterConfig, vocabulary: int) -> RouterConfig:
    """Return a router's configuration in a decoder of so many token ids. Raises as :func:`check_causal`."""
    check_causal(router)
    if router.gate != "hash":
        return router
    remedy = f"the decoder has {vocabulary} token ids; leave it out"
    require(router.vocabulary in (None, vocabulary), "router.vocabulary", router.vocabulary, remedy)
    return replace(router, vocabulary=vocabulary)


def check_balancing(router: RouterConfig, settings: dict[str, float]) -> None:
    """Raise ``ValueError`` if the router and another method would balance the load, with these rates by name."""
    if router.needs_balance:
        return
    reason = f"router.select={router.select!r} balances the load itself"
    if router.gate in UNBALANCED:
        reason = f"router.gate={router.gate!r} {UNBALANCED[router.gate]}"
    for name, value in settings.items():
        require(value == 0, f"balance.{name}", value, f"{reason}; set balance.{name} to 0")


def check_single_choice(router: RouterConfig, num_experts: int, top_k: int) -> None:
    """Raise ``ValueError`` if ``top_k=1`` is combined with normalisation, which makes every gate weight 1.

    The router would then get no gradient from the task's loss.
    """
    if top_k > 1 or num_experts == 1 or router.gate in UNBALANCED:
        return
    for name in ("softmax_after_topk", "normalize_weights"):
        require(
            not getattr(router, name),
            f"router.{name}",
            True,
            "with top_k=1 this makes every gate weight 1, and the task's loss cannot train the router; set it to "
            "False, so that the gate weight is the score (Switch)",
        )
