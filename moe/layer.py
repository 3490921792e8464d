"""The Mixture-of-Experts layer.  T tokens, D hidden, E experts, K top-k."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .balance import Balancer, Visit, initial_bias
from .collectives import reset
from .config import MoEConfig
from .dispatch import Dispatcher, DropDuplicates, MixingDispatcher, build_capacity, build_dispatcher
from .experts import SharedExperts, build_experts, build_local
from .placement import Placement, Replicas
from .regions import region
from .replication import Calibration, Replication
from .routing import build_router
from .types import Routing, RoutingStats


class MoE(nn.Module):
    """A Mixture-of-Experts layer that replaces a dense feed-forward: ``y = layer(x)``.

    ``x`` is [..., hidden_size] in a floating dtype; ``y`` has the same shape and dtype. ``mask`` ([...], True where a
    token is valid) excludes padding from routing and statistics; masked tokens get only the shared experts' output. For
    ``scope="sequence"``, the second-to-last dimension is the sequence. ``codes`` (int64 [...]) are the numbers that
    some routers read: token ids (``gate="hash"``) or tasks (``gate="task"``).

    The balance loss is attached to ``y`` in the autograd graph: train on your own loss and add nothing to it. ``stats``
    describes the last training forward. Evaluation, no-grad and recomputed forwards change neither it nor any counts.

    Further arguments, by name, go to the router: gate "residual" takes ``passed``, the
    :class:`~equimoe.moe.routing.PassedLogits` of the layer before.

    ``group`` is the process group whose ranks hold different tokens and average their gradients, as under DDP or FSDP;
    None means all ranks. Call :meth:`place` instead if sequences or experts are split over ranks.

    Weights: ``router.weight`` [E, D], ``experts.gate_up_proj`` [E, 2F, D], ``experts.down_proj`` [E, D, F].
    """

    def __init__(self, config: MoEConfig, group: Any = None) -> None:
        super().__init__()
        self.config = config
        hidden, std = config.hidden_size, config.init_std
        self.router = build_router(config)
        self.router.bias_E = initial_bias(config.balance, config.all_experts)
        self.experts = build_experts(config)
        self.shared: SharedExperts | None = None
        if config.shared_intermediate_size:
            self.shared = SharedExperts(hidden, config.shared_intermediate_size, config.shared_gate, std)
        #: what this rank computes for its own tokens
        self.local = build_local(config)
        router = config.router
        self.balancer = Balancer(
            config.balance,
            config.num_experts,
            config.top_k,
            router.z_loss,
            router.reach,
            router.entropy_loss,
            config.load_weights,
        )
        self._put(Placement())
        if group is not None:
            self.place(Placement.of_group(group))
        self._stats: RoutingStats | None = None

    def reset_parameters(self) -> None:
        """Initialise all weights randomly, for example after ``to_empty``.

        The same seed gives the same weights as a new layer.
        """
        for part in self.children():
            reset(part)

    def place(self, placement: Placement) -> None:
        """Tell the layer which ranks it works on. The caller splits the experts' weights to match ``placement``.

        Raises ValueError if the placement's owners do not match the layer.
        """
        if self.config.chunks is not None and placement.ep.size > 1 and placement.owners is None:
            raise ValueError(
                "placement.owners=None: experts of unequal width need owners; use Owners.even(widths, ranks)"
            )
        self._put(placement)
        self.balancer.place(placement)

    def _put(self, placement: Placement) -> None:
        self.duplicates = DropDuplicates(placement.copies)
        self.capacity = build_capacity(self.config, placement)
        self.dispatcher: Dispatcher | MixingDispatcher = build_dispatcher(self.config, placement)
        #: the replicas of experts that the ranks hold in this step; None: none
        self.replication: Replication | None = None

    def hold(self, replicas: Replicas, free: bool = False, calibration: Calibration | None = None) -> None:
        """Hold replicas of other ranks' experts from the next forward on. Tokens prefer holders on their own node.

        Every ep rank must call this with the same ``replicas``, between steps. See :class:`Replication` for the other
        arguments. Raises ValueError if the replicas have other owners than the layer's placement.
        """
        if replicas.owners != self.balancer.owners:
            raise ValueError("replicas.owners: differ from the placement's; make them from the same owners")
        self.replication = Replication(replicas, self.balancer.placement.ep, self.dispatcher, free, calibration)

    def forward(self, x: Tensor, mask: Tensor | None = None, codes: Tensor | None = None, **given: Any) -> Tensor:
        whole = x.shape
        x, mask, codes = self.duplicates.split(x, mask, codes)
        x_TD, mask_T, codes_T, sequences = self._flatten(x, mask, codes)
        router, experts, shared = self.parts()
        held = experts if self.replication is None else self.replication.begin(experts)
        visit, decision = self.balancer.begin(self, x_TD)
        with region("route"):
            routing = router(x_TD, mask_T, sequences, decision, codes_T, **given)
            if self.capacity is not None:
                routing = self.capacity(routing)
        with region("balance"):
            counted = visit is not None and self.balancer.count(visit, routing, mask_T)
            if visit is not None and counted:
                self._keep_stats(routing, visit)
        sent = self.local.sent(routing)
        if self.replication is not None:
            held = self.replication.adapt(held, experts, sent, counted)
        with region("dispatch"):
            flight = self.dispatcher.send(x_TD, sent)
        local_TD = self.local(shared, x_TD, routing)  # overlaps with the exchange of rows
        with region("combine"):  # region "experts" is inside: rows may arrive and return in chunks
            y_TD = self.dispatcher.finish(flight, held)
        if self.replication is not None:
            y_TD = self.replication.end(y_TD, held)
        if local_TD is not None:
            y_TD = y_TD + local_TD
        with region("balance"):
            y = self.balancer.attach(visit, y_TD, routing, router.weight).view(x.shape).to(x.dtype)
        return self.duplicates.join(y, whole)

    def parts(self) -> tuple[Any, Any, Any]:
        """Return the router, the routed experts, and the shared experts or None."""
        return self.router, self.experts, self.shared

    @property
    def stats(self) -> RoutingStats:
        """Statistics of the last training forward on this rank. Raises RuntimeError before the first one."""
        if self._stats is None:
            raise RuntimeError("MoE.stats: no training forward yet; call the layer with gradients enabled")
        return self._stats

    def _flatten(
        self, x: Tensor, mask: Tensor | None, codes: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
        hidden = self.config.hidden_size
        if not x.is_floating_point():
            raise ValueError(f"x.dtype={x.dtype}: must be a floating dtype; give hidden states, not token ids")
        if x.dim() == 0 or x.shape[-1] != hidden:
            raise ValueError(f"x.shape={tuple(x.shape)}: the last dimension must be hidden_size={hidden}")
        if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != torch.bool):
            raise ValueError(
                f"mask={mask.dtype} {tuple(mask.shape)}: must be torch.bool {tuple(x.shape[:-1])}; set it to True "
                "where a token is valid"
            )
        if codes is not None and (codes.shape != x.shape[:-1] or codes.dtype != torch.int64):
            raise ValueError(
                f"codes={codes.dtype} {tuple(codes.shape)}: must be torch.int64 {tuple(x.shape[:-1])}, "
                "a number per token"
            )
        x_TD = x.reshape(-1, hidden)
        tokens_each = x.shape[-2] if x.dim() > 1 else 1
        sequences = x_TD.shape[0] // tokens_each if x_TD.shape[0] else 1
        mask_T, codes_T = (None if t is None else t.reshape(-1) for t in (mask, codes))
        return x_TD, mask_T, codes_T, sequences

    def _keep_stats(self, routing: Routing, visit: Visit) -> None:
        losses = partial(self.balancer.loss_values, visit)
        # not by nn.Module's assignment, which looks for parameters and modules
        self.__dict__["_stats"] = RoutingStats(routing.counts_BE, routing.tokens_B, routing.ids_TK, losses)

    def __getstate__(self) -> dict[str, Any]:
        # both may hold unfinished collectives, which cannot be copied
        return {**self.__dict__, "_stats": None, "replication": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.dispatcher.address(self.balancer.owners)  # a copy holds no replicas
