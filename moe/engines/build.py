"""Builds the engine for a model and a mesh."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..balance import Step
from ..collectives import Axis, private_axis, world_axis
from ..config import PlacementConfig
from ..layer import MoE
from ..model import Decoder
from ..parallel import LossFunction, Mesh, check_alike, model_has_values, parallelize, token_losses
from ..parallel.stages import split, stage_ids
from ..parallel.tied import check_stages, materialize, tied_weights
from .balance import StepBalance
from .base import OptimizerFactory
from .experts import ExpertPlacement
from .main_grads import accumulating
from .reduce import Reducer, reduction_axes
from .runners import Precision, Runner, Stages, WholeModel
from .torch import TorchEngine

if TYPE_CHECKING:
    from ..parallel.pipeline import Pipeline


def build_engine(
    model: nn.Module,
    mesh: Mesh | None,
    optimizer: OptimizerFactory,
    *,
    loss: LossFunction = token_losses,
    max_norm: float = 0.0,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    precision: Precision = nullcontext,
    micro_batches: int = 1,
    shape: tuple[int, int] | None = None,
    placement: PlacementConfig | None = None,
) -> TorchEngine:
    """Split ``model`` over ``mesh`` and build the engine that trains it. Every rank must call this.

    * ``model``: the whole model, with the same weights on every rank (else ValueError), on ``device``. It is called
      with a batch's inputs, and with its mask if there is one. If it is on the meta device, each rank builds only its
      own part on ``device``, by the model's ``reset_parameters``; torch's random generator must be seeded alike.
    * ``optimizer``: makes the optimizer from the trainable parameters by name.
    * ``loss``: maps the model's outputs and the labels to the loss of each position.
    * ``max_norm``: gradients are clipped to this norm; 0 does not clip.
    * ``dtype``: FSDP2's compute dtype. ``precision``: returns the context of every forward (autocast).
    * ``micro_batches``, ``shape``: micro-batches per step, and the shape [B, S] of one before its sequences are split.
      Only a pipeline needs them.
    * ``placement``: how experts are replicated under ``parallel.experts="fssdp"``.
    """
    device = device or next(model.parameters()).device
    exact = any(m.config.balance.estimator == "exact" for m in model.modules() if isinstance(m, MoE))
    world = world_axis()
    if mesh is None and world.size > 1:
        raise ValueError(f"mesh=None: {world.size} ranks would train separate models; pass build_mesh(...)")
    check_alike(model, world)
    parts: list[nn.Module] = [model]
    layers = {name: m.config.num_experts for name, m in model.named_modules() if isinstance(m, MoE)}
    if mesh is not None:
        whole = [model] if mesh.degrees.pp == 1 else _stages(model, mesh)
        parts = [parallelize(part, mesh, dtype, reduced=True) for part in whole]
    if all(parameter.is_meta for parameter in model.parameters()):
        materialize(parts, device)
    parameters = {name: p for part in parts for name, p in part.named_parameters()}
    axes = reduction_axes(parts, parameters, mesh)
    experts = _placement(parts, layers, mesh, placement or PlacementConfig(), dtype)
    if all(model_has_values(part) for part in parts):
        # buckets get their own groups: ranks may start exchanges and buckets of a backward in different orders
        own = {axis.name: private_axis(axis) for axis in _distinct(axes)}
        axes = {name: own[axis.name] for name, axis in axes.items()}
    reducer = Reducer(parameters, axes)
    runner: Runner
    if mesh is not None and mesh.degrees.pp > 1:
        assert isinstance(model, Decoder)
        pipeline = _pipeline(model, parts, mesh, micro_batches, shape, device, dtype, precision)  # type: ignore[arg-type]
        runner, steps = Stages(pipeline, mesh, loss, reducer), pipeline.steps
    else:
        main_grads = accumulating(parts, parameters, set(axes), mesh)
        runner, steps = WholeModel(parts[0], mesh, loss, precision, reducer, main_grads), [Step.of(parts[0])]
    return TorchEngine(
        parts, parameters, mesh, runner, reducer, StepBalance(steps, exact), experts, optimizer, device, max_norm
    )


def _placement(
    parts: list[nn.Module],
    whole: dict[str, int],
    mesh: Mesh | None,
    config: PlacementConfig,
    dtype: torch.dtype | None,
) -> ExpertPlacement:
    layers = {name: m for part in parts for name, m in part.named_modules() if isinstance(m, MoE)}
    if mesh is None or mesh.degrees.experts != "fssdp":
        return ExpertPlacement({}, config)
    return ExpertPlacement(layers, config, mesh["ep"], mesh["stage"], dtype, whole)


def _distinct(axes: dict[str, Axis]) -> list[Axis]:
    return list({axis.name: axis for axis in axes.values()}.values())


def _stages(model: nn.Module, mesh: Mesh) -> list[Decoder]:
    """Return this rank's pipeline stages of a decoder."""
    if not isinstance(model, Decoder):
        found = type(model).__name__
        raise ValueError(f"parallel.pp: can split only a Decoder, not {found}; set parallel.pp=1")
    degrees, axis = mesh.degrees, mesh["pp"]
    number = axis.size * degrees.stages_of_rank
    if tied := tied_weights(model):
        check_stages(tied, [split(model, number, s) for s in range(number)])
    return [split(model, number, s) for s in stage_ids(degrees.schedule, axis.size, axis.rank, degrees.stages_of_rank)]


def _pipeline(
    model: Decoder,
    stages: list[Decoder],
    mesh: Mesh,
    micro_batches: int,
    shape: tuple[int, int] | None,
    device: torch.device,
    dtype: torch.dtype | None,
    precision: Precision,
) -> Pipeline:
    if shape is None:
        raise ValueError("shape=None: a pipeline needs it; pass the shape [B, S] of a micro-batch")
    from ..parallel.pipeline import Pipeline  # imported late, because torch's schedules are slow to import

    degrees = mesh.degrees
    inputs_shape = (shape[0], shape[1] // mesh["cp"].size)
    held = inputs_shape[1] // (mesh["tp"].size if degrees.sequence_parallel else 1)
    # autocast leaves the residual stream in fp32
    hidden_dtype = dtype if dtype is not None and degrees.data_parallel == "fsdp" else next(model.parameters()).dtype
    hidden_shape = (shape[0], held, model.hidden_size)
    return Pipeline(
        stages,
        mesh["pp"],
        degrees.schedule,
        micro_batches,
        device,
        hidden_shape,
        hidden_dtype,
        inputs_shape,
        precision,
    )
