"""Plants faults in a copy of every op, and prints whether the benchmarks and the compile gate see each.

    python benchmarks/planted.py [--only TEXT]

Each fault goes through ``run.py`` on a tiny shape, or through the gate on one chip, in this process. It is seen when
the command fails with one line that names the op, and shows no figure. Exits with the number of faults that were not.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import checkout  # noqa: F401  (first: it decides which equimoe is imported)
import kernel_suite
import layer_suite
import peers
import run
import torch
from options import Parser
from torch import Tensor

#: the op of a tile that does not fit
SPILLING = "a tile that spills"
ARGUMENTS = ["--device", "cpu", "--shapes", "tiny-b", "--threads", "1", "--compiled", "0", "--only", "loop"]


Change = Callable[[Tensor], Tensor]


class _Changed(torch.autograd.Function):
    """Applies one function to a result, and another to its gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, change: Change, back: Change) -> Tensor:
        ctx.back = back
        return change(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(grad), None, None


def same(value: Tensor) -> Tensor:
    return value.clone()


def doubled(value: Tensor) -> Tensor:
    return value * 2


def nan(value: Tensor) -> Tensor:
    return value * float("nan")


def row(value: Tensor) -> Tensor:
    """The first row is the negative of what it should be; whole numbers are one too large."""
    first = -value[:1] if value.is_floating_point() else value[:1] + 1
    return torch.cat([first, value[1:]])


class Fault(NamedTuple):
    """What becomes of an op's result and of its gradient; if ``late``, only when it has passed the reduced gate."""

    change: Change
    back: Change = same
    late: bool = False


FAULTS = {
    "output doubled": Fault(doubled),
    "output NaN": Fault(nan),
    "one row wrong": Fault(row),
    "gradient zero": Fault(same, torch.zeros_like),
    "gradient NaN": Fault(same, nan),
    "doubled when timed": Fault(doubled, late=True),
    "no gradient when timed": Fault(same, torch.zeros_like, late=True),
}
#: the field of an op's result that is changed
FIELDS = {"topk_gate": "weights_TK", "sort_by_expert": "order_R"}
#: by suite, the module whose name of an op is replaced, and the ops that it runs
SUITES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "kernels": (
        kernel_suite,
        (
            "topk_gate",
            "sort_by_expert",
            "permute",
            "combine",
            "grouped_gemm",
            "grouped_gemm_dgrad",
            "grouped_gemm_wgrad",
            "expert_mlp",
        ),
    ),
    "layer": (peers, ("expert_mlp",)),
}
#: ops without a gradient
ONE_WAY = ("sort_by_expert", "grouped_gemm_dgrad", "grouped_gemm_wgrad")


def faulty(right: Callable[..., Any], op: str, fault: Fault, active: list[bool]) -> Callable[..., Any]:
    """A copy of ``right`` with the fault, while ``active`` is not empty."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = right(*args, **kwargs)
        if not active:
            return result
        field = FIELDS.get(op)
        value = getattr(result, field) if field else result
        value = _Changed.apply(value, fault.change, fault.back) if value.is_floating_point() else fault.change(value)
        return result._replace(**{field: value}) if field else value

    return wrong


def seen_by_run(suite: str, op: str, fault: Fault) -> tuple[bool, str]:
    """Whether ``run.py`` fails, names the op and shows no figure; and its line."""
    module = SUITES[suite][0]
    home = kernel_suite if suite == "kernels" else layer_suite
    active = [] if fault.late else [True]

    def gate(*args: Any, right: Callable[..., Any] = home.gate) -> Any:
        result = right(*args)
        active.append(True)
        return result

    out, err = io.StringIO(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(module, op, faulty(getattr(module, op), op, fault, active)))
        stack.enter_context(mock.patch.object(home, "gate", gate))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        status = run.main([*ARGUMENTS, "--suite", suite, "--out", folder])
        written = list(Path(folder).iterdir())
    lines = err.getvalue().strip().splitlines()
    line = lines[-1] if lines else ""
    name = peers.OURS if suite == "layer" else op.removesuffix("_dgrad").removesuffix("_wgrad")
    named = len(lines) == 1 and line.startswith(f"WRONG: {name}")
    return status == 1 and named and "|" not in out.getvalue() and not written, line


def seen_by_gate() -> tuple[bool, str]:
    """Whether the compile gate refuses a tile that needs more registers than there are; and its line."""
    import compile_gate

    from equimoe.kernels import matmul_tiles

    large = matmul_tiles.MatmulTile(256, 256, 64, 8, 3)
    with mock.patch.object(
        matmul_tiles, "_HALF", {**matmul_tiles._HALF, ("sm_90", "few"): dict.fromkeys(matmul_tiles.OPS, large)}
    ):
        lines = compile_gate.gate("sm_90", "gemm_kernel bf16 few even silu")
    return bool(lines) and all(fault for _, fault in lines), " ".join(lines[0][0].split()) if lines else ""


def cases() -> Iterator[tuple[str, str, str]]:
    """(suite, op, fault) of everything that can be wrong."""
    for suite, (_, ops) in SUITES.items():
        for op in ops:
            for name, fault in FAULTS.items():
                whole = op == "sort_by_expert" and fault.change is nan  # whole numbers have no NaN
                if not whole and not (op in ONE_WAY and fault.change is same):
                    yield suite, op, name


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="faults whose line begins with or has this text in it")
    only = parser.parse_args(argv).only
    chosen = [case for case in cases() if only in " ".join(case)]
    found = total = 0

    def told(name: str, fault: str, result: tuple[bool, str]) -> None:
        nonlocal found, total
        found, total = found + result[0], total + 1
        print(f"{name:27} {fault:22} {'seen' if result[0] else 'NOT SEEN':8}  {result[1]}", flush=True)

    for suite, op, fault in chosen:
        told(f"{suite} {op}", fault, seen_by_run(suite, op, FAULTS[fault]))
    if only in SPILLING:
        told("gate grouped_gemm", SPILLING, seen_by_gate())
    print(f"{found} of {total} planted faults seen")
    return total - found


if __name__ == "__main__":
    sys.exit(main())
