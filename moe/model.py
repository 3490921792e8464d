"""A small decoder language model for tests, recipes and examples.

Pre-norm blocks of causal attention with rotary positions and a SwiGLU feed-forward, dense or MoE.
B sequences, S tokens of each, D hidden, N heads, H head width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .balance import recompute
from .config import MoEConfig
from .experts import SwiGLU
from .layer import MoE


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions (arXiv 2104.09864).

    The rows of ``qkv_proj`` are ordered by head, then query, key, value, so that a slice of them is whole heads.
    """

    cos_SH: Tensor
    sin_SH: Tensor

    def __init__(self, hidden_size: int, num_heads: int, seq_len: int) -> None:
        super().__init__()
        self.head_width = hidden_size // num_heads
        self.qkv_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        cos_SH, sin_SH = _rotary(seq_len, self.head_width)
        self.register_buffer("cos_SH", cos_SH, persistent=False)
        self.register_buffer("sin_SH", sin_SH, persistent=False)
        #: (q, k, v) to out, all [B, N, S, H]; context parallelism puts its own here
        self.attend: Callable[[Tensor, Tensor, Tensor], Tensor] = causal_attention

    def forward(self, x_BSD: Tensor) -> Tensor:
        qkv = self.qkv_proj(x_BSD)
        q_BNSH, k_BNSH, v_BNSH = qkv.unflatten(-1, (-1, 3, self.head_width)).permute(3, 0, 2, 1, 4).unbind(0)
        out_BNSH = self.attend(self._rotate(q_BNSH), self._rotate(k_BNSH), v_BNSH)
        return self.out_proj(out_BNSH.transpose(1, 2).flatten(2))

    def hold(self, positions_S: Tensor) -> None:
        """Let the rows of a sequence stand at these positions of it, instead of at 0, 1, 2, ..."""
        self.cos_SH, self.sin_SH = self.cos_SH[positions_S], self.sin_SH[positions_S]

    def _rotate(self, t_BNSH: Tensor) -> Tensor:
        first, second = t_BNSH.chunk(2, dim=-1)
        cos_SH = self.cos_SH[: t_BNSH.shape[2]].to(t_BNSH.dtype)
        sin_SH = self.sin_SH[: t_BNSH.shape[2]].to(t_BNSH.dtype)
        return torch.cat((first * cos_SH - second * sin_SH, second * cos_SH + first * sin_SH), dim=-1)


def causal_attention(q_BNSH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor) -> Tensor:
    """Softmax attention of each position to itself and those before it."""
    return F.scaled_dot_product_attention(q_BNSH, k_BNSH, v_BNSH, is_causal=True)


def _rotary(seq_len: int, head_width: int) -> tuple[Tensor, Tensor]:
    frequency = 10000.0 ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    angle_SH = torch.outer(torch.arange(seq_len, dtype=torch.float64), frequency)
    return angle_SH.cos().float(), angle_SH.sin().float()


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, attention: Attention, mlp: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(hidden_size, eps=1e-5)
        self.attention = attention
        self.mlp_norm = nn.RMSNorm(hidden_size, eps=1e-5)
        self.mlp = mlp

    def forward(self, x_BSD: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD))
        rest = (mask_BS,) if isinstance(self.mlp, MoE) else ()
        return x_BSD + self.mlp(self.mlp_norm(x_BSD), *rest)


class Decoder(nn.Module):
    """Token ids int64 [B, S] to logits [B, S, V]; ``mask`` [B, S], True where a token is valid, is for the MoE layers.

    Block i (from 0) has an MoE feed-forward when ``(i + 1) % moe_every == 0``; with ``moe_every=0`` none has.
    A pipeline stage is a copy without the embedding, some blocks, or the head; it takes and gives hidden states.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        seq_len: int,
        num_layers: int,
        num_heads: int,
        intermediate_size: int,
        moe: MoEConfig,
        moe_every: int = 1,
        recompute_blocks: bool = False,
    ) -> None:
        super().__init__()
        hidden = moe.hidden_size
        self.embedding: nn.Module | None = nn.Embedding(vocab_size, hidden)
        self.blocks = nn.ModuleDict()
        for i in range(num_layers):
            is_moe = moe_every > 0 and (i + 1) % moe_every == 0
            mlp = MoE(moe) if is_moe else SwiGLU(hidden, intermediate_size, moe.init_std)
            self.blocks[str(i)] = Block(Attention(hidden, num_heads, seq_len), mlp, hidden)
        self.norm: nn.Module | None = nn.RMSNorm(hidden, eps=1e-5)
        self.head: nn.Module | None = nn.Linear(hidden, vocab_size, bias=False)
        self.run_block: Callable[..., Any] = recompute if recompute_blocks else _run
        self._initialise(moe.init_std, num_layers)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.embedding is not None:
            x = self.embedding(x)
        for block in self.blocks.values():
            x = self.run_block(block, x, mask)
        if self.norm is not None and self.head is not None:
            x = self.head(self.norm(x))
        return x

    def moe_layers(self) -> list[MoE]:
        """The MoE layers, in order."""
        return [module for module in self.modules() if isinstance(module, MoE)]

    @torch.no_grad()
    def _initialise(self, std: float, num_layers: int) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)
        # GPT-2: what is written to the residual stream starts smaller the more writers there are
        for name, weight in self.named_parameters():
            if name.endswith(("out_proj.weight", "down_proj", "down_proj.weight")):
                weight.mul_(1.0 / math.sqrt(2 * num_layers))


def _run(block: nn.Module, *args: Any) -> Any:
    return block(*args)
