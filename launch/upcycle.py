"""Grows dense models into MoE models, and merges models: ``python -m equimoe.launch.upcycle DIR --out NEW --method M``.

DIR is the folder of a run, of a checkpoint or of a transformers model. The result is a checkpoint of step 0, from which
training starts with ``--init.from``, and which ``equimoe.launch.convert export`` writes for transformers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..moe.checkpoint.manifest import printable
from ..moe.interop.domains import divide, domain_masks
from ..moe.interop.families import family_of
from ..moe.interop.hf import Weights
from ..moe.interop.merge import Assembly, average, merge
from ..moe.interop.upcycle import Recipe, upcycle
from . import domains, env, initial
from .text import counted
from .usage import Parser, a_path, run_on_files

Write = Callable[[list[Weights], dict[str, Any], Path, int | None], Path]


@dataclass(frozen=True)
class Method:
    """A method: what it makes of one model, or of several."""

    summary: str
    several: bool
    #: the fields of its settings that are options
    options: tuple[str, ...]
    write: Write


def _grow(**usual: Any) -> Write:
    def write(sources: list[Weights], given: dict[str, Any], out: Path, files: int | None) -> Path:
        defaults = {"num_experts": 8 if len(sources) == 1 else len(sources), "top_k": 2}
        return upcycle(sources, Recipe(**(defaults | usual | given)), out, files)

    return write


def _average(sources: list[Weights], given: dict[str, Any], out: Path, files: int | None) -> Path:
    return merge(sources, average(len(sources)), out, files)


def _assemble(sources: list[Weights], given: dict[str, Any], out: Path, files: int | None) -> Path:
    equal = (1 / len(sources),) * len(sources)
    return merge(sources, Assembly(**({"weights": equal} | given)), out, files)


def _read_me(sources: list[Weights], given: dict[str, Any], out: Path, files: int | None) -> Path:
    if "data" not in given:
        raise ValueError("--data: is missing; give a folder with a folder of text for each domain")
    tokenizer = given.get("tokenizer"), given.get("end_of_document")
    measured = domains.activity(sources[0].path, given["data"], given.get("tokens", 100_000), *tokenizer)
    masks_NLF = domain_masks(torch.stack(list(measured.values())), given.get("keep_channels", 0.5))
    final = divide(sources[0], masks_NLF, out, given.get("top_k", 2), given.get("seed", 0), files)
    common_LF = masks_NLF.all(0)
    own = [
        f"{printable(domain)} {_share(mask_LF & ~common_LF)}"
        for domain, mask_LF in zip(measured, masks_NLF, strict=True)
    ]
    print(f"channels of one domain: {', '.join(own)}; of all domains: {_share(common_LF)}")
    return final


def _share(mask_LF: torch.Tensor) -> str:
    return f"{float(mask_LF.float().mean()):.0%}"


_GROW = ("num_experts", "top_k", "normalize_weights", "moe_every", "dense_layers", "seed")
METHODS = {
    "sparse": Method("experts are copies of the feed-forward (sparse upcycling)", False, _GROW, _grow()),
    "fine": Method(
        "experts are parts of copies (fine-grained upcycling)",
        False,
        (*_GROW, "granularity", "scaled"),
        _grow(granularity=2),
    ),
    "drop": Method(
        "experts are copies in which some channels are drawn again (Drop-Upcycling)",
        False,
        (*_GROW, "ratio", "granularity", "scaled"),
        _grow(ratio=0.5),
    ),
    "read-me": Method(
        "experts are the channels that are active on a domain's text (Read-ME)",
        False,
        ("data", "keep_channels", "tokens", "tokenizer", "end_of_document", "top_k", "seed"),
        _read_me,
    ),
    "join": Method(
        "each model's feed-forwards become experts, other weights are averaged (Branch-Train-MiX)", True, _GROW, _grow()
    ),
    "average": Method("all weights are averaged (Branch-Train-Merge)", True, (), _average),
    "assemble": Method(
        "weights are weighted sums, others the first model's (Assembly of Experts)",
        True,
        ("weights", "tensors", "routers", "threshold"),
        _assemble,
    ),
}


@env.command
def main(argv: list[str] | None = None) -> None:
    """Entry point. Exits with 67 if files are damaged or missing, 64 for a model or option that does not fit, 73 if a
    file cannot be written.
    """
    arguments = _parser().parse_args(argv)
    run_on_files(_run, arguments)


def _run(arguments: argparse.Namespace) -> None:
    method, out = METHODS[arguments.method], arguments.out
    if arguments.files is not None and arguments.files < 1:
        raise ValueError(f"--files={arguments.files}: must be at least 1")
    if method.several != (len(arguments.dirs) > 1):
        wanted = "at least two models" if method.several else "one model; --method join takes several"
        raise ValueError(f"--method={arguments.method}: give {wanted}")
    for folder in arguments.dirs:
        if not folder.is_dir():
            raise ValueError(f"{folder}: is not a folder; give that of a run, a checkpoint or a transformers model")
    given = {field: value for field in OPTIONS if (value := getattr(arguments, field)) is not None}
    for field in given.keys() - set(method.options):
        raise ValueError(f"{OPTIONS[field]}: has no effect with --method={arguments.method}; leave it out")
    sources = [initial.weights(folder) for folder in arguments.dirs]
    final = method.write(sources, given, out, arguments.files)
    found = initial.weights(out)
    print(f"wrote {printable(str(final))}: {described(found)}")
    try:
        family_of(found.architecture)
    except ValueError as error:
        print(f"note: convert export cannot write it: {error}")
    print(f"train: python -m equimoe.launch.train --init.from {printable(str(out))}")


def described(found: Weights) -> str:
    """Describe a model in a few words."""
    a, total = found.architecture, sum(_numbers(entry.shape) for entry in found.tensors.values())
    blocks = sum(map(a.is_moe, range(a.num_layers)))
    experts = f"{counted(a.moe.num_experts, 'expert')} of width {a.moe.intermediate_size}, {a.moe.top_k} per token"
    kind = f"{experts}, in {blocks} of {a.num_layers} blocks" if blocks else f"{a.num_layers} dense blocks"
    return f"{kind}; {total:,} parameters"


def _numbers(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


#: field of a method's settings -> its option
OPTIONS = {
    "num_experts": "--experts",
    "top_k": "--top-k",
    "normalize_weights": "--plain-gates",
    "granularity": "--granularity",
    "scaled": "--scaled",
    "ratio": "--ratio",
    "moe_every": "--moe-every",
    "dense_layers": "--dense-layers",
    "seed": "--seed",
    "data": "--data",
    "keep_channels": "--keep-channels",
    "tokens": "--tokens",
    "tokenizer": "--tokenizer",
    "end_of_document": "--end-of-document",
    "weights": "--weights",
    "tensors": "--tensors",
    "routers": "--routers",
    "threshold": "--threshold",
}


def _parser() -> argparse.ArgumentParser:
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = Parser(
        prog="python -m equimoe.launch.upcycle",
        description=f"{summary.split(':')[0]}. {' '.join(more.split())}",
        epilog="Methods: " + "; ".join(f"{name}: {method.summary}" for name, method in METHODS.items()) + ".",
    )
    parser.add_argument(
        "dirs", nargs="+", type=a_path, metavar="DIR", help="folder of a model; a run's newest checkpoint"
    )
    parser.add_argument("--out", type=a_path, required=True, help="folder in which the checkpoint gets one of its own")
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--files", type=int, help="number of files; default one per GiB")

    def add(field: str, text: str, **how: Any) -> None:
        methods = ", ".join(name for name, method in METHODS.items() if field in method.options)
        parser.add_argument(OPTIONS[field], dest=field, default=None, help=f"{text} ({methods})", **how)

    add("num_experts", "default 8; with join the number of models", type=int, metavar="E")
    add("top_k", "experts per token; default 2", type=int, metavar="K")
    add("normalize_weights", "do not divide gate weights by their sum", action="store_const", const=False)
    add("granularity", "experts per copy; default 2 with fine, else 1", type=int, metavar="G")
    add("ratio", "share of an expert's channels that is drawn again; default 0.5", type=float, metavar="R")
    add(
        "scaled",
        "what is scaled so that outputs stay the same: up and down projections (linear, default), or the gate "
        "projection too, as published (all)",
        choices=("linear", "all"),
    )
    add("moe_every", "only every n-th block becomes MoE; default 1", type=int, metavar="N")
    add("dense_layers", "the first n blocks stay dense; default 0", type=int, metavar="N")
    add("seed", "seed of new random weights; default 0", type=int)
    add("data", "text of several domains, such as a folder with a folder for each", metavar="PATH")
    add("keep_channels", "share of the channels that a domain keeps; default 0.5", type=float, metavar="R")
    add("tokens", "tokens of each domain that are read; default 100000", type=int, metavar="N")
    add("tokenizer", "tokenizer.json, or 'bytes'; default: the model's own", metavar="PATH")
    add("end_of_document", "token that ends a document; default: the model's own", metavar="TOKEN")
    add("weights", "a weight per model; they sum to 1; default equal", type=float, nargs="+", metavar="W")
    add("tensors", "what is merged: routed experts (default), or all but routers", choices=("experts", "all"))
    add("routers", "merge the routers too", action="store_const", const=True)
    add("threshold", "merge only matrices that differ by more, root mean square", type=float, metavar="D")
    return parser


if __name__ == "__main__":
    main()
