"""Records reach trackers: TensorBoard's files are read back here, those of W&B and MLflow in tests/engines."""

from __future__ import annotations

import importlib.util
import io
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator

from equimoe.launch import env
from equimoe.moe.observe import mirror
from equimoe.moe.observe.metrics import MetricsWriter, read_records
from equimoe.moe.observe.mirror import Mirror, scalars_of
from equimoe.moe.observe.pictures import COLD, HOT, pictures_of
from equimoe.moe.observe.trackers import TRACKERS, check_installed
from tests.helpers import small
from tests.helpers.command import launch, one_line
from tests.helpers.runs import made_up_run
from tests.moe.test_metrics import TRAIN

BOARD = ["tensorboard"]


def events_of(run_dir: Path) -> Any:
    events = event_accumulator.EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return events


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    events = events_of(run_dir)
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_numbers_reach_tensorboard_and_a_resumed_run_replaces_its_steps(tmp_path: Path) -> None:
    records = made_up_run(steps=40, every=10, eval_every=20, layers=2)
    with MetricsWriter(tmp_path, BOARD) as writer:
        for record in records:
            writer.write(record)
    with MetricsWriter(tmp_path, BOARD, resume_step=20) as resumed:
        resumed.write(TRAIN | {"step": 30, "loss": 9.0, "grad_norm": None})
    found = scalars(tmp_path)
    train = {record["step"]: record for record in records if record["kind"] == "train"}
    assert found["train/loss"] == [
        (10, pytest.approx(train[10]["loss"])),
        (20, pytest.approx(train[20]["loss"])),
        (30, 9),
    ]
    assert [step for step, _ in found["train/grad_norm"]] == [10, 20]
    evaluation = next(record for record in records if record["kind"] == "eval")
    assert found["heldout/loss"] == [(20, pytest.approx(evaluation["loss"]))]
    assert found["heldout_domain/docs"] == [(20, pytest.approx(evaluation["domains"]["docs"]["loss"]))]
    expected = train[20]["layers"][1]["max_over_mean"]
    assert found["layer_1/max_over_mean"][-1] == (20, pytest.approx(expected))


def test_numbers_have_names() -> None:
    layer = {"counts": [1, 2], "cv": 0.3, "entropy": 0.9, "dead": 0.0, "max_over_mean": 1.3}
    layer |= {"losses": {"global": 1.1, "micro": 1.2}, "projected_straggler": {"2": 1.4, "4": None}, "score_sum": 0.5}
    train = TRAIN | {"scaled_losses": {"global": 0.011}, "waiting": 0.02, "layers": [layer, layer | {"cv": 0.4}]}
    found = dict(scalars_of(train))
    want = {
        "train/scaled_losses/global": 0.011, "train/waiting": 0.02, "train/loss": TRAIN["loss"],
        "train/tokens_per_s": 5120.0, "layer_0/cv": 0.3, "layer_1/cv": 0.4, "layer_0/entropy": 0.9,
        "layer_0/dead": 0.0, "layer_0/max_over_mean": 1.3, "layer_1/losses/micro": 1.2,
        "layer_0/projected_straggler/2": 1.4, "layer_0/score_sum": 0.5,
    }  # fmt: skip
    assert {name: found[name] for name in want} == want
    assert not any("counts" in name or name.endswith(("/step", "/tokens")) for name in found)
    evaluation = {"kind": "eval", "step": 10, "loss": 2.0, "divergence": [0.1, None]}
    evaluation |= {"score_sum": {"a b": [0.5, 0.6]}, "max_frequency": {"a b": [0.7, 0.8]}}
    assert dict(scalars_of(evaluation)) == {
        "heldout/loss": 2.0, "heldout_layer_0/divergence": 0.1, "heldout_layer_1/divergence": None,
        "heldout_layer_0/score_sum/a b": 0.5, "heldout_layer_1/score_sum/a b": 0.6,
        "heldout_layer_0/max_frequency/a b": 0.7, "heldout_layer_1/max_frequency/a b": 0.8,
    }  # fmt: skip


def colour(code: str) -> np.ndarray:
    return np.array([int(code[i : i + 2], 16) for i in (1, 3, 5)])


def near(picture: np.ndarray, code: str) -> np.ndarray:
    return np.abs(picture.astype(int) - colour(code)).max(-1) < 12


def test_pictures_show_which_experts_are_busy() -> None:
    layers = [{"counts": [800, 1, 1, 1, 1, 1, 1, 1]}, {"counts": [1, 1, 1, 1, 1, 1, 1, 800]}]
    ((name, picture),) = pictures_of({"kind": "train", "step": 7, "layers": layers})
    assert name == "load" and picture.dtype == np.uint8 and picture.shape[2] == 3
    rows, columns = np.nonzero(near(picture[:, : int(0.87 * picture.shape[1])], HOT))
    upper = rows < (rows.min() + rows.max()) / 2
    assert np.median(columns[upper]) < 200 < 600 < np.median(columns[~upper]), "expert 0 above, expert 7 below"
    assert near(picture, COLD).sum() > 3 * near(picture, HOT).sum()
    ink = (picture < 90).all(-1)[:, : columns.min() - 2]
    assert ink.sum() > 200, "rows have labels"


