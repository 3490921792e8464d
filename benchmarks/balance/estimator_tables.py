"""The tables of :mod:`estimators`. A point is one layer of a stage, an order, a cut and a step of data."""

# N values.

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from benchmarks.shared.records import as_lines, table

ESTIMATORS = ("rolling", "carry", "exact")
ORDERS = ("shuffled", "by domain", "drifting")


def cosine(got: Tensor, want: Tensor) -> float:
    got, want = got.double().flatten(), want.double().flatten()
    return float(got @ want / (got.norm() * want.norm()).clamp_min(1e-300))


def ranks(values: Sequence[float]) -> Tensor:
    """fp64 [N]: the place of each in their order, the mean of its places where there are equals."""
    values_N = torch.tensor(values, dtype=torch.float64)
    below_N = (values_N[None] < values_N[:, None]).sum(1)
    return below_N + ((values_N[None] == values_N[:, None]).sum(1) - 1) / 2


def rank_correlation(one: Sequence[float], two: Sequence[float]) -> float:
    """Spearman's."""
    a_N, b_N = ranks(one), ranks(two)
    return cosine(a_N - a_N.mean(), b_N - b_N.mean())


def _cells(of: list[dict[str, Any]]) -> list[str]:
    """Mean and worst layer of cosine and error, and what the balancer reports. The worst is of a mean over trials."""
    by_layer = [list(group) for _, group in groupby(sorted(of, key=lambda p: p["layer"]), key=lambda p: p["layer"])]
    cosines, errors = ([fmean(p[key] for p in layer) for layer in by_layer] for key in ("cosine", "error"))
    figures = [f"{fmean(cosines):.3f}", f"{min(cosines):.3f}", f"{fmean(errors):.3f}", f"{max(errors):.3f}"]
    return [*figures, f"{fmean(p['reported'] for p in of):.3f}"]


def gradient_table(found: list[dict[str, Any]], by: Sequence[str]) -> str:
    """A row for each value of the fields ``by``."""
    columns = ["cosine", "worst cosine", "error", "worst error", "reported"]
    header = [field.replace("_", "-") for field in by]
    header += [f"{name} {column}" for name in ESTIMATORS[:2] for column in columns] + ["exact error, worst"]
    rows = []
    for key in dict.fromkeys(tuple(point[field] for field in by) for point in found):
        here = [p for p in found if tuple(p[field] for field in by) == key]
        row = [str(value) for value in key]
        for name in ESTIMATORS[:2]:
            row += _cells([p for p in here if p["estimator"] == name])
        rows.append([*row, f"{max(p['error'] for p in here if p['estimator'] == 'exact'):.0e}"])
    return table(header, rows)


def carry_over_rolling(found: list[dict[str, Any]], figure: str = "error") -> dict[tuple[str, str], list[float]]:
    """By order and stage: the error of ``carry`` over that of ``rolling``, means over layers and trials, for each M."""
    errors: dict[tuple, list[float]] = {}
    for point in found:
        key = point["order"], point["stage"], point["micro_batches"], point["estimator"]
        errors.setdefault(key, []).append(point[figure])
    ratios: dict[tuple[str, str], list[float]] = {}
    for (order, stage, many, name), of in errors.items():
        if name == "carry":
            ratios.setdefault((order, stage), []).append(fmean(of) / fmean(errors[order, stage, many, "rolling"]))
    return ratios


def carry_table(found: list[dict[str, Any]], moved: list[dict[str, Any]]) -> str:
    """A row per order, a column per stage: the median over M, the least and the most; and how far the load moved."""
    ratios = carry_over_rolling(found)
    stages = list(dict.fromkeys(stage for _, stage in ratios))
    rows = []
    for order in dict.fromkeys(order for order, _ in ratios):
        row = [order]
        for stage in stages:
            of = ratios[order, stage]
            by = fmean(m["moved"] for m in moved if (m["order"], m["stage"]) == (order, stage))
            row.append(f"{median(of):.2f} ({min(of):.2f} - {max(of):.2f}), {by:.3f}")
        rows.append(row)
    return table(["order", *stages], rows)


