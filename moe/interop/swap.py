"""Makes the MoE blocks of another library's model compute as this package's layer, in place.

A swapped block stays the same module with the same submodules, parameters, buffers and hooks; only classes change. So
state dicts, optimizers, adapters and wrappers see the names and objects that they know.

T tokens, D hidden, E experts, K top-k, B sequences, L positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..balance import Visit
from ..config import BalanceConfig
from ..experts import RoutedExperts
from ..layer import MoE
from ..placement import Placement
from ..types import Routing
from .adapters import ADAPTERS, Adapter
from .parts import KeptExperts, KeptRouter, SwappedRouter, stacked_experts
from .read import Plan, read

#: the argument by which a model hands the padding mask to the attention next to a block. As an argument of the decoder
#: layer, it is the same when activation checkpointing runs that layer again
_MASK = "equimoe_mask"
#: the coefficient of the model's own balance loss
_COEFFICIENT = "router_aux_loss_coef"
#: the attribute of a changed module with its former class, its replaced attributes, and the names of its new ones
_BEFORE = "_before_swap"


@dataclass
class _Swapped:
    """What a swapped block remembers. It holds no module, so that models are freed without garbage collection."""

    adapter: Adapter
    #: the layer's function of the stacked weights of its experts
    mlp: Any
    hooks: list[Any] = field(default_factory=list)
    #: bool [B, L], the model's mask in the current forward; and whether it has been sent but has not arrived
    mask: Tensor | None = None
    awaited: bool = False


class SwappedMoE(MoE):
    """A block of another library that computes as this package's layer, and returns what the block returns."""

    _swapped: _Swapped

    def forward(self, x: Tensor, mask: Tensor | None = None, codes: Tensor | None = None, **given: Any) -> Any:
        """``mask`` ([...], True where a token counts) takes the place of the model's."""
        sent = self._sent_mask(x, needed=mask is None)
        return self._swapped.adapter.output(super().forward(x, sent if mask is None else mask, codes, **given))

    def parts(self) -> tuple[Any, Any, Any]:
        swapped, adapter = self._swapped, self._swapped.adapter
        experts: Any
        if adapter.weights is None:
            experts = self._modules[adapter.experts]
        else:
            experts = partial(stacked_experts, swapped.mlp, adapter.weights, self)
        shared = None if adapter.shared is None else partial(adapter.shared, self)
        return self._modules[adapter.router], experts, shared

    def _keep_stats(self, routing: Routing, visit: Visit) -> None:
        super()._keep_stats(routing, visit)
        assert self._stats is not None
        # masked tokens are computed but not counted, so the difference is not what was dropped
        self._stats = replace(self._stats, ids_TK=None)

    def place(self, placement: Placement) -> None:
        split = placement.ep.size * placement.etp.size
        if split > 1 and not isinstance(self.experts, RoutedExperts):
            raise ValueError(
                f"parallel.ep, parallel.etp: the experts of {type(self).__name__} are not this package's and cannot be "
                f"split over {split} ranks; set both to 1"
            )
        super().place(placement)

    def __getattr__(self, name: str) -> Any:
        alias = getattr(self._swapped.adapter, name) if name in ("router", "experts") else name
        part = super().__getattr__(alias)
        adapted = None if alias == name else getattr(part, "get_base_layer", None)  # PEFT's wrapper has no expert bias
        return part if adapted is None else adapted()

    def _sent_mask(self, x: Tensor, needed: bool) -> Tensor | None:
        swapped = self._swapped
        (mask, awaited), swapped.mask, swapped.awaited = (swapped.mask, swapped.awaited), None, False
        if awaited and needed:
            raise ValueError(
                f"attention_mask: it does not reach {type(self).__name__}, because the layers of the model do not pass "
                f"keyword arguments on to {swapped.adapter.attention!r}; call the block with mask=..."
            )
        return None if mask is None else mask[:, -x.shape[-2] :]  # with a cache, x has only the last positions


def swap(
    model: nn.Module,
    balance: BalanceConfig | None = None,
    *,
    adapters: Mapping[type[nn.Module], Adapter] | None = None,
    group: Any = None,
) -> nn.Module:
    """Make every MoE block of a transformers model compute as this package's layer, and return the model.

    ``balance`` configures load balancing (None: over the global batch); the model's own balance loss gets the
    coefficient 0. Parameters stay the same objects under the same names. Positions where the model's 2-dimensional
    ``attention_mask`` is 0 are computed, but not counted. ``adapters`` describes blocks of your own, by class.
    ``group`` has the ranks with different tokens, see :class:`equimoe.moe.MoE`.

    Call it on every rank, before anything wraps the model. Raises ValueError if the model has no MoE block, or one
    with a setting that this layer does not have.
    """
    plans = read(model, {**ADAPTERS, **(adapters or {})}, BalanceConfig() if balance is None else balance)
    for plan in plans:
        _swap_block(plan, group)
    _hand_on_masks(plans)
    if not any(_COEFFICIENT in vars(module) for module in model.modules()):
        for inner, block in {plan.model: plan.block for plan in plans if plan.model is not None}.items():
            hooks: list[Any] = block._swapped.hooks  # type: ignore[union-attr, assignment]
            hooks.append(inner.register_forward_pre_hook(_check_router_logits, with_kwargs=True))
    for module in model.modules():
        if vars(module).get(_COEFFICIENT):
            vars(module)["_swapped_coefficient"], vars(module)[_COEFFICIENT] = vars(module)[_COEFFICIENT], 0.0
    return model


