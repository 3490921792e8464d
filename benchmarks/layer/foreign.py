"""Contestants that call other projects' kernels through their published interfaces.

They are imported if installed, or from the checkouts that ``--peer NAME=PATH`` names. For a NAME that is not listed
here, PATH is a Python file whose ``build(shape, gate_up, down)`` returns ``run(x_TD, weights_TK, ids_TK)``.
"""

# T tokens, D hidden, F expert width, E experts, K top-k, R = T*K routed rows.

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.layer.peers import Absent, Contestant
from benchmarks.shared.shapes import Shape

#: with more experts, an eager loop takes minutes, because it pads each expert's gradient to all experts
_MOST_EAGER = 8


def _needs_cuda(gate_up: Tensor, what: str) -> None:
    if gate_up.device.type != "cuda":
        raise Absent(f"{what} runs on CUDA only")


def build_liger(shape: Shape, gate_up: nn.Parameter, down: nn.Parameter) -> Contestant:
    """Call Liger-Kernel's LigerFusedMoEFunction: int32 ids, weights in the activations' dtype."""
    _needs_cuda(gate_up, "Liger-Kernel")
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    def run(x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        return LigerFusedMoEFunction.apply(x_TD, gate_up, down, ids_TK.int(), weights_TK.to(x_TD.dtype))

    return Contestant(run, (gate_up, down))


def build_scattermoe(shape: Shape, gate_up: nn.Parameter, down: nn.Parameter) -> Contestant:
    """Call ScatterMoE's parallel_linear twice, as its GLUMLP does. (GLUMLP itself activates the second half.)"""
    _needs_cuda(gate_up, "ScatterMoE")
    from scattermoe import flatten_sort_count, parallel_linear

    def run(x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        experts_R, flat_R, ends_E = flatten_sort_count(ids_TK, num_experts=shape.E)
        order = (experts_R, flat_R, ends_E)
        pre_RF = parallel_linear(x_TD, gate_up.permute(0, 2, 1), shape.K, *order, grouped_out=True)
        gate, up = pre_RF.chunk(2, dim=-1)
        gates_TK = weights_TK.to(x_TD.dtype)
        return parallel_linear(F.silu(gate) * up, down.permute(0, 2, 1), 1, *order, grouped_in=True, gates=gates_TK)

    return Contestant(run, (gate_up, down))


def build_sonicmoe(shape: Shape, gate_up: nn.Parameter, down: nn.Parameter) -> Contestant:
    """Call SonicMoE's moe_general_routing_inputs. Versions without ``concat_layout`` alternate gate and up rows."""
    _needs_cuda(gate_up, "SonicMoE")
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    options = inspect.signature(moe_general_routing_inputs).parameters
    concatenated = "concat_layout" in options
    layout = {"concat_layout": True} if concatenated else {}
    first = gate_up
    if not concatenated:
        by_turns = gate_up.detach().view(shape.E, 2, shape.F, shape.D).transpose(1, 2).flatten(1, 2)
        first = nn.Parameter(by_turns.contiguous())
    stream = torch.cuda.current_stream().cuda_stream

    def run(x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        tokens_R = torch.arange(shape.T, device=x_TD.device, dtype=torch.int32).repeat_interleave(shape.K)
        y_TD, _ = moe_general_routing_inputs(
            x_TD, weights_TK.reshape(-1), tokens_R, ids_TK.reshape(-1).int(), first.permute(1, 2, 0), None,
            down.permute(1, 2, 0), None, shape.E, stream, ActivationType.SWIGLU, False, **layout,
        )  # fmt: skip
        return y_TD

    def restore(grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        dfirst, ddown = grads
        if not concatenated:
            dfirst = dfirst.view(shape.E, shape.F, 2, shape.D).transpose(1, 2).flatten(1, 2)
        return dfirst, ddown

    return Contestant(run, (first, down), restore)


def build_transformers(shape: Shape, gate_up: nn.Parameter, down: nn.Parameter, implementation: str) -> Contestant:
    """Call the experts of Hugging Face's Qwen3-MoE with one value of ``experts_implementation``."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    if implementation == "eager" and shape.E > _MOST_EAGER:
        raise Absent(f"its backward pads every expert's gradient to all experts, so it runs up to {_MOST_EAGER} only")
    if implementation == "sonicmoe":
        from transformers.integrations.sonicmoe import is_sonicmoe_loadable

        is_sonicmoe_loadable(raise_error=True)
    config = Qwen3MoeConfig(
        hidden_size=shape.D, moe_intermediate_size=shape.F, num_experts=shape.E, num_experts_per_tok=shape.K
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    experts.gate_up_proj, experts.down_proj = gate_up, down

    def run(x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        return experts(x_TD, ids_TK, weights_TK.to(x_TD.dtype))

    return Contestant(run, (gate_up, down))


def build_transformer_engine(shape: Shape, gate_up: nn.Parameter, down: nn.Parameter) -> Contestant:
    """Call two of Transformer Engine's GroupedLinear between its permutations. They need row counts on the host."""
    _needs_cuda(gate_up, "Transformer Engine")
    import transformer_engine.pytorch as te

    def linear(weight_EON: Tensor) -> nn.Module:
        experts, out, into = weight_EON.shape
        # on meta, because our weights replace its own
        module = te.GroupedLinear(experts, into, out, bias=False, params_dtype=weight_EON.dtype, device="meta")
        for index, weight in enumerate(weight_EON.detach()):
            setattr(module, f"weight{index}", nn.Parameter(weight))
        return module

    up_proj, down_proj = linear(gate_up), linear(down)
    leaves = tuple(getattr(m, f"weight{i}") for m in (up_proj, down_proj) for i in range(shape.E))

    def run(x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        counts = ids_TK.reshape(-1).bincount(minlength=shape.E).tolist()
        rows_RD, row_id_map = te.moe_permute(x_TD, ids_TK.int(), -1, -1, map_type="index")
        gate, up = up_proj(rows_RD, counts).chunk(2, dim=-1)
        out_RD = down_proj(F.silu(gate) * up, counts)
        return te.moe_unpermute(out_RD, row_id_map, weights_TK, map_type="index")

    def restore(grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return torch.stack(list(grads[: shape.E])), torch.stack(list(grads[shape.E :]))

    return Contestant(run, leaves, restore)


KNOWN: dict[str, Callable[..., Contestant]] = {
    "liger": build_liger,
    "scattermoe": build_scattermoe,
    "sonicmoe": build_sonicmoe,
    "transformers grouped_mm": partial(build_transformers, implementation="grouped_mm"),
    "transformers eager": partial(build_transformers, implementation="eager"),
    "transformers sonicmoe": partial(build_transformers, implementation="sonicmoe"),
    "transformer-engine": build_transformer_engine,
}
#: name -> reason, for contestants that must not run unless --only names them
ONLY_IF_NAMED = {"transformers sonicmoe": "it downloads and runs its kernel"}


def _from_file(name: str, path: Path) -> Callable[..., Contestant]:
    spec = importlib.util.spec_from_file_location(f"peer_{name}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--peer {name}={path}: give a Python file that defines build(shape, gate_up, down)")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def build(shape: Shape, gate_up: nn.Parameter, down: nn.Parameter) -> Contestant:
        return Contestant(module.build(shape, gate_up, down), (gate_up, down))

    return build


def find(given: Sequence[str]) -> dict[str, Callable[..., Contestant]]:
    """Return the builders of all known contestants and of those given as NAME=PATH."""
    builders = dict(KNOWN)
    for one in given:
        name, _, text = one.partition("=")
        path = Path(text).expanduser().resolve()
        if not name or not text or not path.exists():
            raise ValueError(f"--peer {one}: give NAME=PATH with the path of an existing checkout or Python file")
        if path.is_file():
            builders[name] = _from_file(name, path)
        elif any(known.split()[0] == name for known in KNOWN):
            sys.path.insert(0, str(path / "src" if (path / "src").is_dir() else path))
        else:
            raise ValueError(f"--peer {one}: give a Python file, or a checkout of one of {', '.join(KNOWN)}")
    return builders
