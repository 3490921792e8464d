"""Causal self-attention with rotary positions (arXiv 2104.09864): grouped-query and latent attention.

B sequences, S tokens per sequence, D hidden, N query heads, M key/value heads, G = N / M, H width of a query or key
head, W width of a value head, R rotated width, C width of a latent.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..collectives import reset
from ..config import AttentionConfig, require
from .attend import causal_attention, windowed_attention
from .documents import Documents
from .norm import RMSNorm
from .past import Past
from .rotary import rotary_tables, rotate

AttendWithin = Callable[[Tensor, Tensor, Tensor, Documents | None], Tensor]

#: epsilon of all norms, unless another one is given
EPS = 1e-5


class HeadNorm(RMSNorm):
    """RMSNorm of each head, with one weight [H] that all heads share.

    Under tensor parallelism its gradient must be summed over the ranks that hold the heads.
    """


class JointNorm(RMSNorm):
    """RMSNorm over all heads of [B, M, G, S, H] together, with a weight [M * G * H]."""

    def forward(self, x_BMGSH: Tensor) -> Tensor:
        x_BSX = x_BMGSH.permute(0, 3, 1, 2, 4)
        return super().forward(x_BSX.flatten(2)).view(x_BSX.shape).permute(0, 2, 3, 1, 4)


class Attention(nn.Module):
    """Base class of all kinds of attention: maps hidden states [B, S, D] to the same shape.

    With ``documents``, a position attends only to positions of its own document. Rotary positions still count from the
    start of the sequence: scores depend on differences of positions only.

    Parallelism is applied from outside: tensor parallelism gives each rank some of the ``split_heads`` heads; context
    parallelism gives it some of the positions (:meth:`hold`) and replaces ``attend``.
    """

    cos_SR: Tensor
    sin_SR: Tensor

    def __init__(self, seq_len: int, rotated: int, config: AttentionConfig, split_heads: int) -> None:
        super().__init__()
        self.config, self.seq_len = config, seq_len
        self._angles = partial(rotary_tables, seq_len, rotated, config.rotary_base, config.scaling)
        self._positions_S: Tensor | None = None
        cos_SR, sin_SR = self._angles()
        self.register_buffer("cos_SR", cos_SR, persistent=False)
        self.register_buffer("sin_SR", sin_SR, persistent=False)
        #: number of heads into which the weights can be split
        self.split_heads = split_heads
        #: factor of the scores, in addition to H^-0.5
        self.score_scale = 1.0 if config.scaling is None else config.scaling.score_scale
        #: maps (q [B, N, S, H], k [B, M, S, H], v [B, M, S, W], documents or None) to [B, N, S, W]
        self.attend: AttendWithin = causal_attention
        #: number of positions that a position attends to; None: all earlier ones
        self.window: int | None = None
        #: the key/value cache while text is generated, else None
        self.past: Past | None = None

    def see_only(self, window: int) -> None:
        """Let each position attend to itself and the ``window - 1`` positions before it."""
        if window < self.seq_len:
            self.window, self.attend = window, partial(windowed_attention, window=window)

    def span(self, attend: AttendWithin) -> None:
        """Replace causal attention by one over positions that other ranks hold."""
        require(
            self.window is None,
            "attention.window",
            self.window,
            "cannot span the ranks of context parallelism; set parallel.cp=1, or leave it out",
        )
        self.attend = attend

    def hold(self, positions_S: Tensor) -> None:
        """Set the positions of a sequence's rows, which are 0, 1, 2, ... by default."""
        self.cos_SR, self.sin_SR = self.cos_SR[positions_S], self.sin_SR[positions_S]
        self._positions_S = positions_S

    def reset_parameters(self) -> None:
        """Initialise all weights randomly and compute the rotary tables."""
        for part in self.children():
            reset(part)
        self.fill_tables()

    def fill_tables(self) -> None:
        """Compute the rotary tables."""
        for table_SR, values_SR in zip((self.cos_SR, self.sin_SR), self._angles(), strict=True):
            table_SR.copy_(values_SR if self._positions_S is None else values_SR[self._positions_S])

    def _rotate(self, t: Tensor) -> Tensor:
        """Rotate each channel pair (i, i + R/2) of [B, ..., S, R] by the angle of its position."""
        if self.past is not None:
            positions = self.past.now.positions_BS.view(t.shape[0], *[1] * (t.dim() - 3), t.shape[-2])
            return rotate(t, self.cos_SR[positions], self.sin_SR[positions])
        length, held = t.shape[-2], self.cos_SR.shape[0]
        split = self._positions_S is not None
        if length > held or (split and length < held):
            parts = self.seq_len // held
            raise ValueError(
                f"x: sequences of {length * parts} positions, but the model has seq_len={self.seq_len}; give it "
                f"sequences of {'exactly' if split else 'at most'} that length, or build it with another seq_len"
            )
        return rotate(t, self.cos_SR[:length], self.sin_SR[:length])

    def _scaled(self, q: Tensor) -> Tensor:
        """Scale queries, and so the scores; without ``score_scale`` they are the same tensor."""
        return q if self.score_scale == 1.0 else q * self.score_scale


