"""Parts of benchmarks/gpu/run.py: each checks or measures one thing on the GPU, or rehearses it on the CPU.

    python benchmarks/gpu/parts.py PART

A finding is one line: name, PASS, FAIL or a number, and details. The command exits with 1 if a check has failed.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import checkout  # noqa: F401

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.checkout import ROOT
from benchmarks.shared.agreement import TOLERANCE, brief, errors
from benchmarks.shared.options import Parser
from benchmarks.shared.records import facts_line
from benchmarks.shared.shapes import BY_NAME, Shape, expert_weights, make_batch
from benchmarks.shared.timing import Timer, graphed, yardstick
from equimoe.kernels.expert_mlp import expert_mlp
from equimoe.kernels.matmul_tiles import MatmulTile, arch_of
from equimoe.kernels.sort_by_expert import sort_by_expert
from equimoe.launch.env import command
from equimoe.moe import CapacityConfig, MoE, MoEConfig, Step
from equimoe.moe.parallel.pair_attention import PAIR_ATTENTION

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
SHAPES = [BY_NAME[name] for name in (("30B-b", "Qwen3-30B-8k", "Mixtral-8x7B-8k") if ON_GPU else ("tiny-a",))]
TABLE = ROOT / "kernels" / "matmul_tiles.py"
#: kind of tile -> the candidates: rows, columns, depth, warps, stages
CANDIDATES = {
    "gemm": [(128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4)],
    "gated": [(128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 3), (64, 128, 64, 4, 4)],
    "gated_grad": [(128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 64, 64, 8, 3), (64, 64, 64, 8, 3)],
    "wgrad": [(128, 256, 64, 8, 4), (128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (256, 128, 64, 8, 3)],
}
#: those of the rehearsal
SMALL = [(16, 16, 16, 1, 1), (32, 16, 16, 1, 1)]
failed = False


def say(name: str, verdict: str | bool, detail: object = "") -> None:
    """Print one finding; False means that a check has failed."""
    global failed
    if isinstance(verdict, bool):
        failed |= not verdict
        verdict = "PASS" if verdict else "FAIL"
    print(f"{name} | {verdict} | {detail}", flush=True)


@contextmanager
def checking(name: str) -> Iterator[None]:
    """Report an exception as a failed check."""
    try:
        yield
    except Exception as error:
        say(name, False, brief(error))


def expert_path(shape: Shape, routing: str = "uniform") -> Callable[[], tuple[Tensor, ...]]:
    """Return a call that computes output and gradients of the experts with Triton's kernels, in bf16."""
    batch = make_batch(shape, routing, torch.bfloat16, DEVICE)
    gate_up, down = expert_weights(shape, torch.bfloat16, DEVICE)

    def run() -> tuple[Tensor, ...]:
        order = sort_by_expert(batch.ids_TK, shape.E, backend="triton")
        y_TD = expert_mlp(batch.x_TD, batch.weights_TK, order, gate_up, down, backend="triton")
        return y_TD.detach(), *torch.autograd.grad(y_TD, (batch.x_TD, batch.weights_TK, gate_up, down), batch.dy_TD)

    return run


def seconds(call: Callable[[], Any], runs: int = 9) -> float:
    """Return the median time of a call."""

    def step(mark: Callable[[], None]) -> None:
        mark()
        call()
        mark()

    timer = Timer(DEVICE)
    timer.sample(step, 3 if ON_GPU else 1)
    return median(parts[0] for parts in timer.sample(step, runs if ON_GPU else 1))


# ---- is it right?


def facts() -> None:
    print(facts_line())
    if ON_GPU:
        properties = torch.cuda.get_device_properties(0)
        say("device", properties.name, f"{properties.total_memory >> 30} GiB, {properties.multi_processor_count} SMs")
        say("versions", torch.version.cuda or "", f"triton {__import__('triton').__version__}")
    rates = yardstick(Timer(DEVICE), torch.bfloat16, quick=not ON_GPU)
    say("matrix product", f"{rates.flops / 1e12:.4g} TFLOP/s")
    say("copy", f"{rates.bytes / 1e12:.3g} TB/s")


