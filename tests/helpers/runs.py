"""Creates records of a made-up run, as a training loop would write them."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np

from equimoe.moe.observe import domain_record, speed_record, step_record
from equimoe.moe.train.config import TrainConfig


def layer_record(counts: np.ndarray) -> dict[str, Any]:
    """Return the metrics of one layer whose experts got ``counts`` tokens."""
    share = counts / counts.sum()
    return {
        "counts": [int(count) for count in counts],
        "balance": float(len(share) * (share**2).sum()),
        "max_over_mean": float(counts.max() / counts.mean()),
        "cv": float(counts.std() / counts.mean()),
        "entropy": float(-(share[share > 0] * np.log(share[share > 0])).sum() / math.log(len(share))),
        "dead": int((counts == 0).sum()),
        "dropped": 0.0,
    }


def made_up_run(
    steps: int = 300,
    every: int = 5,
    experts: int = 8,
    layers: int = 4,
    domains: tuple[str, ...] = ("code", "docs", "tests"),
    eval_every: int = 100,
) -> list[dict[str, Any]]:
    """Return a run that learns: losses fall, counts even out, domains diverge; expert 1 of layer 0 dies."""
    rng = np.random.default_rng(0)
    skew_LE = rng.normal(size=(layers, experts))
    taste_DLE = rng.normal(size=(len(domains), layers, experts))
    records: list[dict[str, Any]] = [
        {
            "kind": "run",
            "config": asdict(TrainConfig(steps=steps)),
            "versions": {"torch": "2.13.0", "python": "3.11.2"},
            "world_size": 2,
            "parameters": 5_300_000,
            "active_parameters": 2_100_000,
        },
        {"kind": "baseline", "bigram": {"all": 2.45, **{d: 2.3 + 0.2 * i for i, d in enumerate(domains)}}},
    ]
    for step in range(every, steps + 1, every):
        progress, loss = step / steps, 1.7 + 3.6 * math.exp(-4 * step / steps)
        counts_LE = 8192 * np.exp(skew_LE * 1.2 * math.exp(-6 * progress) + rng.normal(size=skew_LE.shape) * 0.08)
        if layers and progress > 0.5:
            counts_LE[0, 1] = 0
        cells = [layer_record(counts.astype(int)) for counts in counts_LE]
        by_domain = {d: loss + 0.3 * i - 0.3 + rng.normal() * 0.05 for i, d in enumerate(domains)}
        records.append(
            {
                "kind": "train",
                "step": step,
                "loss": loss + rng.normal() * 0.06,
                "grad_norm": 0.6 + 2.5 * math.exp(-8 * progress) + abs(rng.normal()) * 0.2,
                "lr": 3e-3 * min(1.0, step / 20) * (0.55 + 0.45 * math.cos(math.pi * progress)),
                "balance": float(np.mean([cell["balance"] for cell in cells])) if cells else None,
                "max_over_mean": max(cell["max_over_mean"] for cell in cells) if cells else None,
                "tokens": step * 4096,
                "tokens_per_s": 5000 + rng.normal() * 120,
                "elapsed_s": step * 0.82,
                "domain_loss": by_domain,
                "layers": cells,
            }
        )
        if eval_every and step % eval_every == 0:
            weight_DLE = np.exp(taste_DLE * progress)
            share_DLE = weight_DLE / weight_DLE.sum(axis=-1, keepdims=True)
            records.append(
                {
                    "kind": "eval",
                    "step": step,
                    "loss": loss + 0.12,
                    "domains": {d: {"loss": value + 0.12, "tokens": 4096} for d, value in by_domain.items()},
                    "routing": {d: share.tolist() for d, share in zip(domains, share_DLE, strict=True)},
                }
            )
    return records


def observed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records of a made-up run with the routing metrics that newer versions add."""
    rng, found = np.random.default_rng(1), []
    for record in records:
        if record["kind"] == "train" and record["layers"]:
            layers = []
            for number, layer in enumerate(record["layers"]):
                losses = {"global": layer["balance"], "micro": layer["balance"] + 0.2, "z": 5.0 + number}
                layers.append(
                    layer
                    | {
                        "losses": losses,
                        "scaled_losses": {"global": 0.01 * losses["global"], "z": 0.0001 * losses["z"]},
                        "balance_tokens": 2560.0,
                        "balance_sequences": 10.0,
                        "estimator_error": 0.1 + 0.02 * rng.random(),
                        "gradient_error": 0.4 + 0.02 * rng.random(),
                        "straggler": 1.1 + 0.1 * number,
                        "straggler_max": 1.5 + 0.1 * number,
                        "projected_straggler": {"2": 1.15 + 0.1 * number, "8": layer["max_over_mean"] + 0.2},
                        "score_sum": 0.3 + 0.3 * record["step"] / 300,
                    }
                )
            busy = {"busy_s": [0.1, 0.1 + 0.2 * (record["step"] > 100)], "stragglers": []}
            speed = speed_record(record["tokens_per_s"], 2, 3e7, 1e12) | {"memory_bytes": 3 << 29}
            record = record | step_record(layers, 0.1) | {"layers": layers} | busy | speed
        if record["kind"] == "eval":
            scores = {d: [0.4 + 0.05 * i for i in range(len(rows))] for d, rows in record["routing"].items()}
            bars = {d: entry | {"loss_std": 0.05} for d, entry in record["domains"].items()}
            record = record | {"score_sum": scores, "loss_std": 0.03, "tokens": 12288, "domains": bars}
            record = record | domain_record(record["routing"])
        found.append(record)
    return found
