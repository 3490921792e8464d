"""Renders a run's metrics as one HTML page: ``python -m equimoe.launch.report RUN_DIR`` writes RUN_DIR/report.html.

Several folders are compared in one page. ``--watch`` serves the page while the run goes on. A page is complete in
itself: it needs no network and no other file.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C loses nothing, and needs no traceback

from ..moe.observe.metrics import write_atomically
from ..moe.observe.printable import printable
from . import env
from .compare import comparison_of, read_runs
from .live import HOST, Live, serve
from .page import POLICY, page, report_of
from .records import Run
from .usage import Parser, a_path, check_file

REPORT_FILE, COMPARISON_FILE = "report.html", "comparison.html"
PORT = 8710


def build(folders: Sequence[Path]) -> tuple[str, list[str]]:
    """Return the title and the parts of the page of one run, or of the comparison of several.

    Raises ValueError if a run has no metrics.
    """
    if len(folders) == 1:
        run = Run.read(folders[0])
        return run.name, report_of(run)
    runs = read_runs(folders)
    return ", ".join(run.name for run in runs), comparison_of(runs)


def write_report(run_dir: Path) -> Path:
    """Write ``run_dir/report.html`` from ``run_dir/metrics.jsonl`` and return its path.

    The page says which figures a run has no records for. Raises ValueError if there are no metrics, and OSError if the
    page cannot be written; an earlier page is then kept.
    """
    return write_page([Path(run_dir)], Path(run_dir) / REPORT_FILE)


def write_page(folders: Sequence[Path], path: Path) -> Path:
    """Write the page of one or several runs to ``path``; see :func:`write_report`."""
    title, parts = build(folders)
    text = page(title, parts, f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">')
    write_atomically(path, text.encode(errors="backslashreplace"))
    return path


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m equimoe.launch.report",
        description="Write RUN_DIR/report.html from RUN_DIR/metrics.jsonl; compare several runs in one page.",
    )
    parser.add_argument("run_dir", nargs="+", type=a_path, help="folder of a run")
    where = f"default RUN_DIR/{REPORT_FILE}, or {COMPARISON_FILE} for several runs"
    parser.add_argument("--out", type=a_path, metavar="FILE", help=f"file to write; {where}")
    parser.add_argument("--watch", action="store_true", help=f"serve the page on {HOST}, and renew it")
    parser.add_argument("--port", type=int, default=PORT, help=f"for --watch; default {PORT}, 0: any that is free")
    return parser


@env.command
def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns the exit code: 64 for wrong usage, 66 for no metrics, 73 if the page cannot be written."""
    arguments = _parser().parse_intermixed_args(sys.argv[1:] if argv is None else argv)
    folders: list[Path] = arguments.run_dir
    if arguments.watch:
        return _watch(folders, arguments.port)
    several = len(folders) > 1
    if arguments.out is not None:
        try:
            check_file("--out", arguments.out)
        except env.Refused as error:
            env.stop(env.Process(), error.code, str(error))
    path = arguments.out or (Path(COMPARISON_FILE) if several else folders[0] / REPORT_FILE)
    try:
        print(f"report: {printable(str(write_page(folders, path)))}")
    except ValueError as error:
        print(f"report: {printable(str(error))}", file=sys.stderr)
        return env.DATA
    except OSError as error:
        print(
            f"report: {printable(str(error.filename or path))}: cannot be written ({error.strerror})", file=sys.stderr
        )
        return env.CANNOT_WRITE
    return 0


def _watch(folders: list[Path], port: int) -> int:
    if not 0 <= port < 1 << 16:
        print(f"report: --port={port}: must be in 0..65535", file=sys.stderr)
        return env.CONFIG
    missing = next((folder for folder in folders if not folder.is_dir()), None)
    if missing is not None:
        print(f"report: {printable(str(missing))}: no such folder; give the folder of a run", file=sys.stderr)
        return env.DATA
    live = Live(folders, partial(build, folders))
    try:
        serve(live, port, lambda found: print(f"report: http://{HOST}:{found}/  (Ctrl-C ends it)", flush=True))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except OSError as error:
        print(f"report: --port={port}: cannot be used ({error.strerror}); choose another one", file=sys.stderr)
        return env.CONFIG
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
