"""Predicts the speed of the experts' kernels on an H200 from the compile gate's table. Nothing is run or measured.

    python benchmarks/kernels/predict.py [--shapes 30B-b,Qwen3-30B-8k]

Each product takes the longest of four times: that of its tiles, of its traffic in HBM, and of its operations at the
rate that no Triton kernel has exceeded. A tile takes, for each step, as many clocks as the busiest of the tensor cores,
the shared memory and the L2 cache needs, and a prologue and an epilogue, which other blocks of the multiprocessor hide
in part. The tiles, their matrix instructions, pipelines and blocks per multiprocessor come from compiled.tsv.

The assumptions are constants below. They come from documents and from the speed that others published for a tile of
128 x 256, and errors of 20 % are likely. The order of two kernels depends on them less than their speed does.
"""

# T tokens, D hidden, F expert width, E experts, K top-k, R = T*K routed rows.

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import checkout  # noqa: F401

import torch

from benchmarks.kernels.binary import Row, table
from benchmarks.shared.options import Parser
from benchmarks.shared.shapes import Shape, parse
from equimoe.launch.env import command

#: an H200: multiprocessors, clocks per second under load, operations and bytes of shared memory per clock of each
MULTIPROCESSORS, CLOCK, OPERATIONS, SHARED = 132, 1.70e9, 4096, 128
#: bytes per second from the L2 cache and from HBM, and the share of the latter that a gather reaches
L2, HBM, GATHER = 8.5e12, 4.3e12, 0.8
#: operations per second that a product of large dense matrices in Triton reaches
MOST = 740e12
#: clocks from the first load to the first product; and after the last one, in all and per KiB that is loaded or stored
PROLOGUE, EPILOGUE, PER_KIB = 1500, 400, 34
#: clocks until data from the L2 cache or HBM arrive: if a pipeline holds no more than two steps, each step waits for it
LATENCY = 900
#: clocks of a step in all, relative to the busiest unit's: with one block per multiprocessor, and with more
ALONE, TOGETHER = 1.10, 1.04
#: random routings over which times are averaged
DRAWS = 8
#: seconds to sort rows and map tiles, forward and backward
MAPS = (42e-6, 30e-6)
#: TFLOP/s forward and backward: what the kernels should reach now, and in the end
MARKS = {
    "30B-b": ((490, 505), (600, 600)),
    "Qwen3-30B-8k": ((450, 430), (500, 500)),
    "Mixtral-8x7B-8k": ((610, 565), (700, 700)),
}


