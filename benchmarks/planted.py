"""Plants faults in a copy of every op, and checks that the benchmarks and the compile gate detect them.

    python benchmarks/planted.py [--only TEXT]

Each fault runs through ``run.py`` on a tiny shape, or through the gate on one chip, in this process. It counts as seen
if the command fails with one line that names the op, and shows no measurement. The exit status is the number of faults
that were not seen.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent)
    import checkout  # noqa: F401

import torch
from torch import Tensor

from benchmarks import run
from benchmarks.kernels import kernel_suite
from benchmarks.layer import layer_suite, peers
from benchmarks.shared.options import Parser
from benchmarks.shared.records import OURS
from equimoe.launch.env import command

#: the fault of the compile gate
SPILLING = "a tile that spills"
ARGUMENTS = ["--device", "cpu", "--shapes", "tiny-b", "--threads", "1", "--compiled", "0", "--only", "loop"]


Change = Callable[[Tensor], Tensor]


class _Changed(torch.autograd.Function):
    """Applies one function to a result and another to its gradient."""

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
    """Negate the first row, or add one to it if it holds whole numbers."""
    first = -value[:1] if value.is_floating_point() else value[:1] + 1
    return torch.cat([first, value[1:]])


def other_dtype(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value.int()


def broken(value: Tensor) -> Tensor:
    raise ArithmeticError("planted")


def unread(given: Tensor) -> None:
    """Leave the op's input unchanged."""


def negated(given: Tensor) -> None:
    given.neg_()


def zeroed(given: Tensor) -> None:
    given.zero_()


class Fault(NamedTuple):
    """Changes to an op's result, to its gradient, and to its first input before and after the call.

    A ``late`` fault starts after the check at reduced size. ``every`` = n affects only each n-th call.
    """

    change: Change
    back: Change = same
    before: Callable[[Tensor], None] = unread
    after: Callable[[Tensor], None] = unread
    late: bool = False
    every: int = 1


FAULTS = {
    "output doubled": Fault(doubled),
    "output NaN": Fault(nan),
    "one row wrong": Fault(row),
    "gradient zero": Fault(same, torch.zeros_like),
    "gradient NaN": Fault(same, nan),
    "another dtype": Fault(other_dtype),
    "raises": Fault(broken),
    "negates its input": Fault(same, before=negated),
    "doubled when timed": Fault(doubled, late=True),
    "no gradient when timed": Fault(same, torch.zeros_like, late=True),
    "every third doubled": Fault(doubled, late=True, every=3),
    "zeroes its input": Fault(same, after=zeroed, late=True),
    "raises when timed": Fault(broken, late=True),
}
#: op -> the field of its result that is changed
FIELDS = {"topk_gate": "weights_TK", "sort_by_expert": "order_R"}
#: suite -> the module in which ops are replaced, and their names
SUITES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "kernels": (
        kernel_suite,
        (
            "router_logits",
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
    """Return a copy of ``right`` that has the fault while ``active`` is not empty."""
    calls = count(1)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        if not active or next(calls) % fault.every:
            return right(*args, **kwargs)
        fault.before(args[0].data)  # invisible to autograd, like a kernel's writes
        result = right(*args, **kwargs)
        fault.after(args[0].data)
        field = FIELDS.get(op)
        value = getattr(result, field) if field else result
        value = _Changed.apply(value, fault.change, fault.back) if value.is_floating_point() else fault.change(value)
        return result._replace(**{field: value}) if field else value

    return wrong


def seen_by_run(suite: str, op: str, fault: Fault) -> tuple[bool, str]:
    """Return whether ``run.py`` fails, names the op and shows no measurement; and its error line."""
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
    name = OURS if suite == "layer" else op.removesuffix("_dgrad").removesuffix("_wgrad")
    named = len(lines) == 1 and line.startswith(f"WRONG: {name}")
    return status == 1 and named and "|" not in out.getvalue() and not written, line


def seen_by_gate() -> tuple[bool, str]:
    """Return whether the compile gate rejects a tile that needs too many registers; and its report line."""
    from benchmarks.kernels import compile_gate
    from equimoe.kernels import matmul_tiles

    large = matmul_tiles.MatmulTile(256, 256, 64, 8, 3)
    with mock.patch.object(
        matmul_tiles, "_HALF", {**matmul_tiles._HALF, ("sm_90", "few"): dict.fromkeys(matmul_tiles.OPS, large)}
    ):
        lines = compile_gate.gate("sm_90", "gemm_kernel bf16 few even silu")
    return bool(lines) and all(fault for _, fault in lines), " ".join(lines[0][0].split()) if lines else ""


def cases() -> Iterator[tuple[str, str, str]]:
    """Yield suite, op and name of all faults."""
    for suite, (_, ops) in SUITES.items():
        for op in ops:
            for name, fault in FAULTS.items():
                whole = op == "sort_by_expert" and fault.change is nan  # whole numbers have no NaN
                backward_only = fault == Fault(same, fault.back, late=fault.late)
                if not whole and not (op in ONE_WAY and backward_only):
                    yield suite, op, name


@command
def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--only", default="", help="plant only faults whose description contains this text")
    only = parser.parse_args(argv).only
    chosen = [case for case in cases() if only in " ".join(case)]
    found = total = 0

    def show(name: str, fault: str, result: tuple[bool, str]) -> None:
        nonlocal found, total
        found, total = found + result[0], total + 1
        print(f"{name:27} {fault:22} {'seen' if result[0] else 'NOT SEEN':8}  {result[1]}", flush=True)

    for suite, op, fault in chosen:
        show(f"{suite} {op}", fault, seen_by_run(suite, op, FAULTS[fault]))
    if only in SPILLING:
        show("gate grouped_gemm", SPILLING, seen_by_gate())
    if not total:
        parser.error(
            f"--only={only}: no fault has this text in its description; the first is {' '.join(next(cases()))!r}"
        )
    print(f"planted faults seen: {found} of {total}")
    return total - found


if __name__ == "__main__":
    sys.exit(main())
