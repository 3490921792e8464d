"""Measures attention within the documents of packed sequences, forward and backward, in all the ways it is computed.

    python benchmarks/packed_attention.py [--rounds 7] [--dtype float32]

The ways take turns. "joined" is causal attention over whole sequences, as without documents; "one_by_one", "mask" and
"blocks" are those of ``equimoe/moe/model/attend.py`` ("blocks", FlexAttention, on a GPU only). Every way must first
agree with "mask". The lengths of documents are geometrically distributed around their mean.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent)
    import checkout  # noqa: F401

import torch
from torch import Tensor

from benchmarks.shared.options import Parser, positive
from benchmarks.shared.records import load_averages
from benchmarks.shared.timing import Step, Timer, interleave
from equimoe.launch.env import command
from equimoe.moe.model.attend import WITHIN, causal_attention
from equimoe.moe.model.documents import Documents, document_numbers, document_starts

#: name -> sequences, positions, query heads, key/value heads, head width, mean length of a document
CASES: dict[str, tuple[int, ...]] = {
    "quickstart, short documents": (8, 256, 4, 4, 64, 20),
    "quickstart, long documents": (8, 256, 4, 4, 64, 100),
    "quickstart, one document each": (8, 256, 4, 4, 64, 1 << 40),
    "2,048 positions, tiny documents": (2, 2048, 8, 2, 64, 10),
    "2,048 positions, short documents": (2, 2048, 8, 2, 64, 300),
    "2,048 positions, long documents": (2, 2048, 8, 2, 64, 3000),
    "4,096 positions, wide heads": (1, 4096, 16, 4, 128, 400),
}


def inputs(case: str, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], Documents]:
    """Return q, k, v and the gradient of the output, and the documents."""
    sequences, positions, heads, kv_heads, width, mean = CASES[case]
    generator = torch.Generator().manual_seed(0)
    sizes = (heads, kv_heads, kv_heads, heads)
    tensors = [torch.randn(sequences, n, positions, width, generator=generator).to(device, dtype) for n in sizes]
    ends = torch.rand(sequences, positions, generator=generator) < 1 / mean
    starts = document_starts(document_numbers(ends.long(), 1)).to(device)
    return tensors, Documents(starts)


def measure(case: str, dtype: torch.dtype, device: torch.device, rounds: int) -> dict[str, float]:
    """Return the median milliseconds of each way."""
    (*qkv, gradient), documents = inputs(case, dtype, device)
    qkv = [t.requires_grad_() for t in qkv]
    names = ["joined", "one_by_one", "mask", *(["blocks"] if device.type == "cuda" else [])]

    def attend(name: str) -> Tensor:
        if name == "joined":
            return causal_attention(*qkv)
        return WITHIN[name](*qkv, Documents(documents.starts_BS), None)

    right, tolerance = attend("mask"), 1e-4 if dtype == torch.float32 else 5e-2
    for name in names[1:]:
        assert (attend(name) - right).abs().max() < tolerance, name

    def step(name: str) -> Step:
        def run(mark: Any) -> None:
            mark()
            attend(name).backward(gradient)
            mark()

        return run

    parts, _ = interleave(Timer(device), {name: step(name) for name in names}, rounds, 0.0, tuple(names))
    return {name: 1e3 * median(sum(run) for run in runs) for name, runs in parts.items()}


@command
def main(argv: list[str] | None = None) -> int:
    """Print a table."""
    parser = Parser(__doc__)
    parser.add_argument("--rounds", type=positive, default=7, help="runs of each way (default %(default)s)")
    parser.add_argument("--threads", type=positive, default=1, help="(default %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default %(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{device.type}, torch {torch.__version__}, {args.dtype}, threads {args.threads}, load {load_averages()}")
    for case in CASES:
        found = measure(case, getattr(torch, args.dtype), device, args.rounds)
        base = found["joined"]
        row = "  ".join(f"{name} {ms:8.1f} ms ({base / ms:4.2f}x)" for name, ms in found.items())
        print(f"{case:<34}{row}", flush=True)
    print(f"load average after {load_averages()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
