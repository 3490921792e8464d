"""Converts models of transformers to checkpoints and back: ``python -m equimoe.launch.convert import MODEL --out DIR``.

``import`` reads a folder with config.json and safetensors files; training starts from the result, or from the folder
itself, with ``--init.from``. ``export`` reads the folder of a checkpoint or of a run, which may be training; then it
means the run's newest valid checkpoint. ``layers`` reads the MoE layers in a checkpoint of DeepSpeed or Megatron-Core.
"""

from __future__ import annotations

import argparse
import shlex

from ..moe import checkpoint
from ..moe.checkpoint import tools
from ..moe.checkpoint.manifest import printable
from ..moe.interop.convert import DTYPES, export_checkpoint, import_folder
from ..moe.interop.foreign import EXPERT, write_layers
from ..moe.interop.hf import is_folder
from . import env
from .text import counted
from .usage import Parser, a_path, run_on_files


@env.command
def main(argv: list[str] | None = None) -> None:
    """Entry point. Exits with 67 if files are damaged or missing, 64 for a model or option that is not supported, 73 if
    a file cannot be written.
    """
    arguments = _parser().parse_args(argv)
    run_on_files(COMMANDS[arguments.command], arguments)


def import_(arguments: argparse.Namespace) -> None:
    """Write the weights of a transformers folder as a checkpoint of step 0."""
    if arguments.files is not None and arguments.files < 1:
        raise ValueError(f"--files={arguments.files}: must be at least 1")
    if not arguments.dir.is_dir():
        raise checkpoint.CheckpointError(f"{arguments.dir}: is not a folder; give that of a model or checkpoint")
    if not is_folder(arguments.dir) and tools.held(arguments.dir):
        raise checkpoint.CheckpointError(
            f"{arguments.dir}: holds checkpoints of this package, not a transformers model; to make one of them, use "
            "export; to train from them, use --init.from"
        )
    final, source = import_folder(arguments.dir, arguments.out, arguments.files)
    for note in source.notes:
        print(f"note: {note}")
    size = sum(map(tools.bytes_of, source.tensors.values()))
    print(f"wrote {printable(str(final))}: {counted(len(source.tensors), 'tensor')}, read {size:,} bytes")
    print(f"train: python -m equimoe.launch.train --init.from {printable(shlex.quote(str(arguments.out)))}")


def export(arguments: argparse.Namespace) -> None:
    """Write the weights of a checkpoint as a folder that transformers loads."""
    if arguments.file_bytes < 1:
        raise ValueError(f"--file-bytes={arguments.file_bytes}: must be at least 1")
    if is_folder(arguments.dir) and not tools.held(arguments.dir):
        raise checkpoint.CheckpointError(
            f"{arguments.dir}: is a transformers model already; to make a checkpoint of it, use import; to train from "
            "it, use --init.from"
        )
    path, manifest = tools.newest_valid(arguments.dir)
    how = (arguments.layout, arguments.dtype, arguments.file_bytes)
    family, files = export_checkpoint(path, manifest, arguments.out, *how)
    size = sum(file.stat().st_size for file in files)
    out = printable(str(arguments.out))
    print(f"wrote {out}: {family} of step {manifest['step']}, {counted(len(files), 'file')}, {size:,} bytes")


def layers(arguments: argparse.Namespace) -> None:
    """Write the MoE layers of a checkpoint of DeepSpeed or Megatron-Core, one safetensors file each."""
    if not arguments.dir.is_dir():
        raise checkpoint.CheckpointError(f"{arguments.dir}: is not a folder; give that of a model or checkpoint")
    written = 0
    for file, weights in write_layers(arguments.dir, arguments.out, arguments.expert):
        experts, _, width = weights["experts.down_proj"].shape
        print(f"wrote {printable(str(file))}: {counted(experts, 'expert')} of width {width}")
        written += 1
    print(f"{counted(written, 'layer')}; load one with layer.load_state_dict(safetensors.torch.load_file(FILE))")


COMMANDS = {"import": import_, "export": export, "layers": layers}


def _parser() -> argparse.ArgumentParser:
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = Parser(
        prog="python -m equimoe.launch.convert", description=f"{summary.split(':')[0]}. {' '.join(more.split())}"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="import|export|layers")
    one = commands.add_parser("import", help=import_.__doc__, description=import_.__doc__)
    one.add_argument("dir", type=a_path, metavar="MODEL", help="folder of a transformers model")
    one.add_argument("--out", type=a_path, required=True, help="folder in which the checkpoint gets one of its own")
    one.add_argument("--files", type=int, help="number of files; default one per GiB")
    two = commands.add_parser("export", help=export.__doc__, description=export.__doc__)
    two.add_argument("dir", type=a_path, metavar="DIR", help="folder of a checkpoint or of a run")
    two.add_argument("--out", type=a_path, required=True, help="new folder for the model; it must not exist")
    two.add_argument(
        "--layout",
        choices=("v4", "v5"),
        help="one tensor per expert and projection, as in files of transformers 4 and 5 (v4), or one for all experts "
        "(v5); default: that of the imported model, or v4",
    )
    two.add_argument("--dtype", choices=DTYPES, help="default: that of the imported model, or float32")
    two.add_argument("--file-bytes", type=int, default=5 << 30, help="largest file; default 5 GiB")
    three = commands.add_parser("layers", help=layers.__doc__, description=layers.__doc__)
    three.add_argument("dir", type=a_path, metavar="DIR", help="folder of a checkpoint, or in which a run saves them")
    three.add_argument("--out", type=a_path, required=True, help="new folder for the files; it must not exist")
    three.add_argument(
        "--expert",
        nargs="+",
        default=list(EXPERT),
        metavar="NAME",
        help="of DeepSpeed's experts, the linear layers: gate, up and down projection, or the two of experts without a "
        f"gate; default {' '.join(EXPERT)}",
    )
    return parser


if __name__ == "__main__":
    main()