def unswap(model: nn.Module) -> nn.Module:
    """Undo :func:`swap`, and return the model. Parameters keep their values.

    Raises ValueError if the model is not swapped, if a wrapper has changed the class of a block, or between a forward
    and its backward.
    """
    swapped = [module for module in model.modules() if _BEFORE in vars(module)]
    if not swapped:
        raise ValueError(f"unswap: {type(model).__name__} is not swapped; call swap first")
    for module in swapped:
        if "is_swapped" not in vars(type(module)):
            raise ValueError(f"unswap: a wrapper has made a {type(module).__name__} of a block; unwrap the model first")
    layers = [module for module in swapped if isinstance(module, SwappedMoE)]
    if any(v.counted and v.lives and not v.done for layer in layers for v in layer.balancer.layer.visits.values()):
        raise ValueError(
            "unswap: the backward of a training forward has not run; call unswap after it, or delete the output"
        )
    for layer in layers:
        layer.balancer.layer.forget_module()
        for hook in layer._swapped.hooks:
            hook.remove()
    for module in swapped:
        original, replaced, new = vars(module).pop(_BEFORE)
        for name in new:
            del vars(module)[name]
        vars(module).update(replaced)
        module.__class__ = original
    for module in model.modules():
        if "_swapped_coefficient" in vars(module):
            vars(module)[_COEFFICIENT] = vars(module).pop("_swapped_coefficient")
    return model


def _swap_block(plan: Plan, group: Any) -> None:
    block, adapter = plan.block, plan.adapter
    with torch.device("meta"):  # only its attributes are used
        layer = MoE(plan.config)
    if group is not None:
        layer.place(Placement.of_group(group))
    router, swapped = plan.router, _Swapped(adapter, layer.experts.mlp)
    options = {"_kept_dtype": router.weight.dtype, "bias_name": adapter.bias}
    _become(router, KeptRouter if adapter.own_router else SwappedRouter, _attributes(layer.router) | options)
    if plan.own_experts:
        _become(getattr(block, adapter.experts), KeptExperts, {})
    elif adapter.weights is None:
        _become(getattr(block, adapter.experts), RoutedExperts, _attributes(layer.experts))
    attributes = _attributes(layer) | {"_swapped": swapped}
    del attributes["shared"]
    _become(block, SwappedMoE, attributes)


def _become(module: nn.Module, base: type, attributes: dict[str, Any]) -> None:
    """Put ``base`` before the class of ``module``, set attributes of the module, and note what these were."""
    own, original = vars(module), type(module)
    replaced = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    own[_BEFORE] = original, replaced, [name for name in attributes if name not in replaced]
    body = {"__module__": original.__module__, "__doc__": original.__doc__, "is_swapped": True}
    module.__class__ = type(original.__name__, (base, original), body)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module that not every module has."""
    return {name: value for name, value in vars(module).items() if name not in vars(nn.Module())}


# ---- the padding mask


def _hand_on_masks(plans: Iterable[Plan]) -> None:
    """Have each model hand its attention mask to its blocks: as an argument, through the attention next to each."""
    blocks: dict[nn.Module, list[_Swapped]] = {}
    for plan in plans:
        if plan.model is None or not plan.attentions:
            continue
        swapped: _Swapped = plan.block._swapped  # type: ignore[assignment]
        blocks.setdefault(plan.model, []).append(swapped)
        take = partial(_take_mask, swapped)
        for attention in plan.attentions:
            swapped.hooks.append(attention.register_forward_pre_hook(take, prepend=True, with_kwargs=True))
    for model, receivers in blocks.items():
        send = partial(_send_mask, receivers)
        receivers[0].hooks.append(model.register_forward_pre_hook(send, with_kwargs=True))


def _send_mask(receivers: list[_Swapped], model: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    mask = given.get("attention_mask")
    sent = {_MASK: mask.bool()} if isinstance(mask, Tensor) and mask.dim() == 2 else {}
    for receiver in receivers:
        receiver.awaited = bool(sent)
    return args, {**kwargs, **sent}


def _take_mask(receiver: _Swapped, attention: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    receiver.mask = None
    if _MASK in kwargs:
        receiver.mask, receiver.awaited = kwargs.pop(_MASK), False
    return args, kwargs


# ---- the balance loss of a head


def _check_router_logits(model: nn.Module, args: Any, kwargs: Any) -> None:
    config, asked = getattr(model, "config", None), kwargs.get("output_router_logits")
    recorded = getattr(config, "output_router_logits", False) if asked is None else asked
    if recorded and getattr(config, _COEFFICIENT, 0.0) and torch.is_grad_enabled():
        raise ValueError(
            f"output_router_logits=True: swap was called with {type(model).__name__} and without its head, whose "
            f"balance loss would be added; call swap with the whole model, or if no head adds one, set "
            f"config.{_COEFFICIENT}=0"
        )