def layer() -> None:
    """Compare a layer's output and gradients with the same layer in fp64 on the host."""
    for dtype in (torch.float32, torch.bfloat16):
        config = MoEConfig(hidden_size=64, intermediate_size=48, num_experts=8, top_k=2, shared_intermediate_size=32)
        torch.manual_seed(0)
        # fp32 first, so that both route alike: the router computes in fp32, and x is exact in every dtype
        wanted = MoE(config).to(dtype).double()
        x_TD = torch.randn(200, 64).to(dtype)
        results = []
        for backend, device, kind in (("torch", torch.device("cpu"), torch.float64), ("triton", DEVICE, dtype)):
            config = MoEConfig(**{**vars(config), "backend": backend})
            one = MoE(config).to(device, kind)
            one.load_state_dict(wanted.state_dict())
            x = x_TD.to(device, kind).requires_grad_()
            y = one(x)
            y.backward(torch.ones_like(y))
            results.append({"output": y.detach(), "x": x.grad, **{n: p.grad for n, p in one.named_parameters()}})
        for name, want in results[0].items():
            by_norm, by_row = errors(results[1][name].cpu(), want)
            limits = [3 * limit for limit in TOLERANCE[dtype]]
            say(f"{dtype}, {name}", by_norm <= limits[0] and by_row <= limits[1], f"{by_norm:.1e}, {by_row:.1e}")


def attention() -> None:
    """Compare the fused attention of context parallelism with tiles of scores in fp64."""
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    for heads, groups, width, v_width in ((8, 8, 64, 64), (8, 2, 128, 128), (4, 4, 192, 128)):
        q, do = (torch.randn(2, heads, 128, w, device=DEVICE).to(dtype) for w in (width, v_width))
        k, v = (torch.randn(2, groups, 128, w, device=DEVICE).to(dtype) for w in (width, v_width))
        for causal in (True, False):
            name = f"{heads} heads of {width}, {groups} of keys, causal {causal}"
            with checking(name):
                found = []
                for way, kind in (("tiles", torch.float64), ("flash", dtype)):
                    one, given = PAIR_ATTENTION[way], [t.to(kind) for t in (q, k, v)]
                    out, lse, rest = one.forward(*given, causal, None)
                    grads = one.backward(do.to(kind), *given, out.to(kind), lse, causal, None, rest)
                    found.append([out, lse[..., None], *grads])
                worst = max(errors(a, b)[0] for a, b in zip(found[1], found[0], strict=True))
                say(name, worst < 2 * TOLERANCE[dtype][0], f"{worst:.1e}")


def waits() -> None:
    """Run a layer forward and backward while torch raises an error for every wait of the host."""
    for backend in ("triton", "torch"):
        for autocast in (False, True):
            name = f"{backend}, autocast {autocast}"
            kind = torch.float32 if autocast else torch.bfloat16
            one = MoE(MoEConfig(512, 256, 16, 2, backend=backend)).to(DEVICE, kind)  # type: ignore[arg-type]
            x = torch.randn(2048, 512, device=DEVICE, dtype=kind, requires_grad=True)
            with checking(name):
                try:
                    for attempt in range(3):
                        if attempt:  # the first compiles
                            torch.cuda.set_sync_debug_mode("error")
                        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                            y = one(x)
                        y.float().square().mean().backward()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                say(name, True)


def repeatability() -> None:
    """Compute the same twenty times; all bits must be equal."""
    for shape in SHAPES[:2]:
        run = expert_path(shape, "zipf")
        first = run()
        again = all(all(map(torch.equal, first, run())) for _ in range(20 if ON_GPU else 2))
        say(shape.name, again)


