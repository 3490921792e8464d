"""One router for all layers, which decides before the first one (Read-ME, arXiv 2410.19123).

B sequences, S tokens per sequence, D hidden, T tokens, E experts, K top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..collectives import fill_normal
from ..config import AttentionConfig, MoEConfig, require
from ..experts import SwiGLU
from ..routing import Router
from .attention import ATTENTION
from .decoder import Block, Decoder
from .documents import Documents
from .norm import RMSNorm


class PreGate(nn.Module):
    """A causal transformer of one block that maps the embeddings [B, S, D] of tokens to logits [B, S, E]."""

    def __init__(self, num_experts: int, hidden_size: int, num_heads: int, seq_len: int, init_std: float) -> None:
        super().__init__()
        attention = ATTENTION["grouped"](hidden_size, num_heads, seq_len, AttentionConfig(), 1e-5)
        self.block = Block(attention, SwiGLU(hidden_size, 2 * hidden_size, init_std), hidden_size)
        self.norm = RMSNorm(hidden_size, eps=1e-5)
        self.head = nn.Linear(hidden_size, num_experts, bias=False)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    fill_normal(module.weight, init_std)

    def forward(self, x_BSD: Tensor, starts_BS: Tensor | None = None) -> Tensor:
        documents = None if starts_BS is None else Documents(starts_BS)
        return self.head(self.norm(self.block(x_BSD, documents=documents)))


class PreGated(nn.Module):
    """A decoder whose MoE layers all route by the logits of one :class:`PreGate`. Their own routers are replaced.

    The gate sees token embeddings only, so :meth:`choices` tells which experts a text needs before the decoder runs. It
    gets no gradient to the embeddings. For one process, or data parallelism; generation would recompute all tokens.
    """

    def __init__(self, decoder: Decoder, num_heads: int, seq_len: int) -> None:
        super().__init__()
        layers = decoder.moe_layers()
        if not layers or len({(layer.config.num_experts, layer.config.top_k) for layer in layers}) != 1:
            raise ValueError("decoder: needs MoE layers, all with the same num_experts and top_k")
        config = layers[0].config
        for name, plain in (("gate", "linear"), ("jitter", 0.0)):
            value = getattr(config.router, name)
            require(
                value == plain, f"router.{name}", value, f"has no effect with a gate before the decoder; use {plain}"
            )
        self.gate = PreGate(config.num_experts, config.hidden_size, num_heads, seq_len, config.init_std)
        self.decoder = decoder
        for layer in layers:
            layer.router = _GivenLogits(layer.config, self.gate.head.weight)
        self._routers = [layer.router for layer in layers]

    def forward(self, ids_BS: Tensor, mask_BS: Tensor | None = None, starts: Tensor | None = None) -> Tensor:
        logits_TE = self.logits(ids_BS, starts).flatten(0, 1)
        for router in self._routers:
            router.given_TE = logits_TE
        return self.decoder(ids_BS, mask_BS, starts)

    def logits(self, ids_BS: Tensor, starts_BS: Tensor | None = None) -> Tensor:
        """Return the router's logits [B, S, E]."""
        assert self.decoder.embedding is not None
        return self.gate(self.decoder.embedding(ids_BS).detach(), starts_BS)

    @torch.no_grad()
    def choices(self, ids_BS: Tensor) -> Tensor:
        """Return the experts [B, S, K] of each token, in all layers."""
        logits_TE = self.logits(ids_BS).flatten(0, 1)
        return self._routers[0].routing(logits_TE, None, len(ids_BS), None).ids_TK.unflatten(0, ids_BS.shape)


class _GivenLogits(Router):
    """A router whose logits are given for each forward. ``weight`` is that of the head that computed them."""

    given_TE: Tensor

    def __init__(self, config: MoEConfig, weight: Tensor) -> None:
        size = (config.hidden_size, config.num_experts, config.top_k)
        super().__init__(*size, config.router, config.init_std, config.backend)
        assert isinstance(weight, nn.Parameter)
        self.weight = weight

    def logits(self, x_TD: Tensor) -> Tensor:
        """Return the given logits [T, E] in fp32 (fp64 for fp64)."""
        return self.given_TE.to(torch.promote_types(self.given_TE.dtype, torch.float32))
