"""Verifies, shows and rewrites checkpoints: ``python -m equimoe.launch.checkpoint verify runs/quickstart``.

DIR is the folder of a checkpoint, or of a run; then it means the run's newest valid checkpoint, and for ``verify`` all.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import Any

from ..moe import checkpoint
from ..moe.checkpoint import tools
from ..moe.checkpoint.manifest import printable
from . import env
from .text import counted
from .usage import Parser, a_path, run_on_files


@env.command
def main(argv: list[str] | None = None) -> None:
    """Entry point. Exits with 67 if a checkpoint is damaged, 64 for a wrong option, 73 if a file cannot be written."""
    arguments = _parser().parse_args(argv)
    run_on_files(COMMANDS[arguments.command], arguments)


def verify(arguments: argparse.Namespace) -> None:
    """Read every byte and compare it with the checksums."""
    damaged = []
    for path in tools.find(arguments.dir):
        try:
            manifest = checkpoint.read_manifest(path)
            tensors = checkpoint.contents(path, manifest)
            size = sum(entry["bytes"] for entry in manifest["files"].values())
            what = f"{counted(len(tensors), 'tensor')} in {counted(len(manifest['files']), 'file')}, {size:,} bytes"
            print(f"{printable(str(path))}: valid, step {manifest['step']}, {what}")
        except checkpoint.CheckpointError as error:
            damaged.append(str(error))
    for line in damaged:
        print(f"error: {line}", file=sys.stderr)
    if damaged:
        sys.exit(env.CHECKPOINT)


def show(arguments: argparse.Namespace) -> None:
    """Print step, position, mesh and tensors."""
    path, manifest = tools.newest_valid(arguments.dir)
    tensors = checkpoint.contents(path, manifest)
    print(f"{printable(str(path))}: step {manifest['step']}")
    for name, value in manifest["position"].items():
        if name == "config":
            print("config:")
            print("\n".join(f"  {line}" for line in _flat(value)))
        else:
            print(f"{printable(name)}: {_text(value)}")
    rows = [
        (printable(name), str(entry.dtype).removeprefix("torch."), _shape(entry.shape), entry)
        for name, entry in sorted(tensors.items())
    ]
    widths = [max(len(str(row[column])) for row in [("tensor", "dtype", "shape"), *rows]) for column in range(3)]
    print(f"\n{'tensor':<{widths[0]}}  {'dtype':<{widths[1]}}  {'shape':<{widths[2]}}  {'bytes':>15}  parts")
    total = 0
    for name, dtype, shape, entry in rows:
        size = math.prod(entry.shape) * entry.dtype.itemsize
        total += size
        parts = len(entry.chunks)
        print(f"{name:<{widths[0]}}  {dtype:<{widths[1]}}  {shape:<{widths[2]}}  {size:>15,}  {parts}")
    print(f"{counted(len(rows), 'tensor')}, {total:,} bytes")


def reshard(arguments: argparse.Namespace) -> None:
    """Write the same state in another number of files."""
    if arguments.files < 1:
        raise ValueError(f"--files={arguments.files}: must be at least 1")
    path, manifest = tools.newest_valid(arguments.dir)
    final = tools.reshard(path, manifest, arguments.out, arguments.files)
    files = checkpoint.read_manifest(final)["files"]
    shards = [name for name in files if name.endswith(".safetensors")]
    size = sum(entry["bytes"] for entry in files.values())
    print(f"wrote {printable(str(final))}: step {manifest['step']}, {counted(len(shards), 'file')}, {size:,} bytes")


def export(arguments: argparse.Namespace) -> None:
    """Write the model's weights as plain safetensors files."""
    if arguments.file_bytes < 1:
        raise ValueError(f"--file-bytes={arguments.file_bytes}: must be at least 1")
    path, manifest = tools.newest_valid(arguments.dir)
    files = tools.export(path, manifest, arguments.out, arguments.file_bytes)
    size = sum(file.stat().st_size for file in files)
    out = printable(str(arguments.out))
    print(f"wrote {out}: weights of step {manifest['step']}, {counted(len(files), 'file')}, {size:,} bytes")


COMMANDS = {"verify": verify, "show": show, "reshard": reshard, "export": export}
#: what ``--out`` means for each command that writes
OUT = {
    "reshard": "folder in which the new checkpoint gets a folder of its own, as in OUT/step-00000100",
    "export": "new folder for the files themselves; it must not exist",
}


def _flat(value: Any, prefix: str = "") -> list[str]:
    """Format nested settings as lines ``section.field: value``."""
    if isinstance(value, dict) and value:
        return [line for name, item in value.items() for line in _flat(item, f"{prefix}.{name}" if prefix else name)]
    return [f"{printable(prefix)}: {_text(value)}"]


def _text(value: Any) -> str:
    return printable(value if isinstance(value, str) else json.dumps(value))


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _parser() -> argparse.ArgumentParser:
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = Parser(
        prog="python -m equimoe.launch.checkpoint", description=f"{summary.split(':')[0]}. {' '.join(more.split())}"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="verify|show|reshard|export")
    for name, run in COMMANDS.items():
        one = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        one.add_argument("dir", type=a_path, metavar="DIR", help="folder of a checkpoint or of a run")
        if name in ("reshard", "export"):
            one.add_argument("--out", type=a_path, required=True, help=OUT[name])
        if name == "reshard":
            one.add_argument("--files", type=int, default=1, help="number of files; default 1")
        if name == "export":
            one.add_argument("--file-bytes", type=int, default=5 << 30, help="largest file; default 5 GiB")
    return parser


if __name__ == "__main__":
    main()
