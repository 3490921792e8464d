"""Recipes: named functions that return a complete :class:`~equimoe.moe.train.config.TrainConfig`."""

from __future__ import annotations

from collections.abc import Callable

from ...moe.train.config import TrainConfig
from .deepseek_v3 import deepseek_v3
from .mixtral import mixtral
from .quickstart import quickstart
from .qwen3_235b import qwen3_235b
from .qwen3_global_batch import qwen3_global_batch

#: recipes by the name that ``--recipe NAME`` takes
RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "quickstart": quickstart,
    "qwen3_global_batch": qwen3_global_batch,
    "mixtral": mixtral,
    "deepseek_v3": deepseek_v3,
    "qwen3_235b": qwen3_235b,
}
