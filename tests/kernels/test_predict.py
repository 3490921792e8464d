"""The model of the kernels' speed: clocks by hand, and what it must say of better and worse tiles."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from benchmarks.kernels.predict import MARKS, Tile, kernels, main, predict, totals
from benchmarks.shared.shapes import BY_NAME

WIDE = Tile(128, 256, 64, 256, 1, 3)


def test_clocks_of_a_step() -> None:
    """2*128*256*64 operations, 4096 per clock; 2*4 instructions of (64+256)*16 elements and a step of 384 rows."""
    units = WIDE.units()
    assert units["tensor"] == 1024 and units["shared"] == 2 * 4 * 320 * 16 * 2 / 128 + 384 * 64 * 2 / 128
    assert units["L2"] == pytest.approx(384 * 64 * 2 * 132 * 1.7e9 / 8.5e12)
    assert WIDE.step() == pytest.approx(1.1 * units["L2"])


def test_a_shallow_pipeline_waits_and_narrow_instructions_cost_shared_memory() -> None:
    small = Tile(64, 64, 32, 64, 1, 3)
    assert small._replace(depth=2).step() > 900 > small.step()
    assert WIDE._replace(instruction=64).units()["shared"] > WIDE.units()["shared"]
    assert WIDE.seconds(132, 10, 64) < WIDE.seconds(133, 10, 64) == WIDE.seconds(264, 10, 64)


def test_every_product_of_the_table_is_predicted_below_the_peak() -> None:
    tiles = kernels()
    shape = BY_NAME["Qwen3-30B-8k"]
    found = predict(shape, tiles)
    assert all(100 < rate <= 740 for name, (_, rate) in found.items() if name != "sum")
    narrow = {name: tile._replace(n=64, instruction=64) for name, tile in tiles.items()}
    for better, worse in zip(totals(shape, found), totals(shape, predict(shape, narrow)), strict=True):
        assert better > worse
    assert set(MARKS) <= set(BY_NAME)


def test_an_unknown_shape_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--shapes", "30B-b,nope"])
    assert stop.value.code == 2 and "--shapes=nope: choose from 30B-b, " in capsys.readouterr().err
