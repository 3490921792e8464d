"""The router under Megatron-Core: this package's, with Megatron's way to select; or Megatron's own.

T tokens, E experts, K top-k, G groups, S positions, B sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from ....kernels.topk_gate import GateOutput
from ...config import MoEConfig
from ...routing import Router
from ...types import Decision, Routing


class ExactRouter(Router):
    """This package's router, as Megatron-Core sees its own.

    Megatron's ``finalize_model_grads`` sums ``local_tokens_per_expert`` over ranks, moves ``expert_bias`` by it, and
    calls :meth:`reset_global_aux_loss_tracker`. A router without a bias has neither of the two tensors.

    It selects experts as Megatron does. The router of a layer outside of Megatron ranks a group by its two best scores;
    Megatron ranks it by its K / kept_groups best, and for a softmax after top-k by the logits instead of the scores.
    """

    def __init__(self, moe: MoEConfig, config: TransformerConfig) -> None:
        options, per_group = moe.router, moe.top_k // moe.router.kept_groups
        grouped = options.groups > 1
        special = grouped and (options.softmax_after_topk or per_group != 2)
        fused = replace(options, groups=1, kept_groups=1) if special else options
        super().__init__(moe.hidden_size, moe.num_experts, moe.top_k, fused, moe.init_std, moe.backend)
        if special:
            select = partial(
                _select, k=moe.top_k, groups=options.groups, kept_groups=options.kept_groups, per_group=per_group
            )
            score = None if options.softmax_after_topk else self.score
            self.route = partial(_route, self.route, score, select)
        #: ends the layer's step
        self.end_step: Callable[[], None] = _nothing
        if config.moe_router_enable_expert_bias:
            device = self.weight.device
            self.bias_E = torch.zeros(moe.num_experts, dtype=torch.float32, device=device)
            #: int64 [E], choices on this rank since the last update of the bias
            counts_E = torch.zeros(moe.num_experts, dtype=torch.int64, device=device)
            self.register_buffer("local_tokens_per_expert", counts_E, persistent=False)
        #: the tensor of the bias, its version and its value, when the step began
        self._at_start: tuple[Tensor, int, Tensor] | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "expert_bias" and self.bias_E is not None:
            return self.bias_E
        return super().__getattr__(name)

    def count(self, counts_E: Tensor) -> None:
        """Add the choices of a micro-batch to what moves the bias."""
        if self.bias_E is not None:
            self.local_tokens_per_expert += counts_E

    def forget(self, skipped: bool) -> None:
        """Begin a step: forget the choices of one that broke off, and undo the move of the bias if it was ``skipped``.

        Megatron moves the bias before it knows whether gradients have overflowed, in which case weights stay.
        """
        if self.bias_E is None:
            return
        if skipped and self._at_start is not None:
            bias_E, version, value_E = self._at_start
            if bias_E is self.bias_E and bias_E._version == version + 1:  # else a checkpoint has been loaded, too
                bias_E.copy_(value_E)
        self.local_tokens_per_expert.zero_()
        self._at_start = self.bias_E, self.bias_E._version, self.bias_E.clone()

    def reset_global_aux_loss_tracker(self) -> None:
        """Called by Megatron-Core when the gradients of a step are complete."""
        self.end_step()


def _nothing() -> None:
    pass


def _route(
    gate: Callable[..., GateOutput],
    score: Callable[[Tensor], Tensor] | None,
    select: Callable[[Tensor], Tensor],
    logits_TE: Tensor,
    *,
    bias_E: Tensor | None,
    ids_TK: Tensor | None,
    **rest: Any,
) -> GateOutput:
    """Select by ``score`` (None: by the logits), and leave the rest to the router's ``gate``."""
    if ids_TK is None:
        with torch.no_grad():
            wanted_TE = logits_TE if score is None else score(logits_TE).exp()
            ids_TK = select(wanted_TE if bias_E is None else wanted_TE + bias_E)
    return gate(logits_TE, bias_E=bias_E, ids_TK=ids_TK, **rest)


def _select(wanted_TE: Tensor, k: int, groups: int, kept_groups: int, per_group: int) -> Tensor:
    """Choose the k best of the best groups, which are ranked by the sum of their ``per_group`` best."""
    worth_TG = wanted_TE.unflatten(1, (groups, -1)).topk(per_group, dim=-1).values.sum(-1)
    kept_TG = torch.zeros_like(worth_TG, dtype=torch.bool).scatter_(1, worth_TG.topk(kept_groups, dim=-1).indices, True)
    kept_TE = kept_TG.repeat_interleave(wanted_TE.shape[1] // groups, dim=1)
    return wanted_TE.masked_fill(~kept_TE, float("-inf")).topk(k, dim=-1).indices


class MegatronRouter(TopKRouter):
    """Megatron-Core's own router, with all its losses, as the router of this package's layer."""

    #: the expert bias is Megatron's ``expert_bias``
    bias_E = None

    def __init__(self, config: TransformerConfig, groups: ProcessGroupCollection) -> None:
        super().__init__(config=config, pg_collection=groups)
        self.top_k = config.moe_router_topk

    def forget(self, skipped: bool) -> None:
        """Do nothing: Megatron-Core keeps the counts of a step that broke off, and the move of the bias."""

    def forward(
        self,
        x_TD: Tensor,
        mask_T: Tensor | None = None,
        sequences: int = 1,
        decision: Decision | None = None,
        codes_T: Tensor | None = None,
    ) -> Routing:
        """Route T tokens: ``sequences`` sequences of equal length. A ``decision`` is not kept but made again.

        Megatron's router reads no ``codes_T``.
        """
        x_SBD = x_TD.unflatten(0, (sequences, -1)).transpose(0, 1).contiguous()
        padding_SB = None if mask_T is None else ~mask_T.view(sequences, -1).transpose(0, 1)
        probs, chosen = super().forward(x_SBD, padding_SB)
        probs_TE, chosen_TE = (t.unflatten(0, x_SBD.shape[:2]).transpose(0, 1).flatten(0, 1) for t in (probs, chosen))
        if mask_T is not None:
            chosen_TE = chosen_TE & mask_T[:, None]
        asked_TK, best_TK = chosen_TE.to(torch.int8).topk(self.top_k, dim=-1)
        counts_BE = chosen_TE.view(sequences, -1, chosen_TE.shape[1]).sum(1)
        tokens_T = torch.ones_like(x_TD[:, 0], dtype=torch.int64) if mask_T is None else mask_T.long()
        return Routing(
            Decision(best_TK, best_TK.masked_fill(asked_TK == 0, -1)),
            probs_TE.gather(1, best_TK).float(),
            counts_BE,
            tokens_T.view(sequences, -1).sum(1),
            torch.zeros(counts_BE.shape, device=x_TD.device),
            torch.zeros((), device=x_TD.device),
        )
