"""The start of a run whose text is long: it is tokenised once per folder, while the other ranks wait."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from equimoe.launch import env
from equimoe.launch.options import to_yaml
from equimoe.moe.train.data import build
from tests.helpers import small
from tests.helpers.command import Ended, launch, one_line


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("equimoe.launch.page.PLOTS", ())


def run(tmp_path: Path, world: int, within: Any, *options: str, timeout_s: float = 60) -> Ended:
    config = small.on(tmp_path / "texts", steps=2)
    config = replace(config, parallel=replace(config.parallel, timeout_s=timeout_s))
    (tmp_path / "small.yaml").write_text(to_yaml(config))
    argv = ["--config", str(tmp_path / "small.yaml"), "--run-dir", str(tmp_path / "run"), *options]
    return launch(argv, world, within=within)


def built(tmp_path: Path) -> list[list[int]]:
    """Return, for each build, the ranks that made it."""
    return [json.loads(path.read_text()) for path in sorted(tmp_path.glob("built-*"))]


@contextmanager
def long_text(tmp_path: Path, before: Any = lambda: None, nodes: int = 1) -> Iterator[None]:
    """Let all text be long, record who builds, and pretend that the ranks are on several nodes."""
    from equimoe.moe.train.data import sources

    sources.SHORT, real, rank = -1, build._build, int(os.environ["RANK"])
    local = int(os.environ["WORLD_SIZE"]) // nodes
    os.environ |= {"LOCAL_RANK": str(rank % local), "LOCAL_WORLD_SIZE": str(local)}

    def record(*given: Any) -> None:
        (tmp_path / f"built-{rank}").write_text(str(rank))
        before()
        real(*given)

    build._build = record
    yield


def test_one_rank_tokenises_and_a_restart_does_not(tmp_path: Path) -> None:
    small.write_texts(tmp_path / "texts")
    plain = run(tmp_path, 2, lambda: long_text(tmp_path), "--run-dir", str(tmp_path / "first"))
    assert plain.codes == [0, 0], plain
    assert built(tmp_path) == [0] and "tokenising into" in plain.out[0] and "tokenising" not in plain.out[1]
    assert len(list((tmp_path / "first" / "tokens").iterdir())) == 1
    (tmp_path / "built-0").unlink()
    again = run(
        tmp_path, 2, lambda: long_text(tmp_path), "--run-dir", str(tmp_path / "first"), "--resume", "--steps", "3"
    )
    assert again.codes == [0, 0] and built(tmp_path) == [], again
    # the same tokens as without a store
    kept = launch(["--config", str(tmp_path / "small.yaml"), "--run-dir", str(tmp_path / "kept"), "--steps", "3"], 2)
    assert kept.codes == [0, 0] and not (tmp_path / "kept" / "tokens").exists()
    losses = [
        [r["loss"] for line in (tmp_path / name / "metrics.jsonl").open() if (r := json.loads(line))["kind"] == "train"]
        for name in ("first", "kept")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 3


@pytest.mark.slow
def test_ranks_wait_for_longer_than_they_would_for_a_hang(tmp_path: Path) -> None:
    """The limit of the start is ten times that of a step; the build goes on for longer, and says so."""
    small.write_texts(tmp_path / "texts")

    @contextmanager
    def slow() -> Iterator[None]:
        from equimoe.launch import tokens

        tokens.REPORT_S = 0.1
        real = build._chunks

        def chunks(*given: Any) -> Iterator[Any]:
            for _ in range(60):  # this rank's own watch sees it move
                time.sleep(0.1)
                given[-1].update(0)
            yield from real(*given)

        build._chunks = chunks
        with long_text(tmp_path):
            yield

    done = run(tmp_path, 2, slow, timeout_s=0.4)
    assert done.codes == [0, 0] and done.seconds > 6, done


@pytest.mark.slow
def test_a_folder_of_each_node_gets_a_store_of_its_own(tmp_path: Path) -> None:
    """Of four ranks on two nodes; a relative --data.cache is another folder on each."""
    small.write_texts(tmp_path / "texts")

    @contextmanager
    def node() -> Iterator[None]:
        place = tmp_path / f"node{int(os.environ['RANK']) // 2}"
        place.mkdir(exist_ok=True)
        os.chdir(place)
        with long_text(tmp_path, nodes=2):
            yield

    options = ("--data.cache", "cache", "--data.global_batch", "8")
    done = run(tmp_path, 4, node, *options)
    assert done.codes == [0] * 4, done
    assert built(tmp_path) == [0, 2]
    stores = [sorted(path.name for path in (tmp_path / f"node{n}" / "cache").iterdir()) for n in (0, 1)]
    assert stores[0] == stores[1] and len(stores[0]) == 1
    (tmp_path / "built-0").unlink()
    (tmp_path / "built-2").unlink()
    shared = run(tmp_path, 4, lambda: long_text(tmp_path, nodes=2), "--run-dir", str(tmp_path / "other"))
    assert shared.codes == [0] * 4 and built(tmp_path) == [0], shared


@pytest.mark.parametrize("world", [1, 2])
def test_an_error_of_the_rank_that_builds_is_one_line(tmp_path: Path, world: int) -> None:
    small.write_texts(tmp_path / "texts")
    (tmp_path / "texts" / "x.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    ended = run(tmp_path, world, lambda: long_text(tmp_path))
    one_line(ended, env.DATA, "error: data.path=", "x.jsonl' line 2: is not JSON")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    small.write_texts(tmp_path / "texts")
    (tmp_path / "file").write_text("")
    ended = run(tmp_path, 2, lambda: long_text(tmp_path), "--data.cache", str(tmp_path / "file" / "cache"))
    one_line(ended, env.DATA, "error: data.cache=", "cannot be written (", "; choose another folder")


@pytest.mark.parametrize("long", [False, True])
def test_a_run_folder_inside_the_data_folder_can_be_resumed(tmp_path: Path, long: bool) -> None:
    """What a run writes is not trained on; its folder may even hold the stores of its own text."""
    small.write_texts(tmp_path / "texts")
    inside = ("--run-dir", str(tmp_path / "texts" / "runs" / "one"))
    within = (lambda: long_text(tmp_path)) if long else nullcontext
    first = run(tmp_path, 1, within, *inside)
    assert first.codes == [0], first
    again = run(tmp_path, 1, within, *inside, "--resume", "--steps", "3")
    assert again.codes == [0] and "left out, runs: runs/one/" in again.out[0], again
    other = run(tmp_path, 1, within, "--run-dir", str(tmp_path / "texts" / "runs" / "two"))
    (line,) = [line for line in other.out[0].splitlines() if line.startswith("training: ")]
    assert other.codes == [0] and line.count("domain") == 3 and "runs" not in line


def test_a_dry_run_keeps_the_tokens_for_the_run(tmp_path: Path) -> None:
    small.write_texts(tmp_path / "texts")
    assert run(tmp_path, 1, lambda: long_text(tmp_path), "--dry-run").codes == [0]
    (tmp_path / "built-0").unlink()
    assert run(tmp_path, 1, lambda: long_text(tmp_path)).codes == [0] and built(tmp_path) == []
