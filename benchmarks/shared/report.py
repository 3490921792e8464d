"""Turns a result of run.py into tables, and judges it by our aims."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.shared.records import LAYER, OURS, table

#: TFLOP/s forward and backward, of the experts and of the layer
SPEED_AIMS = {
    "30B-b": (520, 470),
    "7B-a": (400, 400),
    "Qwen3-30B-8k": (450, 400),
    "Mixtral-8x7B-8k": (640, 560),
}
METADATA_ROWS, METADATA_US = 262144, 40
COMBINE_AIM, ZIPF_AIM, MEMORY_AIM = 0.85, 1.1, 0.1
ALWAYS_FASTER_THAN = ("loop", "grouped_mm")
MIB = 1 << 20


class Aim(NamedTuple):
    name: str
    aim: str
    measured: str
    reached: bool


def _layers(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, shape in result["shapes"].items():
        if "layer" in shape:
            yield name, shape["layer"]


def _ops(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, shape in result["shapes"].items():
        if "kernels" in shape:
            yield name, shape["kernels"]["ops"]


def _speed_aims(result: dict[str, Any]) -> Iterator[Aim]:
    for name, layer in _layers(result):
        for who in (OURS, LAYER):
            figures = layer["uniform"].get(who)
            for part, aim in zip(("forward", "backward"), SPEED_AIMS.get(name, ()), strict=False):
                if figures is not None:
                    speed = figures[part]["tflops"]
                    yield Aim(f"{name} {part}, {who}", f">= {aim} TFLOP/s", f"{speed:.0f}", speed >= aim)


def _worst(
    title: str, aim: str, found: list[tuple[float, str]], reached: Callable[[float], bool], low: bool = False
) -> Iterator[Aim]:
    """Yield one aim for the worst of several (number, where it was measured)."""
    if found:
        figure, where = min(found) if low else max(found)
        yield Aim(title, aim, f"{figure:.3f} ({where})", reached(figure))


def aims(result: dict[str, Any]) -> list[Aim]:
    """Return the aims for what was measured on a GPU, and whether they are reached; empty for a CPU."""
    if result["arguments"]["device"] != "cuda":
        return []
    found = list(_speed_aims(result))
    combines, zipfs, slower, memory = [], [], [], []
    for name, each in _ops(result):
        combines.append((each["combine"]["fraction"], name))
        metadata = each["sort_by_expert"]["median_us"]
        if result["shapes"][name]["rows"] == METADATA_ROWS:
            text, reached = f"{metadata:.1f}", metadata <= METADATA_US
            found.append(Aim(f"routing metadata, {METADATA_ROWS} rows, {name}", f"<= {METADATA_US} us", text, reached))
    for name, layer in _layers(result):
        ours = {routing: layer[routing][OURS] for routing in ("uniform", "zipf") if OURS in layer[routing]}
        if len(ours) == 2:
            zipfs.append((ours["zipf"]["total"]["median_us"] / ours["uniform"]["total"]["median_us"], name))
        for routing, figures in ours.items():
            for peer in set(ALWAYS_FASTER_THAN) & set(layer[routing]):
                for part in ("forward", "total"):
                    theirs = layer[routing][peer][part]["median_us"]
                    slower.append((figures[part]["median_us"] / theirs, f"{name} {routing} {part} {peer}"))
        if "uniform" in ours:
            memory.append((abs(ours["uniform"]["kept_bytes"] / layer["kept_formula_bytes"] - 1), name))
    found += _worst("combine, of the copy rate", f">= {COMBINE_AIM}", combines, lambda x: x >= COMBINE_AIM, low=True)
    found += _worst("Zipf over uniform", f"<= {ZIPF_AIM}", zipfs, lambda x: x <= ZIPF_AIM)
    found += _worst("time over loop and grouped_mm", "<= 1", slower, lambda x: x <= 1)
    title = "saved activations: relative deviation from 2TD + 4TKF"
    found += _worst(title, f"<= {MEMORY_AIM}", memory, lambda x: x <= MEMORY_AIM)
    return found


def _size(name: str, shape: dict[str, Any]) -> str:
    text = f"{name}: " + " ".join(f"{key}={shape[key]}" for key in "TDFEK")
    if cut := [f"{key}={value}" for key, value in shape["published"].items() if shape[key] != value]:
        text += f" (reduced from {' '.join(cut)})"
    return text


def layer_table(layer: dict[str, Any]) -> str:
    header = ["contestant", "routing", "forward ms", "IQR", "backward ms", "IQR", "TFLOP/s forward", "backward"]
    header += ["of floor forward", "backward", "time/ours", "saved MiB", "peak forward MiB", "peak step MiB"]
    rows, floor = [], layer["floor"]
    for routing in ("uniform", "zipf"):
        ours = layer[routing].get(OURS, {}).get("total", {}).get("median_us")
        for name, figures in layer[routing].items():
            forward, backward = figures["forward"], figures["backward"]
            kind = "layer" if name == LAYER else "path"
            of_floor = [floor[f"{kind}_{p}_us"] / figures[p]["median_us"] for p in ("forward", "backward")]
            row = [name, routing]
            for part in (forward, backward):
                row += [f"{part['median_us'] / 1e3:.3f}", f"{part['iqr_us'] / 1e3:.3f}"]
            row += [f"{part['tflops']:.3g}" for part in (forward, backward)]
            row += ["-", "-"] if name.startswith("dense") else [f"{fraction:.2f}" for fraction in of_floor]
            row.append(f"{figures['total']['median_us'] / ours:.2f}" if ours else "-")
            for key in ("kept_bytes", "peak_forward_bytes", "peak_step_bytes"):
                row.append("-" if figures.get(key) is None else f"{figures[key] / MIB:.1f}")
            rows.append(row)
    formula = f"saved for the backward pass by formula, 2TD + 4TKF: {layer['kept_formula_bytes'] / MIB:.1f} MiB"
    ratio = zipf_over_uniform(layer)
    return table(header, rows) + f"\n\n{formula}" + (f"; Zipf over uniform, ours: {ratio:.2f}" if ratio else "")


def zipf_over_uniform(layer: dict[str, Any]) -> float | None:
    both = [layer[routing].get(OURS) for routing in ("zipf", "uniform")]
    if None in both:
        return None
    skewed, even = (figures["total"]["median_us"] for figures in both)
    return skewed / even


def kernel_table(kernels: dict[str, Any]) -> str:
    header = ["op", "us", "IQR", "floor us", "of floor", "bound", "TFLOP/s", "TB/s", "floor MB"]
    header += ["Triton MB", "timed"]
    rows = []
    for name, row in kernels["ops"].items():
        us = row["median_us"]
        rows.append(
            [name, f"{us:.1f}", f"{row['iqr_us']:.1f}", f"{row['floor_us']:.1f}", f"{row['fraction']:.2f}"]
            + [row["bound"]]
            + [f"{row['flops'] / us / 1e6:.3g}" if row["bound"] == "compute" else "-"]
            + [f"{row['floor_bytes'] / us / 1e6:.3g}" if row["bound"] == "memory" else "-"]
            + ["-" if row[key] is None else f"{row[key] / 1e6:.1f}" for key in ("floor_bytes", "triton_bytes")]
            + [row["timing"]]
        )
    return table(header, rows)


def markdown(result: dict[str, Any]) -> str:
    """Return the whole result as Markdown."""
    facts, stick = result["facts"], result["yardstick"]
    lines = [f"# {facts['device']}, {result['arguments']['backend']} backend, {result['arguments']['dtype']}", ""]
    versions = ", ".join(f"{name} {number or 'absent'}" for name, number in facts["versions"].items())
    lines += [f"{key}: {versions if key == 'versions' else value}  " for key, value in facts.items()]
    lines.append(f"load average before: {result['load_before']}, after: {result['load_after']}  ")
    lines.append(f"command: {result['command']}  ")
    for when, rates in stick.items():
        product, copy = rates["matmul_tflops"], rates["copy_tbs"]
        lines.append(f"yardstick at the {when}: product {product:.4g} TFLOP/s, copy {copy:.4g} TB/s  ")
    lines += [f"{note}  " for note in result["notes"]]
    if found := aims(result):
        lines += ["", "## Aims", ""]
        lines.append(table(["what", "aim", "measured", ""], [[*a[:3], "pass" if a.reached else "FAIL"] for a in found]))
    for name, shape in result["shapes"].items():
        lines += ["", f"## {_size(name, shape)}", ""]
        if "layer" in shape:
            lines += [layer_table(shape["layer"]), ""]
            lines += [f"absent: {peer}: {why}  " for peer, why in shape["layer"]["absent"].items()]
        if "kernels" in shape:
            lines += ["", kernel_table(shape["kernels"])]
    if result["left_out"]:
        lines += ["", "## Left out", ""] + [f"- {name}: {why}" for name, why in result["left_out"].items()]
    return "\n".join(lines) + "\n"


def write(result: dict[str, Any], path: Path) -> Path:
    """Write the tables next to the result file."""
    text = path.with_suffix(".md")
    text.write_text(markdown(result))
    return text