def collectives() -> None:
    """Train a layer under DDP and FSDP2, and call every collective for every dtype that we send, with one rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    wraps: dict[str, Callable[[nn.Module], nn.Module]] = {
        "DDP": nn.parallel.DistributedDataParallel,
        "FSDP2": lambda module: fully_shard(module, mesh=init_device_mesh(DEVICE.type, (1,))),
    }
    if ON_GPU:
        torch.cuda.set_device(DEVICE)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        method = f"file://{folder}/store"
        dist.init_process_group("cpu:gloo,cuda:nccl" if ON_GPU else "gloo", init_method=method, rank=0, world_size=1)
        for name, wrap in wraps.items():
            with checking(name):
                one = wrap(MoE(MoEConfig(64, 32, 8, 2)).to(DEVICE))
                optimizer = torch.optim.AdamW(one.parameters(), fused=True)
                for _ in range(2):
                    one(torch.randn(4, 16, 64, device=DEVICE)).square().mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()
                say(name, True)
        for dtype in (torch.int64, torch.int32, torch.uint8, torch.bfloat16, torch.float32, torch.float64):
            with checking(str(dtype)):
                sent = torch.ones(8, dtype=dtype, device=DEVICE)
                received = torch.zeros_like(sent)
                if ON_GPU:  # gloo has none
                    dist.all_to_all_single(received, sent, [8], [8])
                dist.all_gather_into_tensor(received, sent)
                dist.all_reduce(received)
                say(str(dtype), bool(torch.equal(sent, received)))
        dist.destroy_process_group()


def training() -> None:
    """Train the quickstart on host and device, and resume on the device; the losses must agree."""
    steps = 20 if ON_GPU else 3
    options = {"parallel.ep": 1, "log.every": 1, "log.eval_every": 0, "checkpoint.every": 0, "log.trackers": "none"}
    options |= {} if ON_GPU else {"data.seq_len": 32, "data.global_batch": 2, "data.micro_batch": 2}
    given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    with tempfile.TemporaryDirectory() as folder:

        def start(where: str, last: int, *more: str, host: bool = False) -> subprocess.Popen[bytes]:
            environment = {**os.environ, "OMP_NUM_THREADS": "4"} | ({"CUDA_VISIBLE_DEVICES": ""} if host else {})
            run = ["--recipe", "quickstart", "--steps", str(last), "--run-dir", f"{folder}/{where}"]
            arguments = [sys.executable, "-m", "equimoe.launch.train", *run, *given, *more]
            return subprocess.Popen(arguments, env=environment)

        def losses(where: str) -> dict[int, float]:
            lines = map(json.loads, Path(folder, where, "metrics.jsonl").read_text().splitlines())
            return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}

        on_host, on_device = start("host", steps, host=True), start("device", steps)
        say("trains", on_device.wait() == 0 and on_host.wait() == 0)
        apart = [abs(loss - losses("device")[step]) for step, loss in losses("host").items()]
        say("losses of host and device", len(apart) == steps and max(apart) < 0.02, f"{max(apart):.1e} apart")
        say("resumes", start("device", steps + 5, "--resume").wait() == 0 and len(losses("device")) == steps + 5)


# ---- why is it as fast as it is?


def profile() -> None:
    """Print the kernels that take longest."""
    for shape in SHAPES:
        run = expert_path(shape)
        run()
        with torch.profiler.profile() as found:
            for _ in range(3):
                run()
        attribute = "self_device_time_total" if ON_GPU else "self_cpu_time_total"
        for event in sorted(found.key_averages(), key=lambda event: -getattr(event, attribute))[:14]:
            say(shape.name, f"{getattr(event, attribute) / 3:.0f} us", f"{event.count / 3:.0f}x {event.key[:70]}")


def sweep() -> None:
    """Time the tiles of every product, if their results are right; print the best as a change of the table."""
    from equimoe.kernels.grouped_gemm import triton_ops as gemm

    shipped = gemm.shipped_tile
    #: kind of tile -> for each shape, the times of the tiles that are right there
    times: dict[str, list[dict[MatmulTile, float]]] = {kind: [] for kind in CANDIDATES}
    for shape in SHAPES:
        run = expert_path(shape)
        wanted = run()
        for kind, candidates in CANDIDATES.items():
            times[kind].append({})
            for numbers in candidates if ON_GPU else SMALL:
                tile = MatmulTile(*numbers)
                try:
                    gemm.shipped_tile = lambda op, *rest, kind=kind, tile=tile: (
                        tile if op == kind else shipped(op, *rest)
                    )
                    right = all(
                        errors(a, b)[0] < TOLERANCE[torch.bfloat16][0] for a, b in zip(run(), wanted, strict=True)
                    )
                    if right:
                        times[kind][-1][tile] = seconds(run, 5)
                    said = f"{1e6 * times[kind][-1][tile]:.0f} us" if right else "WRONG"
                    say(f"{shape.name}, {kind}", said, numbers)
                except Exception as error:  # a tile that does not fit the chip
                    say(f"{shape.name}, {kind}", "refused", f"{numbers} {brief(error)}")
                finally:
                    gemm.shipped_tile = shipped
        show_best(times)  # after each shape: there may be no time for the others


def show_best(times: Mapping[str, Sequence[Mapping[MatmulTile, float]]]) -> None:
    """Print the best tile of every kind so far, and all of them as a change of the table."""
    tiles = {kind: tile for kind, by_shape in times.items() if (tile := fastest(by_shape))}
    for kind in times:
        say(f"best, {kind}", tuple_of(tiles[kind]) if kind in tiles else "none is right on all shapes")
    before = TABLE.read_text()
    # in the rehearsal, the table has no tiles of the interpreter
    after = with_tiles(before, arch_of(DEVICE) if ON_GPU else "sm_90", tiles)
    name = str(TABLE.relative_to(ROOT))
    print("\nto apply with git apply:\n")
    print("".join(difflib.unified_diff(before.splitlines(True), after.splitlines(True), f"a/{name}", f"b/{name}")))


def fastest(times: Sequence[Mapping[MatmulTile, float]]) -> MatmulTile | None:
    """Return the tile that is fastest in the geometric mean, of those that every shape has; None if there is none."""
    everywhere = [tile for tile in times[0] if all(tile in one for one in times)]
    return min(everywhere, key=lambda tile: prod(one[tile] for one in times), default=None)


def tuple_of(tile: MatmulTile) -> str:
    return ", ".join(map(str, tile[:5]))


def with_tiles(source: str, arch: str, tiles: Mapping[str, MatmulTile]) -> str:
    """Return the source of the table with these tiles for many rows on ``arch``."""
    head = f'("{arch}", "many"): {{\n'
    before, found, rest = source.partition(head)
    entries, end, after = rest.partition("    },\n")
    for kind, tile in tiles.items():
        entries = re.sub(rf'("{kind}": MatmulTile)\(.*\)', rf"\1({tuple_of(tile)})", entries)
    return before + found + entries + end + after


def graphs() -> None:
    """Capture the expert path, and a layer in evaluation, as CUDA graphs."""
    for shape in SHAPES[:2]:
        with checking(shape.name):
            run = expert_path(shape)
            wanted, replay = run(), graphed(run, DEVICE)
            equal = replay is not None and all(map(torch.equal, wanted, replay()))
            detail = (
                f"{1e3 * seconds(run):.3f} ms, as a graph {1e3 * seconds(replay):.3f} ms" if replay else "not captured"
            )
            say(shape.name, equal, detail)
    for name, capacity in (("layer", None), ("layer with a capacity", CapacityConfig())):
        with checking(name), torch.no_grad():
            layer = MoE(MoEConfig(512, 256, 16, 2, capacity=capacity)).to(DEVICE, torch.bfloat16).eval()
            call = partial(layer, torch.randn(2048, 512, device=DEVICE, dtype=torch.bfloat16))
            output, replay = call(), graphed(call, DEVICE)
            say(name, replay is not None and torch.equal(output, replay()))


def compiled() -> None:
    """Compile the expert path, and a layer whose step is driven, as one graph each."""
    shape = SHAPES[0]
    batch = make_batch(shape, "uniform", torch.bfloat16, DEVICE)
    gate_up, down = expert_weights(shape, torch.bfloat16, DEVICE)

    def path(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        order = sort_by_expert(ids, shape.E, backend="triton")
        return expert_mlp(x, weights, order, gate_up, down, backend="triton")

    with checking("expert path"):
        call = torch.compile(path, fullgraph=True, dynamic=True)
        for tokens in (shape.T, shape.T // 2, 777):
            call(batch.x_TD[:tokens].detach(), batch.weights_TK[:tokens].detach(), batch.ids_TK[:tokens])
        say("expert path", True, "one graph")
    with checking("layer"):
        layer = MoE(MoEConfig(512, 256, 16, 2, backend="triton")).to(DEVICE, torch.bfloat16)
        step, one = Step.of(layer), torch.compile(layer, fullgraph=True)
        for _ in range(3):
            with step.micro_batch():
                one(torch.randn(2048, 512, device=DEVICE, dtype=torch.bfloat16)).sum().backward()
            step.end()
        say("layer", True, "one graph")


PARTS = {
    part.__name__: part
    for part in (facts, layer, attention, waits, repeatability, collectives, training, profile, sweep, graphs, compiled)
}


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("part", choices=PARTS)
    PARTS[parser.parse_args(argv).part]()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
