"""A model whose blocks are spread over pipeline stages."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ..model import Decoder
from ..parallel import Mesh, Share, parallelize, token_nats, vocabulary_parallel
from ..parallel.pipeline import Pipeline, split, stage_ids
from .data_parallel import DataParallel


class Pipelined(DataParallel):
    """Runs a step's micro-batches through this rank's stages, in the order of the configured schedule.

    ``model`` is the whole decoder, the same on every rank; ``shape`` [B, S] is that of a share's inputs. What a stage
    has to say about losses is empty where the last stage is not.
    """

    def __init__(
        self,
        model: Decoder,
        mesh: Mesh,
        micro_batches: int,
        shape: tuple[int, int],
        device: torch.device,
        dtype: torch.dtype | None,
        precision: Callable[[], AbstractContextManager[None]],
    ) -> None:
        degrees, axis = mesh.degrees, mesh["pp"]
        each = degrees.stages_of_rank
        parts = [split(model, axis.size * each, s) for s in stage_ids(degrees.schedule, axis.size, axis.rank, each)]
        super().__init__([parallelize(part, mesh, dtype) for part in parts], mesh, precision)
        held = shape[1] // (mesh["tp"].size if degrees.sequence_parallel else 1)
        hidden_shape = (shape[0], held, model.hidden_size)
        # autocast leaves the residual stream in fp32
        hidden_dtype = dtype if dtype is not None and degrees.data_parallel == "fsdp" else torch.float32
        self.pipeline = Pipeline(
            parts, axis, degrees.schedule, micro_batches, device, hidden_shape, hidden_dtype, shape, precision
        )

    def gradients(self, shares: list[Share], tokens: float, exact: bool = False) -> list[Tensor]:
        inputs, labels, masks = _columns(shares)
        if exact:
            self.pipeline.count(inputs, masks)
        with vocabulary_parallel(self.mesh):
            found = self.pipeline.step(inputs, labels, masks, lambda *of: token_nats(*of) / tokens)
        self.reduce_gradients()
        return [nats_BS * tokens for nats_BS in found]

    @property
    def at_once(self) -> int:
        return self.pipeline.micro_batches

    @torch.no_grad()
    def evaluate(self, shares: list[Share]) -> list[Tensor]:
        inputs, labels, _ = _columns(shares)
        with vocabulary_parallel(self.mesh):
            return self.pipeline.evaluate(inputs, labels, None, token_nats)


def _columns(shares: list[Share]) -> tuple[list[Tensor], list[Tensor], list[Tensor] | None]:
    masks = [share.mask for share in shares if share.mask is not None]
    return [share.inputs for share in shares], [share.labels for share in shares], masks or None
