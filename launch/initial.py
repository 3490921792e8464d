"""The weights that a run starts from: a transformers folder, a checkpoint, or another run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..moe.checkpoint import tools
from ..moe.interop.architecture import OWN, OWN_CHOICES
from ..moe.interop.convert import SOURCES, companions_of, model_of, weights_of
from ..moe.interop.hf import COMPANIONS, Weights, companions, is_folder, keep_companions
from ..moe.train.trainer import Trainer

#: routers that add weights to those of gate "linear"; the new ones begin as in a new run
EXTENDED = ("noisy", "residual", "task")
#: fields that must stay plain if the model's are
PLAIN = {name: OWN[name] for name in ("moe.router.gate", "moe.zero_computation", "moe.widths")}
#: expert bias update rate of a run whose model has an expert bias, if none is given (DeepSeek-V3, arXiv 2412.19437)
BIAS_UPDATE_RATE = 0.001


class Initial:
    """The configuration that weights determine. Raises ValueError if ``path`` has no weights that a run can use."""

    def __init__(self, path: Path, begun: Path | None = None) -> None:
        """``begun``: folder of a run that may have started from them. It holds the same model, so a resume needs no
        ``path``.
        """
        self.path, source = path, path
        if begun is not None and begun.is_dir() and tools.held(begun):
            source = begun
        elif not path.is_dir():
            raise ValueError(f"--init.from={path}: is not a folder; give that of {SOURCES}")
        self.places = (path, source)
        self.model = model_of(source)
        self.sections = self.model.fields()

    def apply(self, values: dict[str, Any]) -> None:
        """Set the model of a configuration, given as nested mappings, and defaults that suit it."""
        for name, value in self.sections.items():
            section, field = _place(values, name)
            section[field] = value
        balance = values["moe"]["balance"]
        if self.model.expert_bias:
            balance["bias_update_rate"] = balance["bias_update_rate"] or BIAS_UPDATE_RATE
        tokenizer = next(filter(None, map(tokenizer_in, self.places)), None)
        if tokenizer is not None and values["data"]["tokenizer"] == "bytes":
            values["data"]["tokenizer"] = str(tokenizer)

    def check(self, values: dict[str, Any]) -> None:
        """Raise ValueError if a configuration describes another model."""
        for name, value in (self.sections if self.model.is_dense else PLAIN | self.sections).items():
            section, field = _place(values, name)
            added = name == "moe.router.gate" and value == OWN[name] and section[field] in EXTENDED
            if section[field] != value and not added and name not in OWN_CHOICES:
                has = f"the model of --init.from={self.path} has {value!r}; leave it out"
                if self.model.is_dense and name.startswith(("moe.", "model.moe_every")):
                    has = f"the model of --init.from={self.path} is dense; give it experts with equimoe.launch.upcycle"
                raise ValueError(f"{name}={section[field]!r}: {has}")
        if self.model.expert_bias and not values["moe"]["balance"]["bias_update_rate"]:
            raise ValueError(
                f"moe.balance.bias_update_rate=0: the routers of --init.from={self.path} have an expert bias; leave it "
                "out, or set a tiny one"
            )


def begin(trainer: Trainer, path: Path) -> None:
    """Give a new run the weights in folder ``path``. Every rank must call it."""
    found = weights(path)
    trainer.begin(found.path, found.tensors, found.opened)


def keep(path: Path, run_dir: Path) -> None:
    """Copy the small files of the model that a run starts from to its folder, for an export."""
    if (run_dir / COMPANIONS).exists() or not path.is_dir():
        return
    if is_folder(path):
        keep_companions(companions(weights_of(path)), run_dir / COMPANIONS)
    elif (found := companions_of(path)) is not None:
        keep_companions(companions(found), run_dir / COMPANIONS)


def tokenizer_in(path: Path) -> Path | None:
    """Return the tokenizer of the transformers model that the weights in folder ``path`` come from."""
    small = path if is_folder(path) else companions_of(path)
    file = None if small is None else small / "tokenizer.json"
    return file if file is not None and file.is_file() else None


def weights(path: Path) -> Weights:
    """Describe the weights in the folder of a transformers model, a checkpoint or a run."""
    return weights_of(path) if is_folder(path) else weights_of(*tools.newest_valid(path, SOURCES), own=True)


def _place(values: dict[str, Any], name: str) -> tuple[dict[str, Any], str]:
    *path, field = name.split(".")
    for part in path:
        values = values[part]
    return values, field