def test_pictures_of_the_routing_of_domains() -> None:
    routing = {"c": [[0.5, 0.5, 0, 0], [0.25] * 4], "<b>$x^{": [[0, 0, 0.25, 0.75], [0.25] * 4], "none": []}
    ((name, picture),) = pictures_of({"kind": "eval", "step": 7, "loss": 1.0, "domains": {}, "routing": routing})
    assert name == "routing" and picture.shape[0] > 150
    assert list(pictures_of({"kind": "eval", "step": 7, "routing": {}})) == []
    assert list(pictures_of(TRAIN)) == []
    many = [{"counts": [1, 2]}] * 61
    ((_, tall),) = pictures_of({"kind": "train", "step": 7, "layers": many})
    assert tall.shape[0] < 600


def test_tensorboard_gets_pictures_and_the_configuration(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, BOARD) as writer:
        for record in made_up_run(steps=20, every=10, eval_every=20):
            writer.write(record)
    events = events_of(tmp_path)
    for name in ("load", "routing"):
        (image,) = events.Images(name)
        pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
        assert image.step == 20 and pixels.shape == (image.height, image.width, 3)
        assert near(pixels, HOT).any() or near(pixels, COLD).any()
    texts = plugin_event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    texts.Reload()
    (event,) = texts.Tensors("config/text_summary")
    (text,) = event.tensor_proto.string_val
    assert b"    global_batch: 16\n" in text and b"    optim:\n" in text


# ---- trackers that fail


class Broken:
    needs = ("json", "json")
    wrote: list[int] = []

    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        if run_dir.name == "unwilling":
            raise RuntimeError("no credentials\nand much more")

    def describe(self, options: Any, text: str) -> None: ...

    def log(self, step: int, scalars: Any, pictures: Any) -> None:
        if step == 20:
            raise ConnectionError("the server is gone")
        Broken.wrote.append(step)

    def close(self) -> None: ...


class Slow(Broken):
    gate = threading.Event()

    def log(self, step: int, scalars: Any, pictures: Any) -> None:
        self.gate.wait(20)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRACKERS, "broken", Broken)
    monkeypatch.setitem(TRACKERS, "slow", Slow)
    Broken.wrote.clear()
    Slow.gate.clear()


def test_a_tracker_that_cannot_start_is_said_once(tmp_path: Path, broken: None) -> None:
    with pytest.warns(RuntimeWarning) as caught:
        writer = MetricsWriter(tmp_path / "unwilling", ["broken", "tensorboard"])
        writer.write(TRAIN)
        writer.close()
    said = "log.trackers=broken: cannot start (no credentials); training continues without it"
    assert [str(warning.message) for warning in caught] == [said]
    assert read_records(writer.path) == [TRAIN]
    assert scalars(tmp_path / "unwilling")["train/loss"] == [(10, pytest.approx(TRAIN["loss"]))]


def test_a_tracker_that_fails_in_the_middle_is_said_once(tmp_path: Path, broken: None) -> None:
    writer = MetricsWriter(tmp_path, ["broken"])
    with pytest.warns(RuntimeWarning) as caught:
        for step in (10, 20):
            writer.write(TRAIN | {"step": step})
        writer._mirror._feeds[0]._thread.join(20)
        for step in (30, 40):
            writer.write(TRAIN | {"step": step})
        writer.close()
    said = "log.trackers=broken: failed (the server is gone); training continues without it"
    assert [str(warning.message) for warning in caught] == [said]
    assert Broken.wrote == [10]
    assert len(read_records(writer.path)) == 4


def test_a_slow_tracker_delays_no_step(tmp_path: Path, broken: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "WAITING", 3)
    monkeypatch.setattr(mirror, "LAST_S", 0.2)
    copies = Mirror(tmp_path, ["slow"], None)
    began = time.monotonic()
    with pytest.warns(RuntimeWarning, match="log.trackers=slow: does not keep up with the run; training") as caught:
        for step in range(10):
            copies.write(TRAIN | {"step": step})
    assert len(caught) == 1 and time.monotonic() - began < 5
    copies = Mirror(tmp_path, ["slow"], None)
    copies.write(TRAIN)
    with pytest.warns(RuntimeWarning, match="has not written everything within 0 s"):
        copies.close()
    Slow.gate.set()


def test_a_board_on_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("")
    with pytest.warns(RuntimeWarning, match="log.trackers=tensorboard: cannot start") as caught:
        writer = MetricsWriter(tmp_path, BOARD)
        writer.write(TRAIN)
        writer.close()
    assert len(caught) == 1


def test_a_missing_package_is_one_line_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else real(name, *rest))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_installed(("tensorboard",))
    want = r"package wandb is not installed; pip install 'equimoe\[trackers\]', or leave wandb out$"
    with pytest.raises(ValueError, match=f"^log.trackers=wandb: {want}"):
        check_installed(("tensorboard", "wandb"))
    texts = ["--data.path", str(small.write_texts(tmp_path / "texts")), "--parallel.ep", "2"]
    ended = launch([*texts, "--run-dir", str(tmp_path / "run"), "--log.trackers", "wandb"], world=2)
    one_line(ended, env.CONFIG, "error: rank 0: log.trackers=wandb: package wandb is not installed; pip install")
    assert not (tmp_path / "run").exists()
