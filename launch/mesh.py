"""Shows which ranks form which group: ``python -m equimoe.launch.mesh --world 64 --tp 2 --cp 2 --pp 2 --ep 8``."""

from __future__ import annotations

import argparse
import sys

from ..moe.parallel import ParallelConfig
from ..moe.parallel.degrees import DENSE_DEGREES, EXPERT_DEGREES
from ..moe.parallel.mesh import groups_of
from . import env
from .text import counted
from .usage import Parser

#: axis -> what the ranks of one group do together
MEANING = {
    "pp": "send activations to the next stage",
    "dp": "read different sequences",
    "cp": "hold parts of the same sequences",
    "tp": "split attention, embedding and head",
    "dense": "reduce gradients of dense weights",
    "fsdp": "shard dense weights (FSDP2)",
    "edp": "reduce gradients of experts",
    "edp_shard": "shard expert weights (FSDP2)",
    "ep": "exchange rows for experts",
    "etp": "split each expert",
    "stage": "sum the load of experts",
}


@env.command
def main(argv: list[str] | None = None) -> None:
    """Entry point. Exits with code 64 if an option is wrong or the degrees do not fit."""
    arguments = _parser().parse_args(argv)
    if arguments.world < 1 or arguments.node < 1:
        name = "world" if arguments.world < 1 else "node"
        sys.exit(_refuse(f"--{name}={getattr(arguments, name)}: must be at least 1"))
    try:
        config = ParallelConfig(**{name: getattr(arguments, name) for name in (*DENSE_DEGREES, *EXPERT_DEGREES)})
        degrees = config.resolve(arguments.world)
    except ValueError as error:
        sys.exit(_refuse(str(error)))
    print(describe(degrees, arguments.node, arguments.all))


def describe(degrees: ParallelConfig, node: int, everything: bool = False) -> str:
    """Format the groups of every axis as text, for resolved degrees and ``node`` ranks per node.

    Long lists are truncated unless ``everything``.
    """
    dense = " * ".join(f"{name} {getattr(degrees, name)}" for name in DENSE_DEGREES)
    expert = " * ".join(f"{name} {getattr(degrees, name)}" for name in EXPERT_DEGREES)
    lines = [f"dense:   {dense}", f"experts: pp {degrees.pp} * {expert}", f"{counted(node, 'rank')} per node", ""]
    lines.append(f"{'axis':<10} {'ranks':>5} {'groups':>6} {'within a node':>13}   what they do")
    for axis, meaning in MEANING.items():
        groups = groups_of(axis, degrees).tolist()
        if len(groups[0]) == 1:
            continue
        inside = sum(group[0] // node == group[-1] // node for group in _sorted(groups))
        within = {0: "none", len(groups): "all"}.get(inside, f"{inside} of {len(groups)}")
        lines.append(f"{axis:<10} {len(groups[0]):>5} {len(groups):>6} {within:>13}   {meaning}")
        shown = groups if everything else groups[:3]
        lines += [f"{'':<10} {_ranks(group, everything)}" for group in shown]
        if len(shown) < len(groups):
            lines.append(f"{'':<10} ... and {len(groups) - len(shown)} more; --all shows them")
    return "\n".join(lines)


def _sorted(groups: list[list[int]]) -> list[list[int]]:
    return [sorted(group) for group in groups]


def _ranks(group: list[int], everything: bool) -> str:
    if everything or len(group) <= 16:
        return " ".join(map(str, group))
    return f"{' '.join(map(str, group[:8]))} ... {' '.join(map(str, group[-2:]))}"


def _refuse(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 64


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m equimoe.launch.mesh", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--world", type=int, required=True, help="number of ranks")
    parser.add_argument("--node", type=int, default=8, help="ranks per node; default 8")
    parser.add_argument("--all", action="store_true", help="show every group")
    defaults = ParallelConfig()
    for name in (*DENSE_DEGREES, *EXPERT_DEGREES):
        default = getattr(defaults, name)
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, type=int, default=default)
    return parser


if __name__ == "__main__":
    main()
