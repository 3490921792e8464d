"""Checks the lines of a run on the terminal."""

from __future__ import annotations

import io
import math
import re

import pytest

from equimoe.launch.recipes import RECIPES
from equimoe.moe.observe.printable import fitted
from equimoe.moe.observe.progress import Progress, balance_note, duration, eval_line, progress_line
from tests.moe.test_metrics import TRAIN

FAST = TRAIN | {"tokens_per_s_per_device": 2560.0, "tflops_per_device": 0.13, "memory_bytes": 900 << 20}


def test_progress_line() -> None:
    assert progress_line(FAST, 300) == (
        " 10/300  loss 4.2034  norm 1.10  5.12k tok/s  0.13 TFLOP/s  0.879 GiB  max/mean 1.42  left 3m 52s"
    )  # 290 steps of 4096 tokens at 5120 tokens/s
    assert "  7.85 GFLOP/s  " in progress_line(FAST | {"tflops_per_device": 0.00785}, 300)
    bare = progress_line({"kind": "train", "step": 1, "loss": None, "max_over_mean": None}, 20000)
    assert bare == "    1/20000  loss nan  max/mean nan"
    assert progress_line(TRAIN | {"step": 300}, 300).endswith("left 0s")


@pytest.mark.parametrize("name", RECIPES)
def test_the_line_fits_100_columns_with_everything_that_matters(name: str) -> None:
    """On many GPUs, at the last steps of the recipe."""
    steps, data = RECIPES[name]().steps, RECIPES[name]().data
    tokens = min((steps - 99) * data.global_batch * data.seq_len, 9e12)
    large = {"step": steps - 99, "loss": 11.5012, "grad_norm": 12.25, "tokens": tokens, "tokens_per_s": 12.53e6}
    large |= {"tokens_per_s_per_device": 12_240.0, "tflops_per_device": 412.4, "mfu": 0.4168, "max_over_mean": 13.1}
    line = progress_line(TRAIN | large | {"memory_bytes": 75.25 * (1 << 30)}, steps, devices=1024)
    assert len(line) <= 100
    for words in ("loss 11.5012", "norm 12.25", "12.5M tok/s", "12.2k/dev", "412 TFLOP/s", "MFU 42%", "75.2 GiB"):
        assert words in line
    assert re.search(r"left \d+[smhd]", line)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (45.4, "45s"), (59.7, "1m 00s"), (151, "2m 31s"), (3725, "1h 02m"), (273600, "3d 04h"), (-1, "0s")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("sequences", "text"),
    [(512.0, "512 seq"), (2.5, "2.5 seq"), (99.96, "100 seq"), (1048576.0, "1048576 seq"), (None, ""), (math.nan, "")],
)
def test_balance_note(sequences: float | None, text: str) -> None:
    assert balance_note({"balance_sequences": sequences}) == (text and f"balance over: {text}")
    assert balance_note({}) == ""


def test_the_balance_batch_size_is_said_when_it_changes_and_now_and_then() -> None:
    stream = io.StringIO()
    with Progress(300, stream=stream) as progress:
        for step in range(1, 31):
            error = {"estimator_error": 0.034 + step / 1000} if step < 15 else {}
            progress.show(TRAIN | {"step": step, "balance_sequences": 8.0 if step < 4 else 16.0} | error)
        progress.show(TRAIN | {"step": 31})
    said = {
        i: line.split("balance over: ")[1] for i, line in enumerate(stream.getvalue().splitlines(), 1) if "over" in line
    }
    assert said == {
        2: "8 seq (load off by 3.5%)", 6: "16 seq (load off by 3.8%)", 17: "16 seq (load off by 4.8%)", 28: "16 seq"
    }  # fmt: skip


def test_eval_line() -> None:
    record = {"kind": "eval", "step": 100, "loss": 2.5, "domains": {"a": {"loss": 2.25}, "b": {"loss": None}}}
    assert eval_line(record) == "eval:  100  held-out loss: 2.5000  a: 2.2500  b: nan"


def test_an_eval_line_of_many_domains_fits_100_columns() -> None:
    domains = {f"domain {i}": {"loss": float(i)} for i in range(200)}
    line = eval_line({"step": 7, "loss": 1.0, "domains": domains})
    assert line.startswith("eval:    7  held-out loss: 1.0000  domain 0: 0.0000  domain 1: 1.0000  ")
    assert line.endswith("  domain 1: 1.0000  and 198 more") and 82 < len(line) <= 100  # another one has 18 columns


def test_parts_that_fit_into_a_line() -> None:
    parts = [f"part {i}" for i in range(30)]
    assert fitted("a (", parts[:3], end=")") == "a (part 0, part 1, part 2)"
    assert fitted("a (", parts, end=")") == f"a ({', '.join(parts[:10])}, and 20 more)"
    assert fitted("a ", ["x" * 200, "y"]) == f"a {'x' * 200}, and 1 more"
    assert fitted("none", []) == "none"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    with Progress(300, stream=stream) as progress:
        progress.advance(10)
        progress.show(TRAIN)
        progress.show({"kind": "run"})
        progress.say("a word")
    assert stream.getvalue() == progress_line(TRAIN, 300) + "\na word\n"


def test_a_bar_on_a_terminal() -> None:
    stream = Terminal()
    with Progress(300, start=290, stream=stream) as progress:
        progress.advance(295)
        progress.show(TRAIN | {"step": 295})
        assert progress._bar.n == 295
        progress.advance(300)
    assert progress_line(TRAIN | {"step": 295}, 300) + "\n" in stream.getvalue()
    assert "/300" in stream.getvalue().replace(progress_line(TRAIN | {"step": 295}, 300), "")
    progress.close()
