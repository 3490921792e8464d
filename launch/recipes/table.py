"""Compares the sizes of the recipes' models with the published ones."""

from __future__ import annotations

from dataclasses import dataclass

from ...moe.plan import memory, sizes
from . import RECIPES


@dataclass(frozen=True)
class Published:
    """What a paper says of a model."""

    #: its number at arXiv
    paper: str
    #: ranks that the recipe is meant for
    ranks: int
    #: number of parameters, as it is printed; ">": more than that; None: not published
    total: str | None = None
    #: those that a token uses
    active: str | None = None
    #: whether ``active`` counts the embedding
    embedding: bool = True


#: recipe -> what is published of its model
PUBLISHED: dict[str, Published] = {
    "gshard": Published("2006.16668", 2048, ">600B"),
    "switch": Published("2101.03961", 2048, "1571B"),
    "base_layers": Published("2103.16716", 128, "44.4B", "1.6B"),
    "expert_choice": Published("2202.09368", 256, "143B", "9.8B", embedding=False),
    "xmoe": Published("2204.09179", 32),
    "softmoe": Published("2308.00951", 32, "3.7B"),
    "mixtral_8x7b": Published("2401.04088", 128, "46.7B", "12.9B"),
    "deepseekmoe_16b": Published("2401.06066", 64, "16.4B", "2.8B"),
    "olmoe": Published("2409.02060", 256, "6.9B", "1.3B"),
    "hmoe_3b": Published("2408.10681", 16, "2.55B", "0.77B"),
    "moepp_7b": Published("2410.07348", 64, "7B"),
    "deepseek_v2": Published("2405.04434", 1024, "236B", "21B"),
    "deepseek_v3": Published("2412.19437", 1024, "671B", "36.6B", embedding=False),
    "qwen3_30b": Published("2505.09388", 128, "30.5B", "3.3B"),
    "qwen3_235b": Published("2505.09388", 1024, "235B", "22B"),
    "ling_lite": Published("2503.05139", 64, "16.8B", "2.75B"),
    "ling_plus": Published("2503.05139", 1024, "290B", "28.8B"),
    "pangu_pro_72b": Published("2505.21411", 256, "71.99B", "16.50B"),
    "kimi_k2": Published("2507.20534", 1024, "1026.4B", "32.6B"),
}


def parameters(name: str) -> tuple[int, int]:
    """Return the numbers of all and of active parameters of a recipe's model, counted as its paper counts them."""
    found = sizes(RECIPES[name]())
    return found.total, found.active if PUBLISHED[name].embedding else found.active - found.embedding


def table() -> str:
    """Return a table of all published models, in Markdown: parameters, and what rank 0 holds in memory."""
    titles = ("recipe", "paper", "parameters", "published", "active", "published", "ranks", "GiB per rank")
    lines = [titles, tuple("---" for _ in titles)]
    for name, published in PUBLISHED.items():
        total, active = parameters(name)
        held = memory(RECIPES[name](), published.ranks, 0).total / (1 << 30)
        lines.append(
            (
                *(f"`{name}`", f"[{published.paper}](https://arxiv.org/abs/{published.paper})"),
                *(_billions(total), published.total or "-"),
                *(_billions(active) + ("" if published.embedding else " *"), published.active or "-"),
                *(f"{published.ranks:,}", f"{held:.1f}"),
            )
        )
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([*rows, "", "\\* without the embedding, which the paper does not count"])


def _billions(count: int) -> str:
    return f"{count / 1e9:.1f}B" if count >= 1e11 else f"{count / 1e9:.4g}B"
