"""Checks that settings that cannot work are refused in one line before the run folder is touched, in a dry run too."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from equimoe.launch import env
from equimoe.launch.options import parse, to_yaml
from tests.faults.table import report
from tests.helpers import small
from tests.helpers.command import Ended, launch


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    monkeypatch.setattr("equimoe.launch.page.PLOTS", ())
    (tmp_path / "small.yaml").write_text(to_yaml(small.on(small.write_texts(tmp_path / "texts"), steps=1)))
    base = ["--config", str(tmp_path / "small.yaml"), "--run-dir", str(tmp_path / "run")]
    return lambda options, world: launch([*base, *options.split()], world, cwd=tmp_path)


PAD = "--parallel.ep 2 --moe.capacity.pad true"
#: (ranks, options, words of the message) of settings that used to fail within the first step
IMPOSSIBLE = [
    (
        2,
        "--parallel.tp 2 --data.seq_len 15",
        "data.seq_len=15: must be a multiple of parallel.cp * parallel.tp = 1 * 2",
    ),
    (1, "--moe.backend triton", "moe.backend='triton': this run has no GPU"),
    (2, f"{PAD} --moe.capacity.max_tokens 31", "moe.capacity.max_tokens=31: a forward has 32 tokens"),
    (2, f"{PAD} --moe.capacity.max_tokens 1000000000", "moe.capacity.max_tokens=1000000000: a forward has 32 tokens"),
]


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="triton works here")
@pytest.mark.parametrize("dry", ["", "--dry-run"])
@pytest.mark.parametrize(("world", "options", "words"), IMPOSSIBLE)
def test_settings_that_fail_in_the_first_step(
    run: Callable[..., Ended],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    world: int,
    options: str,
    words: str,
    dry: str,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    ended = run(f"{options} {dry}", world)
    assert ended.codes == [env.CONFIG] * world and len(ended.errors) == 1, ended
    assert ended.errors[0].startswith(f"error: {words}")
    assert not (tmp_path / "run").exists()
    report("21", "exit 64, one line", options=options, seconds=round(ended.seconds, 2))


NO_SP = "--parallel.tp 2 --parallel.sequence_parallel false"
SIZES = ["model.vocab_size", "moe.num_experts", "moe.hidden_size", "moe.intermediate_size"]
BIG = str(10**30)


@pytest.mark.parametrize(
    ("world", "options", "words"),
    [
        (4, "--parallel.tp 2 --parallel.cp 2 --data.seq_len 18", "data.seq_len=18: must be a multiple of"),
        (4, "--parallel.tp 2 --parallel.pp 2 --data.seq_len 15", "data.seq_len=15: must be a multiple of"),
        (4, f"{NO_SP} {PAD} --data.seq_len 15", "moe.capacity.pad=True: parallel.tp=2 ranks share 15 positions"),
        (4, f"{NO_SP} {PAD} --data.seq_len 15 --moe.capacity.max_tokens 15", "max_tokens=15: a forward has 64 tokens"),
        (2, f"{NO_SP} --data.seq_len 15 --moe.dispatch.equal_tokens", "moe.dispatch.equal_tokens=True: parallel.tp=2"),
        (
            2,
            "--parallel.data_parallel fsdp --moe.dispatch.memory_mb 64",
            "moe.dispatch.over_memory='chunk': parallel.data_parallel='fsdp' gathers weights for a whole forward",
        ),
        (1, "--parallel.timeout_s 1e30", "parallel.timeout_s=1e+30: must be between 0.1 and 100000"),
        (1, "--parallel.timeout_s 1e-300", "parallel.timeout_s=1e-300: must be between 0.1 and 100000"),
        (1, "--parallel.timeout_s inf", "--parallel.timeout_s=inf: must be a finite number"),
        (1, "--parallel.timeout_s -1", "parallel.timeout_s=-1.0: must be between"),
        (1, "--optim.weight_decay 1e300", "optim.weight_decay=1e+300: must be at most 3.4e+38"),
        (1, "--optim.eps -1", "optim.eps=-1.0: must not be negative"),
        (1, "--moe.init_std -1", "moe.init_std=-1.0: must not be negative"),
        (1, "--moe.dispatch.name overlapped --moe.dispatch.chunks 1000", "chunks=1000: must be between 1 and 64"),
        (1, "--model.num_layers 1000000000000", "model.num_layers=1000000000000: must be at most 10000"),
        *((1, f"--{name} {BIG}", f"{name}={BIG}: must be less than 2**48") for name in SIZES),
        (1, f"--steps {BIG}", f"steps={BIG}: must be less than 2**48"),
        (1, f"--steps {'9' * 5000}", "--steps=999"),
    ],
)
def test_absurd_and_impossible_settings(world: int, options: str, words: str) -> None:
    with pytest.raises(ValueError, match=r"\A.*\Z") as refused:
        parse(options.split()).config.degrees(world)
    assert words in str(refused.value)


def test_settings_at_the_edge_are_accepted() -> None:
    small_tokens = "--data.seq_len 16 --data.micro_batch 2 --parallel.timeout_s 100000 --seed 9223372036854775807"
    parse(small_tokens.split()).config.degrees(1)
    parse(f"{PAD} {small_tokens} --moe.capacity.max_tokens 32".split()).config.degrees(2)
    parse(f"{NO_SP} {PAD} --data.seq_len 15 --data.micro_batch 2 --moe.capacity.max_tokens 16".split()).config.degrees(
        4
    )


def test_a_padded_exchange_never_has_more_rows_than_choices() -> None:
    from equimoe.moe.config import CapacityConfig
    from equimoe.moe.dispatch.exchange_plan import rows_per_expert

    assert rows_per_expert(CapacityConfig(factor=1e38, pad=True), 10, 2, 4) == 20
    assert rows_per_expert(CapacityConfig(factor=1.0, pad=True), 10, 2, 4) == 5


# ---- hostile YAML

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(9)
)
MERGED = "a: &a {k: 1}\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} {{<<: [{', '.join(['*' + chr(97 + i)] * 10)}]}}\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optim: {lr: 0.1}\nsteps: 3\noptim: {eps: 0.1}\n", "line 3: 'optim' is given twice, first in line 1"),
        ("optim:\n  lr: 0.1\n  lr: 0.2\n", "line 3: 'lr' is given twice, first in line 2"),
        ("moe:\n  top_k: 1\n  top-k: 2\n", "line 3: 'top-k' is given twice, first in line 2"),
        ("<<: {steps: 1}\n<<: {seed: 1}\n", "line 2: '<<' is given twice"),
        ("steps: 1\n---\nsteps: 2\n", "line 2, column 1: not YAML: but found another document"),
        (LAUGHS + "optim: *j\n", "aliases expand to more than 100000 values"),
        (MERGED + "optim: {<<: *j}\n", "aliases expand to more than 100000 values"),
        ("a: &a [*a]\n", "an alias contains itself"),
        ("a: &a {b: *a}\n", "an alias contains itself"),
        ("a: " + "[" * 100_000, "is nested more than 32 deep"),
        ("".join(" " * i + "a:\n" for i in range(500)), "line 33: is nested more than 32 deep"),
        ("a: 1\n" * 300_000, "is larger than 1 MiB"),
        ("steps: " + "9" * 5000, "line 1: a number of more than 400 digits"),
        ("steps: 1\nseed: 0x" + "f" * 5000, "line 2: a number of more than 400 digits"),
        ("steps: 2001-99-99", "not YAML: month must be in 1..12"),
        ("steps: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("steps: !!python/name:os.system", "could not determine a constructor"),
        ("a\0b: 1", "not YAML: unacceptable character"),
        ("? [1, 2]\n: 3\n", "found unhashable key"),
        ("steps: {a: " + "x" * 100_000 + "}", "steps={'a': 'xxx"),
        ("optim: {lr: .inf}", "optim.lr=inf: must be a finite number"),
        ("optim: {lr: .nan}", "optim.lr=nan: must be a finite number"),
        ("steps: !!binary '%%'", "steps=b'': must be a whole number"),
        ('"\\e]0;x\\a": 1', "no such key"),
    ],
)
def test_hostile_yaml(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "hostile.yaml"
    file.write_text(text)
    start = time.monotonic()
    with pytest.raises(ValueError, match="hostile.yaml") as refused:
        parse(["--config", str(file)])
    message = str(refused.value)
    assert words in message and "\n" not in message and len(message) < 1000
    assert time.monotonic() - start < 20
    report("14", "one line", kind="YAML", case=words)


def test_files_without_an_end_are_not_read_to_it() -> None:
    with pytest.raises(ValueError, match="^/dev/zero: is larger than 1 MiB"):
        parse(["--config", "/dev/zero"])


def test_harmless_aliases_and_merges_still_work(tmp_path: Path) -> None:
    text = "checkpoint: &often {every: 7}\nlog: {<<: *often, eval_every: 9}\noptim: {lr: 1e-3}\n"
    (tmp_path / "merged.yaml").write_text(text)
    config = parse(["--config", str(tmp_path / "merged.yaml")]).config
    assert (config.checkpoint.every, config.log.every, config.log.eval_every) == (7, 7, 9)
    text = "a: {b: &b {<<: &c {x: 1, y: 2}, x: 3}, d: {<<: *b, y: 4}}\n"
    (tmp_path / "nested.yaml").write_text(text)
    from equimoe.launch.strict_yaml import read_yaml

    assert read_yaml(tmp_path / "nested.yaml") == yaml.safe_load(text)


def test_a_hostile_key_does_not_reach_the_terminal(run: Callable[..., Ended], tmp_path: Path) -> None:
    (tmp_path / "hostile.yaml").write_text('"\\e]0;owned\\a\\u202e\\n": 1\n')
    ended = run(f"--config {tmp_path / 'hostile.yaml'}", 1)
    assert ended.codes == [env.CONFIG] and len(ended.errors) == 1
    assert "\\x1b]0;owned\\x07\\u202e\\n" in ended.errors[0] and "\x1b" not in ended.errors[0]
