"""Divides the channels of a dense model's feed-forwards among domains (Read-ME, arXiv 2410.19123).

Each domain keeps the channels that are most active on its text. Channels that all domains keep become the shared
expert, the others of a domain become its expert. Channels that no domain keeps are left out.

N domains, L blocks, F channels of a dense feed-forward, B sequences, S tokens, E = N experts, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoint.tools import Reader
from ..config import MoEConfig, RouterConfig
from ..experts import SwiGLU
from .architecture import Architecture, canonical
from .computed import Box, Computed, FeedForwards, Kind, inner, router_row, saved, share_of
from .convert import small_files_of_new, write_first
from .hf import Weights

#: sharpness of the soft targets, weight of the hard targets, and their smoothing, as published
SHARPNESS, HARD, SMOOTHING = 10.0, 0.75, 0.5


@contextmanager
def watch_channels(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within the block, yield the magnitudes [B, S, F] of all channels in the last forward, block by block."""
    layers = [module for module in model.modules() if isinstance(module, SwiGLU)]
    seen: list[Tensor] = [torch.empty(0)] * len(layers)
    handles = []
    for number, layer in enumerate(layers):

        def hook(_: nn.Module, given: tuple[Tensor, ...], number: int = number) -> None:
            seen[number] = given[0].detach().abs()

        handles.append(layer.down_proj.register_forward_pre_hook(hook))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def mean_activity(model: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """Return each channel's mean magnitude over token ids [B, S], fp64 [L, F]."""
    total, tokens = torch.zeros(()), 0
    with watch_channels(model) as seen:
        for ids_BS in batches:
            model(ids_BS)
            total = total + torch.stack([found.double().flatten(0, 1).sum(0) for found in seen])
            tokens += ids_BS.numel()
    return total / tokens


def domain_masks(activity_NLF: Tensor, keep: float) -> Tensor:
    """Return which channels each domain keeps in each block: the share ``keep`` with the highest activity."""
    count = share_of(keep, activity_NLF.shape[-1]) if 0 < keep <= 1 else 0
    if not count:
        raise ValueError(f"--keep-channels={keep}: must be at most 1, and at least one channel; 0.5 is usual")
    best = activity_NLF.topk(count, dim=-1).indices
    return torch.zeros_like(activity_NLF, dtype=torch.bool).scatter_(-1, best, True)


def divided(dense: Architecture, masks_NLF: Tensor, top_k: int) -> Architecture:
    """Return the architecture of the divided model. Experts are as wide as the widest in any block."""
    if dense.intermediate_size is None or any(map(dense.is_moe, range(dense.num_layers))):
        raise ValueError("has MoE layers already; give a model whose feed-forwards are all dense")
    domains = len(masks_NLF)
    if domains < 2:
        raise ValueError(f"{domains} domain: text of at least two domains is needed, such as a folder with folders")
    if not 1 <= top_k <= domains:
        raise ValueError(f"--top-k={top_k}: must be between 1 and the number of domains, {domains}")
    common_LF = masks_NLF.all(0)
    width = max(1, int((masks_NLF & ~common_LF).sum(-1).max()))
    moe = MoEConfig(
        dense.moe.hidden_size,
        width,
        domains,
        top_k,
        RouterConfig(normalize_weights=top_k > 1),
        shared_intermediate_size=int(common_LF.sum(-1).max()),
    )
    return canonical(replace(dense, moe=moe, moe_every=1, dense_layers=0, expert_bias=False))


def divide(
    source: Weights, masks_NLF: Tensor, out: Path, top_k: int = 2, seed: int = 0, files: int | None = None
) -> Path:
    """Write the divided model as a checkpoint of step 0 in folder ``out``; return its path."""
    model = divided(source.architecture, masks_NLF, top_k)
    with source.reader() as reader:
        values = Divided(reader, masks_NLF, model, seed)
        return write_first(
            values, values.wanted, model, out, files, str(source.path), small_files_of_new(source, model)
        )


class Divided(Computed):
    """The tensors of the divided model. Narrower experts than the widest are filled with zeros."""

    def __init__(self, reader: Reader, masks_NLF: Tensor, model: Architecture, seed: int) -> None:
        self.dense, self.reader, self.masks_NLF = FeedForwards([reader]), reader, masks_NLF
        self.common_LF, self.moe, self.seed = masks_NLF.all(0), model.moe, seed
        moe = model.moe
        experts, hidden, width, common = (
            moe.num_experts,
            moe.hidden_size,
            moe.intermediate_size,
            moe.shared_intermediate_size,
        )
        shapes: dict[str, Box] = {
            "router.weight": (experts, hidden),
            "experts.gate_up_proj": (experts, 2 * width, hidden),
            "experts.down_proj": (experts, hidden, width),
        }
        if common:
            shapes |= {f"shared.mlp.{kind}_proj.weight": (common, hidden) for kind in ("gate", "up")}
            shapes["shared.mlp.down_proj.weight"] = (hidden, common)
        self.wanted = {name: saved(entry.shape) for name, entry in reader.saved.items() if ".mlp." not in name}
        #: name of a tensor of an MoE layer -> what it is, and its block
        self.made: dict[str, tuple[str, int]] = {}
        for block in range(model.num_layers):
            for leaf, shape in shapes.items():
                self.wanted[self._prefix(block) + leaf] = saved(shape)
                self.made[self._prefix(block) + leaf] = leaf, block

    def box(self, name: str, offsets: Box, sizes: Box) -> Tensor:
        if name not in self.made:
            return self.reader.box(name, offsets, sizes).float()
        leaf, block = self.made[name]
        if leaf.startswith("shared."):
            kind: Kind = "gate" if "gate_proj" in leaf else "up" if "up_proj" in leaf else "down"
            found = self._picked(kind, block, self.common_LF[block], self.moe.shared_intermediate_size)
            return found[inner(offsets, sizes)]
        part = inner(offsets[1:], sizes[1:])
        return torch.stack([self._of_expert(leaf, block, e)[part] for e in range(offsets[0], offsets[0] + sizes[0])])

    def _of_expert(self, leaf: str, block: int, expert: int) -> Tensor:
        if leaf == "router.weight":
            return router_row(self.seed, self._prefix(block), expert, self.moe.hidden_size)
        own_F = self.masks_NLF[expert, block] & ~self.common_LF[block]
        kinds: tuple[Kind, ...] = ("gate", "up") if leaf == "experts.gate_up_proj" else ("down",)
        return torch.cat([self._picked(kind, block, own_F, self.moe.intermediate_size) for kind in kinds])

    def _picked(self, kind: Kind, block: int, chosen_F: Tensor, width: int) -> Tensor:
        """Return the chosen channels of a dense matrix, and zeros up to ``width`` channels."""
        matrix, missing = self.dense.matrix(kind, self._prefix(block)), width - int(chosen_F.sum())
        if kind == "down":
            return F.pad(matrix[:, chosen_F], (0, missing))
        return F.pad(matrix[chosen_F], (0, 0, 0, missing))

    @staticmethod
    def _prefix(block: int) -> str:
        return f"model.blocks.{block}.mlp."


def soft_targets(magnitudes: list[Tensor], masks_NLF: Tensor) -> Tensor:
    """Return how well the channels of each domain suit each token, as probabilities [B, S, N].

    ``magnitudes`` are those of :func:`watch_channels` in a forward of the dense model.
    """
    magnitude_BSX, mask_NX = torch.cat(magnitudes, dim=-1), masks_NLF.flatten(1)
    share_BSN = magnitude_BSX @ mask_NX.T.to(magnitude_BSX.dtype) / magnitude_BSX.sum(-1, keepdim=True)
    return (SHARPNESS * (share_BSN - share_BSN.mean(-1, keepdim=True))).softmax(-1)


def distillation_loss(logits_BSN: Tensor, domain_B: Tensor, targets_BSN: Tensor) -> Tensor:
    """Return the loss with which a router of all layers learns the domains and the soft targets."""
    logits_TN, length = logits_BSN.flatten(0, 1), logits_BSN.shape[1]
    hard = F.cross_entropy(logits_TN, domain_B.repeat_interleave(length), label_smoothing=SMOOTHING)
    return HARD * hard + (1 - HARD) * F.cross_entropy(logits_TN, targets_BSN.flatten(0, 1))
