"""Tokenises text into a store for training: ``python -m equimoe.launch.tokenize --data PATH --out DIR``.

Train on it with ``--data.path DIR``. Started again after an interruption, the command goes on where it was; a store
that is there already, and fits, is kept. --check compares all of its files with their digests.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C needs no traceback: the next start goes on

from tqdm import tqdm

from ..moe.observe.printable import printable, short_count
from ..moe.train.config import DataConfig
from ..moe.train.data import Wanted, check_store, load_corpus, load_tokenizer, store_at
from . import env
from .usage import Parser, in_options

#: options that are fields of section ``data``
FIELDS = ("domain_by", "text_field", "domain_field", "token_dtype", "end_of_document")


@env.command
def main(argv: list[str] | None = None) -> None:
    """Entry point. Exits with 64 for a wrong option, 66 for text that cannot be read or a damaged store."""
    arguments = _parser().parse_args(argv)
    process = env.Process()
    try:
        if arguments.workers < 1:
            raise ValueError(f"--workers={arguments.workers}: must be at least 1")
        if (arguments.data is None) != arguments.check:
            raise ValueError("--data: give the text to tokenise, or --check for what is there")
        given = {name: value for name in FIELDS if (value := getattr(arguments, name)) is not None}
        config = DataConfig(path=arguments.data, tokenizer=arguments.tokenizer, seq_len=1, **given)
    except ValueError as error:
        env.stop(process, env.CONFIG, _in_options(error))
    out = Path(arguments.out).expanduser()
    try:
        if arguments.check:
            _say(out, check_store(out), "is complete and undamaged")
            return
        wanted = store_at(config, load_tokenizer(config.tokenizer, config.end_of_document), out)
        if wanted.complete:
            _say(out, wanted.manifest, "is there already")
            return
        _build(wanted, arguments.workers)
        _say(out, wanted.manifest, "is written")
    except (ValueError, OSError) as error:
        env.stop(process, env.DATA, _in_options(error))


def _build(wanted: Wanted, workers: int) -> None:
    bar = _Bar()
    try:
        wanted.build(workers, bar, bar.waiting)
    finally:
        bar.close()
    # a store of few tokens is no less a store
    try:
        load_corpus(DataConfig(**{**vars(wanted.config), "path": str(wanted.folder)}), wanted.tokenizer)
    except ValueError as error:
        print(f"note: {printable(str(error))}", file=sys.stderr)


class _Bar:
    """A progress bar of what is read, and then of what is merged."""

    def __init__(self) -> None:
        self._bar = tqdm(desc="reading", unit=" characters", unit_scale=True, disable=None)

    def update(self, n: int) -> None:
        self._bar.update(n)

    def reset(self, total: int | None = None) -> None:
        self._bar.close()
        self._bar = tqdm(desc="merging", unit=" documents", unit_scale=True, total=total, disable=None)

    def waiting(self) -> None:
        self._bar.set_description("waiting for another process")

    def close(self) -> None:
        self._bar.close()


def _say(out: Path, manifest: dict[str, Any], what: str) -> None:
    for note in manifest["notes"]:
        print(f"note: {printable(note)}")
    for domain, about in manifest["domains"].items():
        flat = sum(file["length"] for file in about["flat"])
        held = f"{short_count(about['documents'])} documents, {short_count(about['tokens'])} tokens"
        parts = [held] * bool(about["documents"]) + [f"{short_count(flat)} tokens in files"] * bool(flat)
        print(f"{printable(domain)}: {', and '.join(parts)}")
    options = ["--data.path", str(out), "--data.tokenizer", str(manifest["tokenizer"]["name"])]
    print(f"{printable(str(out))} {what}; train on it with {printable(shlex.join(options))}")


def _in_options(error: Exception) -> str:
    return in_options(error, ("tokenizer", *FIELDS), {"path": "--data", "cache": "--out"})


def _parser() -> argparse.ArgumentParser:
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = Parser(
        prog="python -m equimoe.launch.tokenize", description=f"{summary.split(':')[0]}. {' '.join(more.split())}"
    )
    parser.add_argument("--data", metavar="PATH", help="file or folder to tokenise, as --data.path of training")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the store")
    parser.add_argument("--tokenizer", default="bytes", metavar="PATH", help="tokenizer.json, or 'bytes' (default)")
    for name in FIELDS:
        parser.add_argument(f"--{name.replace('_', '-')}", help=f"as --data.{name} of the training command")
    cores = env.available_cores()
    parser.add_argument(
        "--workers", type=int, default=cores, metavar="N", help=f"processes; default {cores}, one per core"
    )
    parser.add_argument("--check", action="store_true", help="only check the store in --out")
    return parser


if __name__ == "__main__":
    main()
