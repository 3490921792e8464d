"""Checks the commands that use a trained model: ``generate`` and ``evaluate``."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock
from unittest.mock import patch

import numpy as np
import pytest

from equimoe.launch import env, evaluate, generate, loaded
from equimoe.launch.options import to_yaml
from equimoe.moe import checkpoint
from tests.helpers import small
from tests.helpers.command import Ended, Within, launch, one_line
from tests.helpers.slow import slow_but


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``texts``, and a finished run in ``run``."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "small.yaml").write_text(to_yaml(small.on(small.write_texts(folder / "texts"), steps=30)))
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr("equimoe.launch.page.PLOTS", ())  # they take time
        ended = launch(["--config", "small.yaml", "--run-dir", "run"], cwd=folder)
    assert ended.codes == [0], ended
    assert re.search(r"^generate: +\S+ -m equimoe.launch.generate --run-dir run --prompt 'The '$", ended.out[0], re.M)
    return folder


def run(folder: Path, main: object, *options: str, world: int = 1) -> Ended:
    return launch(["--run-dir", "run", *options], world, cwd=folder, main=main.main)  # type: ignore[attr-defined]


def test_one_text_appears_after_its_prompt(trained: Path) -> None:
    ended = run(trained, generate, "--prompt", "alpha", "--max-tokens", "8", "--temperature", "0")
    assert ended.codes == [0] and ended.errors == [], ended
    assert re.fullmatch(r"alpha[ -~]{8}\n", ended.out[0]), ended


@pytest.mark.parametrize("options", [[], ["--tp", "2"], ["--ep", "1", "--batch", "1"]], ids=" ".join)
def test_several_texts_are_the_same_on_any_number_of_ranks(trained: Path, options: list[str]) -> None:
    (trained / "prompts.txt").write_text("alpha\n\nbeta\n")
    (trained / "prompts.jsonl").write_text('{"prompt": "x = y\\n"}\n{"prompt": "", "more": 1}\n')
    for file, prompts in (("prompts.txt", ["one", "alpha", "beta"]), ("prompts.jsonl", ["one", "x = y\n", ""])):
        asked = ["--prompt", "one", "--prompts", file, "--max-tokens", "6", "--top-p", "0.9", "--seed", "3"]
        alone = run(trained, generate, *asked)
        found = [json.loads(line) for line in alone.out[0].splitlines()]
        assert alone.codes == [0] and [one["prompt"] for one in found] == prompts
        assert all(one["text"] for one in found)
        two = run(trained, generate, *asked, *options, world=2)
        assert two.codes == [0, 0] and two.out == [alone.out[0], ""] and two.errors == [], two


def test_a_stream_holds_back_parts_of_characters_and_escapes_controls(capsys: pytest.CaptureFixture[str]) -> None:
    from equimoe.moe.train.data import load_tokenizer

    tokenizer = load_tokenizer("bytes")
    stream, shown = generate.Stream("é ", tokenizer), []
    for byte in "aü\x1b[31m\n€".encode() + b"\xff" + b"b\xc3":
        stream.add(byte)
        shown.append(capsys.readouterr().out)
    stream.end()
    assert "".join(shown) == "é aü\\x1b[31m\n€\ufffdb" and shown[1] == "" and capsys.readouterr().out == "\ufffd\n"


def test_special_tokens_are_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    from equimoe.moe.train.data import load_tokenizer

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "one": 1, "two": 2}, unk_token="<unk>"))
    backend.add_special_tokens(["</s>", "<pad>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.encode("<pad>").tolist() == [0]  # spelled out in a text, it is a text
    pad = tokenizer.id_of("<pad>")
    stream = generate.Stream("zero ", tokenizer)
    for token in [1, pad, 2, pad]:
        stream.add(token)
    stream.end()
    assert capsys.readouterr().out == "zero one two\n"


def test_a_line_ends_where_a_text_editor_ends_it(tmp_path: Path) -> None:
    """JSON may contain other separators of lines, and Windows writes another end and a byte order mark."""
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"prompt": "a\u2028b\x85c"}, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    assert generate.read_prompts([], tmp_path / "a.jsonl") == ["a\u2028b\x85c"]
    (tmp_path / "b.txt").write_bytes("\ufeffone\fmore\u2028x\r\n\r\ntwo".encode())
    assert generate.read_prompts([], tmp_path / "b.txt") == ["one\fmore\u2028x", "two"]


def test_json_controls_no_terminal() -> None:
    record = {"prompt": "\x9b31m\u202ex", "text": "é\n\x1b\u2028"}
    line = generate.as_json(record)
    assert json.loads(line) == record and not set("\x9b\u202e\u2028\x1b\n") & set(line)


@pytest.mark.slow
def test_generate_ends_quietly_when_asked_to_or_when_nobody_reads(trained: Path) -> None:
    options = ["--run-dir", "run", "--prompt", "a", "--max-tokens", "100000"]
    command = [sys.executable, "-m", "equimoe.launch.generate", *options]
    for code in (-signal.SIGINT, env.UNREAD):
        process = subprocess.Popen(command, cwd=trained, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(1) == "a"
        if code == env.UNREAD:
            process.stdout.close()
        else:
            process.send_signal(signal.SIGINT)
        assert process.wait(30) == code
        assert all(line.startswith("note: ") for line in process.stderr.read().splitlines())


def test_texts_longer_than_those_of_the_training_are_noted(trained: Path) -> None:
    ended = run(trained, generate, "--prompt", "a", "--max-tokens", "30")
    assert ended.codes == [0]
    assert ended.errors == ["note: texts of up to 32 tokens are longer than those of the training, 16"]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ([], env.CONFIG, ["--prompt: is missing"]),
        (["--prompt", "a", "--max-tokens", "0"], env.CONFIG, ["--max-tokens=0"]),
        (["--prompt", "a", "--max-tokens", "99999999999"], env.MEMORY, ["does not fit", "allocate"]),
        (["--prompt", "a", "--top-p", "2"], env.CONFIG, ["--top-p=2.0"]),
        (["--prompt", "a", "--tp", "2"], env.CONFIG, ["--tp=2", "number of processes"]),
        (["--prompt", "a", "--processes", "0"], env.CONFIG, ["--processes=0"]),
        (["--prompt", "a", "--tokenizer", "nowhere"], env.CONFIG, ["--tokenizer='nowhere'"]),
        (
            ["--prompts", "nowhere"],
            env.DATA,
            ["--prompts=nowhere: cannot be read (No such file", "give a file of text"],
        ),
        (["--prompts", "bad.jsonl"], env.CONFIG, ["--prompts=bad.jsonl: line 2"]),
        (["--prompts", "latin.txt"], env.CONFIG, ["--prompts=latin.txt: is not UTF-8"]),
        (["--prompt", "a", "--run-dir", "nowhere"], env.CONFIG, ["--run-dir=nowhere"]),
        (
            ["--prompt", "a", "--run-dir", "texts"],
            env.CHECKPOINT,
            ["texts: no checkpoint; give the folder of a run, a checkpoint or a transformers model"],
        ),
        (["--temperature", "x"], env.CONFIG, ["--temperature"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else str(value),
)
def test_mistakes_of_generate_end_with_one_line(trained: Path, options: list[str], code: int, words: list[str]) -> None:
    (trained / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    (trained / "latin.txt").write_bytes(b"\xe9\xff")
    one_line(run(trained, generate, *options), code, *words)


def only_on(rank: int, owner: object, name: str, error: Exception) -> Within:
    """Return a context in which a function fails on one rank."""

    def fail(*_: object, **__: object) -> None:
        raise error

    def within() -> AbstractContextManager[object]:
        return patch.object(owner, name, fail) if os.environ["RANK"] == str(rank) else nullcontext()

    return within


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("name", "error", "code"),
    [
        ("find", checkpoint.CheckpointError("step-00000030: is damaged"), env.CHECKPOINT),
        ("tokenizer_of", ValueError("--tokenizer=x: is not a file"), env.CONFIG),
        ("build", checkpoint.CheckpointError("step-00000030: is damaged"), env.CHECKPOINT),
        ("readers", MemoryError("one byte too many"), env.MEMORY),
    ],
    ids=["before the ranks meet", "an option", "afterwards", "memory"],
)
def test_an_error_of_one_rank_is_its_line_and_everyones_exit_code(
    trained: Path, name: str, error: Exception, code: int, rank: int
) -> None:
    """As when the disk of one node is damaged; the other rank would wait for minutes, or end with a traceback."""
    options = ["--run-dir", "run", "--prompt", "a", "--max-tokens", "2"]
    ended = launch(options, 2, cwd=trained, main=generate.main, within=only_on(rank, loaded, name, error))
    one_line(ended, code, f"error: rank {rank}: ", str(error))


def test_text_that_one_rank_cannot_read_is_one_line(trained: Path) -> None:
    within = only_on(1, evaluate, "read_labelled", ValueError("data.path='texts': is empty"))
    ended = launch(["--run-dir", "run", "--data", "texts"], 2, cwd=trained, main=evaluate.main, within=within)
    one_line(ended, env.DATA, "error: rank 1: --data='texts': is empty")


def test_several_ranks_end_quietly_when_nobody_reads(trained: Path) -> None:
    def within() -> AbstractContextManager[object]:
        return patch.object(generate.Stream, "add", mock.Mock(side_effect=BrokenPipeError))

    argv = ["--run-dir", "run", "--prompt", "a", "--max-tokens", "4"]
    with patch.object(env, "_is_unread", lambda: True):
        ended = launch(argv, 2, cwd=trained, main=generate.main, within=within)
    assert ended.codes == [env.UNREAD] * 2 and ended.errors == [], ended


def test_the_commands_of_the_page_run_as_they_stand(trained: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "inference.md").read_text()
    commands = [line for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    (trained / "runs").mkdir()
    (trained / "runs" / "quickstart").symlink_to(trained / "run")
    (trained / "prompts.txt").write_text("alpha\nbeta\n")
    (trained / "prompts.jsonl").write_text('{"prompt": "one"}\n')
    for command in commands:
        _python, _m, module, *options = shlex.split(command)
        world = 1
        if "--processes" in options:
            world = int(options[options.index("--processes") + 1])
        main = {"equimoe.launch.generate": generate.main, "equimoe.launch.evaluate": evaluate.main}[module]
        ended = launch(options, world, cwd=trained, main=main)
        assert ended.codes == [0] * world and ended.out[0], (command, ended)
    assert len(commands) == 6 and (trained / "loss.json").exists()


# ---- evaluate


def evaluated(folder: Path, *options: str, world: int = 1) -> dict[str, Any]:
    ended = run(folder, evaluate, *options, "--json", "found.json", world=world)
    assert ended.codes == [0] * world and ended.errors == [], ended
    assert ended.out[0].splitlines()[-1].startswith("all ") and ended.out[1:] == [""] * (world - 1)
    return json.loads((folder / "found.json").read_text())["domains"]


def test_held_out_text_is_that_of_the_training(trained: Path) -> None:
    """The loss of single documents differs from that of the stream only at the ends of documents."""
    found = evaluated(trained)
    records = [json.loads(line) for line in (trained / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if record["kind"] == "eval"][-1]
    assert found.keys() == last["domains"].keys() | {"all"}
    assert found["all"]["loss"] == pytest.approx(last["loss"], rel=0.1)
    for row in found.values():
        assert row["perplexity"] == pytest.approx(np.exp(row["loss"]))
        if row["documents"] > 1:
            assert row["perplexity_low"] <= row["perplexity"] <= row["perplexity_high"]


def test_prompts_of_instruction_data_are_left_out() -> None:
    """A text without any label is left out whole."""
    stream, mask = np.array([5, 6, 9, 7, 8, 9, 1, 2, 9]), np.array([0, 1, 1, 0, 0, 1, 1, 1, 1], np.uint8)
    assert evaluate._texts(stream, mask, 9) == [([9, 5, 6], [False, True]), ([9, 1, 2], [True, True])]
    assert evaluate._texts(stream, None, 9) == [([9, 5, 6], None), ([9, 7, 8], None), ([9, 1, 2], None)]


def test_separate_documents_are_evaluated_as_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("equimoe.launch.page.PLOTS", ())  # they take time
    config = small.on(small.write_texts(tmp_path / "texts"))
    loss = {}
    for documents in ("joined", "separate"):
        folder = tmp_path / documents
        folder.mkdir()
        given = replace(config, steps=3, data=replace(config.data, documents=documents))
        (folder / "small.yaml").write_text(to_yaml(given))
        ended = launch(["--config", "small.yaml", "--run-dir", "run"], cwd=folder)
        assert ended.codes == [0], ended
        loss[documents] = evaluated(folder, "--data", str(tmp_path / "texts"))["all"]["loss"]
        generated = run(folder, generate, "--prompt", "alpha", "--max-tokens", "4")
        assert generated.codes == [0], generated
    for documents, end in (("joined", None), ("separate", 256)):
        source = loaded.find(tmp_path / documents / "run")
        assert loaded.end_of(source, loaded.tokenizer_of(source, None)) == end
    assert loss["joined"] != loss["separate"]


@pytest.mark.parametrize("options", slow_but([["--ep", "2"]], [["--ep", "2"], ["--tp", "2"]]), ids=" ".join)
def test_other_text_is_evaluated_the_same_on_two_ranks(trained: Path, options: list[str]) -> None:
    data = ["--data", "texts", "--seq-len", "11", "--limit", "4", "--batch", "3"]
    alone = evaluated(trained, *data)
    assert [row["documents"] for row in alone.values()] == [4, 4, 4, 12]
    two = evaluated(trained, *data, *options, world=2)
    for domain, row in alone.items():
        assert two[domain] == pytest.approx(row, rel=1e-5)


@pytest.mark.parametrize(("documents", "samples"), [(1, 100), (5, 1)])
def test_there_is_no_error_bar_without_a_choice_of_documents(documents: int, samples: int) -> None:
    found = evaluate.summary(["a"] * documents, np.array([[2.0, 1.0]] * documents), samples, seed=0)
    assert found["a"]["loss_std"] is found["a"]["perplexity_low"] is found["a"]["perplexity_high"] is None
    assert evaluate.table(found)[1].split()[4::2] == ["-", "-"]


def test_bootstrap_errors_are_those_of_a_ratio_of_sums() -> None:
    """For documents of equal length they equal the standard error of the mean."""
    draw = np.random.default_rng(1)
    losses = draw.normal(2.0, 0.5, 400)
    sums_N2 = np.stack([losses * 50, np.full(400, 50.0)], axis=1)
    found = evaluate.summary(["a"] * 300 + ["b"] * 100, sums_N2, 2000, seed=0)
    assert found["a"]["loss"] == pytest.approx(losses[:300].mean())
    for name, part in (("a", losses[:300]), ("b", losses[300:])):
        assert found[name]["loss_std"] == pytest.approx(part.std() / len(part) ** 0.5, rel=0.1)
    weights = np.array([300, 100]) / 400
    both = (weights**2 * np.array([found["a"]["loss_std"], found["b"]["loss_std"]]) ** 2).sum() ** 0.5
    assert found["all"]["loss_std"] == pytest.approx(both, rel=0.1) and found["all"]["tokens"] == 20000


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--data", "nowhere"], env.DATA, ["--data='nowhere'", "does not exist"]),
        (["--json", "nowhere/x.json"], env.CANNOT_WRITE, ["--json=nowhere/x.json: its folder does not exist"]),
        (["--seed", "-1"], env.CONFIG, ["--seed=-1"]),
        (["--data", "empty"], env.DATA, ["empty", "has no files"]),
        (["--limit", "0"], env.CONFIG, ["--limit=0"]),
        (["--seq-len", "0"], env.CONFIG, ["--seq-len=0"]),
        (["--domain-by", "nothing"], env.CONFIG, ["--domain-by='nothing'"]),
        (["--data", "records.jsonl"], env.DATA, ["--text-field='text'", "is missing in 'records.jsonl' line 1"]),
        (["--json", "texts"], env.CANNOT_WRITE, ["--json=texts: is a folder; name a file in it"]),
        (["--run-dir", "texts"], env.CHECKPOINT, ["no checkpoint", "or a transformers model"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else str(value),
)
def test_mistakes_of_evaluate_end_with_one_line(trained: Path, options: list[str], code: int, words: list[str]) -> None:
    (trained / "empty").mkdir(exist_ok=True)
    (trained / "records.jsonl").write_text('{"body": "words"}\n')
    one_line(run(trained, evaluate, *options), code, *words)
