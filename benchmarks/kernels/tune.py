"""Measures on this GPU which backend of each op is the fastest, and writes kernels/auto.json, which "auto" reads.

    python benchmarks/kernels/tune.py [--out PATH]

Each case is an op, a dtype, and few or many rows per expert. A backend that differs from the reference here, or fails,
is left out. Forward and backward count together. The file is written after each case; other architectures in it stay as
they are.
"""

# T tokens, D hidden, F expert width, E experts, K top-k.

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import checkout  # noqa: F401

import torch

from benchmarks.shared.agreement import brief
from benchmarks.shared.options import Parser
from benchmarks.shared.shapes import Shape, expert_weights, make_batch, spread_logits
from benchmarks.shared.timing import Timer
from equimoe.kernels import auto
from equimoe.kernels.expert_mlp import expert_mlp
from equimoe.kernels.matmul_tiles import BUCKETS, MANY_ROWS, arch_of
from equimoe.kernels.permute import combine, permute
from equimoe.kernels.router_logits import router_logits
from equimoe.kernels.sort_by_expert import sort_by_expert
from equimoe.kernels.topk_gate import topk_gate
from equimoe.launch.env import command

#: with few and with many rows per expert: 64 and 1024
SHAPES = (Shape("few", 512, 2048, 768, 64, 8), Shape("many", 8192, 2048, 768, 64, 8))
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
#: by op: its dtypes, and its backends besides torch
OPS: dict[str, tuple[tuple[torch.dtype, ...], tuple[str, ...]]] = {
    "sort_by_expert": ((torch.int64,), ("triton",)),
    "permute": (FLOATS, ("triton",)),
    "combine": (FLOATS, ("triton",)),
    "expert_mlp": (FLOATS, ("hybrid", "triton")),
    "router_logits": (FLOATS, ("triton",)),
    "topk_gate": ((torch.float32,), ("triton",)),
}
#: timed runs, after one that is not timed
RUNS = 11


def call(op: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Callable[[str], object]:
    """Return a function that runs an op with a backend, forward and backward, on inputs that are made here."""
    floats = dtype if dtype.is_floating_point else torch.bfloat16
    batch = make_batch(shape, "uniform", floats, device)
    order = sort_by_expert(batch.ids_TK, shape.E, backend="torch")
    gate_up, down = expert_weights(shape, floats, device) if op == "expert_mlp" else (None, None)
    router_ED = torch.randn(shape.E, shape.D, device=device, requires_grad=True)
    logits_TE, dlogits_TE = spread_logits(shape, device), torch.randn(shape.T, shape.E, device=device)
    rows_RD = torch.randn(shape.rows, shape.D, device=device).to(floats).requires_grad_()

    def run(backend: str) -> object:
        if op == "sort_by_expert":
            return sort_by_expert(batch.ids_TK, shape.E, backend=backend)
        if op == "router_logits":
            y = router_logits(batch.x_TD, router_ED, backend)
            return torch.autograd.grad(y, (batch.x_TD, router_ED), dlogits_TE)
        if op == "topk_gate":
            gate = topk_gate(logits_TE, shape.K, backend=backend)
            return torch.autograd.grad(gate.weights_TK, logits_TE, batch.weights_TK.detach())
        if op == "permute":
            y = permute(batch.x_TD, order, backend=backend)
            return torch.autograd.grad(y, batch.x_TD, rows_RD.detach())
        if op == "combine":
            y = combine(rows_RD, order, backend=backend)
            return torch.autograd.grad(y, rows_RD, batch.dy_TD)
        y = expert_mlp(batch.x_TD, batch.weights_TK, order, gate_up, down, backend)
        return torch.autograd.grad(y, (batch.x_TD, batch.weights_TK, gate_up, down), batch.dy_TD)

    return run


def seconds(run: Callable[[str], object], backend: str, timer: Timer) -> float:
    def step(mark: Callable[[], None]) -> object:
        mark()
        found = run(backend)
        mark()
        return found

    timer.sample(step, 1)
    return median(part[0] for part in timer.sample(step, RUNS))


def measure(device: torch.device) -> Iterator[tuple[str, str]]:
    """Print the times of every case, and yield its key and its fastest backend."""
    timer = Timer(device)
    for shape in SHAPES:
        many = shape.rows >= MANY_ROWS * shape.E
        assert BUCKETS[many] == shape.name
        for op, (dtypes, others) in OPS.items():
            for dtype in dtypes:
                right = [name for name in others if name != "hybrid" or dtype == torch.bfloat16]
                right = ["torch", *(name for name in right if auto._works(op, name, dtype, device))]
                key, run, times = auto.key(op, dtype, many), call(op, shape, dtype, device), {}
                for name in right:
                    try:
                        times[name] = seconds(run, name, timer)
                    except Exception as error:  # it does not compile for this size, or there is no memory
                        print(f"{key:32} {name} fails: {brief(error)}", flush=True)
                print(f"{key:32}", *(f"{name} {time * 1e3:.3f} ms" for name, time in times.items()), flush=True)
                timer.release()
                if times:
                    yield key, min(times, key=times.__getitem__)


@command
def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=auto.TABLE, help="(default: kernels/auto.json of this checkout)")
    out = parser.parse_args(argv).out
    if not torch.cuda.is_available():
        print("There is no GPU here, so there is nothing to measure; kernels/auto.json stays as it is.")
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    tables = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    partial = out.with_name(f"{out.name}.partial")
    tables[arch_of(device)] = found = {}
    for key, backend in measure(device):
        found[key] = backend
        partial.write_text(json.dumps(tables, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        partial.replace(out)
    print(f"wrote {out}: {arch_of(device)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
