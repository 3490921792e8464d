"""Measurements of a training run, and how they are recorded."""

from .domains import divergences, domain_record, jensen_shannon, mean_divergence
from .routers import chosen_probability, training_score, watch_routers
from .speed import forward_flops, memory_in_use, peak_flops, speed_record, step_flops
from .steps import Columns, estimate_quality, layer_record, observe, step_record
from .waiting import expert_fraction, possible_degrees, straggler

__all__ = [
    "Columns",
    "chosen_probability",
    "divergences",
    "domain_record",
    "estimate_quality",
    "expert_fraction",
    "forward_flops",
    "jensen_shannon",
    "layer_record",
    "mean_divergence",
    "memory_in_use",
    "observe",
    "peak_flops",
    "possible_degrees",
    "speed_record",
    "step_flops",
    "step_record",
    "straggler",
    "training_score",
    "watch_routers",
]