class GroupedAttention(Attention):
    """Grouped-query attention (arXiv 2305.13245): N query heads share M key/value heads; multi-head if M = N.

    The rows of ``qkv_proj`` are ordered by key/value head: its G queries, then its key, then its value, so that
    parallelism can slice them by whole heads. ``qk_norm`` normalises queries and keys before rotation: each head
    (Qwen3, arXiv 2505.09388), or all heads together (OLMoE, arXiv 2409.02060).
    """

    def __init__(
        self, hidden_size: int, num_heads: int, seq_len: int, config: AttentionConfig, eps: float = EPS
    ) -> None:
        kv_heads, width = config.num_kv_heads or num_heads, config.head_width or hidden_size // num_heads
        super().__init__(seq_len, width, config, kv_heads)
        self.group, self.head_width = num_heads // kv_heads, width
        inputs, output = config.bias != "none", config.bias == "all"
        self.qkv_proj = nn.Linear(hidden_size, (num_heads + 2 * kv_heads) * width, bias=inputs)
        self.out_proj = nn.Linear(num_heads * width, hidden_size, bias=output)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.qk_norm:
            norm = HeadNorm if config.qk_norm_over == "head" else JointNorm
            self.q_norm = norm(width if norm is HeadNorm else num_heads * width, eps=eps)
            self.k_norm = norm(width if norm is HeadNorm else kv_heads * width, eps=eps)

    def forward(self, x_BSD: Tensor, documents: Documents | None = None) -> Tensor:
        qkv = self.qkv_proj(x_BSD).unflatten(-1, (-1, self.group + 2, self.head_width))
        # split first: the backward then joins the gradients in the order of the weights, and copies them once
        q_BMGSH, k_BM1SH, v_BM1SH = (t.permute(0, 2, 3, 1, 4) for t in qkv.split((self.group, 1, 1), dim=3))
        q_BNSH = self._scaled(self._rotate(self.q_norm(q_BMGSH))).flatten(1, 2)
        k_BMSH = self._rotate(self.k_norm(k_BM1SH)).flatten(1, 2)
        v_BMSH = v_BM1SH.flatten(1, 2)
        if self.past is None:
            out_BNSH = self.attend(q_BNSH, k_BMSH, v_BMSH, documents)
        else:
            out_BNSH = self.past.attend(q_BNSH, *self.past.extend(k_BMSH, v_BMSH), window=self.window)
        return self.out_proj(out_BNSH.transpose(1, 2).flatten(2))


