"""Small models of Megatron-Core that contain MoE layers, and their training.

S positions, B sequences, M micro-batches, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor, nn

from equimoe.moe import counting_pass
from equimoe.moe.engines.megatron import moe_layer_spec

from .megatron_cpu import megatron_on_cpu
from .megatron_tensors import Whole, assert_equal, fill, joined, moment, parts

D, E, S, VOCAB = 16, 4, 8, 32
_SIZES = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
}
_BF16 = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
#: name of a loss -> its values by layer
Logged = dict[str, Tensor]


class Norm(nn.Module):
    """An RMSNorm for sequence parallelism, which Megatron-Core refuses for torch's."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.float().square().mean(-1, keepdim=True) + self.eps).rsqrt().to(x.dtype) * self.weight


class Layers(nn.Module):
    """MoE layers without attention, which context parallelism needs a GPU for. Maps [S, B, D] to the same shape."""

    def __init__(self, config: TransformerConfig, spec: ModuleSpec) -> None:
        super().__init__()
        self.config, self.vp_stage, self.model_type = config, None, ModelType.encoder_or_decoder
        self.layers = nn.ModuleList(build_module(spec, config=config) for _ in range(config.num_layers))
        for number, layer in enumerate(self.layers, 1):
            layer.set_layer_number(number)

    def set_input_tensor(self, tensor: Any) -> None:
        """Called by Megatron-Core's schedules."""

    def forward(self, x_SBD: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x_SBD = x_SBD + layer(x_SBD, padding_mask=padding_mask)[0]
        return x_SBD

    def sharded_state_dict(self, metadata: dict[str, Any] | None = None) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for number, layer in enumerate(self.layers):
            found |= layer.sharded_state_dict(f"layers.{number}.", metadata=metadata)
        return found


@contextmanager
def megatron(**sizes: Any) -> Iterator[None]:
    """Context with initialised process groups of these sizes."""
    sizes = {name: size for name, size in (_SIZES | sizes).items() if name in _SIZES}
    with megatron_on_cpu():
        MoEAuxLossAutoScaler.main_loss_backward_scale = None
        moe_utils.get_moe_layer_wise_logging_tracker().clear()
        parallel_state.initialize_model_parallel(**sizes)
        try:
            model_parallel_cuda_manual_seed(1, force_reset_rng=True)
            torch.manual_seed(0)
            yield
        finally:
            parallel_state.destroy_model_parallel()
            MoEAuxLossAutoScaler.main_loss_backward_scale = None


def device() -> torch.device:
    """Return this rank's device: the CPU where there is no GPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def config_of(**how: Any) -> TransformerConfig:
    """Return a small config; ``how`` overrides fields."""
    fields: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": D,
        "num_attention_heads": 2,
        "ffn_hidden_size": 2 * D,
        "num_moe_experts": E,
        "moe_ffn_hidden_size": 24,
        "moe_router_topk": 2,
        "moe_router_pre_softmax": True,
        "moe_router_load_balancing_type": "global_aux_loss",
        "moe_aux_loss_coeff": 0.1,
        "moe_token_dispatcher_type": "alltoall",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "normalization": "RMSNorm",
        "persist_layer_norm": False,
        "bias_activation_fusion": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": device().type == "cpu",
        "init_method_std": 0.3,
        "pipeline_dtype": torch.float32,
        "batch_p2p_comm": False,
        "attention_softmax_in_fp32": True,
        "finalize_model_grads_func": finalize_model_grads,
    }
    return TransformerConfig(**(fields | _SIZES | how))


def chunks_of(
    config: TransformerConfig, spec: ModuleSpec | None = None, alone: bool = False, engine: bool = False
) -> list[nn.Module]:
    """Build this rank's parts of a model; ``spec`` is that of the MoE layer, None: Megatron-Core's own.

    ``engine``: the other layers are those of TransformerEngine.
    """
    norm: Any = Norm
    if engine:
        from megatron.core.extensions.transformer_engine import TENorm as norm  # noqa: N813

        layer = get_gpt_layer_with_transformer_engine_spec(num_experts=config.num_moe_experts)
    else:
        layer = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, normalization="RMSNorm")
    if alone:
        return [Layers(config, spec or layer.submodules.mlp)]
    layer.submodules.mlp = spec or layer.submodules.mlp
    if not engine:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
        # the norm before experts keeps its name, as with TransformerEngine
        layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")
    virtual = config.virtual_pipeline_model_parallel_size
    each = config.num_layers // config.pipeline_model_parallel_size // (virtual or 1)
    chunks = []
    for stage in range(virtual or 1):
        place = {"vp_stage": stage if virtual else None, "ignore_virtual": False}
        model = GPTModel(
            config,
            TransformerBlockSubmodules([layer] * each, layer_norm=norm),
            vocab_size=VOCAB,
            max_sequence_length=S,
            pre_process=parallel_state.is_pipeline_first_stage(**place),
            post_process=parallel_state.is_pipeline_last_stage(**place),
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
            vp_stage=place["vp_stage"],
        )
        chunks.append(model.to(device()))
    return chunks


def sequences(step: int, number: int = 4) -> Tensor:
    """Return the token ids of a step, [number, S + 1]."""
    return torch.randint(0, VOCAB, (number, S + 1), generator=torch.Generator().manual_seed(step))


def forward_step(iterator: Iterator[Tensor], model: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
    """Run a micro-batch. Reports the numerator and denominator of the mean loss."""
    ids_BS = next(iterator).to(device())
    positions = torch.arange(S, device=device())[None].expand(len(ids_BS), -1)
    out = model(ids_BS[:, :-1], positions, None, labels=ids_BS[:, 1:])

    def loss(losses_BS: Tensor) -> tuple[Tensor, Tensor]:
        mean = losses_BS.float().mean()
        return mean, torch.stack((mean.detach(), torch.ones_like(mean)))

    return out, loss


def lengths(ids_BS: Tensor) -> Tensor:
    """Return the number of valid positions of each sequence, 3 to 7."""
    return 3 + ids_BS[:, 0] % 5


def embeddings() -> Tensor:
    """Return the inputs of :class:`Layers` for each token id, [VOCAB, D]."""
    return torch.randn(VOCAB, D, generator=torch.Generator().manual_seed(9))


def forward_layers(padded: bool, iterator: Iterator[Tensor], model: Any) -> tuple[Tensor, Callable[..., Any]]:
    """Run a micro-batch through :class:`Layers`. ``padded``: only some positions of each sequence are valid."""
    ids_BS = next(iterator)[:, :S]
    table = embeddings()
    valid_BS = torch.arange(S) < lengths(ids_BS)[:, None] if padded else torch.ones_like(ids_BS, dtype=torch.bool)
    ranks, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    x_SBD, own_BS = table[ids_BS].transpose(0, 1).chunk(ranks)[rank], valid_BS.chunk(ranks, 1)[rank]
    x_SBD = x_SBD.contiguous().to(get_attr_wrapped_model(model, "config").params_dtype).requires_grad_()
    out = model(x_SBD, padding_mask=~own_BS if padded else None)
    losses_SB = (out.float() - x_SBD.detach().flip(-1)).square().mean(-1) * own_BS.T

    def loss(_: Tensor) -> tuple[Tensor, ...]:
        total = losses_SB.sum()
        if get_attr_wrapped_model(model, "config").calculate_per_token_loss:
            return total, own_BS.sum().int(), torch.stack((total.detach(), own_BS.sum()))
        mean = total / valid_BS.sum()
        return mean, torch.stack((mean.detach(), torch.tensor(1 / ranks)))

    return losses_SB.sum(), loss


class Trainer:
    """Chunks of a model with Megatron-Core's DDP, optimizer and schedule."""

    def __init__(
        self,
        chunks: list[nn.Module],
        forward: Callable[..., Any] = forward_step,
        micro_batches: int = 2,
        exact: bool = True,
        distributed_optimizer: bool = False,
        bf16: bool = False,
        fp16: bool = False,
    ) -> None:
        self.chunks, self.forward, self.micro_batches, self.exact = chunks, forward, micro_batches, exact
        self.config: TransformerConfig = chunks[0].config  # type: ignore[assignment]
        half = bf16 or fp16
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=distributed_optimizer, grad_reduce_in_fp32=half)
        wrapped = [Float16Module(self.config, chunk) for chunk in chunks] if half else chunks
        self.ddp = [
            DistributedDataParallel(self.config, ddp, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(wrapped)
        ]
        options = OptimizerConfig(
            optimizer="adam",
            lr=1e-2,
            weight_decay=0.1,
            clip_grad=1.0,
            bf16=bf16,
            fp16=fp16,
            initial_loss_scale=1024.0,
            hysteresis=1,
            params_dtype=self.config.params_dtype,
            use_distributed_optimizer=distributed_optimizer,
        )
        self.optimizer = get_megatron_optimizer(options, self.ddp)
        if fp16:
            self.config.grad_scale_func = self.optimizer.scale_loss

    def schedule(self, mine: Tensor, forward_only: bool = False) -> list[Tensor]:
        """Run micro-batches [M, B, S + 1], and return the losses on the last stage."""
        several = len(self.ddp) > 1
        return get_forward_backward_func()(
            forward_step_func=self.forward,
            data_iterator=[iter(mine) for _ in self.ddp] if several else iter(mine),
            model=self.ddp if several else self.ddp[0],
            num_microbatches=len(mine),
            seq_length=S,
            micro_batch_size=mine.shape[1],
            forward_only=forward_only,
        )

    def backward(self, step: int) -> list[Tensor]:
        """Compute a step's gradients, and return the losses on the last stage."""
        for chunk in self.ddp:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        mine = self.data(step)
        if self.exact:
            with counting_pass():
                self.schedule(mine, forward_only=True)
        return self.schedule(mine)

    def data(self, step: int) -> Tensor:
        """Return this rank's micro-batches of a step, [M, B, S + 1]."""
        ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        return sequences(step)[rank::ranks].unflatten(0, (self.micro_batches, -1))

    def gradients(self) -> list[Any]:
        """Return this rank's parts of the gradients."""
        return parts(self.chunks, lambda p: getattr(p, "main_grad", None))

    def update(self) -> float:
        """Update the weights, and return the norm of the gradients."""
        return float(self.optimizer.step()[1])


def logged() -> Logged:
    """Return the losses that Megatron-Core would log, [layers] each, and forget them."""
    tracker = moe_utils.get_moe_layer_wise_logging_tracker()
    moe_utils.reduce_aux_losses_tracker_across_ranks()
    found = {name: entry["values"].clone() for name, entry in tracker.items()}
    moe_utils.clear_aux_losses_tracker()
    return found


@dataclass
class Run:
    """What one rank's training gave. ``parts`` has gradients of the first step, and the final weights and moments."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    logged: list[Logged] = field(default_factory=list)
    parts: dict[str, list[Any]] = field(default_factory=dict)


def run(
    rank: int,
    world: int,
    initial: Whole | None = None,
    *,
    router: Any = "equimoe",
    estimator: Any = "exact",
    alone: bool = False,
    padded: bool = False,
    micro_batches: int = 2,
    steps: int = 3,
    distributed_optimizer: bool = False,
    bf16: bool = False,
    engine: bool = False,
    **how: Any,
) -> Run:
    """Train a GPTModel, or ``alone`` MoE layers, from ``initial`` tensors. ``router=None``: Megatron-Core's layer."""
    with megatron(**how):
        config = config_of(**(_BF16 | how if bf16 else how))
        spec = None if router is None else moe_layer_spec(config, router=router, estimator=estimator)
        chunks = chunks_of(config, spec, alone, engine)
        if initial is not None:
            fill(chunks, initial)
        forward = partial(forward_layers, padded) if alone else forward_step
        trainer = Trainer(chunks, forward, micro_batches, estimator == "exact", distributed_optimizer, bf16)
        found = Run(parts={"initial": parts(chunks)})
        for step in range(steps):
            losses = trainer.backward(step)
            if step == 0:
                found.parts["gradients"] = trainer.gradients()
            found.logged.append(logged())
            found.norms.append(trainer.update())
            loss = torch.stack(losses).sum(0) if losses else torch.zeros(2, device=device())
            dist.all_reduce(loss, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
            dist.all_reduce(loss, group=parallel_state.get_pipeline_model_parallel_group())
            found.losses.append(float(loss[0] / loss[1]))
        found.parts["weights"] = parts(chunks)
        for name in ("exp_avg", "exp_avg_sq"):
            found.parts[name] = parts(chunks, partial(moment, trainer.optimizer, name))
        return found


def assert_same_training(runs: list[Run], wanted: list[Run], kinds: tuple[str, ...] | None = None) -> None:
    """Assert equal losses, norms and whole tensors."""
    for got in runs:
        torch.testing.assert_close(got.losses, wanted[0].losses, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got.norms, wanted[0].norms, rtol=1e-5, atol=1e-6)
    for kind in kinds or wanted[0].parts:
        found = joined([r.parts[kind] for r in runs])
        assert_equal(
            found, joined([r.parts[kind] for r in wanted]), rtol=5e-4 if kind == "weights" else 1e-4, atol=2e-6
        )
