"""A small decoder language model for tests, recipes and examples.

Its pre-norm blocks have causal attention with rotary positions and a feed-forward: dense SwiGLU or MoE.
B sequences, S tokens per sequence, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..balance import recompute
from ..collectives import draw_seed, fill_normal, reset, seeded
from ..config import AttentionConfig, MoEConfig, RecomputeConfig
from ..config.checks import require
from ..config.routing import in_decoder
from ..experts import SwiGLU
from ..layer import MoE
from ..routing import PassedLogits
from .attention import ATTENTION, EPS, Attention
from .documents import Documents
from .head import NormHead
from .norm import RMSNorm

#: calls a function with its arguments; may call it a second time, in the backward pass, to recompute activations
Caller = Callable[..., Any]
PARTS = ("block", "attention", "feed_forward")


class Block(nn.Module):
    """A pre-norm transformer block: x + attention(norm(x)), then x + feed-forward(norm(x)).

    ``again`` names the part, one of :data:`PARTS` or "" for none, that runs under ``recompute``.
    """

    def __init__(
        self,
        attention: Attention,
        mlp: nn.Module,
        hidden_size: int,
        recompute: Caller | None = None,
        again: str = "",
        eps: float = EPS,
    ) -> None:
        super().__init__()
        self.run_block, self.run_attention, self.run_feed_forward = (
            recompute if recompute is not None and part == again else _run for part in PARTS
        )
        self.attention_norm = RMSNorm(hidden_size, eps=eps)
        self.attention = attention
        self.mlp_norm = RMSNorm(hidden_size, eps=eps)
        self.mlp = mlp

    def reset_parameters(self) -> None:
        """Initialise all weights randomly."""
        # in the order of construction, so that the same seed gives the same weights
        for part in (self.mlp, self.attention, self.attention_norm, self.mlp_norm):
            reset(part)

    def forward(
        self,
        x_BSD: Tensor,
        mask_BS: Tensor | None = None,
        documents: Documents | None = None,
        codes_BS: Tensor | None = None,
        passed: PassedLogits | None = None,
    ) -> Tensor:
        return self.run_block(self._whole, x_BSD, mask_BS, documents, codes_BS, passed)

    def _whole(
        self,
        x_BSD: Tensor,
        mask_BS: Tensor | None,
        documents: Documents | None,
        codes_BS: Tensor | None,
        passed: PassedLogits | None,
    ) -> Tensor:
        x_BSD = x_BSD + self.run_attention(self._attend, x_BSD, documents)
        return x_BSD + self.run_feed_forward(self._feed_forward, x_BSD, mask_BS, codes_BS, passed)

    def _attend(self, x_BSD: Tensor, documents: Documents | None) -> Tensor:
        return self.attention(self.attention_norm(x_BSD), documents)

    def _feed_forward(
        self, x_BSD: Tensor, mask_BS: Tensor | None, codes_BS: Tensor | None, passed: PassedLogits | None
    ) -> Tensor:
        x_BSD = self.mlp_norm(x_BSD)
        if not isinstance(self.mlp, MoE):
            return self.mlp(x_BSD, mask_BS)
        given = {} if passed is None else {"passed": passed}
        return self.mlp(x_BSD, mask_BS, codes_BS, **given)


class Decoder(nn.Module):
    """A decoder language model that maps token ids int64 [B, S] to logits [B, S, V].

    ``mask`` [B, S], True where a token is valid, is passed to the feed-forwards. ``starts`` int64 [B, S] packs several
    documents into a sequence: it is the position at which each position's document starts, see
    :func:`.documents.document_starts`, and no position attends to another document. ``codes`` int64 [B, S] are the
    numbers that routers read: tasks for ``gate="task"``; token ids for ``gate="hash"``, by default those of ``x``. Like
    the mask, they have the S of the hidden states.

    Block i (from 0) has an MoE feed-forward if ``i >= dense_layers`` and ``(i + 1) % moe_every == 0``; with
    ``moe_every=0`` no block has one.

    A pipeline stage is a copy with only some of the embedding, blocks and head. Without the embedding its input is
    hidden states; without the head its output is hidden states. With ``tie_embeddings``, embedding and head are one
    weight. ``norm_head`` divides each row of the head's weight by its length.
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
        dense_layers: int = 0,
        attention: AttentionConfig | None = None,
        recompute_blocks: bool = False,
        recompute_how: RecomputeConfig | None = None,
        norm_eps: float = EPS,
        tie_embeddings: bool = False,
        norm_head: bool = False,
    ) -> None:
        super().__init__()
        moe = replace(moe, router=in_decoder(moe.router, vocab_size))
        hidden, attention, how = moe.hidden_size, attention or AttentionConfig(), recompute_how or RecomputeConfig()
        seed = draw_seed()
        again = partial(recompute, keep_exchanges=how.keep_exchanges)
        with seeded(seed):  # the values that are drawn here are not used
            self.embedding: nn.Module | None = nn.Embedding(vocab_size, hidden)
            self.blocks = nn.ModuleDict()
            for i in range(num_layers):
                is_moe = i >= dense_layers and moe_every > 0 and (i + 1) % moe_every == 0
                mlp = MoE(moe) if is_moe else SwiGLU(hidden, intermediate_size, moe.init_std)
                part = how.part if recompute_blocks and (how.layers is None or i < how.layers) else ""
                attend = ATTENTION[attention.kind](hidden, num_heads, seq_len, attention, norm_eps)
                if (window := attention.window_of(i)) is not None:
                    attend.see_only(window)
                self.blocks[str(i)] = Block(attend, mlp, hidden, again, part, norm_eps)
            self.norm: nn.Module | None = RMSNorm(hidden, eps=norm_eps)
            self.head: nn.Module | None = (NormHead if norm_head else nn.Linear)(hidden, vocab_size, bias=False)
        if tie_embeddings:
            self.head.weight = self.embedding.weight
        self.hidden_size, self.vocab_size = hidden, vocab_size
        #: whether the backward pass recomputes any activations
        self.recomputes = recompute_blocks
        self.init_std, self.num_layers = moe.init_std, num_layers
        self.serve_routers(moe.router.gate)
        self._initialise(seed)

    def serve_routers(self, gate: str) -> None:
        """Give MoE layers with this gate what their routers read. All of a decoder's MoE layers must have the same.

        Raises ValueError if it has others.
        """
        for layer in self.moe_layers():
            other = layer.config.router.gate
            require(gate == other, "moe.router.gate", gate, f"the decoder's other MoE layers have {other!r}; use it")
        #: whether the routers read token ids
        self.routes_by_token = gate == "hash"
        #: whether each MoE layer's logits go to the next one
        self.passes_logits = gate == "residual"

    def reset_parameters(self) -> None:
        """Initialise all weights randomly. The same seed gives the same weights as a new model.

        A pipeline stage gets the whole model's weights, and a rank with a part of a sharded weight draws little more
        than that part. For a model created on the meta device: after ``to_empty``, call this once on the whole model or
        stage, with the same seed on all ranks. Calling each submodule's own ``reset_parameters`` instead would leave
        torch's default initialisation in the linear layers.
        """
        self._initialise(draw_seed())

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        starts: Tensor | None = None,
        codes: Tensor | None = None,
    ) -> Tensor:
        x = self.hidden(x, mask, starts, codes)
        return x if self.head is None else self.logits(x)

    def hidden(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        starts: Tensor | None = None,
        codes: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden states after the last block."""
        documents = None if starts is None else Documents(starts)
        if self.embedding is not None:
            if codes is None and self.routes_by_token:
                codes = x
            x = self.embedding(x)
        passed = PassedLogits() if self.passes_logits else None
        for block in self.blocks.values():
            x = block(x, mask, documents, codes, passed)
            passed = passed and passed.next()
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits for hidden states after the last block."""
        assert self.norm is not None and self.head is not None
        return self.head(self.norm(x))

    def moe_layers(self) -> list[MoE]:
        """Return the MoE layers in order."""
        return list(numbered_moe_layers([self]).values())

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        named = {f"blocks.{name}": block for name, block in self.blocks.items()}
        ends = {"embedding": self.embedding, "norm": self.norm, "head": self.head}
        for name, part in (named | ends).items():
            if part is None:
                continue
            with seeded(seed + zlib.crc32(name.encode())):  # whatever other parts this stage has
                reset(part)
                for module in part.modules():
                    if isinstance(module, (nn.Linear, nn.Embedding)):
                        fill_normal(module.weight, self.init_std)
                    if isinstance(module, nn.Linear) and module.bias is not None:
                        module.bias.zero_()
            # as in GPT-2, scale down the 2 * num_layers projections that add to the residual stream
            for path, weight in part.named_parameters():
                if path.endswith(("out_proj.weight", "down_proj", "down_proj.weight")):
                    weight.mul_(1.0 / math.sqrt(2 * self.num_layers))


def numbered_moe_layers(parts: Iterable[Decoder]) -> dict[int, MoE]:
    """Return the MoE layers of a decoder, or of some of its pipeline stages, keyed by block number."""
    blocks = ((int(number), block) for part in parts for number, block in part.blocks.items())
    return {number: block.mlp for number, block in blocks if isinstance(block.mlp, MoE)}


def _run(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)
