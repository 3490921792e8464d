"""Reads the MoE blocks of another library's model: their parts, and the configuration of the layer that equals them.

D hidden, E experts, F expert width.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..config import BalanceConfig, MoEConfig
from ..layer import MoE
from .adapters import Adapter


class ModelConfig(MoEConfig):
    """The configuration of a layer in a model that exists, which is computed as it is."""

    def _check_single_choice(self) -> None:
        """Do nothing: in a model with one choice and normalised weights, every gate weight is 1."""


@dataclass(frozen=True)
class Plan:
    """What becomes of a block."""

    block: nn.Module
    adapter: Adapter
    config: MoEConfig
    router: Any
    #: whether the experts keep computing with their own code
    own_experts: bool
    #: the model that gets the attention mask; None if there is none
    model: nn.Module | None
    #: the attention next to each place of the block, which several layers may share
    attentions: list[nn.Module]


def read(model: nn.Module, adapters: Mapping[Any, Adapter], balance: BalanceConfig) -> list[Plan]:
    """Return a plan for each MoE block of ``model``. ``adapters`` are found by a block's class, or its name.

    Raises ValueError if there is no block, or if one differs from what its adapter says or what a layer can do.
    """
    plans: dict[nn.Module, Plan] = {}
    unknown = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, MoE):
            raise ValueError(f"swap: {name or type(model).__name__} is a layer of this package already; call swap once")
        adapter = adapters.get(type(module), adapters.get(type(module).__name__))
        if adapter is not None:
            plan = plans[module] = plans.get(module) or _plan(model, name, module, adapter, balance)
            attention = _attention(model, name, adapter)
            if attention is not None and attention not in plan.attentions:
                plan.attentions.append(attention)
        elif "experts" in dict(module.named_children()):
            unknown.add(type(module).__name__)
    if unknown or not plans:
        what = f"the MoE block {', '.join(sorted(unknown))} of" if unknown else "no MoE block in"
        known = ", ".join(sorted(name for name in adapters if isinstance(name, str)))
        raise ValueError(
            f"swap: {what} {type(model).__name__} is known; known are {known}; describe others: "
            "adapters={TheirClass: Adapter(...)}"
        )
    return list(plans.values())


def _plan(model: nn.Module, name: str, block: Any, adapter: Adapter, balance: BalanceConfig) -> Plan:
    above = _above(model, name)
    hf = next((module.config for module in above if hasattr(module, "config")), None)
    router = _part(name, block, adapter.router)
    _refuse(name, block, adapter, balance)
    weight = getattr(router, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(
            f"swap: the router {name}.{adapter.router} ({type(router).__name__}) has no weight [E, D]; use "
            "transformers 5 without quantisation, or describe the block with an adapter"
        )
    experts, hidden = weight.shape
    top_k, routing = adapter.routing(block, hf)
    activation: Any = adapter.activation(block, hf)
    width = 1  # experts that keep their own code know their width
    if activation is not None:
        width = _width(name, block, adapter, experts, hidden)
    elif adapter.weights is None:
        _part(name, block, adapter.experts)
    config = ModelConfig(
        hidden, width, experts, top_k, router=routing, balance=balance, activation=activation or "silu"
    )
    receives = next((module for module in above[1:] if _takes_mask(module)), None)
    return Plan(block, adapter, config, router, activation is None, receives, [])


def _attention(model: nn.Module, name: str, adapter: Adapter) -> nn.Module | None:
    """Return the attention next to the block of this name."""
    above = _above(model, name)
    return getattr(above[0], adapter.attention, None) if above and adapter.attention else None


def _above(model: nn.Module, name: str) -> list[nn.Module]:
    """Return the modules that contain the module of this name, the innermost first."""
    names = name.split(".")[:-1] if name else []
    return [model.get_submodule(".".join(names[:i])) for i in range(len(names), -1, -1)] if name else []


def _takes_mask(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters
    return "attention_mask" in parameters and any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _part(name: str, block: nn.Module, part: str) -> Any:
    found = dict(block.named_children()).get(part)
    if found is None:
        raise ValueError(
            f"swap: {name} ({type(block).__name__}) has no submodule {part!r}; use transformers 5, or name the "
            "submodule in an adapter"
        )
    return found


def _refuse(name: str, block: nn.Module, adapter: Adapter, balance: BalanceConfig) -> None:
    """Raise ValueError for what the layer would not do as the block does."""
    for setting in adapter.refused:
        value = getattr(block, setting, None)
        if value:
            raise ValueError(f"{name}.{setting}={value!r}: this layer adds no noise; set it to 0 on every block")
    if balance.bias_update_rate and adapter.bias is None:
        raise ValueError(
            f"balance.bias_update_rate={balance.bias_update_rate!r}: {type(block).__name__} has no expert bias, so its "
            "state dict could not hold one; use 0"
        )
    for key in (adapter.router, adapter.experts):
        if hasattr(getattr(block, key, None), "get_base_layer"):
            raise ValueError(
                f"swap: {name}.{key} has an adapter already, which the layer would leave out; call swap before the "
                "adapters are added"
            )
    for part in (block, *block.children()):
        if "forward" in vars(part):
            raise ValueError(
                f"swap: another library has replaced the forward of {type(part).__name__} in {name}; call swap before "
                "it does, and load the model without device_map"
            )
    for key, weight in block.named_parameters():
        if hasattr(weight, "device_mesh"):
            raise ValueError(f"swap: {name}.{key} is split over ranks; load without tp_plan, and shard after swap")


def _width(name: str, block: nn.Module, adapter: Adapter, experts: int, hidden: int) -> int:
    """Return the width of the experts. Raises ValueError if their weights do not have this layer's layout."""
    if adapter.weights is not None:
        weights: Any = adapter.weights(block)
    else:
        holder = _part(name, block, adapter.experts)
        weights = [getattr(holder, key, None) for key in ("gate_up_proj", "down_proj")]
    shapes = [list(weight.shape) if isinstance(weight, Tensor) else None for weight in weights]
    width = shapes[1][-1] if shapes[1] else 0
    if shapes != [[experts, 2 * width, hidden], [experts, hidden, width]] or not weights[0].is_floating_point():
        raise ValueError(
            f"swap: the experts of {name} ({type(block).__name__}) have gate_up_proj {shapes[0]} and down_proj "
            f"{shapes[1]} instead of floating-point [{experts}, 2F, {hidden}] and [{experts}, {hidden}, F]; use "
            "transformers 5 without quantisation, or give weights= in an adapter"
        )
    return width
