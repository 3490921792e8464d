"""Small models as checkpoints, to be grown into MoE models and merged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equimoe.launch import initial, loaded
from equimoe.moe.checkpoint.tensors import Saved
from equimoe.moe.interop.architecture import Architecture, architecture
from equimoe.moe.interop.convert import write_first
from equimoe.moe.model import Decoder

HIDDEN, WIDTH, LAYERS, VOCABULARY, LENGTH = 16, 24, 2, 260, 12


def dense(width: int = WIDTH, **moe: Any) -> Architecture:
    """Return the architecture of a dense model, or of an MoE model if settings of its layers are given."""
    model = {"num_layers": LAYERS, "num_heads": 2, "vocab_size": VOCABULARY, "intermediate_size": width}
    layer = {"hidden_size": HIDDEN, "intermediate_size": 12, "num_experts": 4, "top_k": 2} | moe
    return architecture({"model": model | {"moe_every": int(bool(moe))}, "moe": layer, "attention": {}}, False)


class Held:
    """Tensors in memory."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def blocks(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Iterator[Tensor]:
        yield self.tensors[name][tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]


def write(folder: Path, seed: int = 0, model: Architecture | None = None, files: int | None = None) -> Path:
    """Write a checkpoint with random weights; return ``folder``."""
    a = model or dense()
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "seq_len": LENGTH, "num_layers": LAYERS, "num_heads": 2}
    decoder = Decoder(**sizes, intermediate_size=a.intermediate_size or 1, moe=a.moe, moe_every=a.moe_every)
    tensors = {f"model.{name}": 10 * value.detach() for name, value in decoder.named_parameters()}
    wanted = {name: Saved(torch.float32, tuple(value.shape), ()) for name, value in tensors.items()}
    write_first(Held(tensors), wanted, a, folder, files, "a test", {})
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint by name."""
    found = initial.weights(folder)
    with found.reader() as reader:
        return {name: reader.box(name, (0,) * len(entry.shape), entry.shape) for name, entry in found.tensors.items()}


def logits(folder: Path) -> Tensor:
    """Return the logits of a checkpoint's model for some tokens."""
    model = loaded.build(loaded.find(folder), None, torch.device("cpu"), LENGTH, torch.float32)
    ids = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids)
