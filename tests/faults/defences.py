"""Switches off each defence of ``switched_off.py``, and checks that its test then fails: ``make defences``.

Works in copies of the files that git knows. First runs every test once with its defence, which must pass. The last line
is ``N of N defences are seen``. ``-k`` selects rows by number, or by a part of their title.
"""

from __future__ import annotations

import argparse
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.faults.rows import ROWS  # noqa: E402
from tests.faults.switched_off import DEFENCES, Defence  # noqa: E402

#: entries that run side by side, each in its own copy of the tree
WORKERS = 2
#: seconds for a test without its defence, or this many times as long as with it, on a machine that is busy
LIMIT_S, TIMES = 100, 3
#: seconds for all tests with their defences
ALL_S = 1800
#: errors of a replacement that is not the code that it should be
MISTAKES = re.compile(r"\b(NameError|SyntaxError|IndentationError|ImportError|ModuleNotFoundError)\b")


class Ended(NamedTuple):
    """How a test ended: why it failed, empty if it passed, and the seconds that it took."""

    why: str
    seconds: float


def misfits(defences: list[Defence]) -> list[str]:
    """Return a line for each defence whose text is not found exactly once in its file, or whose test does not exist."""
    found = []
    for defence in defences:
        count = (ROOT / defence.file).read_text().count(defence.text)
        if count != 1:
            found.append(f"row {defence.row}: {defence.file} has {count} times, instead of once: {defence.text!r}")
        file, _, test = defence.node.partition("::")
        if f"def {test.partition('[')[0]}(" not in (ROOT / file).read_text():
            found.append(f"row {defence.row}: there is no test {defence.node}")
    return found


def selected(words: list[str]) -> list[Defence]:
    """Return the defences of the rows with these numbers, or with one of these words in their title."""
    named = [row for row, title in ROWS.items() if any(w == row if w.isdigit() else w in title for w in words)]
    return [defence for defence in DEFENCES if not words or defence.row in named]


def copy_tree(tree: Path) -> None:
    """Copy the files that git knows, as they are now."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)


@contextmanager
def without(defence: Defence, tree: Path) -> Iterator[None]:
    """Switch off a defence in a copy of the tree."""
    file = tree / defence.file
    before = file.read_text()
    file.write_text(before.replace(defence.text, defence.off))
    try:
        yield
    finally:
        file.write_text(before)


def run(tree: Path, tests: list[str], limit_s: float, *options: str) -> tuple[int | None, dict[str, Ended]]:
    """Run tests in a copy of the tree; return pytest's exit code, and how each test ended.

    The code is None after ``limit_s`` seconds.
    """
    report = tree / "report.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *options, *tests]
    path = os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH")]))
    # a file may be changed twice within the second that its compiled form remembers
    more = {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "EQUIMOE_SOAK_FAULTS": "6"}
    process = subprocess.Popen(
        command,
        cwd=tree,
        env=os.environ | more,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        code: int | None = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        code = None
        process.send_signal(signal.SIGINT)  # lets the test end what it has started
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return code, outcomes(report) if report.exists() else {}


def outcomes(report: Path) -> dict[str, Ended]:
    """Return how each test of a report in JUnit's format ended. Skipped tests are left out."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        problem = next((part for kind in ("failure", "error") if (part := case.find(kind)) is not None), None)
        if case.find("skipped") is None:
            name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
            why = "" if problem is None else problem.get("message") or "without a message"
            found[name] = Ended(why, float(case.get("time", 0)))
    return found


def passing(trees: list[Path], defences: list[Defence]) -> dict[str, float]:
    """Return the tests of these defences that pass with them, and the seconds that they take."""
    nodes = sorted({defence.node for defence in defences})
    with ThreadPoolExecutor(len(trees)) as pool:
        shares = [nodes[i :: len(trees)] for i in range(len(trees))]
        results = pool.map(lambda tree, share: run(tree, share, ALL_S)[1] if share else {}, trees, shares)
        found = [entry for result in results for entry in result.items()]
    of = {node: [ended for name, ended in found if name == node or name.startswith(f"{node}[")] for node in nodes}
    sound = {node: all_of for node, all_of in of.items() if all_of and not any(ended.why for ended in all_of)}
    return {node: sum(ended.seconds for ended in all_of) for node, all_of in sound.items()}


def judge(defence: Defence, code: int | None, tests: dict[str, Ended]) -> tuple[bool, str]:
    """Return whether a test has failed as it should without its defence, and say how it ended."""
    if code is None:
        return defence.hang, "does not end without its defence" if defence.hang else "DOES NOT END"
    if code == 0:
        return False, "STILL PASSES"
    text = next((ended.why for ended in tests.values() if ended.why), "")
    if code != 1 or not text or MISTAKES.search(text):
        return False, f"BROKEN: pytest ended with {code}: {shortened(text)}"
    return True, f"fails without its defence: {shortened(text)}"


def shortened(text: str, most: int = 120) -> str:
    """Return the beginning of a failure's message, or what a rank has raised, in one line."""
    line = " ".join(text.split())
    raised = re.search(r"[\w.]+(Error|Exception|Exit): .*", line.partition("failed first: Traceback")[2])
    line = line if raised is None else raised[0]
    return line if len(line) <= most else f"{line[: most - 3]}..."


def main(arguments: list[str]) -> int:
    """Check the selected defences; return 0 if each of them is seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", nargs="+", default=[], metavar="ROW", help="only rows with this number or word")
    defences = selected(parser.parse_args(arguments).k)
    if wrong := misfits(defences):
        print("\n".join(wrong))
        return 2
    trees: queue.Queue[Path] = queue.Queue()
    with tempfile.TemporaryDirectory(prefix="defences-") as folder:
        copies = [Path(folder, str(number)) for number in range(WORKERS)]
        for tree in copies:
            copy_tree(tree)
            trees.put(tree)
        sound = passing(copies, defences)

        def check(defence: Defence) -> tuple[bool, str]:
            if defence.node not in sound:
                return False, "FAILS WITH ITS DEFENCE, or is skipped"
            tree = trees.get()
            try:
                with without(defence, tree):
                    limit_s = max(LIMIT_S, TIMES * sound[defence.node])
                    return judge(defence, *run(tree, [defence.node], limit_s, "-x"))
            finally:
                trees.put(tree)

        seen, row = 0, ""
        with ThreadPoolExecutor(WORKERS) as pool:
            for defence, (fails, how) in zip(defences, pool.map(check, defences), strict=True):
                if defence.row != row:
                    print(f"{defence.row:>3}  {ROWS[defence.row]}")
                row, seen = defence.row, seen + fails
                print(f"     {defence.test}  {how}", flush=True)
    print(f"\n{seen} of {len(defences)} defences are seen")
    return int(seen < len(defences))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
