"""Checks that a run finishes, and writes its report, whatever its terminal, locale and file names are like."""

from __future__ import annotations

import json
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from equimoe.launch import env
from equimoe.launch.options import to_yaml
from equimoe.launch.report import write_report
from equimoe.moe.observe.metrics import MetricsWriter, read_records
from equimoe.moe.observe.printable import printable
from tests.faults.table import report
from tests.helpers import small
from tests.helpers.command import Ended, Within, launch, print_to

#: a name that an ASCII terminal cannot print, one that no terminal can, and one that would take over the terminal
NAMES = ["Ελληνικά", "lone-\udcff", "\x1b]0;owned\x07\x1b[2J\n\u202egnirts"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """Return a function that trains on domains with these names, in a run folder with one of them."""
    monkeypatch.setattr("equimoe.launch.page.PLOTS", ())
    texts = small.write_texts(tmp_path / "texts")
    for number, name in enumerate(NAMES):
        os.rename(texts / f"domain{number}", os.fsencode(texts / name))
    (tmp_path / "small.yaml").write_text(to_yaml(small.on(texts, steps=1)))
    base = ["--config", str(tmp_path / "small.yaml")]
    return lambda *options, within, world=1: launch([*base, *options], world, cwd=tmp_path, within=within)


def printing(encoding: str) -> Within:
    @contextmanager
    def block() -> Iterator[None]:
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(encoding=encoding, errors="strict")  # type: ignore[union-attr]
        yield

    return block


@contextmanager
def full_disk() -> Iterator[None]:
    full = os.open("/dev/full", os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(full, descriptor)
    yield


@contextmanager
def closed() -> Iterator[None]:
    """What ``command >&- 2>&-`` leaves: Python sets the streams to None."""
    sys.stdout = sys.stderr = None  # type: ignore[assignment]
    nowhere = os.open(os.devnull, os.O_WRONLY)  # else the files that are opened next would get these numbers
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
    yield


@contextmanager
def unread() -> Iterator[None]:
    """What is left after ``command 2>&1 | head -1``."""
    reader, writer = os.pipe()
    os.close(reader)
    print_to(writer)
    yield


ENCODINGS = ("ascii", "latin-1", "utf-8")
TERMINALS = {name: printing(name) for name in ENCODINGS} | {"full-disk": full_disk, "closed": closed, "unread": unread}


@pytest.mark.parametrize("terminal", TERMINALS)
def test_a_finished_run_has_its_report(run: Callable[..., Ended], tmp_path: Path, terminal: str) -> None:
    ended = run("--run-dir", NAMES[0], within=TERMINALS[terminal])
    assert ended.codes == [0], ended
    assert ("\ncontinue:" in ended.out[0]) == (terminal in ENCODINGS), ended  # all that it had to say
    folder = Path(os.fsdecode(os.fsencode(tmp_path / NAMES[0])))
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Ελληνικά" in page and "\x1b" not in page and "\u202e" not in page
    assert "\x1b" not in ended.out[0] and "\u202e" not in ended.out[0]
    assert all(line.isprintable() for line in ended.out[0].splitlines())
    report("46", "finished, with report")


def test_ranks_whose_reader_has_gone_finish_too(run: Callable[..., Ended], tmp_path: Path) -> None:
    ended = run("--run-dir", "run", within=unread, world=2)
    assert ended.codes == [0, 0] and (tmp_path / "run" / "report.html").exists(), ended


@pytest.mark.parametrize("option", ["--help", "--print-config"])
def test_what_is_only_printed_ends_with_its_reader(run: Callable[..., Ended], option: str) -> None:
    assert run(option, within=unread).codes == [env.UNREAD]


def test_a_broken_locale_and_umask(run: Callable[..., Ended], tmp_path: Path) -> None:
    @contextmanager
    def strict() -> Iterator[None]:
        os.umask(0o777 & ~0o700)
        with printing("ascii")():
            yield

    ended = run("--run-dir", "a b/ü/run", "--log.trackers", "tensorboard", within=strict)
    assert ended.codes == [0], ended
    assert (tmp_path / "a b/ü/run/report.html").exists()
    domains = {name for r in read_records(tmp_path / "a b/ü/run/metrics.jsonl") for name in r.get("domains", {})}
    assert domains == {"Ελληνικά", "lone-\\udcff", "\\x1b]0;owned\\x07\\x1b[2J\\n\\u202egnirts"}


def test_lost_metrics_do_not_lose_the_end(
    run: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A metrics file that vanishes in the middle costs its records, not the run."""
    real = MetricsWriter.write

    def write(self: MetricsWriter, record: dict[str, Any]) -> None:
        real(self, record)
        if record["kind"] == "checkpoint":  # the last one
            os.remove(self.path)

    monkeypatch.setattr(MetricsWriter, "write", write)
    ended = run("--run-dir", "run", within=printing("utf-8"))
    assert ended.codes == [0], ended
    assert "report:     not written" in ended.out[0] and "continue:" in ended.out[0]


def test_paths_in_errors_are_escaped(run: Callable[..., Ended], tmp_path: Path) -> None:
    ended = run("--data.path", f"no/{NAMES[2]}", within=printing("ascii"))
    assert ended.codes == [env.DATA] and len(ended.errors) == 1
    assert "\\x1b]0;owned" in ended.errors[0] and "\x1b" not in ended.err[0]


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("plain Ελληνικά 漢字 عربى", "plain Ελληνικά 漢字 عربى"),
        ("می\u200cخواهم 👩\u200d💻", "می\u200cخواهم 👩\u200d💻"),  # joiners belong to the spelling
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("\x1b[31m\x7f\x9b", "\\x1b[31m\\x7f\\x9b"),
        ("\u202e\u2066\u200f\u2028", "\\u202e\\u2066\\u200f\\u2028"),
        ("\ud800\udcff", "\\ud800\\udcff"),
    ],
)
def test_printable(text: str, escaped: str) -> None:
    assert printable(text) == escaped
    printable(text).encode()


# ---- metrics that somebody else has written

RUN = {"config": {"steps": 3, "data": {"tokenizer": "bytes"}, "moe": {"num_experts": 4}}, "world_size": 2}
LAYER = {"counts": [1, 2, 3, 4], "cv": 0.1, "entropy": 0.9, "dead": 0, "losses": {"global": 1.0}, "score_sum": 0.5}
TRAIN = {"loss": 3.0, "grad_norm": 1.0, "lr": 0.1, "tokens": 10, "domain_loss": {"a": 1.0}, "balance": 1.0}
EVAL = {"loss": 2.0, "domains": {"a": {"loss": 1.0, "tokens": 3}}, "routing": {"a": [[0.25] * 4]}, "divergence": [0.1]}
RECORDS: list[dict[str, Any]] = [
    {"kind": "run", **RUN},
    {"kind": "baseline", "bigram": {"all": 2.0, "a": 2.0}},
    *({"kind": "train", "step": step, **TRAIN, "layers": [LAYER]} for step in (1, 2, 3)),
    {"kind": "eval", "step": 3, **EVAL},
]
WRONG: list[Any] = [None, "x", -1, 1e308, 10**400, [], {}, [[]], {"a": {"b": []}}, True, [1, [2]], *NAMES, "<script>"]


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside ``value``."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*at, key)
        yield from places(item, (*at, key))


def check_page(folder: Path, text: str) -> bool:
    """Write a report of these metrics, or refuse them in a ValueError; return whether there is a page."""
    (folder / "metrics.jsonl").write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            page = write_report(folder).read_text(encoding="utf-8")
        except ValueError as refused:
            assert "\n" not in str(refused)
            return False
    assert not any(bad in page for bad in ("\x1b", "\u202e", "<script>"))
    return True


def damaged(seed: int) -> str:
    chance, records = random.Random(seed), json.loads(json.dumps(RECORDS))
    for _ in range(chance.randint(1, 3)):
        *path, last = chance.choice(list(places(records)))
        inside = records
        for key in path:
            inside = inside[key]
        inside[last] = chance.choice(WRONG)
    return "\n".join(map(json.dumps, records)) + "\n"


def test_hostile_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("equimoe.launch.page.PLOTS", ())
    for seed in range(100):
        check_page(tmp_path, damaged(seed))
    for line in (
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"kind": NaN}',
        "\0",
        '{"kind": "train", "step": []}',
        "9" * 10_000,
    ):
        assert check_page(tmp_path, f"{line}\n{json.dumps(RECORDS[0])}\n")  # of the other line
    check_page(tmp_path, json.dumps({"kind": "run", "config": json.loads('{"a":' * 600 + "1" + "}" * 600)}) + "\n")
    report("14", "page or one line", kind="metrics", cases=107)


@pytest.mark.faults
def test_hostile_metrics_in_figures(tmp_path: Path) -> None:
    for seed in range(3):
        check_page(tmp_path, damaged(1000 + seed))


def test_metrics_without_an_end(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="not a regular file"):
        write_report(tmp_path)