class LatentAttention(Attention):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434; V3, arXiv 2412.19437), in its training form.

    Queries are projected from one latent, keys and values from another; both latents are normalised. Part of each
    head's query and key is rotated, and all heads share the rotated part of the key. The rows of the up-projections are
    ordered by head: query = (plain, rotated), key and value = (plain key, value). With ``q_lora_rank=0``, queries are
    projected directly from x.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, seq_len: int, config: AttentionConfig, eps: float = EPS
    ) -> None:
        super().__init__(seq_len, config.qk_rope_width, config, num_heads)
        inputs, output = config.bias != "none", config.bias == "all"
        self.q_widths = (config.qk_nope_width, config.qk_rope_width)
        self.kv_widths = (config.qk_nope_width, config.v_width)
        self.latent_widths = (config.kv_lora_rank, config.qk_rope_width)
        self.q_down_proj: nn.Module = nn.Identity()
        self.q_norm: nn.Module = nn.Identity()
        if config.q_lora_rank:
            self.q_down_proj = nn.Linear(hidden_size, config.q_lora_rank, bias=inputs)
            self.q_norm = RMSNorm(config.q_lora_rank, eps=eps)
        self.q_up_proj = nn.Linear(config.q_lora_rank or hidden_size, num_heads * sum(self.q_widths), bias=False)
        self.kv_down_proj = nn.Linear(hidden_size, sum(self.latent_widths), bias=inputs)
        self.kv_norm = RMSNorm(config.kv_lora_rank, eps=eps)
        self.kv_up_proj = nn.Linear(config.kv_lora_rank, num_heads * sum(self.kv_widths), bias=False)
        self.out_proj = nn.Linear(num_heads * config.v_width, hidden_size, bias=output)
        #: applied to the key part [B, S, R] that all heads share; tensor parallelism replaces it to reach all ranks
        self.common_key = nn.Identity()

    def forward(self, x_BSD: Tensor, documents: Documents | None = None) -> Tensor:
        q_BNSH = _heads(self.q_up_proj(self.q_norm(self.q_down_proj(x_BSD))), sum(self.q_widths))
        latent_BSC, common_BSR = self.kv_down_proj(x_BSD).split(self.latent_widths, dim=-1)
        latent_BSC = self.kv_norm(latent_BSC)
        plain_q, rotated_q = self._scaled(q_BNSH).split(self.q_widths, dim=-1)
        rotated_q, common_B1SR = self._rotate(rotated_q), self._rotate(self.common_key(common_BSR).unsqueeze(1))
        if self.past is not None:
            out_BNSW = self._attend_latents(self.past, plain_q, rotated_q, latent_BSC, common_B1SR)
            return self.out_proj(out_BNSW.transpose(1, 2).flatten(2))
        kv_BNSX = _heads(self.kv_up_proj(latent_BSC), sum(self.kv_widths))
        plain_k, v_BNSW = kv_BNSX.split(self.kv_widths, dim=-1)
        k_BNSH = torch.cat((plain_k, common_B1SR.expand(-1, plain_k.shape[1], -1, -1)), dim=-1)
        out_BNSW = self.attend(torch.cat((plain_q, rotated_q), dim=-1), k_BNSH, v_BNSW, documents)
        return self.out_proj(out_BNSW.transpose(1, 2).flatten(2))

    def _attend_latents(
        self, past: Past, plain_q: Tensor, rotated_q: Tensor, latent_BSC: Tensor, common_B1SR: Tensor
    ) -> Tensor:
        """Attend to kept latents, which all heads share, instead of to keys and values (arXiv 2405.04434, section 2.1).

        The up-projection of keys is applied to the queries, and that of values to the result.
        """
        weight: Any = self.kv_up_proj.weight
        weight = weight.to_local() if hasattr(weight, "to_local") else weight
        up_k, up_v = weight.unflatten(0, (-1, sum(self.kv_widths))).split(self.kv_widths, dim=1)
        latent_B1LC, common_B1LR = past.extend(latent_BSC.unsqueeze(1), common_B1SR)
        q_BNSX = torch.cat((torch.einsum("bnsk,nkc->bnsc", plain_q, up_k.to(plain_q.dtype)), rotated_q), dim=-1)
        k_B1LX = torch.cat((latent_B1LC, common_B1LR), dim=-1)
        scale = sum(self.q_widths) ** -0.5
        out_BNSC = past.attend(q_BNSX, k_B1LX, latent_B1LC, window=self.window, scale=scale)
        return torch.einsum("bnsc,nwc->bnsw", out_BNSC, up_v.to(out_BNSC.dtype))


#: maps ``AttentionConfig.kind`` to a constructor that takes (hidden_size, num_heads, seq_len, config, epsilon of norms)
ATTENTION: dict[str, Callable[..., Attention]] = {
    "grouped": GroupedAttention,
    "latent": LatentAttention,
}


def _heads(rows_BSX: Tensor, width: int) -> Tensor:
    return rows_BSX.unflatten(-1, (-1, width)).transpose(1, 2)
