"""The router: maps hidden states to a :class:`Routing`.  T tokens, D hidden, E experts, K top-k, B sequences."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.router_logits import router_logits
from ...kernels.topk_gate import FUSED_SCORES, GateOutput, topk_gate
from ..collectives import fill_normal
from ..config import RouterConfig
from ..config.routing import UNBALANCED, UP_TO_K
from ..types import Decision, Routing
from .compose import compose, wanted
from .noise import jittered, mixed, random_second
from .score import SCORES, entropy_sum
from .select import GROUP_WORTHS, group_limited, top_k
from .selections import SELECTIONS, Selection
from .weight import WEIGHTS


class Router(nn.Module):
    """A linear layer (the gate), then three functions: score, select and weigh.

    The op :func:`~equimoe.kernels.topk_gate.topk_gate` fuses all three for the scores that it supports.

    The router computes in fp32 (fp64 for fp64 input), whatever the dtype of ``x`` or autocast. It warns if a wrapper
    gives its forward a rounded copy of ``weight``, because rounding sends some tokens to other experts. It does not
    warn if the module itself was converted (``model.bfloat16()``).

    ``bias_E`` is added to the scores to choose experts, but not to compute gate weights (DeepSeek-V3, arXiv
    2412.19437). It is None until a balancing method assigns an fp32 tensor; from then on it is a buffer that is saved,
    moves with the module and stays fp32.
    """

    bias_E: Tensor | None
    #: what it reads of each token besides the hidden state: "tokens", its id, or "tasks", the number of its task
    reads: str | None = None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        config: RouterConfig,
        init_std: float,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.top_k, self.init_std, self.backend = top_k, init_std, backend
        self.make_parameters(hidden_size, num_experts, config)
        self.register_buffer("bias_E", None)
        self.reset_parameters()
        #: dtype of the module's own weight; a wrapper may give the forward a copy in another dtype
        self._kept_dtype = self.weight.dtype
        # the fused op always weighs K experts
        fused = config.score in FUSED_SCORES and config.group_worth == "two_best" and config.select not in UP_TO_K
        self.route = _fused(top_k, config, backend) if fused else _composed(top_k, config)
        self.score = SCORES[config.score]
        self.selection = SELECTIONS[config.select](config, top_k)
        #: disturbs the hidden states in training
        self.disturbed: Callable[[Tensor], Tensor] = partial(jittered, size=config.jitter) if config.jitter else _same
        #: share of noise in the logits in training, see :meth:`begin_step`
        self.random_steps, self.randomness = config.random_steps, 0.0
        self.needs_entropy = config.entropy_loss > 0
        #: says which choices are computed in training; None: all
        self.keep: Callable[[Tensor], Tensor] | None = random_second if config.random_second else None
        if backend == "triton":
            _warn_without_kernel(config, fused, self.selection != Selection())

    def make_parameters(self, hidden_size: int, num_experts: int, config: RouterConfig) -> None:
        """Create the parameters, uninitialized."""
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def reset_parameters(self) -> None:
        """Initialize the weights with new random values, and the bias with zero."""
        fill_normal(self.weight, self.init_std)
        if self.bias_E is not None:
            self.bias_E.zero_()

    def forward(
        self,
        x_TD: Tensor,
        mask_T: Tensor | None = None,
        sequences: int = 1,
        decision: Decision | None = None,
        codes_T: Tensor | None = None,
    ) -> Routing:
        """Route T tokens: ``sequences`` sequences of equal length.

        If a ``decision`` is given, its experts are kept and only their gate weights are computed. ``codes_T``, int64,
        are the numbers that :attr:`reads` names.
        """
        logits_TE = self.training_logits(x_TD) if self.training else self.logits(x_TD)
        return self.routing(logits_TE, mask_T, sequences, decision)

    def routing(self, logits_TE: Tensor, mask_T: Tensor | None, sequences: int, decision: Decision | None) -> Routing:
        """Route T tokens with these logits, see :meth:`forward`; in training, after :meth:`begin_step`'s noise."""
        logits_TE = mixed(logits_TE, self.randomness, mask_T) if self.training else logits_TE
        chosen_TK = self._select(logits_TE, mask_T, sequences) if decision is None else decision.chosen_TK
        gate = self.route(logits_TE, bias_E=self.bias_E, mask_T=mask_T, sequences=sequences, ids_TK=chosen_TK)
        # drawn whether or not the decision is given, so that whatever draws next gets the same numbers in recomputation
        kept_TK = self.keep(gate.weights_TK) if self.training and self.keep is not None else None
        if decision is None:
            ids_TK = gate.ids_TK if mask_T is None else gate.ids_TK.masked_fill(~mask_T[:, None], -1)
            ids_TK = ids_TK if kept_TK is None else ids_TK.masked_fill(~kept_TK, -1)
            decision = Decision(gate.ids_TK, ids_TK)
        entropy = entropy_sum(self.score(logits_TE), mask_T) if self.needs_entropy else None
        sums = gate.counts_BE, gate.tokens_B, gate.prob_sums_BE, gate.z_sum
        return Routing(decision, gate.weights_TK, *sums, entropy)

    def _select(self, logits_TE: Tensor, mask_T: Tensor | None, sequences: int) -> Tensor | None:
        """Return the chosen experts int64 [T, K]; None if :attr:`route` is to choose them."""
        select = self.selection.training if self.training else self.selection.evaluation
        if select is None:
            return None
        with torch.no_grad():
            return select(logits_TE, wanted(self.score(logits_TE), self.bias_E), mask_T, sequences)

    def begin_step(self, step: int) -> None:
        """Set the share of noise in the logits of an optimizer step, from 0, for ``random_steps``."""
        self.randomness = max(0.0, 1 - step / self.random_steps) if self.random_steps else 0.0

    def logits(self, x_TD: Tensor) -> Tensor:
        """Return the logits [T, E] in fp32 (fp64 for fp64 input), as in evaluation."""
        self.check_rounding()
        return self.product(x_TD, self.weight)

    def training_logits(self, x_TD: Tensor) -> Tensor:
        """Return the logits [T, E] of a forward in training, which may be random."""
        return self.logits(self.disturbed(x_TD))

    def product(self, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        """Multiply hidden states by a weight in fp32 (fp64 for fp64 input), whatever autocast says."""
        return router_logits(x_TD, weight_ED, self.backend)

    def probabilities(self, x_TD: Tensor, codes_T: Tensor | None = None) -> Tensor:
        """Return each token's scores, normalised to sum 1, [T, E]. The load-balancing loss sums these.

        A router that takes further arguments in its forward takes them here, too.
        """
        return self.score(self.logits(x_TD)).softmax(-1)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self.bias_E is not None:
            self.bias_E = self.bias_E.float()  # load_state_dict(assign=True) keeps the dtype of the file
        self._kept_dtype = self.weight.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Apply ``fn`` as every module does, but keep ``bias_E`` in fp32: its updates are too small for 16 bits."""
        before = self.bias_E
        super()._apply(fn, recurse)
        if before is not None and self.bias_E is not None and self.bias_E.dtype != before.dtype:
            self.bias_E = before.to(self.bias_E.device)
        self._kept_dtype = self.weight.dtype
        return self

    def check_rounding(self) -> None:
        """Warn once if the forward gets a weight of a narrower dtype than the module's own."""
        if self.weight.dtype == self._kept_dtype:
            return
        kept, self._kept_dtype = self._kept_dtype, self.weight.dtype
        if self.weight.dtype.itemsize < kept.itemsize:
            warnings.warn(
                f"router.weight is {kept}, but its forward gets a copy in {self.weight.dtype}, which sends some tokens "
                "to other experts; with FSDP2 wrap each router by itself before its block: "
                "fully_shard(layer.router, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))",
                stacklevel=4,
            )


def _same(x_TD: Tensor) -> Tensor:
    return x_TD


def _fused(k: int, config: RouterConfig, backend: str) -> Callable[..., GateOutput]:
    limited = config.select == "top_k"  # the others look at groups themselves
    return partial(
        topk_gate,
        k=k,
        score=config.score,
        groups=config.groups if limited else 1,
        kept_groups=config.kept_groups if limited else 1,
        normalize=config.normalize_weights,
        softmax_after_topk=config.softmax_after_topk,
        scale=config.weight_scale,
        backend=backend,
    )


def _warn_without_kernel(config: RouterConfig, fused: bool, selects: bool) -> None:
    """Warn of each piece that runs in torch, although the layer asks for Triton."""
    pieces = [("score", config.score in FUSED_SCORES), ("group_worth", config.group_worth == "two_best")]
    pieces += [("select", not selects), ("random_second", not config.random_second)]
    for name, has_kernel in (*pieces, ("gate", config.gate not in UNBALANCED)):
        if not has_kernel:
            what, whole = (
                f"router.{name}={getattr(config, name)!r}",
                "" if fused else ", and so does the rest of routing",
            )
            warnings.warn(f"backend='triton': {what} has no Triton kernel and runs in torch{whole}", stacklevel=4)


def _composed(k: int, config: RouterConfig) -> Callable[..., GateOutput]:
    select = partial(top_k, k=k)
    if config.groups > 1:
        worth = GROUP_WORTHS[config.group_worth]
        select = partial(group_limited, k=k, groups=config.groups, kept_groups=config.kept_groups, worth=worth)
    name = "normalized" if config.normalize_weights else "plain"
    weigh = WEIGHTS["softmax_after_topk" if config.softmax_after_topk else name]
    return partial(compose, score=SCORES[config.score], select=select, weigh=weigh, scale=config.weight_scale)