class Tile(NamedTuple):
    """One kernel of the table."""

    m: int
    n: int
    k: int
    instruction: int
    blocks: int
    depth: int

    @classmethod
    def of(cls, row: Row) -> Tile:
        m, n, k = map(int, re.findall(r"\d+", row.tile)[:3])
        return cls(m, n, k, int(row.binary.matrix.partition("n")[2]), row.binary.blocks, row.binary.depth)

    def units(self) -> dict[str, float]:
        """Return the clocks that each unit needs for one step."""
        reads = (self.m // 64) * (self.n // self.instruction) * (self.k // 16) * (64 + self.instruction) * 16 * 2
        copied = (self.m + self.n) * self.k * 2
        return {
            "tensor": 2 * self.m * self.n * self.k / OPERATIONS,
            "shared": (reads + copied) / SHARED,
            "L2": copied / (L2 / MULTIPROCESSORS / CLOCK),
        }

    def step(self) -> float:
        units = self.units()
        clocks = max(units.values()) * (ALONE if self.blocks == 1 else TOGETHER)
        return clocks if self.depth > 2 else max(clocks, (LATENCY + 0.2 * units["tensor"]) / self.blocks)

    def seconds(self, tiles: int, steps: float, kib: float) -> float:
        """Return the time of ``tiles`` tiles of ``steps`` steps; after them a tile loads or stores ``kib`` KiB."""
        clocks = steps * self.step() + (PROLOGUE + EPILOGUE + PER_KIB * kib) / self.blocks
        waves = tiles / MULTIPROCESSORS
        return (-(-tiles // MULTIPROCESSORS) if waves < 20 else waves + 0.5) * clocks / CLOCK


def kernels() -> dict[str, Tile]:
    """Return the tiles of all products on sm_90, in bf16 and with many rows per expert."""
    rows, case = table(), "bf16 many even silu"
    labels = {
        "up": f"up_kernel {case}",
        "down": f"gemm_kernel {case}",
        "dh": f"up_grad_kernel {case}",
        "ddown": f"wgrad_kernel {case}",
        "dgate_up": f"wgrad_kernel {case} 2",
        "dx": f"gemm_kernel {case} 2",
    }
    return {name: Tile.of(rows["sm_90", label]) for name, label in labels.items()}


def counts(s: Shape, draw: int) -> torch.Tensor:
    """Return the rows of each expert if all choices are equally likely."""
    scores = torch.rand(s.T, s.E, generator=torch.Generator().manual_seed(draw))
    return torch.bincount(scores.topk(s.K, 1).indices.flatten(), minlength=s.E)


def predict(s: Shape, tiles: dict[str, Tile]) -> dict[str, tuple[float, float]]:
    """Return seconds and TFLOP/s of each product of the experts, forward and backward, and of a sum over k."""
    rows_DE = torch.stack([counts(s, draw) for draw in range(DRAWS)])
    gemm, weight = 2 * s.rows * s.D * s.F, 2 * s.E * s.D * s.F
    token, wide, routed = 2 * s.T * s.D, 2 * s.rows * s.F, 2 * s.rows * s.D  # bytes

    def ceil(a: int, b: int) -> int:
        return -(-a // b)

    def by_rows(name: str, flops: int, columns: int, depth: int, size: int, stored: float) -> tuple[float, float]:
        t = tiles[name]
        numbers = ((rows_DE + t.m - 1) // t.m).sum(1) * ceil(columns, t.n)
        seconds = [t.seconds(int(n), depth / t.k, stored * t.m * t.n * 2 / 1024) for n in numbers]
        return bound(sum(seconds) / DRAWS, flops, size)

    def by_experts(name: str, flops: int, m: int, n: int, size: int) -> tuple[float, float]:
        t = tiles[name]
        steps = float(((rows_DE + t.k - 1) // t.k).double().mean())
        return bound(t.seconds(s.E * ceil(m, t.m) * ceil(n, t.n), steps, t.m * t.n * 2 / 1024), flops, size)

    def bound(seconds: float, flops: int, size: int) -> tuple[float, float]:
        seconds = max(seconds, size / HBM, flops / MOST)
        return seconds, flops / seconds / 1e12

    # stored: what the epilogue loads and stores, relative to the product's tile in 16 bits
    return {
        "up": by_rows("up", 2 * gemm, 2 * s.F, s.D, token + 2 * weight + 3 * wide, 1.5),
        "down": by_rows("down", gemm, s.D, s.F, wide + weight + routed, 1),
        "dh": by_rows("dh", gemm, s.F, s.D, token + weight + 5 * wide, 5),
        "ddown": by_experts("ddown", gemm, s.D, s.F, token + wide + weight),
        "dgate_up": by_experts("dgate_up", 2 * gemm, 2 * s.F, s.D, token + 2 * wide + 2 * weight),
        "dx": by_rows("dx", 2 * gemm, s.D, 2 * s.F, 2 * wide + 2 * weight + routed, 1),
        "sum": ((routed + token + 8 * s.rows) / (HBM * GATHER), 0.0),
    }


def totals(s: Shape, found: dict[str, tuple[float, float]]) -> tuple[float, float]:
    """Return TFLOP/s forward and backward."""
    forward = sum(found[name][0] for name in ("up", "down", "sum")) + MAPS[0]
    backward = sum(found[name][0] for name in ("dh", "ddown", "dgate_up", "dx", "sum")) + MAPS[1]
    return s.forward_flops / forward / 1e12, s.backward_flops / backward / 1e12


@command
def main(arguments: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--shapes", default=",".join(MARKS), help="(default: %(default)s)")
    try:
        shapes = parse(parser.parse_args(arguments).shapes)
    except ValueError as error:
        parser.error(str(error))
    tiles = kernels()
    print(
        "Predicted for an H200 in bf16 with the shipped Triton kernels; nothing was measured. Assumptions:\n"
        f"  {MULTIPROCESSORS} multiprocessors at {CLOCK / 1e9:.2f} GHz; each, per clock, {OPERATIONS} operations and\n"
        f"  {SHARED} bytes of shared memory; L2 {L2 / 1e12} TB/s, HBM {HBM / 1e12} TB/s;\n"
        f"  at most {MOST / 1e12:.0f} TFLOP/s; prologue {PROLOGUE} clocks, epilogue {EPILOGUE} and {PER_KIB} per KiB;\n"
        "  routing uniformly at random; no router\n"
    )
    print("clocks per step    tile           tensor shared    L2  blocks steps held  at most")
    for name, t in tiles.items():
        units = t.units()
        clocks = "".join(f"{clocks:7.0f}" for clocks in units.values())
        share = units["tensor"] / max(units.values())
        print(f"  {name:16} {f'{t.m}x{t.n}x{t.k}':13}{clocks} {t.blocks:7} {t.depth:10} {share:7.0%} of peak")
    print("\npredicted TFLOP/s    forward  mark   goal   backward  mark   goal   each product")
    for shape in shapes:
        found = predict(shape, tiles)
        forward, backward = totals(shape, found)
        marks, goals = MARKS.get(shape.name, (("-", "-"), ("-", "-")))
        each = " ".join(f"{product} {rate:.0f}" for product, (_, rate) in found.items() if rate)
        sums = f"sum over k {found['sum'][0] * 1e6:.0f} us"
        print(
            f"  {shape.name:18} {forward:7.0f} {marks[0]:>5} {goals[0]:>6}"
            f" {backward:10.0f} {marks[1]:>5} {goals[1]:>6}   {each}; {sums}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
