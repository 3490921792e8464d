"""Recipes: named functions that return a complete :class:`~equimoe.moe.train.config.TrainConfig`."""

from __future__ import annotations

from collections.abc import Callable

from ...moe.train.config import TrainConfig
from .classic import base_layers, expert_choice, gshard, softmoe, switch, xmoe
from .deepseek import deepseek_v2, deepseek_v3, deepseekmoe_16b, kimi_k2
from .mixtral import mixtral
from .quickstart import quickstart
from .qwen import qwen3_30b, qwen3_235b
from .qwen3_global_batch import qwen3_global_batch
from .released import hmoe_3b, ling_lite, ling_plus, mixtral_8x7b, moepp_7b, olmoe, pangu_pro_72b

#: recipes by the name that ``--recipe NAME`` takes: small studies first, then published models
RECIPES: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        *(quickstart, qwen3_global_batch, mixtral),
        *(gshard, switch, base_layers, expert_choice, xmoe, softmoe),
        *(mixtral_8x7b, deepseekmoe_16b, olmoe, hmoe_3b, moepp_7b, deepseek_v2, deepseek_v3),
        *(qwen3_30b, qwen3_235b, ling_lite, ling_plus, pangu_pro_72b, kimi_k2),
    )
}
