"""Builds the model and the engine of a training run."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..engines import Engine, build_engine
from ..model import Decoder
from ..model.documents import document_numbers
from ..parallel import Mesh
from .config import TrainConfig
from .data import Corpus
from .optim import build_optimizer


def mixed_precision(config: TrainConfig, device: torch.device) -> AbstractContextManager[None]:
    """Return an autocast context that computes in bf16 if ``config.dtype`` is bfloat16, and else does nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.dtype == "bfloat16")


def build_model(config: TrainConfig, vocab_size: int) -> Decoder:
    """Build the complete model of ``config``. Its weights depend only on the seed, so all ranks build the same.

    Within ``torch.device("meta")`` it has no weights yet; :func:`engine_of` gives each rank its part of the same ones.
    """
    torch.manual_seed(config.seed)
    model = Decoder(
        vocab_size=vocab_size,
        seq_len=config.data.seq_len,
        num_layers=config.model.num_layers,
        num_heads=config.model.num_heads,
        intermediate_size=config.model.intermediate_size,
        moe=config.moe,
        moe_every=config.model.moe_every,
        dense_layers=config.model.dense_layers,
        attention=config.attention,
        recompute_blocks=config.model.recompute,
        recompute_how=config.recompute,
        norm_eps=config.model.norm_eps,
        tie_embeddings=config.model.tie_embeddings,
        norm_head=config.model.norm_head,
    )
    freeze(model, config.optim.frozen)
    return model


def freeze(model: nn.Module, parts: str | None) -> None:
    """Freeze the weights whose names contain one of ``parts``, separated by commas.

    Raises ValueError for a part that no name contains, and if nothing is left to train.
    """
    named = dict(model.named_parameters())
    for part in [] if parts is None else [part.strip() for part in parts.split(",")]:
        frozen = [weight for name, weight in named.items() if part in name]
        if not frozen:
            raise ValueError(f"optim.frozen={parts}: no weight's name contains {part!r}; one is {[*named][-1]}")
        for weight in frozen:
            weight.requires_grad_(False)
    if not any(weight.requires_grad for weight in named.values()):
        raise ValueError(f"optim.frozen={parts}: freezes every weight; leave some out")


@contextmanager
def one_line_for_memory(config: TrainConfig) -> Iterator[None]:
    """Within the block, turn the error that there is not enough memory into a ValueError of one line."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        reason = str(error).split("\n")[0] or "out of memory"
        if not isinstance(error, MemoryError) and "alloc" not in reason and "overflow" not in reason.lower():
            raise
        raise ValueError(
            f"model.num_layers={config.model.num_layers}, moe.hidden_size={config.moe.hidden_size}: the model does "
            f"not fit into this machine's memory ({reason}); python -m equimoe.launch.dryrun shows what it needs"
        ) from None


def documents_of(inputs_BS: Tensor, config: TrainConfig, corpus: Corpus) -> Tensor | None:
    """Return the number of each position's document [B, S] if attention stays within documents, else None."""
    if config.data.documents == "joined":
        return None
    if corpus.end_of_document is None:
        raise ValueError("data.documents='separate': the corpus does not say which id ends a document; use 'joined'")
    return document_numbers(inputs_BS, corpus.end_of_document)


def check_backend(backend: str, device: torch.device) -> None:
    """Raise ``ValueError`` if the kernels of ``backend`` cannot run on ``device``."""
    if backend != "triton":
        return
    where = f"moe.backend={backend!r}"
    if importlib.util.find_spec("triton") is None:
        raise ValueError(f"{where}: package triton is not installed; install it, or use 'auto'")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"{where}: this run has no GPU; use 'auto' or 'torch'")


def engine_of(
    config: TrainConfig, model: Decoder, mesh: Mesh | None, device: torch.device, micro_batches: int
) -> Engine:
    check_backend(config.moe.backend, device)

    def optimizer(trainable: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        return build_optimizer(trainable, config.optim)

    shared: dict[str, Any] = {
        "max_norm": config.optim.grad_clip,
        "device": device,
        "precision": partial(mixed_precision, config, device),
    }
    torch.manual_seed(config.seed)  # for a model that has no weights yet
    if config.engine == "torch":
        dtype = torch.bfloat16 if config.dtype == "bfloat16" else None
        shape = (config.data.micro_batch, config.data.seq_len)
        return build_engine(
            model,
            mesh,
            optimizer,
            shape=shape,
            dtype=dtype,
            micro_batches=micro_batches,
            placement=config.placement,
            **shared,
        )
    try:
        if config.engine == "megatron":
            from ..engines.megatron import build_megatron_engine
        else:
            from ..engines.deepspeed import build_deepspeed_engine
    except ImportError as error:  # it names the extra to install
        raise ValueError(f"engine={config.engine!r}: cannot be imported: {error}") from None
    if config.engine == "megatron":
        sharded = config.megatron.distributed_optimizer
        return build_megatron_engine(model, mesh, optimizer, distributed_optimizer=sharded, **shared)
    settings = config.deepspeed.settings()
    stage, micro_batch = config.deepspeed.zero_stage, config.data.micro_batch
    return build_deepspeed_engine(
        model,
        mesh,
        optimizer,
        zero_stage=stage,
        settings=settings,
        micro_batch=micro_batch,
        micro_batches=micro_batches,
        **shared,
    )