def prediction(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How well what a balancer can report tells the true error of the gradient: a row per estimator and order."""
    rows = []
    for name in (*ESTIMATORS[:2], "both"):
        for order in (*ORDERS, "all"):
            of = [p for p in found if p["estimator"] in ESTIMATORS[:2]]
            of = [p for p in of if name in ("both", p["estimator"]) and order in ("all", p["order"])]
            error = [p["error"] for p in of]
            row: dict[str, Any] = {"estimator": name, "order": order, "points": len(of)}
            for key in ("reported", "of_imbalance"):
                row[f"{key}_rank"] = rank_correlation([p[key] for p in of], error)
                row[f"{key}_ratio"] = median(p["error"] / max(p[key], 1e-300) for p in of)
            rows.append(row)
    return rows


def markdown(result: dict[str, Any]) -> str:
    """The whole result as text."""
    points, facts = result["points"], as_lines(result)
    lines = [f"# Estimators of the step's load, {result['facts']['cpu']}", "", *facts]
    for stage, at in result["training"].items():
        lines.append(f"{stage}: " + ", ".join(f"{key} {value:.4g}" for key, value in at.items()) + "  ")
    lines += ["", "Gradient of the balance loss alone, of each router, against one process with the whole step: cosine"]
    lines += ["and relative error, mean over layers (and steps of data) and worst layer; `reported` is"]
    lines += ["`estimator_error` of `estimate_quality`.", "", "## Over all stages", ""]
    lines += [gradient_table(points, ("order", "micro_batches")), "", "## Stage by stage", ""]
    lines += [gradient_table(points, ("order", "stage", "micro_batches")), ""]
    ratios, told_ratios = (
        [ratio for of in carry_over_rolling(points, figure).values() for ratio in of]
        for figure in ("error", "reported")
    )
    picked = sum((ratio > 1) == (of > 1) for ratio, of in zip(ratios, told_ratios, strict=True))
    lines += ["## Error of `carry` over error of `rolling`", "", "Median over M, least and most; above 1, `carry` is"]
    lines += [
        f"worse: in {sum(ratio > 1 for ratio in ratios)} of {len(ratios)} rows. Then how far the load of the step"
    ]
    lines += ["before is from this step's, as a share of it: weights and data have moved in between.", ""]
    lines += [carry_table(points, result["moved"]), ""]
    lines.append(f"The estimator with the smaller `reported` has the smaller error in {picked} of {len(ratios)} rows.")
    lines += ["", "## What a balancer can tell of it", ""]
    lines += ["Spearman's rank correlation with the true relative error, and median of true over predicted; one point"]
    lines += [
        "per layer, M, stage and step of data. `estimator_error` is a share of the step's load, `gradient_error` of"
    ]
    lines += ["that load's distance from an even one.", ""]
    names = ("estimator_error", "gradient_error")
    header = ["estimator", "order", "points", *(f"{name}: {what}" for name in names for what in ("rank", "true / it"))]
    figures = ("reported_rank", "reported_ratio", "of_imbalance_rank", "of_imbalance_ratio")
    rows = result["prediction"]
    lines.append(
        table(header, [[r["estimator"], r["order"], str(r["points"]), *(f"{r[f]:.2f}" for f in figures)] for r in rows])
    )
    lines += ["", "## The rolling loss over random orders of the same micro-batches", ""]
    lines += ["Closed: (H_M/M) micro + (1 - H_M/M) (M global - micro) / (M - 1). Means over layers, 1.0 is balanced."]
    lines += ["All orders where there are few, which leaves rounding; else drawn ones.", ""]
    header = ["stage", "micro-batches", "M", "H_M/M", "micro", "global", "closed", "mean over orders", "standard error"]
    keys = ("share", "micro", "global", "closed", "mean", "standard_error")
    rows = [
        [r["stage"], r["order"], str(r["micro_batches"]), *(f"{r[key]:.5f}" for key in keys)]
        for r in result["orders_mean"]
    ]
    lines += [table(header, rows), "", "## Computed in fp32, against fp64", ""]
    lines += [
        table(
            ["stage", "pass", "worst layer"], [[r["stage"], r["what"], f"{r['error']:.0e}"] for r in result["rounding"]]
        )
    ]
    return "\n".join(lines) + "\n"
